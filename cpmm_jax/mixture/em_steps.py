"""The two steps of EM for mixtures of factor analyzers with diagonal noise.

The E-step sums expected complete-data statistics. With y = W (x - mean), which the density computes
anyway, the factors have the posterior N(G^-T y, M^-1) (see `linalg`). So all that is needed of the
examples are the sums of r, r x, r x^2 and r x y^T over them, r being the responsibilities: matrix
products, as many operations as the density takes, and O(K D R) numbers. The sum of r y y^T follows,
since y is linear in x. Products run in the dtype of the examples and are added up in float64. Where
the noise is so small beside the spread of the components that rounding would spoil a variance, they
run in float64 too.

The M-step solves for means and loadings together, a regression of x on the factors and a constant,
and then for the noise.

Source: Ghahramani and Hinton, "The EM Algorithm for Mixtures of Factor Analyzers" (1996); Rubin and
Thayer, "EM algorithms for ML factor analysis" (1982).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cpmm_jax.mixture import density, linalg
from cpmm_jax.mixture.density import Components
from cpmm_jax.mixture.mfa import MFA

ABSOLUTE_ERROR = 1e-2  # nats, a bound for one example: tells in no responsibility
LEAST_COUNT = 1.0  # examples below which a component has died
SPOILED_ABOVE = 1e4  # mean square over noise where float32 would be 1e-3 of a variance off


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What the components have in common.

    Attributes:
        isotropic_noise: one noise variance for all features: a mixture of probabilistic PCA.
        shared_noise: the same noise for all components.
        shared_loadings: the same loadings for all components; unless the noise is shared too, the
            M-step then maximises over the loadings first and the noise after (ECM).
    """

    isotropic_noise: bool = False
    shared_noise: bool = False
    shared_loadings: bool = False


@flax.struct.dataclass
class Statistics:
    """Expected complete-data statistics: sums over examples, float64, additive.

    Attributes:
        count: sum of the responsibilities, shape (K,).
        x: sum of r x, (K, D).
        x_square: sum of r x^2, (K, D).
        z: sum of r E[z], the factors, (K, R).
        zz: sum of r E[z z^T], (K, R, R).
        xz: sum of r x E[z]^T, (K, D, R).
        log_prob: sum of log p(x).
        worst: the lowest log p(x) seen, and the example it was seen at, shape (D,).
    """

    count: Float[Array, " K"]
    x: Float[Array, "K D"]
    x_square: Float[Array, "K D"]
    z: Float[Array, "K R"]
    zz: Float[Array, "K R R"]
    xz: Float[Array, "K D R"]
    log_prob: Float[Array, ""]
    worst: tuple[Float[Array, ""], Float[Array, " D"]]

    def merge(self, other: Statistics) -> Statistics:
        """Return the statistics of both sets of examples together."""
        total = jax.tree.map(jnp.add, self, other)
        first = self.worst[0] <= other.worst[0]
        worst = jax.tree.map(lambda a, b: jnp.where(first, a, b), self.worst, other.worst)
        return total.replace(worst=worst)  # type: ignore[attr-defined, no-any-return]


class _Sums(NamedTuple):
    """What a block of examples gives: y = W (x - mean) in place of the factors."""

    r: Array  # (K,)
    x: Array  # (K, D)
    x_square: Array  # (K, D)
    xy: Array  # (K, R, D)
    log_prob: Array  # ()
    worst: tuple[Array, Array]


