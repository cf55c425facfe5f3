"""Starts for a mixture of factor analyzers: k-means with local factors, or random examples.

k-means runs here, jitted: SciPy's seeding takes time quadratic in the number of clusters, and
scikit-learn is optional.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from cpmm_jax.mixture.checks import check_rows
from cpmm_jax.mixture.density import map_blocks
from cpmm_jax.mixture.mfa import MFA
from cpmm_jax.mixture.padding import pad_rows, padded_size_of_few

FLOOR = 1e-4  # of a feature's variance: the least noise variance of a component
ROUNDS = 30  # of k-means, at most
RESTARTS = 3  # of k-means
BLOCK_ROWS = 16384
SEED_ROWS = 100  # examples per cluster among which k-means is seeded


def default_noise_floor(x: Float[ArrayLike, "N D"]) -> npt.NDArray[np.float64]:
    """Return 1e-4 of each feature's variance, shape (D,); of their mean for a constant feature.

    The likelihood of a mixture has no maximum: a component that closes in on one example, or on a
    value that recurs, gains without bound. A standard deviation of one hundredth of the feature's
    is narrower than what few hundred examples can tell, and wide enough for float32.
    """
    variance = np.var(np.asarray(x, np.float64), axis=0)
    least = max(float(variance.mean()), float(np.finfo(np.float64).tiny) / FLOOR)
    return FLOOR * np.where(variance > 1e-12 * least, variance, least)  # type: ignore[no-any-return]


def kmeans_start(
    x: Float[ArrayLike, "N D"],
    num_components: int,
    rank: int,
    *,
    noise_floor: Float[ArrayLike, "*D"] | None = None,
    seed: int,
) -> MFA:
    """Cluster the examples by k-means, and give each cluster its principal factors.

    Args:
        x: examples, shape (N, D).
        num_components: K.
        rank: factors, R.
        noise_floor: smallest noise variance, a number or shape (D,).
        seed: of the seeding.

    Returns:
        An `MFA` in the units of `x`, weighted by the sizes of the clusters.

    Example:
        >>> import numpy as np
        >>> x = np.concatenate([np.full((5, 1), -1.0), np.full((5, 1), 1.0)])
        >>> sorted(kmeans_start(x, 2, 0, seed=0).means[:, 0].tolist())
        [-1.0, 1.0]
    """
    rows = check_rows(x, num_components, rank)
    floor = default_noise_floor(rows) if noise_floor is None else np.asarray(noise_floor)
    _, labels = kmeans(rows, num_components, seed=seed)
    pooled = _factors(rows - rows.mean(axis=0), rank, floor)
    means, loadings, noise = [], [], []
    for k in range(num_components):
        own = rows[labels == k]
        means.append(own.mean(axis=0))
        few = len(own) <= rank + 1  # too few for factors of their own: a narrow copy of the whole
        shape = _factors(own - means[-1], rank, floor) if not few else None
        scale = num_components ** (-2.0 / rows.shape[1])
        own_loadings, own_noise = shape or (pooled[0] * scale**0.5, pooled[1] * scale)
        loadings.append(own_loadings)
        noise.append(np.maximum(own_noise, floor))
    counts = np.bincount(labels, minlength=num_components)
    return _mixture(np.log(counts / len(rows)), means, loadings, noise)


def random_start(
    x: Float[ArrayLike, "N D"],
    num_components: int,
    rank: int,
    *,
    noise_floor: Float[ArrayLike, "*D"] | None = None,
    seed: int,
) -> MFA:
    """Put the components at random examples, all with the covariance of the whole.

    Args and returns as for `kmeans_start`.
    """
    rows = check_rows(x, num_components, rank)
    floor = default_noise_floor(rows) if noise_floor is None else np.asarray(noise_floor)
    chosen = np.random.default_rng(seed).choice(len(rows), num_components, replace=False)
    loadings, noise = _factors(rows - rows.mean(axis=0), rank, floor)
    count = num_components
    return _mixture(
        np.full(count, -np.log(count)), rows[chosen], [loadings] * count, [noise] * count
    )


def _mixture(logits: Any, means: Any, loadings: Any, noise: Any) -> MFA:
    dtype = jax.dtypes.canonicalize_dtype(np.asarray(means).dtype)
    arrays = (logits, means, loadings, np.log(noise))
    return MFA(*(jnp.asarray(np.asarray(array), dtype) for array in arrays))


def _factors(
    residual: npt.NDArray[Any], rank: int, floor: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return principal loadings (D, R), and the variance that they leave, (D,).

    Source: Tipping and Bishop, "Probabilistic principal component analysis" (1999).
    """
    count, dim = residual.shape
    variance = np.maximum(np.mean(residual**2, axis=0), floor)
    if rank == 0:
        return np.zeros((dim, 0)), variance
    wide = residual.astype(np.float64) / np.sqrt(count)
    if count >= dim:
        values, vectors = np.linalg.eigh(wide.T @ wide)
        values, vectors = values[::-1], vectors[:, ::-1]
    else:
        _, scales, rows = np.linalg.svd(wide, full_matrices=False)
        values, vectors = scales**2, rows.T
    kept = min(rank, len(values))
    left = max(dim - kept, 1)
    rest = max(float(variance.sum() - values[:kept].sum()) / left, 0.0)
    loadings = np.zeros((dim, rank))
    loadings[:, :kept] = vectors[:, :kept] * np.sqrt(np.maximum(values[:kept] - rest, 0.0))
    return loadings, np.maximum(variance - np.sum(loadings**2, axis=1), floor)


