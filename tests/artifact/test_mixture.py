"""The NumPy mixture: right against dense SciPy and rational arithmetic; bad input in one line."""

from __future__ import annotations

import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats

from cpmm_jax import artifact
from cpmm_jax.artifact import mixture as numerics
from cpmm_jax.errors import ConfigError, DataError
from tests.artifact.golden import random_mixture


def dense_log_joint(mixture: artifact.Mixture, x: np.ndarray) -> np.ndarray:
    """Compute log p(x, c, k) with D x D covariances, shape (N, C, K)."""
    C, K = mixture.logits.shape
    out = np.empty((len(x), C, K))
    for c in range(C):
        for k in range(K):
            loadings = mixture.loadings[c, k].astype(np.float64)
            noise = np.exp(mixture.log_noise[c, k].astype(np.float64))
            covariance = loadings @ loadings.T + np.diag(noise)
            normal = scipy.stats.multivariate_normal(mixture.means[c, k], covariance)
            weight = scipy.special.log_softmax(mixture.class_logits.astype(np.float64))[c]
            weight += scipy.special.log_softmax(mixture.logits[c].astype(np.float64))[k]
            out[:, c, k] = weight + normal.logpdf(x)
    return out


def exact_log_normal(
    x: np.ndarray, mean: np.ndarray, loadings: np.ndarray, log_noise: np.ndarray
) -> float:
    """Compute one log-density in rational arithmetic: no rounding but that of exp and log."""
    D = len(x)
    to_exact = np.vectorize(lambda value: Fraction(float(value)), otypes=[object])
    L, residual = to_exact(loadings), to_exact(x) - to_exact(mean)
    rows = np.column_stack([L @ L.T + np.diag(to_exact(np.exp(log_noise))), residual])
    quadratic, log_det = Fraction(0), 0.0
    for i in range(D):  # elimination: the quadratic form is the sum of pivots' squared residuals
        pivot = rows[i][i]
        log_det += float(np.log(float(pivot)))
        quadratic += rows[i][D] ** 2 / pivot
        for j in range(i + 1, D):
            rows[j] = rows[j] - rows[j][i] / pivot * rows[i]
    return -0.5 * (float(quadratic) + log_det + D * float(np.log(2 * np.pi)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("D", "R"), [(1, 0), (1, 1), (2, 1), (5, 0), (5, 2), (40, 4), (3, 5)])
def test_log_densities_match_dense_scipy(D: int, R: int, dtype: Any) -> None:
    mixture = random_mixture(D + R, D=D, R=R, dtype=dtype)
    x = np.random.default_rng(1).standard_normal((7, D)) * 3
    joint = dense_log_joint(mixture, x)
    by_class = scipy.special.logsumexp(joint, axis=2)
    close = {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(mixture.component_log_prob(x), joint, **close)
    np.testing.assert_allclose(mixture.class_log_prob(x), by_class, **close)
    total = scipy.special.logsumexp(joint, axis=(1, 2))
    np.testing.assert_allclose(mixture.log_prob(x), total, **close)
    posterior = np.exp(joint - total[:, None, None])
    np.testing.assert_allclose(mixture.responsibilities(x), posterior, **close)
    np.testing.assert_allclose(mixture.predict_proba(x), posterior.sum(axis=2), **close)
    np.testing.assert_array_equal(mixture.predict(x), by_class.argmax(axis=1))


@pytest.mark.parametrize("shift", [0.0, 1e4, 1e8])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_extreme_components_match_rational_arithmetic(shift: float, scale: float) -> None:
    """Noise variances 1e-6 to 1e2 within a component, means far apart, all of it shifted."""
    rng = np.random.default_rng(2)
    C, K, D, R = 1, 3, 4, 2
    means = rng.standard_normal((C, K, D)) * scale + shift
    loadings = rng.standard_normal((C, K, D, R)) * np.array([1.0, 30.0])
    log_noise = np.log(10.0) * rng.permuted(np.tile([-6.0, -3.0, 0.0, 2.0], (C, K, 1)), axis=2)
    mixture = artifact.Mixture(np.zeros(C), np.zeros((C, K)), means, loadings, log_noise)
    noise = rng.standard_normal((K, D)) * np.exp(0.5 * log_noise[0])
    factors = np.einsum("kdr,kr->kd", loadings[0], rng.standard_normal((K, R)))
    x = means[0] + factors + noise
    expected = [
        [exact_log_normal(row, means[0, k], loadings[0, k], log_noise[0, k]) for k in range(K)]
        for row in x
    ]
    found = mixture.component_log_prob(x)[:, 0] + np.log(K)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_parallel_factors_and_great_distances_stay_finite() -> None:
    """A capacitance matrix singular to rounding, and squares near the end of the range."""
    loadings = np.full((1, 1, 3, 2), 1e9)
    mixture = artifact.Mixture(
        np.zeros(1), np.zeros((1, 1)), np.zeros((1, 1, 3)), loadings, np.full((1, 1, 3), -6.0)
    )
    x = np.array([[0.0, 0.0, 0.0], [1e9, 1e9, 1e9], [1e6, -1e6, 0.0], [1e100, 0.0, -1e100]])
    expected = exact_log_normal(x[0], np.zeros(3), loadings[0, 0], np.full(3, -6.0))
    found = mixture.log_prob(x)
    assert np.isfinite(found).all() and found[3] < -1e199
    np.testing.assert_allclose(found[:2], [expected, expected - 0.25], rtol=1e-6)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = random_mixture(3)
    x = np.random.default_rng(4).standard_normal((23, 5)).astype(np.float32)
    whole = mixture.component_log_prob(x)
    for elements in (1, 500):  # one example at a time; blocks that do not divide N
        monkeypatch.setattr(numerics, "_BLOCK_ELEMENTS", elements)
        np.testing.assert_allclose(mixture.component_log_prob(x), whole, rtol=1e-12)
        np.testing.assert_allclose(
            mixture.log_prob(x), scipy.special.logsumexp(whole, axis=(1, 2)), rtol=1e-12
        )
    with pytest.raises(DataError, match="row 20, column 3"):
        x[20, 3] = np.nan
        mixture.log_prob(x)


def test_no_examples_give_empty_results() -> None:
    mixture = random_mixture(5)
    x = np.empty((0, 5))
    shapes = [mixture.log_prob(x).shape, mixture.component_log_prob(x).shape]
    assert shapes == [(0,), (0, 2, 3)] and mixture.predict_proba(x).shape == (0, 2)
    assert mixture.sample(np.random.default_rng(0), 0).shape == (0, 5)


@pytest.mark.parametrize("R", [0, 2])
def test_samples_have_the_moments_of_the_mixture(R: int) -> None:
    mixture = random_mixture(6, D=3, R=R)
    draws = mixture.sample(np.random.default_rng(7), 200_000)
    weights = np.exp(
        scipy.special.log_softmax(mixture.class_logits)[:, None]
        + scipy.special.log_softmax(mixture.logits, axis=1)
    )
    mean = np.einsum("ck,ckd->d", weights, mixture.means)
    centred = mixture.means - mean
    covariance = np.einsum("ck,ckd,cke->de", weights, centred, centred)
    covariance += np.einsum("ck,ckdr,cker->de", weights, mixture.loadings, mixture.loadings)
    covariance += np.diag(np.einsum("ck,ckd->d", weights, np.exp(mixture.log_noise)))
    assert draws.shape == (200_000, 3)
    np.testing.assert_allclose(draws.mean(axis=0), mean, atol=0.05)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.15)
    again = mixture.sample(np.random.default_rng(7), 200_000)
    np.testing.assert_array_equal(draws, again)


BAD_X: dict[str, tuple[Any, str]] = {
    "one example": (np.zeros(6), r"\(N, 6\) or \(N, \*\(2, 3\)\); got \(6,\)"),
    "other D": (np.zeros((4, 5)), r"\(N, 6\).*got \(4, 5\)"),
    "other event": (np.zeros((4, 3, 2)), r"got \(4, 3, 2\)"),
    "NaN": ([[0, 0, 0, 0, np.nan, 0]], r"nan in row 0, column 4 \(e\)"),
    "infinity": ([[0] * 6, [-np.inf] + [0] * 5], r"-inf in row 1, column 0 \(a\)"),
    "too large": ([[1e200] * 6], r"at most 1e\+100; got 1e\+200 in row 0, column 0"),
    "strings": ([["a"] * 6], "must hold numbers; got dtype <U1"),
    "objects": (np.zeros((2, 6), object), "must hold numbers; got dtype object"),
    "ragged": ([[1.0], [1.0, 2.0]], "must be an array"),
}


@pytest.mark.parametrize("name", BAD_X)
def test_bad_examples_are_refused_in_one_line(name: str) -> None:
    mixture = random_mixture(11, D=6, feature_names=tuple("abcdef"), event_shape=(2, 3))
    x, message = BAD_X[name]
    for method in (mixture.log_prob, mixture.predict, mixture.responsibilities):
        with pytest.raises(DataError, match=message) as caught:
            method(x)
        assert "\n" not in str(caught.value)


def test_bad_sample_arguments_are_refused() -> None:
    mixture = random_mixture(12)
    for rng, n, message in [(0, 5, "Generator; got int"), (None, -1, "0 or more; got -1")]:
        with pytest.raises(ConfigError, match=message):
            mixture.sample(np.random.default_rng(0) if rng is None else rng, n)  # type: ignore


def test_another_unit_brings_its_jacobian() -> None:
    mixture = random_mixture(0, D=3, R=1, dtype=np.float32)
    scale, shift = np.array([2.0, 1e-3, -5.0]), np.array([1e8, 0.0, 3.0])
    z = np.random.default_rng(0).standard_normal((6, 3))
    moved = mixture.affine(scale, shift)
    expected = mixture.log_prob(z) - np.log(np.abs(scale)).sum()
    np.testing.assert_allclose(moved.log_prob(z * scale + shift), expected, rtol=1e-6)
    assert moved.means.dtype == np.float64


def test_some_classes_keep_their_names() -> None:
    whole = random_mixture(0)
    names = tuple(f"class {c}" for c in range(whole.num_classes))
    kept = artifact.to_mixture(whole, class_names=names).classes([1, 0])
    assert kept.class_names == names[1::-1]
    x = np.random.default_rng(0).standard_normal((5, whole.dim))
    two = whole.class_log_prob(x)[:, [1, 0]]
    expected = scipy.special.softmax(two, axis=1)
    np.testing.assert_allclose(kept.predict_proba(x), expected, rtol=1e-9)


def test_a_pickle_holds_the_parameters_alone() -> None:
    mixture = random_mixture(0)
    size = len(pickle.dumps(mixture))
    x = np.random.default_rng(0).standard_normal((5, mixture.dim))
    before = mixture.log_prob(x)  # keeps what it computes of the parameters
    assert len(pickle.dumps(mixture)) == size
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(mixture)).log_prob(x), before)
