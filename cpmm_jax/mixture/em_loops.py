"""The loops of EM: all examples at each step, mini-batches, or a stream of chunks.

Parameters and statistics are in float64, whatever the setting of JAX; examples are centred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Bool, Float, Int

from cpmm_jax.errors import DataError
from cpmm_jax.mixture import linalg
from cpmm_jax.mixture.em_steps import LEAST_COUNT, Constraints, Statistics, expect, maximise
from cpmm_jax.mixture.mfa import MFA

BLOCK_ROWS = 2048  # examples in a block, unless `chunk_size` says otherwise
DECAY = 0.7  # of the step size of mini-batches, (t + 1)^-DECAY


class EMResult(NamedTuple):
    """A fit by EM.

    Attributes:
        mixture: the fitted `MFA`, in the units of the examples.
        log_likelihood: mean of log p(x) over the examples under `mixture`, in nats.
        history: that mean before each iteration and after the last, shape (iterations + 1,); with
            mini-batches the mean over each epoch as it went.
        iterations: M-steps over all examples; with mini-batches, epochs.
        converged: whether the last gain was below the tolerance.
        reseeded: how many times a component that had died was set up anew.
        moved: how many times a component was moved to where it was worth more.
    """

    mixture: MFA
    log_likelihood: float
    history: npt.NDArray[np.float64]
    iterations: int
    converged: bool
    reseeded: int
    moved: int = 0


class _Loop(NamedTuple):
    """Exact EM under way; `statistics` are those of `mixture`."""

    mixture: MFA
    statistics: Statistics
    history: Float[Array, " I"]
    iterations: Int[Array, ""]
    reseeded: Int[Array, ""]
    gain: Float[Array, ""]


def exact_em(
    x: Array,
    weight: Array,
    start: MFA,
    floor: Any,
    tol: float,
    *,
    constraints: Constraints,
    max_iter: int,
    size: int,
) -> EMResult:
    """Do exact EM in one compiled loop."""
    with jax.enable_x64(True):
        settings = (np.array(floor), np.float64(tol), np.int32(max_iter))
        arguments = jax.tree.map(jnp.asarray, (start, *settings))
        capacity = max(256, 1 << max_iter.bit_length())  # other limits compile nothing anew
        loop = _exact_loop(x, weight, *arguments, constraints, capacity, size)
    iterations = int(loop.iterations)
    history = np.asarray(loop.history)[: iterations + 1]
    return EMResult(
        jax.tree.map(np.asarray, loop.mixture),
        float(history[-1]),
        history,
        iterations,
        float(loop.gain) < tol,
        int(loop.reseeded),
    )


@partial(jax.jit, static_argnames=("constraints", "capacity", "size"))
def _exact_loop(
    x: Array,
    weight: Array,
    start: MFA,
    floor: Array,
    tol: Array,
    max_iter: Array,
    constraints: Constraints,
    capacity: int,
    size: int,
) -> _Loop:
    total = jnp.sum(weight, dtype=jnp.float64)
    # The first round evaluates the start. It need not meet the constraints: the M-step of another
    # round before that makes it.
    first = -1 if constraints == Constraints() else -2
    shapes = jax.eval_shape(partial(expect, size=size), start, x, weight)
    begin = _Loop(
        mixture=start,
        statistics=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
        history=jnp.zeros((capacity,)),
        iterations=jnp.full((), first, jnp.int32),
        reseeded=jnp.zeros((), jnp.int32),
        gain=jnp.full((), jnp.inf),
    )

    def goes_on(loop: _Loop) -> Bool[Array, ""]:
        return (loop.iterations < max_iter) & (loop.gain >= tol)

    def iterate(loop: _Loop) -> _Loop:
        advanced, renewed = _advance(loop.mixture, loop.statistics, floor, constraints)
        begins = loop.iterations == first
        mixture = jax.tree.map(lambda a, b: jnp.where(begins, a, b), start, advanced)
        statistics = expect(mixture, x, weight, size)
        mean, done = statistics.log_prob / total, loop.iterations + 1
        renewed = renewed & ~begins
        unknown = renewed | (done <= 0)
        gain = jnp.where(unknown, jnp.inf, mean - loop.history[jnp.maximum(done - 1, 0)])
        fresh = _Loop(
            mixture,
            statistics,
            loop.history.at[jnp.maximum(done, 0)].set(mean),
            done,
            loop.reseeded + renewed.astype(loop.reseeded.dtype),
            gain,
        )
        # EM never lowers the likelihood; rounding may, at the end, and is not followed.
        kept = loop._replace(gain=gain)
        return jax.tree.map(lambda a, b: jnp.where(gain >= 0, a, b), fresh, kept)

    return jax.lax.while_loop(goes_on, iterate, begin)


def _advance(
    mixture: MFA, statistics: Statistics, floor: Array, constraints: Constraints
) -> tuple[MFA, Bool[Array, ""]]:
    """Do the M-step, or else set a component up anew, and say which."""
    revived, reseed = _reseed(mixture, statistics)
    maximum = maximise(statistics, mixture, floor, constraints)
    return jax.tree.map(lambda a, b: jnp.where(reseed, a, b), revived, maximum), reseed


def _reseed(mixture: MFA, statistics: Statistics) -> tuple[MFA, Bool[Array, ""]]:
    """Set the emptiest component up anew at the example of lowest density, if it has died.

    It gets the shape of the heaviest component and the weight of one example. The others give up
    that weight, which costs 1 nat of the log-likelihood of all examples; so it is done where that
    one example gains more.
    """
    weight = jnp.sum(statistics.count)
    dead, heavy = jnp.argmin(statistics.count), jnp.argmax(statistics.count)
    log_prob, example = statistics.worst
    factors = linalg.factorise_in_dtype(mixture.loadings[heavy], mixture.log_noise[heavy])[0]
    own = -0.5 * (factors.log_det + example.shape[0] * linalg.LOG_TWO_PI) - jnp.log(weight)
    others = jnp.log1p(-1.0 / weight)
    revived = MFA(
        (jax.nn.log_softmax(mixture.logits) + others).at[dead].set(-jnp.log(weight)),
        mixture.means.at[dead].set(example),
        mixture.loadings.at[dead].set(mixture.loadings[heavy]),
        mixture.log_noise.at[dead].set(mixture.log_noise[heavy]),
    )
    gain = own - log_prob + weight * others
    return revived, (statistics.count[dead] < LEAST_COUNT) & (gain > 0.0)


def stepwise_em(
    x: Array,
    weight: Array,
    start: MFA,
    floor: Any,
    tol: float,
    key: Array,
    *,
    constraints: Constraints,
    max_iter: int,
    size: int,
) -> EMResult:
    """Do stepwise EM on mini-batches of `size`, until an epoch gains less than `tol`."""
    with jax.enable_x64(True):
        mixture, floor = jax.tree.map(jnp.asarray, (start, np.array(floor)))
        statistics = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(partial(expect, size=size), mixture, x, weight),
        )
        history, converged = [float(_mean_log_prob(mixture, x, weight, size))], False
        for epoch in range(max_iter):
            own = jax.random.fold_in(key, epoch)
            mixture, statistics, mean = _epoch(
                x, weight, mixture, statistics, floor, own, jnp.asarray(epoch), constraints, size
            )
            history.append(float(mean))
            converged = epoch > 0 and history[-1] - history[-2] < tol
            if converged:
                break
        final = float(_mean_log_prob(mixture, x, weight, size))
    return EMResult(
        jax.tree.map(np.asarray, mixture), final, np.array(history), len(history) - 1, converged, 0
    )


@partial(jax.jit, static_argnames="size")
def _mean_log_prob(mixture: MFA, x: Array, weight: Array, size: int) -> Float[Array, ""]:
    statistics = expect(mixture, x, weight, min(size, BLOCK_ROWS))
    return statistics.log_prob / jnp.sum(weight, dtype=jnp.float64)


@partial(jax.jit, static_argnames=("constraints", "size"))
def _epoch(
    x: Array,
    weight: Array,
    mixture: MFA,
    statistics: Statistics,
    floor: Array,
    key: Array,
    epoch: Array,
    constraints: Constraints,
    size: int,
) -> tuple[MFA, Statistics, Float[Array, ""]]:
    """Go through the examples once, in batches of `size` of a fresh random order."""
    total = x.shape[0]
    batches = -(-total // size)
    order = jnp.resize(jax.random.permutation(key, total), (batches, size))

    def step(carry: tuple[MFA, Statistics], batch: tuple[Array, Array]) -> Any:
        mixture, statistics = carry
        i, rows = batch
        rate = ((epoch * batches + i).astype(jnp.float64) + 1.0) ** -DECAY
        own = weight[rows]
        fresh = expect(mixture, x[rows], own, size)
        scale = jnp.sum(weight, dtype=jnp.float64) / jnp.sum(own, dtype=jnp.float64)
        mean = fresh.log_prob / jnp.sum(own, dtype=jnp.float64)
        statistics = jax.tree.map(
            lambda old, new: (1.0 - rate) * old + rate * scale * new, statistics, fresh
        )
        return (maximise(statistics, mixture, floor, constraints), statistics), mean

    (mixture, statistics), means = jax.lax.scan(
        step, (mixture, statistics), (jnp.arange(batches), order)
    )
    return mixture, statistics, jnp.mean(means)


_expect = jax.jit(expect, static_argnums=3)
_advance_jitted = jax.jit(_advance, static_argnums=3)


def stream_em(
    chunks: Callable[[], Iterable[tuple[Array, Array]]],
    start: MFA,
    floor: Any,
    tol: float,
    *,
    constraints: Constraints,
    max_iter: int,
    size: int,
) -> EMResult:
    """Do exact EM on chunks (examples, weights), read anew for each iteration."""
    with jax.enable_x64(True):
        mixture, floor = jax.tree.map(jnp.asarray, (start, np.array(floor)))
        history: list[float] = []
        reseeded, renewed, gain, before = 0, False, np.inf, mixture
        while True:
            statistics = total = None
            for x, weight in chunks():
                more = _expect(mixture, x, weight, size)
                statistics = more if statistics is None else statistics.merge(more)
                total = float(np.sum(weight)) + (total or 0.0)
            if statistics is None or total is None:
                raise DataError("`chunks` must give at least one array of examples; got none.")
            history.append(float(statistics.log_prob) / total)
            gain = np.inf if renewed or len(history) == 1 else history[-1] - history[-2]
            if gain < 0:  # by rounding, as in `_exact_loop`
                mixture, history = before, history[:-1]
            if gain < tol or len(history) > max_iter:
                break
            before = mixture
            mixture, renewed = _advance_jitted(mixture, statistics, floor, constraints)
            renewed = bool(renewed)
            reseeded += renewed
    return EMResult(
        jax.tree.map(np.asarray, mixture),
        history[-1],
        np.array(history),
        len(history) - 1,
        bool(gain < tol),
        reseeded,
    )