def _block_sums(
    x: Array, weight: Array, components: Components, factors: linalg.Factors, in_float64: Array
) -> _Sums:
    """Sum over one block; a row of weight zero counts for nothing."""
    fast, magnitude, y = density.matrix_product_form(x, components, factors)

    def responsibilities(log_joint: Array) -> tuple[Array, Array]:
        log_prob = jax.nn.logsumexp(log_joint, axis=1)
        return jnp.exp(log_joint - log_prob[:, None]) * weight[:, None], log_prob

    r, log_prob = jax.lax.cond(
        density.is_spoiled(fast, magnitude, 1, ABSOLUTE_ERROR),
        lambda: responsibilities(density.residual_form(x, components)),
        lambda: responsibilities(fast),
    )

    def products(dtype: Any) -> Any:
        def call() -> Any:
            rows, left = x.astype(dtype), r.astype(dtype)
            weighted = [left * part.astype(dtype) for part in y]
            ry = jnp.concatenate(weighted, axis=1) if y else jnp.zeros((len(rows), 0), dtype)
            sums = (left.T @ rows, left.T @ (rows * rows), ry.T @ rows)
            return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), sums)

        return call

    first, second, xy = jax.lax.cond(in_float64, products(jnp.float64), products(x.dtype))
    counted = jnp.where(weight > 0, log_prob, jnp.inf)
    lowest = jnp.argmin(counted)
    xy = jnp.moveaxis(xy.reshape(len(y), r.shape[1], x.shape[1]), 1, 0)
    return _Sums(
        jnp.sum(r, axis=0).astype(jnp.float64),
        first,
        second,
        xy,
        jnp.sum(jnp.where(weight > 0, weight * log_prob, 0.0), dtype=jnp.float64),
        jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (counted[lowest], x[lowest])),
    )


