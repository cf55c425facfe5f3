"""The number of components chosen after training, and pruning."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from cpmm_jax.errors import ConfigError
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.mixture.mfa import MFA
from cpmm_jax.models.selection import (
    broaden_by_validation,
    choose_num_times,
    polish_by_validation,
    prune,
)
from tests.models.small import examples, small


def test_the_best_of_the_numbers_tried() -> None:
    model, x = small(), examples(50)
    chosen = choose_num_times(model, x, candidates=(2, 1))
    assert list(chosen.scores) == [1, 2]
    assert chosen.num_times == max(chosen.scores, key=chosen.scores.__getitem__)
    assert chosen.mixture.num_components == 3 * chosen.num_times
    for num_times, score in chosen.scores.items():
        expected = np.mean(np.asarray(model.extract(num_times).log_prob(x)))
        assert score == pytest.approx(expected, rel=1e-5)
    y = np.arange(50) % 2
    joint = np.asarray(model.extract(2).class_log_prob(x))[np.arange(50), y]
    labelled = choose_num_times(model, x, y, candidates=(2,))
    assert labelled.scores == {2: pytest.approx(joint.mean(), rel=1e-5)}


def test_pruned_classes_keep_their_heaviest() -> None:
    logits = jnp.log(jnp.array([[0.5, 1e-7, 0.5], [1e-7, 1e-8, 1.0]]))
    means = jnp.arange(6.0).reshape(2, 3, 1)
    parts = MFA(logits, means, jnp.zeros((2, 3, 1, 0)), jnp.zeros((2, 3, 1)))
    pruned = prune(HierarchicalMFA(jnp.zeros(2), parts))
    np.testing.assert_array_equal(pruned.components.means[..., 0], [[0.0, 2.0], [3.0, 5.0]])
    x = np.linspace(-1, 6, 20, dtype=np.float32)[:, None]
    np.testing.assert_allclose(
        pruned.log_prob(x), HierarchicalMFA(jnp.zeros(2), parts).log_prob(x), atol=1e-5
    )


def test_polish_stops_where_validation_is_best() -> None:
    x, x_valid = examples(60), examples(40) + 0.5
    mixture = small().extract(2)
    found = polish_by_validation(mixture, x, x_valid=x_valid, rounds=(4, 0, 1))
    assert list(found.scores) == [0, 1, 4]
    assert found.rounds == max(found.scores, key=found.scores.__getitem__)
    assert found.scores[0] == pytest.approx(float(np.mean(mixture.log_prob(x_valid))), rel=1e-5)
    best = float(np.mean(found.mixture.log_prob(x_valid)))
    assert best == pytest.approx(found.scores[found.rounds], rel=1e-5)


def test_narrow_components_are_broadened_to_where_validation_is_best() -> None:
    x = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
    start = MFA(jnp.zeros(100), x[:100], jnp.zeros((100, 2, 0)), jnp.full((100, 2), -12.0))
    found = broaden_by_validation(start, x[100:], noise=(10.0, 0.3, 1e-3, 3.0))
    assert list(found.scores) == [0.0, 1e-3, 0.3, 3.0]  # not beyond the first that is worse
    assert found.noise == max(found.scores, key=found.scores.__getitem__) == 0.3
    best = float(np.mean(found.mixture.log_prob(x[100:])))
    assert best == pytest.approx(found.scores[0.3], rel=1e-5)
    broad = broaden_by_validation(found.mixture, x[100:], noise=(5.0,))
    assert broad.noise == 0.0
    assert broad.mixture is found.mixture


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="`rounds` must list numbers of iterations"):
        polish_by_validation(small().extract(1), examples(3), x_valid=examples(3), rounds=(-1,))
    with pytest.raises(ConfigError, match="`candidates` must list at least one"):
        choose_num_times(small(), examples(3), candidates=())
    with pytest.raises(ConfigError, match=r"`min_weight` must lie in \[0, 1\); got 1.0"):
        prune(small().extract(1).flatten(), 1.0)
