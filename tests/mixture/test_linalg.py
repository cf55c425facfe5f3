"""One component's algebra against NumPy: the small Cholesky factor, its derivative, the density."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.test_util import check_grads

from cpmm_jax.mixture import linalg


def positive_definite(rng, *batch, rank):
    root = rng.normal(size=(*batch, rank, rank + 2))
    return root @ np.swapaxes(root, -1, -2) + 0.1 * np.eye(rank)


@pytest.mark.parametrize("rank", [1, 2, 4, 9, 32])
def test_cholesky_and_inverse_match_numpy_in_batches(rng, rank, x64):
    matrices = positive_definite(rng, 300, rank=rank)
    factor, inverse = jax.jit(jax.vmap(linalg.cholesky_and_inverse))(jnp.asarray(matrices))
    expected = np.linalg.cholesky(matrices)
    np.testing.assert_allclose(factor, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(inverse @ expected, np.tile(np.eye(rank), (300, 1, 1)), atol=1e-9)
    assert np.array_equal(factor, np.tril(factor)) and np.array_equal(inverse, np.tril(inverse))


def test_cholesky_in_float32(rng):
    matrices = positive_definite(rng, 300, rank=4).astype(np.float32)
    factor, inverse = jax.jit(jax.vmap(linalg.cholesky_and_inverse))(jnp.asarray(matrices))
    assert factor.dtype == inverse.dtype == jnp.float32
    np.testing.assert_allclose(factor, np.linalg.cholesky(matrices), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 6])
def test_cholesky_derivative_matches_finite_differences(rng, rank, x64):
    root = jnp.asarray(rng.normal(size=(rank, rank)))

    def factorise(root):
        return linalg.cholesky_and_inverse(root @ root.T + jnp.eye(rank))

    check_grads(jax.jit(factorise), (root,), order=1, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dim", "rank"), [(1, 0), (1, 1), (3, 0), (4, 2), (3, 3)])
def test_log_prob_matches_scipy(rng, dim, rank, x64):
    mean, loadings = rng.normal(size=dim), rng.normal(size=(dim, rank))
    log_noise, x = rng.normal(size=dim), rng.normal(size=(6, dim))
    got = jax.jit(linalg.log_prob)(*map(jnp.asarray, (x, mean, loadings, log_noise)))
    covariance = loadings @ loadings.T + np.diag(np.exp(log_noise))
    expected = scipy.stats.multivariate_normal(mean, covariance).logpdf(x)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


@pytest.mark.parametrize("rank", [0, 1, 4, 16])
def test_factors_are_right_where_float32_cannot_factorise(rng, rank):
    log_noise = rng.uniform(np.log(1e-6), np.log(1e2), 64).astype(np.float32)
    loadings = rng.normal(size=(64, rank)).astype(np.float32)
    factors = jax.jit(linalg.factorise)(jnp.asarray(loadings), jnp.asarray(log_noise))
    assert {leaf.dtype for leaf in factors} == {jnp.dtype(jnp.float32)}
    wide = loadings.astype(np.float64)
    noise = np.exp(log_noise.astype(np.float64))
    covariance = wide @ wide.T + np.diag(noise)
    np.testing.assert_allclose(factors.log_det, np.linalg.slogdet(covariance)[1], rtol=1e-6)
    np.testing.assert_allclose(factors.precision, 1.0 / noise, rtol=1e-6)
    projection = np.asarray(factors.projection, np.float64)
    capacitance = np.eye(rank) + (wide / noise[:, None]).T @ wide
    expected = np.linalg.solve(np.linalg.cholesky(capacitance), (wide / noise[:, None]).T)
    assert np.abs(projection - expected).max(initial=0) <= 1e-6 * np.abs(expected).max(initial=1)


@pytest.mark.parametrize("rank", [0, 2])
def test_factor_derivatives_match_finite_differences(rng, rank, x64):
    arguments = jnp.asarray(rng.normal(size=(4, rank))), jnp.asarray(rng.normal(size=4))
    factorise = jax.jit(linalg.factorise)
    check_grads(factorise, arguments, order=1, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [0, 2])
def test_condition_derivatives_match_finite_differences(rng, rank, x64):
    shapes = (3,), (3,), (3, rank), (3,), (2, rank)
    arguments = tuple(jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    condition = jax.jit(linalg.condition)
    check_grads(condition, arguments, order=1, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


def test_float32_derivatives_of_hard_factors_are_finite(rng):
    log_noise = jnp.asarray(rng.uniform(np.log(1e-6), np.log(1e2), 64), jnp.float32)
    loadings = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
    gradient = jax.grad(lambda *a: linalg.factorise(*a).projection.sum(), (0, 1))
    for leaf in jax.jit(gradient)(loadings, log_noise):
        assert np.isfinite(leaf).all()


def test_in_float64_survives_every_order_of_jit_and_vmap(rng):
    def cancel(small, row):
        return (row + small) @ jnp.ones(row.shape, row.dtype) - row.sum()

    small, rows = jnp.float32(2.0**-20), jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    wide = linalg.in_float64(cancel)
    inner = jax.vmap(wide, (None, 0))
    for function in (inner, jax.jit(inner), jax.vmap(jax.jit(wide), (None, 0))):
        got = jax.vmap(jax.jit(function), (None, 0))(small, rows)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, np.full((2, 3), 2.0**-18), rtol=1e-6)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_closed_form_derivative_is_that_of_autodiff(rng, rank, x64):
    primals = jnp.asarray(rng.normal(size=(7, rank))), jnp.asarray(rng.normal(size=7))
    tangents = jnp.asarray(rng.normal(size=(7, rank))), jnp.asarray(rng.normal(size=7))
    _, got = jax.jvp(linalg.factorise, primals, tangents)
    _, expected = jax.jvp(lambda *args: linalg.factorise_in_dtype(*args)[0], primals, tangents)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
