"""The log-density of many components at many examples, fast where that is accurate.

Two forms of the same number:

- *Matrix products*, centred: with a = x - c, b = mean_k - c and c the mean of the means,
  the squared Mahalanobis length is  a^2 . psi^-1 - 2 a . (b psi^-1) + b^2 . psi^-1 - |W a - W b|^2.
  Matrix products over all components, 2 N K D (R + 2) operations, nothing of size N K D.
- *Residuals* (`linalg.log_prob`) in float64, one component at a time: several times slower, and
  right however far the means lie from each other in units of the noise.

The first cancels: its terms can be much larger than their sum. Their size is known, so the rounding
error is bounded by it, and a block of examples whose bound exceeds `RELATIVE_ERROR` of its
log-density is evaluated again by residuals (a real branch under `jit`; under `vmap` both are run).
Derivatives are those of the matrix-product form, in the dtype of the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cpmm_jax.errors import ConfigError
from cpmm_jax.mixture import linalg

RELATIVE_ERROR = 5e-6  # of max(1, |log p|); what the matrix-product form must promise
RELEVANCE = 20.0  # nats below the best component of a sum where one no longer moves the sum
BLOCK_ELEMENTS = 2**22  # held at a time by default: 16 MiB in float32, about what caches hold


class Components(NamedTuple):
    """K components with normalised log-weights: (K,), (K, D), (K, D, R), (K, D)."""

    log_weights: Float[Array, " K"]
    means: Float[Array, "K D"]
    loadings: Float[Array, "K D R"]
    log_noise: Float[Array, "K D"]


def _centre(means: Float[Array, "K D"]) -> Float[Array, "1 D"]:
    """Return the mean of the means, rounded to some bits less than the dtype has.

    `x - centre` and `means - centre` must subtract the same number. Compiled into a fused
    multiply-add, the division of the mean would reach one of them unrounded, which far from the
    origin is a good part of a standard deviation; the explicit rounding cannot be fused away.
    """
    info = jnp.finfo(means.dtype)
    return jax.lax.reduce_precision(
        jnp.mean(means, axis=0, keepdims=True), int(info.nexp), int(info.nmant) - 6
    )


class Terms(NamedTuple):
    """What the matrix products give.

    Attributes:
        log_prob: log w_k + log N_k, shape (N, K).
        magnitude: size of the terms that cancelled in it, shape (N, K).
        projected: W (x - mean), the whitened factors before their posterior is shrunk, R of (N, K).
    """

    log_prob: Float[Array, "N K"]
    magnitude: Float[Array, "N K"]
    projected: tuple[Float[Array, "N K"], ...]


def matrix_product_form(
    x: Float[Array, "N D"], components: Components, factors: linalg.Factors
) -> Terms:
    """Evaluate all components at all examples by two matrix products."""
    log_weights, means, loadings, _ = components
    dim, rank = loadings.shape[1:]
    centre = _centre(jax.lax.stop_gradient(means))
    a, b = x - centre, means - centre
    linear = b * factors.precision
    b_square = jnp.sum(b * linear, axis=-1)[None, :]
    # One product for all that is linear in a, factors before components: what follows then runs
    # over whole rows of K numbers, in one pass.
    projection = jnp.moveaxis(factors.projection, 1, 0)
    shift = jnp.sum(projection * b[None], axis=-1)
    affine = a @ jnp.concatenate([projection.reshape(-1, dim), -2.0 * linear]).T
    *factored, crossed = jnp.split(affine, rank + 1, axis=1)
    projected = tuple(part - shift[r][None, :] for r, part in enumerate(factored))
    quadratic = (a * a) @ factors.precision.T + crossed
    correction = sum((part * part for part in projected), start=jnp.zeros_like(quadratic))
    constant = (log_weights - 0.5 * (factors.log_det + dim * linalg.LOG_TWO_PI))[None, :]
    magnitude = quadratic + (3.0 * b_square + jnp.abs(constant))
    return Terms((constant - 0.5 * b_square) - 0.5 * (quadratic - correction), magnitude, projected)


def residual_form(x: Float[Array, "N D"], components: Components) -> Float[Array, "N K"]:
    """Return log w_k + log N_k from residuals in float64, in the dtype of x.

    Widened one component at a time: float64 copies of all of them, and of what is made of them,
    would be most of the program's memory.
    """

    def evaluate(x: Array, log_weight: Array, *parameters: Array) -> Array:
        return linalg.log_prob(x, *parameters) + log_weight

    wide = linalg.in_float64(evaluate)
    return jax.lax.map(lambda component: wide(x, *component), tuple(components)).T


def is_spoiled(
    fast: Float[Array, "N K"],
    magnitude: Float[Array, "N K"],
    num_sums: int,
    absolute: float = RELATIVE_ERROR,
) -> Bool[Array, ""]:
    """Tell whether rounding may have spoiled a value that matters to one of the sums.

    `absolute` is an error in nats that is borne, however small the value.
    """
    # One sum in the shape that it has: its maximum is then found once, here and in its logarithm.
    count, total = fast.shape
    shape = (count, total) if num_sums == 1 else (count, num_sums, total // num_sums)
    grouped = fast.reshape(shape)
    best = jnp.max(grouped, axis=-1, keepdims=True)
    relevant = ~(grouped < best - RELEVANCE)  # also where an overflow made both infinite or NaN
    size = magnitude.reshape(shape)
    size = jnp.where(size < jnp.inf, size, jnp.inf)  # a maximum may pass over NaN
    error = jnp.max(jnp.where(relevant, size, 0.0), axis=-1) * float(jnp.finfo(fast.dtype).eps)
    borne = jnp.maximum(absolute, RELATIVE_ERROR * jnp.abs(best[..., 0]))
    return jnp.any(~(error <= borne))


@jax.custom_jvp
def _restored(
    fast: Float[Array, "N K"], x: Float[Array, "N D"], components: Components
) -> Float[Array, "N K"]:
    """Return the residual form, with the derivatives of the matrix-product form `fast`."""
    return residual_form(x, components)


@_restored.defjvp
def _restored_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    return _restored(*primals), tangents[0]


def _reduce_block(
    reduce: Callable[[Float[Array, "N K"]], Any],
    x: Float[Array, "N D"],
    components: Components,
    factors: linalg.Factors,
    num_sums: int,
) -> Any:
    fast, magnitude, _ = matrix_product_form(x, components, factors)
    # The branches hand over what is kept: N x K numbers that leave a branch would be copied. The
    # usual one comes reduced, so that its passes over the block are shared with those of the check.
    return jax.lax.cond(
        is_spoiled(*jax.lax.stop_gradient((fast, magnitude)), num_sums),
        lambda fast, _, x, components: reduce(_restored(fast, x, components)),
        lambda fast, reduced, x, components: reduced,
        fast,
        reduce(fast),
        x,
        components,
    )


def block_size(
    num_examples: int, num_components: int, dim: int, rank: int, chunk_size: int | None
) -> int:
    """Return how many examples are evaluated at a time.

    Args:
        num_examples: N.
        num_components: K (all classes together).
        dim: D.
        rank: R.
        chunk_size: the user's choice; None for as many as keep `BLOCK_ELEMENTS` in memory.

    Raises:
        ConfigError: `chunk_size` is less than 1.
    """
    if chunk_size is None:
        chunk_size = BLOCK_ELEMENTS // (num_components * (rank + 3) + 3 * dim)
    elif chunk_size < 1:
        raise ConfigError(
            f"`chunk_size` must be at least 1 (examples evaluated at a time); got {chunk_size}. "
            "Leave it out for a size that fits the memory."
        )
    return max(1, min(chunk_size, num_examples))


def map_blocks(function: Callable[[Any], Any], rows: Any, size: int) -> Any:
    """Apply `function` to blocks of at most `size` rows, one after the other.

    Args:
        function: maps a pytree of (n, ...) arrays to a pytree of (n, ...) arrays.
        rows: a pytree of arrays with the same leading axis N.
        size: most rows in a block; blocks are made equal, the last one padded with zeros at need.

    Returns:
        The results with leading axis N. Memory for intermediates (also those of the derivative)
        is that of one block.
    """
    total = jax.tree.leaves(rows)[0].shape[0]
    if total <= size:
        return function(rows)
    count = math.ceil(total / size)
    # Somewhat smaller blocks where they then divide the rows: nothing to pad, so nothing to copy.
    count = next((more for more in range(count, 2 * count) if total % more == 0), count)
    size = math.ceil(total / count)

    def blocks(leaf: Array) -> Array:
        padding = [(0, count * size - total)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, padding).reshape(count, size, *leaf.shape[1:])

    stacked = jax.lax.map(jax.checkpoint(function), jax.tree.map(blocks, rows))
    return jax.tree.map(lambda leaf: jax.lax.collapse(leaf, 0, 2)[:total], stacked)


def working_dtype(*arrays: Array) -> jnp.dtype:
    """Return the widest dtype of the arrays, at least float32: what a density is computed in.

    This promotion is meant, so it also holds where JAX is told to refuse implicit ones.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *(array.dtype for array in arrays))


def reduce_log_prob(
    reduce: Callable[[Float[Array, "n K"]], Any],
    x: Float[Array, "N D"],
    components: Components,
    chunk_size: int | None = None,
    num_sums: int = 1,
) -> Any:
    """Apply `reduce` to log w_k + log N(x_n; component k), block by block.

    Args:
        reduce: maps the (n, K) values of a block of examples to what is kept of them.
        x: examples, shape (N, D).
        components: K weighted components.
        chunk_size: examples evaluated at a time; None for a size that fits the memory.
        num_sums: how many sums over equally many consecutive components are wanted, each of them
            accurate: 1 for the density, C for those of the classes, K for every component's own.

    Returns:
        What `reduce` returns, with leading axis N.
    """
    dtype = working_dtype(x, *components)
    components = Components(*(leaf.astype(dtype) for leaf in components))
    num_components, dim, rank = components.loadings.shape
    size = block_size(x.shape[0], num_components, dim, rank, chunk_size)
    factors = jax.vmap(linalg.factorise)(components.loadings, components.log_noise)
    with jax.default_matmul_precision("float32"):
        return map_blocks(
            lambda block: _reduce_block(reduce, block, components, factors, num_sums),
            x.astype(dtype),
            size,
        )