def expect(
    mixture: MFA, x: Float[Array, "N D"], weight: Float[Array, " N"], size: int
) -> Statistics:
    """Sum the expected statistics of examples under a mixture (the E-step).

    Args:
        mixture: parameters in float64.
        x: examples, shape (N, D), about the origin.
        weight: of each example, shape (N,); 0 for one that does not count.
        size: examples in a block; memory is that of one block, and the result does not depend on it
            but for rounding.
    """
    log_weights = jax.nn.log_softmax(mixture.logits)
    wide = Components(log_weights, mixture.means, mixture.loadings, mixture.log_noise)
    components = Components(*(leaf.astype(x.dtype) for leaf in wide))
    exact, inverse = jax.vmap(linalg.factorise_in_dtype)(mixture.loadings, mixture.log_noise)
    factors = jax.tree.map(lambda leaf: leaf.astype(x.dtype), exact)
    spread = mixture.means**2 + jnp.sum(mixture.loadings**2, axis=-1)
    in_float64 = jnp.max(spread * exact.precision) > SPOILED_ABOVE
    total = x.shape[0]
    size = min(size, total)

    def block(i: Array) -> _Sums:
        # The last block starts earlier, over rows that have been counted and then weigh nothing.
        start = jnp.minimum(i * size, total - size)
        rows = jax.lax.dynamic_slice_in_dim(x, start, size)
        own = jax.lax.dynamic_slice_in_dim(weight, start, size)
        fresh = start + jnp.arange(size, dtype=i.dtype) >= i * size
        return _block_sums(rows, jnp.where(fresh, own, 0.0), components, factors, in_float64)

    def add(carry: _Sums, i: Array) -> tuple[_Sums, None]:
        more = block(i)
        lower = more.worst[0] < carry.worst[0]
        worst = jax.tree.map(lambda a, b: jnp.where(lower, a, b), more.worst, carry.worst)
        return jax.tree.map(jnp.add, carry, more)._replace(worst=worst), None

    with jax.default_matmul_precision("float32"):
        count = jnp.arange(-(-total // size), dtype=jnp.int32)
        none: _Sums = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(block, count[0])
        )
        none = none._replace(worst=(jnp.full_like(none.worst[0], jnp.inf), none.worst[1]))
        sums, _ = jax.lax.scan(add, none, count)
    return _statistics(sums, mixture, exact, inverse)


def _statistics(
    sums: _Sums, mixture: MFA, factors: linalg.Factors, inverse: Float[Array, "K R R"]
) -> Statistics:
    """Turn sums over y into sums over the factors, E[z] = G^-T y and Var[z] = G^-T G^-1."""
    mean = mixture.means
    residual = sums.x - sums.r[:, None] * mean
    y = jnp.einsum("krd,kd->kr", factors.projection, residual)
    yx = sums.xy - y[:, :, None] * mean[:, None, :]  # sum of r y (x - mean)^T
    yy = jnp.einsum("krd,ksd->krs", yx, factors.projection)
    identity = jnp.eye(inverse.shape[-1], dtype=inverse.dtype)[None]
    scatter = sums.r[:, None, None] * identity + 0.5 * (yy + jnp.swapaxes(yy, 1, 2))
    return Statistics(
        count=sums.r,
        x=sums.x,
        x_square=sums.x_square,
        z=jnp.einsum("ksr,ks->kr", inverse, y),
        zz=jnp.einsum("kqr,kqs,kst->krt", inverse, scatter, inverse),
        xz=jnp.einsum("ksd,ksr->kdr", sums.xy, inverse),
        log_prob=sums.log_prob,
        worst=sums.worst,
    )


def maximise(
    statistics: Statistics, previous: MFA, floor: Float[Array, " D"], constraints: Constraints
) -> MFA:
    """Maximise the expected complete-data log-likelihood (the M-step).

    The regression of x on (z, 1) gives loadings and mean together. The noise is maximised given
    them, not below `floor`; the objective has one maximum in each variance, so that a variance at
    the floor is the maximum above it, and the likelihood never falls.

    Args:
        statistics: of all examples.
        previous: the parameters before; a component that has died keeps them.
        floor: smallest noise variance of each feature, shape (D,): without one the likelihood is
            unbounded, as a component can close in on a single example.
        constraints: what the components have in common.
    """
    s = statistics
    weight = jnp.sum(s.count)
    count = jnp.maximum(s.count, jnp.finfo(s.count.dtype).tiny)
    mean_x, mean_z = s.x / count[:, None], s.z / count[:, None]
    zz = s.zz - s.z[:, :, None] * mean_z[:, None, :]
    xz = s.xz - s.x[:, :, None] * mean_z[:, None, :]
    xx = s.x_square - s.x * mean_x
    if constraints.shared_loadings:
        precision = jnp.exp(-previous.log_noise)
        gram = jnp.einsum("kd,krs->drs", precision, zz)
        right = jnp.einsum("kd,kdr->dr", precision, xz)
        loadings = jax.vmap(_solve)(gram, right[:, None, :])[:, 0, :]
        loadings = jnp.broadcast_to(loadings, s.xz.shape)
    else:
        loadings = jax.vmap(_solve)(zz, xz)
    means = mean_x - jnp.einsum("kdr,kr->kd", loadings, mean_z)
    explained = 2.0 * xz - jnp.einsum("kds,ksr->kdr", loadings, zz)
    squares = xx - jnp.sum(loadings * explained, axis=-1)
    share = count[:, None]
    if constraints.shared_noise:
        squares, share = jnp.sum(squares, axis=0, keepdims=True), weight
    if constraints.isotropic_noise:
        squares = jnp.mean(squares, axis=1, keepdims=True)
        floor = jnp.max(floor, keepdims=True)
    noise = jnp.broadcast_to(jnp.maximum(squares / share, floor[None, :]), means.shape)
    alive = s.count >= LEAST_COUNT
    log_weights = jnp.log(count) - jnp.log(weight)  # finite for a component without any example
    fresh = MFA(log_weights, means, loadings, jnp.log(noise))
    kept = previous.replace(logits=fresh.logits)  # type: ignore[attr-defined]
    return jax.tree.map(
        lambda new, old: jnp.where(alive.reshape(-1, *[1] * (new.ndim - 1)), new, old), fresh, kept
    )


def _solve(gram: Float[Array, "R R"], right: Float[Array, "M R"]) -> Float[Array, "M R"]:
    """Solve X gram = right for a symmetric positive definite matrix."""
    if gram.shape[0] == 0:
        return right
    # Elimination, no LAPACK: see `linalg.cholesky_and_inverse`. The factor's scale guards it where
    # a component holds less than one example.
    size = jnp.finfo(gram.dtype).eps * jnp.trace(gram) + jnp.finfo(gram.dtype).tiny
    _, inverse = linalg.cholesky_and_inverse(gram + size * jnp.eye(gram.shape[0], dtype=gram.dtype))
    return right @ inverse.T @ inverse
