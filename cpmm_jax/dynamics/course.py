"""Points carried along a vector field, with the log-determinant and the energies of their ways."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cpmm_jax.dynamics.fields import MLPField
from cpmm_jax.dynamics.solve import SUCCESS, SolverConfig, solve
from cpmm_jax.dynamics.trace import Trace, evaluate
from cpmm_jax.errors import ConfigError
from cpmm_jax.mixture.density import BLOCK_ELEMENTS, map_blocks
from cpmm_jax.mixture.linalg import LOG_TWO_PI


class FlowReading(NamedTuple):
    """Points carried along a flow to T positions, and what was gathered on the way.

    Attributes:
        states: the points at the positions, shape (T, N, D).
        log_det: log |det du_v / du_start| of each, the integral of tr(dg/du), shape (T, N); None
            where no trace was asked for.
        kinetic: integral of |g|^2 along the way, shape (T, N); None where not asked for.
        jacobian: integral of |dg/du|_F^2 along the way, shape (T, N); None where not asked for.
        num_steps: steps that the solver took, refused ones included; the most of any block of rows.
        num_evaluations: evaluations of the field in them, without those that choose the first step
            size and the iterations of implicit solvers.
        result: 0 for success, otherwise a code that `dynamics.solve.check_result` explains.
    """

    states: Float[Array, "T N D"]
    log_det: Float[Array, "T N"] | None
    kinetic: Float[Array, "T N"] | None
    jacobian: Float[Array, "T N"] | None
    num_steps: Int[Array, ""]
    num_evaluations: Int[Array, ""]
    result: Int[Array, ""]

    @property
    def ok(self) -> Bool[Array, ""]:
        """Whether the solve succeeded."""
        return self.result == SUCCESS


def carry_points(
    field: MLPField,
    u: Float[Array, "N D"],
    positions: Float[Array, " T"],
    start: Float[Array, ""] | float,
    solver: SolverConfig,
    *,
    trace: Trace | None = None,
    key: Array | None = None,
    energies: bool = False,
    chunk_size: int | None = None,
) -> FlowReading:
    """Solve du/dv = field(v, u) from `start` to the last of `positions`, and read at each of them.

    The rows of a block are one state and share the solver's steps.

    Args:
        field: the field of one point.
        u: points at `start`, shape (N, D).
        positions: where to read, going away from `start`, in [0, 1], shape (T,).
        start: where the points are.
        solver: how to solve.
        trace: how tr(dg/du) is computed; None to integrate the points alone.
        key: PRNG key for a trace that is estimated.
        energies: whether to integrate |g|^2 and |dg/du|_F^2 along; needs a trace.
        chunk_size: rows solved at a time; None for a number that fits the memory.

    Returns:
        A `FlowReading`. A failed solve is told in its `result`.

    Raises:
        ConfigError: energies without a trace, or a random trace without a key.
    """
    if energies and trace is None:
        raise ConfigError(
            "`trace` must be given with energies=True, which need derivatives of the field; "
            "got None; pass ExactTrace() or HutchinsonTrace()."
        )
    positions, start = jnp.asarray(positions, u.dtype), jnp.asarray(start, u.dtype)
    span = positions[-1] - start
    # The span is 0 where nothing moves; any time will do then, but not 0 / 0.
    times = jnp.clip((positions - start) / jnp.where(span == 0, 1.0, span), 0.0, 1.0)
    noise = None if trace is None else trace.draw(key, u.shape, u.dtype)

    def solve_block(rows: tuple[Array, Array | None]) -> tuple[_State, Array, Array]:
        u, noise = rows
        zeros = jnp.zeros(len(u), u.dtype)
        log_det, energy = zeros if trace else None, zeros if energies else None
        initial, course = _State(u, log_det, energy, energy), _Course(field, noise, start, span)
        solution = solve(partial(_move, trace=trace), initial, times, solver, args=course)
        by_row = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), solution.states)
        # One number for the block, told by each of its rows.
        steps, result = (jnp.full(len(u), n) for n in (solution.num_steps, solution.result))
        return by_row, steps, result

    directions = trace.num_directions(field, u.shape[1], energies) if trace else 0
    size = _block_size(field, len(u), directions, chunk_size)
    by_row, steps, result = map_blocks(solve_block, (u, noise), size)
    states: _State = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), by_row)
    most = jnp.max(steps)
    return FlowReading(
        states.u,
        states.log_det,
        states.kinetic,
        states.jacobian,
        most,
        _evaluations(solver.solver, most),
        jnp.max(result),
    )


def latent_log_prob(reading: FlowReading) -> Float[Array, " N"]:
    """Return log N(u_1; 0, I) + log_det in nats, of a reading whose last position is v = 1."""
    assert reading.log_det is not None
    latent = reading.states[-1]
    square = jnp.sum(latent**2, axis=-1)
    return reading.log_det[-1] - 0.5 * (square + latent.shape[-1] * LOG_TWO_PI)


class _State(NamedTuple):
    """What is integrated: points, and the integrals along their ways (None: not wanted)."""

    u: Float[Array, "N D"]
    log_det: Float[Array, " N"] | None
    kinetic: Float[Array, " N"] | None
    jacobian: Float[Array, " N"] | None


class _Course(NamedTuple):
    """The field, the directions of a random trace, and the way: v = start + span * s."""

    field: Any
    noise: Float[Array, "N S D"] | None
    start: Float[Array, ""]
    span: Float[Array, ""]


def _move(s: Any, state: _State, course: _Course, *, trace: Trace | None) -> _State:
    """Right-hand side in s, which runs from 0 to 1 whatever the way is."""
    v = course.start + course.span * s

    if trace is None:
        return _State(course.span * evaluate(course.field, v, state.u), None, None, None)
    value, divergence, frobenius = trace(
        course.field, v, state.u, course.noise, frobenius=state.kinetic is not None
    )
    rates = _State(course.span * value, course.span * divergence, None, None)
    if frobenius is None:
        return rates
    length = jnp.abs(course.span)  # energies grow in either direction
    kinetic = length * jnp.sum(value**2, axis=-1)
    return rates._replace(kinetic=kinetic, jacobian=length * frobenius)


def _evaluations(solver: diffrax.AbstractSolver, num_steps: Int[Array, ""]) -> Int[Array, ""]:
    tableau = getattr(solver, "tableau", None)
    if tableau is None:
        return num_steps + int(isinstance(solver, diffrax.ReversibleHeun))
    # Where the last slope of a step is the first of the next, one comes before all steps.
    shared = int(tableau.fsal)
    return shared + num_steps * (tableau.num_stages - shared)


def _block_size(field: MLPField, rows: int, directions: int, chunk_size: int | None) -> int:
    if chunk_size is not None and chunk_size < 1:
        raise ConfigError(
            f"`chunk_size` must be at least 1 (rows solved at a time); got {chunk_size}. "
            "Leave it out for a number that fits the memory."
        )
    widest = max(max(layer.kernel.shape) for layer in (*field.layers, field.output))
    fitting = max(1, BLOCK_ELEMENTS // ((1 + directions) * widest))
    return max(1, min(fitting if chunk_size is None else chunk_size, rows))
