"""Starts: k-means against scikit-learn, local factors, awkward data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmm_jax.mixture.em import fit_em
from cpmm_jax.mixture.initialise import (
    _plus_plus,
    default_noise_floor,
    kmeans,
    kmeans_start,
    random_start,
)
from cpmm_jax.mixture.padding import pad_rows


def clusters(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(6), 40)
    return 5.0 * rng.normal(size=(6, 3))[labels] + rng.normal(size=(240, 3)), labels


def test_kmeans_is_as_good_as_that_of_scikit_learn() -> None:
    from sklearn.cluster import KMeans

    x, _ = clusters()
    centres, labels = kmeans(x, 6, seed=0)
    inertia = np.sum((x - centres[labels]) ** 2)
    expected = KMeans(6, n_init=10, random_state=0).fit(x).inertia_
    assert inertia < 1.01 * expected
    np.testing.assert_allclose(centres, [x[labels == k].mean(axis=0) for k in range(6)], atol=0.05)


def test_no_cluster_is_empty_where_examples_recur() -> None:
    x = np.repeat(np.array([[0.0, 0.0], [1.0, 1.0]], np.float32), 10, axis=0)
    labels = kmeans(x, 5, seed=0)[1]
    assert set(labels) == set(range(5))
    start = kmeans_start(x, 5, 1, seed=0)
    assert all(np.isfinite(leaf).all() for leaf in (start.means, start.loadings, start.log_noise))


def test_each_cluster_has_its_own_covariance() -> None:
    x, labels = clusters()
    x = x * np.where(labels == 0, 3.0, 1.0)[:, None]
    start = kmeans_start(x, 6, 2, seed=0)
    for k in range(6):
        own = x[np.argmin(np.linalg.norm(x[:, None] - start.means[None], axis=-1), axis=1) == k]
        loadings = np.asarray(start.loadings[k])
        covariance = loadings @ loadings.T + np.diag(np.exp(start.log_noise[k]))
        np.testing.assert_allclose(np.diag(covariance), own.var(axis=0), rtol=0.05)
    np.testing.assert_allclose(np.exp(start.logits).sum(), 1.0, rtol=1e-5)


def test_random_start_is_at_examples_and_follows_its_seed() -> None:
    x, _ = clusters()
    x = x.astype(np.float32)
    one, again, other = (random_start(x, 4, 1, seed=s) for s in (0, 0, 1))
    assert {tuple(row) for row in np.asarray(one.means)} <= {tuple(row) for row in x}
    np.testing.assert_array_equal(one.means, again.means)
    assert (np.asarray(one.means) != np.asarray(other.means)).any()


def test_noise_floor_follows_the_scale() -> None:
    x = np.random.default_rng(0).normal(size=(1000, 3)) * [1.0, 100.0, 0.0] + 7.0
    floor = default_noise_floor(x)
    np.testing.assert_allclose(floor[:2], [1e-4, 1.0], rtol=0.2)
    assert floor[2] > 0


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_ranks(rank: int) -> None:
    x, _ = clusters()
    assert kmeans_start(x, 2, rank, seed=0).loadings.shape == (2, 3, rank)
    assert random_start(x, 2, rank, seed=0).loadings.shape == (2, 3, rank)


def test_rows_of_padding_are_no_examples(rng: np.random.Generator) -> None:
    """Half way between two groups, 212 of them would draw both centres to the middle."""
    x = (rng.normal(size=(300, 2)) + 100.0 * (np.arange(300) % 2)[:, None]).astype(np.float32)
    centres, labels = kmeans(x, 2, seed=0)
    assert labels.shape == (300,)
    np.testing.assert_allclose(np.sort(centres[:, 0]), [0, 100], atol=1.0)
    result = fit_em(x, 2, 1, seed=0)
    np.testing.assert_allclose(result.mixture.mean(), x.mean(axis=0), rtol=1e-4)
    some = jnp.asarray(pad_rows(x[:6], 256))
    seeds = _plus_plus(jax.random.key(0), some, jnp.int32(6), 6)
    np.testing.assert_array_equal(np.unique(seeds, axis=0), np.unique(x[:6], axis=0))
