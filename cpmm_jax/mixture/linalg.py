"""Diagonal-plus-low-rank Gaussian algebra for ONE component.

A component is N(mean, diag(psi) + L L^T) with psi = exp(log_noise) of shape (D,) and L the loadings
of shape (D, R): a factor analyzer, x = mean + L z + noise with z ~ N(0, I_R) (Ghahramani and
Hinton, 1996). No D x D matrix is formed: with the capacitance matrix M = I + L^T psi^-1 L (R x R)
and its Cholesky factor M = G G^T,

    log det(psi + L L^T)  = sum(log psi) + 2 sum(log diag G)             (determinant lemma)
    (psi + L L^T)^-1      = psi^-1 - W^T W,   W = G^-1 L^T psi^-1        (Woodbury)

Everything here is unbatched; callers lift it over components with `jax.vmap`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOG_TWO_PI = math.log(2.0 * math.pi)


class Factors(NamedTuple):
    """What the density of one component needs, computed once and used for every example.

    Attributes:
        precision: exp(-log_noise), shape (D,).
        projection: W = G^-1 L^T psi^-1, shape (R, D); (W r)^T (W r) is Woodbury's correction.
        log_det: log-determinant of the covariance, a scalar.
    """

    precision: Float[Array, " D"]
    projection: Float[Array, "R D"]
    log_det: Float[Array, ""]


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run `function` in float64, whatever the dtype of its arguments; results in theirs.

    Batching is kept inside: the rules of `jax.vmap` for several operations truncate float64 when
    they run outside the context (jax 0.10), as they do when a jitted caller is batched. Not
    differentiable in reverse: the caller gives the derivative.

    Args:
        function: takes and returns pytrees of floating-point arrays.
    """

    @jax.custom_batching.custom_vmap
    def call(*args: Any) -> Any:
        dtype = jnp.result_type(*jax.tree.leaves(args))
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), args)
            return jax.tree.map(lambda leaf: leaf.astype(dtype), function(*wide))

    @call.def_vmap
    def batch(axis_size: int, in_batched: list[Any], *args: Any) -> tuple[Any, Any]:
        in_axes = tuple(jax.tree.map(lambda batched: 0 if batched else None, in_batched))
        out = in_float64(jax.vmap(function, in_axes, axis_size=axis_size))(*args)
        return out, jax.tree.map(lambda _: True, out)

    return call  # type: ignore[no-any-return]


def cholesky_and_inverse(
    matrix: Float[Array, "R R"],
) -> tuple[Float[Array, "R R"], Float[Array, "R R"]]:
    """Factor a small positive definite matrix as G G^T and invert the factor.

    Gaussian elimination of (matrix, I), one row at a time. It serves in place of the LAPACK
    routines because batches of hundreds of those were seen to deadlock inside one XLA program on
    CPU (jaxlib 0.10.2), and because tiny factorisations cost more to call than to do.

    Args:
        matrix: symmetric positive definite, shape (R, R).

    Returns:
        G (lower triangular) and G^-1, each of shape (R, R).
    """
    rank = matrix.shape[0]
    rows = jnp.arange(rank)

    def eliminate(j: Array, tableau: Array) -> Array:
        pivot_row = tableau[j] * jax.lax.rsqrt(tableau[j, j])
        below = jnp.where(rows > j, pivot_row[:rank], jnp.zeros((), matrix.dtype))
        return (tableau - below[:, None] * pivot_row[None, :]).at[j].set(pivot_row)

    tableau = jnp.concatenate([matrix, jnp.eye(rank, dtype=matrix.dtype)], axis=1)
    tableau = jax.lax.fori_loop(0, rank, eliminate, tableau, unroll=rank <= 4)
    return jnp.triu(tableau[:, :rank]).T, tableau[:, rank:]


def capacitance(
    loadings: Float[Array, "D R"], log_noise: Float[Array, " D"], jitter: float = 0.0
) -> Float[Array, "R R"]:
    """Compute M = I + L^T psi^-1 L, with `jitter` times its largest entry added to the diagonal."""
    scaled = loadings * jnp.exp(-0.5 * log_noise)[:, None]
    matrix = scaled.T @ scaled
    size = 1.0 + jitter * jnp.max(jnp.diagonal(matrix))
    return matrix + size * jnp.eye(matrix.shape[0], dtype=matrix.dtype)


def factorise_in_dtype(
    loadings: Float[Array, "D R"], log_noise: Float[Array, " D"]
) -> tuple[Factors, Float[Array, "R R"]]:
    """Prepare one component's density in the dtype of the arguments; return G^-1 besides."""
    precision = jnp.exp(-log_noise)
    if loadings.shape[-1] == 0:
        empty = jnp.zeros((0, 0), loadings.dtype)
        return Factors(precision, jnp.zeros_like(loadings).T, jnp.sum(log_noise)), empty
    cholesky, inverse = cholesky_and_inverse(capacitance(loadings, log_noise))
    projection = inverse @ (loadings * precision[:, None]).T
    log_det = jnp.sum(log_noise) + 2.0 * jnp.sum(jnp.log(jnp.diagonal(cholesky)))
    return Factors(precision, projection, log_det), inverse


