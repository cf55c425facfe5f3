"""Moves of components: against deletion by brute force, and on data where EM alone gets stuck."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmm_jax.data import make
from cpmm_jax.errors import ConfigError
from cpmm_jax.mixture.em import fit_em
from cpmm_jax.mixture.initialise import random_start
from cpmm_jax.mixture.mfa import MFA
from cpmm_jax.mixture.moves import _candidates, prospects
from tests.mixture.conftest import log_prob


def grid_log_prob(x: np.ndarray) -> np.ndarray:
    """Return the true log-density of the 25 Gaussians."""
    x = np.asarray(x, np.float64)
    centres = np.stack(np.meshgrid(np.arange(5), np.arange(5)), -1).reshape(-1, 2) - 2.0
    exponent = -0.5 * np.sum((x[:, None] - centres) ** 2, axis=-1) / 0.05**2
    return np.asarray(jax.nn.logsumexp(exponent, axis=1)) - np.log(25 * 2 * np.pi * 0.05**2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_finds_all_25_gaussians_from_random_points(seed: int) -> None:
    x, _ = make("25gaussians", 2000, seed)
    test, _ = make("25gaussians", 5000, 100 + seed)
    stuck = fit_em(x, 25, 0, start=random_start, seed=seed)
    found = fit_em(x, 25, 0, start=random_start, seed=seed, moves=100)

    def divergence(mixture: MFA) -> float:
        return float(np.mean(grid_log_prob(test) - np.asarray(mixture.log_prob(test))))

    assert divergence(stuck.mixture) > 0.3
    assert divergence(found.mixture) < 0.05
    assert found.moved > 0
    assert np.all(np.diff(found.history) >= 0)
    assert found.history[-1] == found.log_likelihood > stuck.log_likelihood


def test_the_cost_of_taking_a_component_is_that_of_deletion() -> None:
    rng = np.random.default_rng(0)
    mixture = MFA(
        *(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4,), (4, 3), (4, 3, 2), (4, 3)))
    )
    x = rng.normal(size=(50, 3)).astype(np.float32)
    weight = rng.uniform(0.5, 2.0, size=50).astype(np.float32)
    loss = np.asarray(prospects(mixture, jnp.asarray(x), jnp.asarray(weight)).loss)
    for k in range(4):
        rest = jax.tree.map(lambda leaf, k=k: jnp.delete(leaf, k, axis=0), mixture)
        expected = weight @ (log_prob(mixture, x) - log_prob(rest, x))
        np.testing.assert_allclose(loss[k], expected, rtol=1e-4)


def test_what_splitting_gains_is_what_two_groups_are_worth() -> None:
    """Two thirds at one place, one third at another, under one component; the other is right."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 2)) * 0.1
    x[:300, 0] += 20.0
    x[300:400, 1] += 3.0
    mixture = MFA(
        jnp.zeros(2, jnp.float32),
        jnp.asarray([x[:300].mean(0), x[300:].mean(0)], jnp.float32),
        jnp.zeros((2, 2, 0), jnp.float32),
        jnp.log(jnp.asarray([x[:300].var(0), x[300:].var(0)], jnp.float32)),
    )
    found = prospects(mixture, jnp.asarray(x, jnp.float32), jnp.ones(600, jnp.float32))
    expected = 150 * np.log(x[300:, 1].var() / 0.1**2) + 100 * np.log(1 / 3) + 200 * np.log(2 / 3)
    assert found.gain[0] < 0 < found.gain[1]
    assert float(found.gain[1]) == pytest.approx(expected, rel=0.05)
    assert abs(float(found.axis[1, 1])) == pytest.approx(1.0, abs=1e-3)
    assert float(found.share[1]) == pytest.approx(1 / 3, abs=1e-3)
    np.testing.assert_allclose(found.halves[1], [[0.0, 0.0], [0.0, 3.0]], atol=0.05)


def test_a_component_without_examples_is_taken_and_never_split() -> None:
    x = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
    shapes = {"loadings": (2, 2, 0), "log_noise": (2, 2)}
    rest = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
    means = jnp.asarray([[0.0, 0.0], [1e4, 0.0]], jnp.float32)
    mixture = MFA(logits=jnp.zeros(2, jnp.float32), means=means, **rest)
    weight = jnp.ones(300, jnp.float32)
    found = prospects(mixture, jnp.asarray(x), weight)
    assert found.gain[1] == -np.inf
    assert all(np.isfinite(leaf).all() for leaf in found._replace(gain=found.gain[:1]))
    [moved] = _candidates(mixture, jnp.asarray(x), weight)
    assert np.abs(moved.means).max() < 2.0


def test_moves_keep_the_noise_floor_and_the_weights_of_examples() -> None:
    x, _ = make("25gaussians", 400, 0)
    count = np.where(np.arange(400) < 200, 2, 1)
    settings = {"start": random_start, "moves": 10, "noise_floor": 0.01, "seed": 0}
    weighted = fit_em(x, 8, 1, sample_weight=count, **settings)
    assert np.exp(np.asarray(weighted.mixture.log_noise)).min() >= 0.01 * (1 - 1e-5)
    per_row = np.asarray(weighted.mixture.log_prob(x))
    assert np.average(per_row, weights=count) == pytest.approx(weighted.log_likelihood, abs=1e-4)


def test_one_component_has_nowhere_to_go() -> None:
    x, _ = make("moons", 50, 0)
    assert fit_em(x, 1, 1, moves=5).moved == 0


def test_bad_moves() -> None:
    with pytest.raises(ConfigError, match=r"`moves` must be at least 0, a number of tries; got -1"):
        fit_em(np.zeros((10, 2)), 2, 1, moves=-1)