def kmeans(
    x: Float[ArrayLike, "N D"], num_clusters: int, *, seed: int, restarts: int = RESTARTS
) -> tuple[npt.NDArray[Any], Int[np.ndarray, " N"]]:
    """Cluster examples by Lloyd's algorithm, seeded by k-means++; the best of several starts.

    Args:
        x: examples, shape (N, D).
        num_clusters: K.
        seed: of the seeding.
        restarts: how many starts.

    Returns:
        Centres, shape (K, D), and the cluster of each example, (N,); no cluster is empty.

    Source: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding" (2007).
    """
    rows = np.asarray(x)
    dtype = jax.dtypes.canonicalize_dtype(rows.dtype)
    centre = rows.mean(axis=0)
    centred = (rows - centre).astype(dtype)
    every, count = _padded(centred)
    rng = np.random.default_rng(seed)
    sample = min(len(rows), SEED_ROWS * num_clusters)
    best: Any = None
    for key in jax.random.split(jax.random.key(seed), restarts):
        seeds, own = every, count
        if sample < len(rows):
            seeds, own = _padded(centred[rng.choice(len(rows), sample, False)])
        found = _lloyd(every, count, _plus_plus(key, seeds, own, num_clusters))
        if best is None or float(found[2]) < float(best[2]):
            best = found
    centres, labels = np.asarray(best[0]), np.asarray(best[1])[: len(rows)].copy()
    for k in np.setdiff1d(np.arange(num_clusters), labels):
        # As where examples recur: an example of the largest cluster, whichever is farthest out.
        largest = np.flatnonzero(labels == np.argmax(np.bincount(labels)))
        distance = np.sum((centred[largest] - centres[labels[largest[0]]]) ** 2, axis=1)
        labels[largest[np.argmax(distance)]] = k
    return centres + centre, labels


def _padded(rows: npt.NDArray[Any]) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """Return rows with padding, and how many are none."""
    size = padded_size_of_few(len(rows))
    return jnp.asarray(pad_rows(rows, size)), jnp.int32(len(rows))


@partial(jax.jit, static_argnums=3)
def _plus_plus(
    key: Array, x: Float[Array, "N D"], count: Int[Array, ""], num_clusters: int
) -> Float[Array, "K D"]:
    """Draw centres, each with probability proportional to the squared distance to the nearest."""
    first = x[jax.random.randint(key, (), 0, count, count.dtype)]
    real = jnp.arange(x.shape[0], dtype=count.dtype) < count
    centres = jnp.broadcast_to(first, (num_clusters, x.shape[1]))

    def choose(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centres, nearest = carry
        chosen = jax.random.categorical(jax.random.fold_in(key, k), jnp.log(nearest))
        centre = x[chosen]
        distance = jnp.sum((x - centre[None, :]) ** 2, axis=1)
        return centres.at[k].set(centre), jnp.minimum(nearest, distance)

    nearest = jnp.where(real, jnp.sum((x - first[None, :]) ** 2, axis=1), 0.0)
    return jax.lax.fori_loop(1, num_clusters, choose, (centres, nearest))[0]


@jax.jit
@jax.default_matmul_precision("float32")
def _lloyd(
    x: Float[Array, "N D"], count: Int[Array, ""], centres: Float[Array, "K D"]
) -> tuple[Float[Array, "K D"], Int[Array, " N"], Float[Array, ""]]:
    num_clusters = centres.shape[0]
    real = (jnp.arange(x.shape[0], dtype=count.dtype) < count).astype(x.dtype)

    def assign(centres: Array) -> tuple[Array, Array]:
        def block(rows: Array) -> tuple[Array, Array]:
            scores = rows @ centres.T - 0.5 * jnp.sum(centres**2, axis=1)[None, :]
            return jnp.argmax(scores, axis=1), jnp.sum(rows**2, axis=1) - 2 * jnp.max(
                scores, axis=1
            )

        labels, distances = map_blocks(block, x, BLOCK_ROWS)
        return labels, jnp.sum(real * distances)

    def update(carry: Any) -> Any:
        i, centres, labels, inertia, _ = carry
        counts = jnp.bincount(labels, real, length=num_clusters)
        sums = jax.ops.segment_sum(x * real[:, None], labels, num_clusters)
        fresh = sums / jnp.maximum(counts, 1)[:, None]
        centres = jnp.where((counts > 0)[:, None], fresh, centres)
        labels, better = assign(centres)
        return i + 1, centres, labels, better, inertia - better

    def goes_on(carry: Any) -> Array:
        i, _, _, inertia, gain = carry
        return (i < ROUNDS) & (gain > 1e-4 * inertia)

    labels, inertia = assign(centres)
    start = (jnp.zeros((), jnp.int32), centres, labels, inertia, jnp.full((), jnp.inf, x.dtype))
    _, centres, labels, inertia, _ = jax.lax.while_loop(goes_on, update, start)
    return centres, labels, inertia