@jax.custom_jvp
def _factors_and_inverse(
    loadings: Float[Array, "D R"], log_noise: Float[Array, " D"]
) -> tuple[Factors, Float[Array, "R R"]]:
    return in_float64(factorise_in_dtype)(loadings, log_noise)  # type: ignore[no-any-return]


@_factors_and_inverse.defjvp
@jax.default_matmul_precision("float32")
def _factors_and_inverse_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    """Differentiate in closed form: matrix products of what is known, and no loop.

    With dM = d(L^T psi^-1 L) and S = G^-1 dM G^-T, the factor of M = G G^T moves by
    dG = G phi(S), where phi keeps the lower triangle and half the diagonal. So
    dW = G^-1 d(L^T psi^-1) - phi(S) W, and log det M moves by tr(S).
    """
    factors, inverse = _factors_and_inverse(*primals)
    d_loadings, d_log_noise = tangents
    precision, projection, _ = factors
    moved = inverse @ d_loadings.T  # G^-1 dL^T
    half = moved @ projection.T
    noisy = projection * (jnp.exp(primals[1]) * d_log_noise)[None, :]
    inner = half + half.T - noisy @ projection.T  # S
    lower = jnp.tril(inner) - 0.5 * jnp.diag(jnp.diagonal(inner))
    derivative = Factors(
        -precision * d_log_noise,
        moved * precision[None, :] - projection * d_log_noise[None, :] - lower @ projection,
        jnp.sum(d_log_noise) + jnp.trace(inner),
    )
    return (factors, inverse), (derivative, -lower @ inverse)


def factorise(loadings: Float[Array, "D R"], log_noise: Float[Array, " D"]) -> Factors:
    """Prepare one component's density; values in float64, whatever the dtype of the arguments.

    With noise variances down to 1e-6 the capacitance matrix has a condition number near 1e8 and a
    float32 Cholesky factor keeps no digit of its small pivots (or is NaN). This set-up costs
    O(D R^2) per component, little beside the evaluation, so it runs in float64. Derivatives are
    matrix products of its results, in the dtype of the arguments.

    Args:
        loadings: factor loadings, shape (D, R); R may be 0.
        log_noise: log of the noise variances, shape (D,).

    Returns:
        `Factors` in the dtype of `loadings`.
    """
    return _factors_and_inverse(loadings, log_noise)[0]


def log_prob(
    x: Float[Array, "N D"],
    mean: Float[Array, " D"],
    loadings: Float[Array, "D R"],
    log_noise: Float[Array, " D"],
) -> Float[Array, " N"]:
    """Evaluate log N(x; mean, diag(exp(log_noise)) + loadings loadings^T), in nats.

    The residual form: x - mean is taken first, so nothing depends on where the origin is. Runs in
    the dtype of its arguments.

    Args:
        x: examples, shape (N, D).
        mean: shape (D,).
        loadings: shape (D, R).
        log_noise: log of the noise variances, shape (D,).

    Returns:
        Log-densities, shape (N,).
    """
    factors, _ = factorise_in_dtype(loadings, log_noise)
    residual = x - mean[None, :]
    quadratic = (residual * residual) @ factors.precision
    quadratic = quadratic - jnp.sum((residual @ factors.projection.T) ** 2, axis=-1)
    return -0.5 * (quadratic + factors.log_det + x.shape[-1] * LOG_TWO_PI)


@jax.default_matmul_precision("float32")
def _condition(
    values: Float[Array, " M"],
    mean: Float[Array, " M"],
    loadings: Float[Array, "M R"],
    log_noise: Float[Array, " M"],
    other_loadings: Float[Array, "E R"],
    jitter: float = 0.0,
) -> tuple[Float[Array, " E"], Float[Array, "E R"]]:
    if loadings.shape[-1] == 0:
        return jnp.zeros(other_loadings.shape[:1], other_loadings.dtype), other_loadings
    _, inverse = cholesky_and_inverse(capacitance(loadings, log_noise, jitter))
    projected = loadings.T @ ((values - mean) * jnp.exp(-log_noise))
    narrowed = other_loadings @ inverse.T
    return narrowed @ (inverse @ projected), narrowed


@jax.custom_jvp
def condition(
    values: Float[Array, " M"],
    mean: Float[Array, " M"],
    loadings: Float[Array, "M R"],
    log_noise: Float[Array, " M"],
    other_loadings: Float[Array, "E R"],
) -> tuple[Float[Array, " E"], Float[Array, "E R"]]:
    """Condition one component on M of its features.

    The factors have the posterior z | values ~ N(M^-1 L^T psi^-1 (values - mean), M^-1), with the
    square root G^-T of M^-1 = G^-T G^-1. Values in float64 and derivatives as in `factorise`.

    Args:
        values: the observed features, shape (M,).
        mean: their mean, shape (M,).
        loadings: their loadings, shape (M, R).
        log_noise: log of their noise variances, shape (M,).
        other_loadings: loadings of the E features that are not observed, shape (E, R).

    Returns:
        By how much the mean of the others moves, shape (E,), and their new loadings, (E, R).
    """
    evaluate = in_float64(_condition)
    return evaluate(values, mean, loadings, log_noise, other_loadings)  # type: ignore[no-any-return]


@condition.defjvp
def _condition_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    jitter = 8 * float(jnp.finfo(primals[2].dtype).eps)
    _, derivative = jax.jvp(partial(_condition, jitter=jitter), primals, tangents)
    return condition(*primals), derivative
