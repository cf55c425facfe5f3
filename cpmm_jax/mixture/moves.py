"""Moves that EM cannot make by itself: components taken to where they are worth more.

EM ends in the nearest optimum, where one component may lie across two groups while two share a
third. Both can be told from the responsibilities, and a move is kept only where EM, going on from
it, ends higher.

Source: Ueda, Nakano, Ghahramani and Hinton, "SMEM algorithm for mixture models" (2000), whose
split-and-merge this simplifies: a component is taken away, at a cost that is known exactly, instead
of two being merged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cpmm_jax.mixture import density, linalg
from cpmm_jax.mixture.density import Components
from cpmm_jax.mixture.em_loops import EMResult
from cpmm_jax.mixture.mfa import MFA

MOST_ROWS = 10_000  # by which moves are judged
CANDIDATES = 5  # components to take, and components to split, that are combined
CUTS = (-0.6, 0.0, 0.6)  # standard deviations from the mean where a component may be cut
POWER_ROUNDS = 10  # of the search for a component's longest axis


class Prospects(NamedTuple):
    """What could be gained and lost, in nats over the examples, for each component.

    Attributes:
        loss: of the log-likelihood, when the component is taken away, shape (K,).
        gain: when it is cut in two across its longest axis, by the examples on either side, (K,);
            minus infinity for one without examples.
        axis: that axis, of length one, (K, D).
        share: of the component's examples on the upper side, (K,).
        halves: means of the lower and the upper side, (K, 2, D).
        within: variance along the axis that is left within the sides, a part of the whole, (K,).
    """

    loss: Float[Array, " K"]
    gain: Float[Array, " K"]
    axis: Float[Array, "K D"]
    share: Float[Array, " K"]
    halves: Float[Array, "K 2 D"]
    within: Float[Array, " K"]


def improve(
    run: Callable[[MFA], EMResult],
    result: EMResult,
    x: Float[Array, "N D"],
    weight: Float[Array, " N"],
    tol: float,
    *,
    tries: int,
    seed: int,
) -> EMResult:
    """Move components, one after the other, as long as EM then ends higher.

    Args:
        run: EM from a mixture on.
        result: where EM has ended.
        x: examples, about the origin.
        weight: of each example.
        tol: gain in nats below which a move is not kept.
        tries: most moves tried.
        seed: of the choice of rows by which moves are judged, where there are many.
    """
    rows: Int[np.ndarray, " n"] = np.arange(len(x))
    if len(rows) > MOST_ROWS:
        rows = np.random.default_rng(seed).choice(rows, MOST_ROWS, replace=False)
    some, own = x[rows], weight[rows]
    pending = _candidates(result.mixture, some, own)
    for _ in range(tries):
        if not pending:
            break
        found = run(pending.pop(0))
        if found.log_likelihood > result.log_likelihood + tol:
            result = _joined(result, found)
            pending = _candidates(result.mixture, some, own)
    return result


def _joined(before: EMResult, after: EMResult) -> EMResult:
    higher = after.history[after.history > before.log_likelihood]
    return after._replace(
        history=np.concatenate([before.history, higher]),
        iterations=before.iterations + after.iterations,
        reseeded=before.reseeded + after.reseeded,
        moved=before.moved + 1,
    )


def _candidates(mixture: MFA, x: Array, weight: Array) -> list[MFA]:
    """Return the mixtures after the most promising moves, best first."""
    found = jax.tree.map(np.asarray, prospects(mixture, x, weight))
    taken = np.argsort(found.loss)[:CANDIDATES]
    split = np.argsort(-found.gain)[:CANDIDATES]
    split = split[np.isfinite(found.gain[split])]  # of one without examples there is no half
    pairs = [(found.gain[k] - found.loss[i], i, k) for i in taken for k in split if i != k]
    return [_moved(mixture, found, i, k) for _, i, k in sorted(pairs, reverse=True)]


def _moved(mixture: MFA, found: Prospects, taken: int, split: int) -> MFA:
    """Set `taken` and `split` to the two sides of `split`."""
    logits, means, loadings, log_noise = (
        np.array(leaf, np.float64) for leaf in jax.tree.leaves(mixture)
    )
    axis, within = found.axis[split], max(float(found.within[split]), 1e-3)
    share = np.clip(found.share[split], 1e-3, 1 - 1e-3)
    sides = (
        (split, 1 - share, found.halves[split, 0]),
        (taken, share, found.halves[split, 1]),
    )
    weight = logits[split]
    # What is left of the component once its variance along the axis has shrunk to that within.
    shape = loadings[split] - (1 - np.sqrt(within)) * np.outer(axis, axis @ loadings[split])
    noise = log_noise[split] + np.log(np.maximum(1 - (1 - within) * axis**2, within))
    for k, part, mean in sides:
        logits[k], means[k] = weight + np.log(part), mean
        loadings[k], log_noise[k] = shape, noise
    return mixture.replace(  # type: ignore[attr-defined, no-any-return]
        logits=logits, means=means, loadings=loadings, log_noise=log_noise
    )


@jax.jit
@jax.default_matmul_precision("float32")
def prospects(mixture: MFA, x: Float[Array, "N D"], weight: Float[Array, " N"]) -> Prospects:
    """Estimate what taking or splitting each component would do to the log-likelihood.

    Taking one away costs the sum of log p - log(p - w_k N_k), less what the other weights gain. A
    cut is judged in one dimension, by the variances of the two sides against that of the whole.
    """
    leaves = (leaf.astype(x.dtype) for leaf in jax.tree.leaves(mixture))
    logits, means, loadings, log_noise = leaves
    log_weights = jax.nn.log_softmax(logits)
    components = Components(log_weights, means, loadings, log_noise)
    factors = jax.vmap(linalg.factorise)(loadings, log_noise)
    joint = density.matrix_product_form(x, components, factors).log_prob
    responsibility = jax.nn.softmax(joint, axis=1)
    tiny = float(jnp.finfo(x.dtype).tiny)
    others = jnp.log(jnp.maximum(1 - responsibility, float(jnp.finfo(x.dtype).eps)))
    rest = jnp.log(jnp.maximum(1 - jnp.exp(log_weights), tiny))
    loss = weight @ (rest[None, :] - others)

    r = responsibility * weight[:, None]
    count = jnp.maximum(jnp.sum(r, axis=0), tiny)
    centre = (r.T @ x) / count[:, None]

    def along(axis: Array) -> Array:
        return x @ axis.T - jnp.sum(centre * axis, axis=1)[None, :]

    def turn(_: int, axis: Array) -> Array:
        weighted = r * along(axis)
        turned = weighted.T @ x - jnp.sum(weighted, axis=0)[:, None] * centre
        return turned / jnp.maximum(jnp.linalg.norm(turned, axis=1, keepdims=True), tiny)

    spread = jnp.sqrt((r.T @ (x * x)) / count[:, None])
    # A component without examples has no spread, and its axis would be 0 / 0.
    start = spread / jnp.maximum(jnp.linalg.norm(spread, axis=1, keepdims=True), tiny)
    axis = jax.lax.fori_loop(0, POWER_ROUNDS, turn, start)
    position = along(axis)
    variance = jnp.maximum(jnp.sum(r * position**2, axis=0) / count, tiny)

    def cut(at: Array) -> tuple[Array, ...]:
        upper = (position > at * jnp.sqrt(variance)[None, :]).astype(x.dtype) * r
        masses, variances, halves = jax.vmap(partial(_side, x, position))(
            jnp.stack([r - upper, upper])
        )
        share = masses / count[None, :]
        gain = 0.5 * jnp.sum(masses * (jnp.log(variance)[None, :] - jnp.log(variances)), axis=0)
        gain = gain + jnp.sum(masses * jnp.log(jnp.maximum(share, tiny)), axis=0)
        within = jnp.sum(share * variances, axis=0) / variance
        return gain, share[1], jnp.moveaxis(halves, 0, 1), jnp.minimum(within, 1.0)

    cuts = jax.lax.map(cut, jnp.asarray(CUTS, x.dtype))
    best, k = jnp.argmax(cuts[0], axis=0), jnp.arange(len(count))
    gain, share, halves, within = (leaf[best, k] for leaf in cuts)
    gain = jnp.where(jnp.sum(r, axis=0) > 0, gain, -jnp.inf)
    return Prospects(loss, gain, axis, share, halves, within)


def _side(x: Array, position: Array, r: Array) -> tuple[Array, Array, Array]:
    """Return mass, variance along the axis, and mean of the examples weighted by r."""
    tiny = float(jnp.finfo(x.dtype).tiny)
    mass = jnp.sum(r, axis=0)
    safe = jnp.maximum(mass, tiny)
    mean = jnp.sum(r * position, axis=0) / safe
    variance = jnp.sum(r * (position - mean[None, :]) ** 2, axis=0) / safe
    floor = 1e-6 * jnp.sum(r * position**2, axis=0) / safe + tiny
    return mass, jnp.maximum(variance, floor), (r.T @ x) / safe[:, None]
