"""EM against a dense textbook iteration, scikit-learn, and its own laws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmm_jax.errors import ConfigError, DataError
from cpmm_jax.mixture.em import fit_em, fit_em_stream, polish
from cpmm_jax.mixture.em_steps import Constraints, expect, maximise
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.mixture.initialise import kmeans_start, random_start
from cpmm_jax.mixture.mfa import MFA

FAR = 1e3  # where the data are, in standard deviations: nothing may depend on it
CONSTRAINTS = {
    "none": Constraints(),
    "noise": Constraints(shared_noise=True),
    "isotropic": Constraints(isotropic_noise=True),
    "loadings": Constraints(shared_loadings=True),
    "all": Constraints(shared_loadings=True, shared_noise=True, isotropic_noise=True),
}


def planted(n: int = 600, dim: int = 4, seed: int = 0) -> np.ndarray:
    """Three separate components with two factors each."""
    rng = np.random.default_rng(seed)
    parts = []
    for k in range(3):
        loadings = rng.normal(size=(dim, 2))
        noise = rng.normal(size=(n // 3, dim)) * np.linspace(0.2, 0.6, dim)
        parts.append(rng.normal(size=(n // 3, 2)) @ loadings.T + noise + 6.0 * k)
    return rng.permutation(np.concatenate(parts)).astype(np.float32)


X = planted()
START = kmeans_start(X, 3, 2, seed=0)


def textbook_iteration(x: np.ndarray, mix: MFA) -> tuple[float, MFA]:
    """One iteration as Ghahramani and Hinton print it, dense, with loops, in float64."""
    from scipy.special import logsumexp, softmax
    from scipy.stats import multivariate_normal

    logits, means, loadings, log_noise = (
        np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(mix)
    )
    x = x.astype(np.float64)
    covariances = [a @ a.T + np.diag(np.exp(p)) for a, p in zip(loadings, log_noise, strict=True)]
    joint = np.stack(
        [
            np.log(w) + multivariate_normal(m, c).logpdf(x)
            for w, m, c in zip(softmax(logits), means, covariances, strict=True)
        ],
        axis=1,
    )
    total = logsumexp(joint, axis=1)
    r = np.exp(joint - total[:, None])
    new = []
    for k, covariance in enumerate(covariances):
        beta = loadings[k].T @ np.linalg.inv(covariance)
        z = (x - means[k]) @ beta.T
        z1 = np.concatenate([z, np.ones((len(x), 1))], axis=1)
        second = np.einsum("n,ni,nj->ij", r[:, k], z1, z1)
        second[:-1, :-1] += r[:, k].sum() * (np.eye(z.shape[1]) - beta @ loadings[k])
        cross = np.einsum("n,nd,nj->dj", r[:, k], x, z1)
        full = cross @ np.linalg.inv(second)
        square = np.einsum("n,nd->d", r[:, k], x * x)
        noise = (square - np.sum(full * cross, axis=1)) / r[:, k].sum()
        new.append((r[:, k].mean(), full[:, -1], full[:, :-1], noise))
    weight, mean, loading, noise = (np.stack(v) for v in zip(*new, strict=True))
    return float(total.mean()), MFA(np.log(weight), mean, loading, np.log(noise))  # type: ignore[arg-type]


def test_one_iteration_is_the_textbook_one() -> None:
    result = fit_em(X, start=START, max_iter=1, tol=0.0, noise_floor=1e-8)
    before, expected = textbook_iteration(X, START)
    after, _ = textbook_iteration(X, expected)
    np.testing.assert_allclose(result.history, [before, after], rtol=1e-5)
    for got, want in zip(jax.tree.leaves(result.mixture), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


def test_one_component_is_factor_analysis() -> None:
    from sklearn.decomposition import FactorAnalysis

    x = X.astype(np.float64)
    expected = FactorAnalysis(2, tol=1e-10, max_iter=5000).fit(x).score(x)
    result = fit_em(x, 1, 2, max_iter=3000, tol=1e-9)
    assert result.log_likelihood == pytest.approx(expected, abs=1e-3)


def test_full_rank_approaches_full_covariances() -> None:
    from sklearn.mixture import GaussianMixture

    expected = GaussianMixture(3, reg_covar=1e-9, n_init=3, random_state=0).fit(X).score(X)
    result = fit_em(X, 3, 3, max_iter=1000, tol=1e-7, n_init=2)
    assert result.converged
    assert expected - 0.01 < result.log_likelihood < expected + 1e-3


def test_recovers_a_planted_mixture() -> None:
    test = planted(3000, seed=0)  # the same components: they come first from the generator
    result = fit_em(X, 3, 2, tol=1e-6)
    order = np.argsort(np.asarray(result.mixture.means)[:, 0])
    np.testing.assert_allclose(np.exp(result.mixture.logits), np.full(3, 1 / 3), atol=1e-3)
    np.testing.assert_allclose(
        np.asarray(result.mixture.means)[order].mean(axis=1), [0.0, 6.0, 12.0], atol=0.3
    )
    assert result.log_likelihood == pytest.approx(
        float(np.mean(result.mixture.log_prob(X))), abs=1e-4
    )
    assert np.isfinite(result.mixture.log_prob(test)).all()


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_likelihood_never_falls_and_constraints_hold(name: str) -> None:
    constraints = CONSTRAINTS[name]
    result = fit_em(X, start=START, max_iter=25, tol=0.0, constraints=constraints)
    assert np.diff(result.history).min() > -2e-6
    assert result.history[-1] > result.history[0]
    noise, loadings = np.asarray(result.mixture.log_noise), np.asarray(result.mixture.loadings)
    assert (np.ptp(noise, axis=0).max() < 1e-6) == constraints.shared_noise
    assert (np.ptp(noise, axis=1).max() < 1e-6) == constraints.isotropic_noise
    assert (np.ptp(loadings, axis=0).max() < 1e-6) == constraints.shared_loadings


def test_neither_blocks_nor_chunks_nor_the_origin_matter() -> None:
    settings: dict[str, Any] = {"max_iter": 10, "tol": 0.0, "noise_floor": 1e-3}
    whole = fit_em(X, start=START, **settings)
    moved = START.replace(means=START.means + FAR)  # type: ignore[attr-defined]
    others = [
        fit_em(X, start=START, chunk_size=71, **settings),
        fit_em_stream(lambda: np.split(X, [250, 300]), START, **settings),
        fit_em(X.astype(np.float64) + FAR, start=moved, **settings),
    ]
    for other in others:
        np.testing.assert_allclose(other.history, whole.history, atol=1e-4)
    np.testing.assert_allclose(others[0].mixture.means, whole.mixture.means, atol=1e-4)
    np.testing.assert_allclose(others[1].mixture.means, whole.mixture.means, atol=1e-4)


def test_small_noise_keeps_its_variance() -> None:
    """Where a float32 sum of squares would be pure rounding."""
    rng = np.random.default_rng(0)
    x = 1e-4 * rng.normal(size=(400, 2)) + np.repeat([[-1.0], [1.0]], 200, axis=0)
    begin = kmeans_start(x.astype(np.float32), 2, 0, noise_floor=1e-14, seed=0)
    begin = begin.replace(log_noise=begin.log_noise + 3.0)  # type: ignore[attr-defined]
    result = fit_em(x.astype(np.float32), start=begin, noise_floor=1e-14)
    expected = np.array([x[:200].var(axis=0), x[200:].var(axis=0)])
    order = np.argsort(np.asarray(result.mixture.means)[:, 0])
    np.testing.assert_allclose(np.exp(result.mixture.log_noise)[order], expected, rtol=0.01)


def test_weights_are_repeated_rows() -> None:
    weight = np.random.default_rng(0).integers(0, 3, len(X))
    settings: dict[str, Any] = {"start": START, "max_iter": 8, "tol": 0.0, "noise_floor": 1e-3}
    weighted = fit_em(X, sample_weight=0.5 * weight, **settings)
    repeated = fit_em(np.repeat(X, weight, axis=0), **settings)
    np.testing.assert_allclose(weighted.history, repeated.history, atol=1e-4)


def test_mini_batches_of_sorted_data_are_unbiased() -> None:
    settings: dict[str, Any] = {"start": START, "batch_size": 64, "max_iter": 15, "tol": 0.0}
    exact = fit_em(X, start=START, tol=1e-6).log_likelihood
    ordered = fit_em(X[np.argsort(X[:, 0])], **settings)
    assert fit_em(X, **settings).log_likelihood == pytest.approx(exact, abs=0.02)
    assert ordered.log_likelihood == pytest.approx(exact, abs=0.02)


def test_components_that_die_are_set_up_anew() -> None:
    lost = START.replace(means=START.means.at[0].set(1e3))  # type: ignore[attr-defined]
    stream = fit_em_stream(lambda: np.split(X, 3), lost, max_iter=100, noise_floor=1e-3)
    for stuck in (fit_em(X, start=lost, max_iter=100, noise_floor=1e-3), stream):
        assert stuck.reseeded >= 1
        assert np.diff(stuck.history).min() > -2e-6
        assert np.exp(np.asarray(stuck.mixture.logits)).min() > 0.01


def test_noise_floor_holds_where_values_recur() -> None:
    x = np.concatenate([X[:200], np.repeat(X[:1], 50, axis=0)])
    result = fit_em(x, 5, 1, noise_floor=1e-2)
    assert float(np.exp(result.mixture.log_noise).min()) == pytest.approx(1e-2, rel=1e-4)
    assert np.isfinite(result.log_likelihood)


def test_more_starts_are_no_worse() -> None:
    one, best = (fit_em(X, 4, 1, start=random_start, n_init=n, max_iter=20) for n in (1, 3))
    assert best.log_likelihood >= one.log_likelihood


def test_polish_never_lowers_the_likelihood() -> None:
    flat = START
    assert np.mean(polish(flat, X).log_prob(X)) >= np.mean(flat.log_prob(X))
    y = (X[:, 0] > 3).astype(int)
    classes = HierarchicalMFA(
        jnp.zeros(2, jnp.float32), jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), flat)
    )
    joint = lambda h: np.take_along_axis(np.asarray(h.class_log_prob(X)), y[:, None], 1).mean()  # noqa: E731
    assert joint(polish(classes, X, y)) > joint(classes) + 0.1
    free = polish(classes, X)
    assert free.components.means.shape == classes.components.means.shape
    assert np.mean(free.log_prob(X)) >= np.mean(classes.log_prob(X))
    again = polish(classes, X, max_iter=0)
    np.testing.assert_allclose(again.log_prob(X), classes.log_prob(X), rtol=1e-5)


@pytest.mark.slow
def test_float64_data_stay_float64(x64: None) -> None:
    result = fit_em(X.astype(np.float64), 2, 1, max_iter=3)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.mixture)} == {np.dtype("float64")}


BAD = X.copy()
BAD[7, 2] = np.nan


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], 2, 1), DataError, r"`x` must have shape \(N, D\).*; got \(4,\)"),
        ((BAD, 2, 1), DataError, "`x` must be finite; got nan in row 7, column 2"),
        ((X[:2], 3, 1), DataError, "at least as many rows as components, 3; got 2"),
        ((X, None, 1), ConfigError, "`num_components` must be at least 1; got None"),
        ((X, 2, 5), ConfigError, "`rank` must lie between 0 and D = 4, the features; got 5"),
        ((X, 2, 1, {"tol": -1.0}), ConfigError, "`tol` must be a gain in nats"),
        ((X, 2, 1, {"n_init": 0}), ConfigError, "`n_init` must be at least 1; got 0"),
        ((X, 2, 1, {"batch_size": 0}), ConfigError, "`batch_size` must be at least 1; got 0"),
        ((X, 2, 1, {"noise_floor": 0.0}), ConfigError, "`noise_floor` must be positive"),
        ((X, 2, 1, {"sample_weight": -X[:, 0]}), DataError, "`sample_weight` must be finite"),
        ((X, 2, 1, {"sample_weight": 0 * X[:, 0]}), DataError, "positive for some example"),
    ],
)
def test_bad_input(arguments: Any, error: type[Exception], message: str) -> None:
    settings = arguments[3] if len(arguments) > 3 else {}
    with pytest.raises(error, match=message) as caught:
        fit_em(*arguments[:3], **settings)
    assert "\n" not in str(caught.value)


def test_bad_chunks_and_labels() -> None:
    with pytest.raises(DataError, match=r"`chunks` must give arrays of shape \(n, 4\)"):
        fit_em_stream(lambda: [X[:, :2]], START)
    with pytest.raises(ConfigError, match="`y` must be None for an `MFA`"):
        polish(START, X, np.zeros(len(X), int))
    with pytest.raises(ConfigError, match="`max_iter` must be at least 0; got -1"):
        fit_em(X, 2, 1, max_iter=-1)
    with pytest.raises(DataError, match="`chunks` must give at least one"):
        fit_em_stream(lambda: [], START)


def test_constraints_are_compared_by_value() -> None:
    assert replace(Constraints(), shared_noise=True) == CONSTRAINTS["noise"]


def test_a_component_without_examples_keeps_a_finite_weight() -> None:
    """The weight underflows, and its logarithm could not be stored."""
    with jax.enable_x64(True):
        far = MFA(
            jnp.zeros(2),
            jnp.array([[0.0, 0.0], [1e6, 1e6]]),
            jnp.zeros((2, 2, 0)),
            jnp.zeros((2, 2)),
        )
        statistics = expect(far, jnp.asarray(X[:, :2]), jnp.ones(len(X), X.dtype), 64)
        assert statistics.count[1] == 0.0
        step = jax.jit(maximise, static_argnums=3)
        logits = step(statistics, far, jnp.full(2, 1e-3), Constraints()).logits
        assert np.isfinite(logits).all()
        assert np.isfinite(np.asarray(logits, np.float32)).all()
