"""How a state moves: the settings of a solve, and the only call of `diffrax.diffeqsolve`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from cpmm_jax.errors import ConfigError, SolverError

SUCCESS, STEPS_EXHAUSTED, NOT_FINITE, FAILED = range(4)

_FAILURES = {
    STEPS_EXHAUSTED: "the solver used up `max_steps` steps before it reached the last time. "
    "Raise `max_steps`, loosen `rtol` and `atol`, or set `num_steps` for steps of fixed size; "
    "where the state grows without bound, use a lower learning rate or a smaller `output_scale`",
    NOT_FINITE: "the state became infinite or NaN. Use more steps (`num_steps`) or tighter "
    "tolerances, a lower learning rate, or a field with smaller `output_scale`",
    FAILED: "the solver or its step-size controller stopped. Loosen `rtol` and `atol`, or set "
    "`num_steps` for steps of fixed size",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class SolverConfig:
    """How an ODE over [0, 1] is solved.

    The default, 16 equal steps of the reversible Heun method, evaluates the field 17 times. It was
    the fastest of those tried at equal test log-likelihood; pseudotimes between two steps are read
    by linear interpolation, in training and in extraction alike, so the extracted mixture is the
    trained one.

    Equal steps of an explicit solver, without an `adjoint`, are a `lax.scan` over the solver's
    step, with every step kept for the gradient: `diffeqsolve` gives the same numbers, but is made
    for loops whose length is not known, and takes 1.3 to 1.4 times as long to run and three times
    as long to compile (`python -m benchmarks.training_step --full`).

    Attributes:
        solver: any diffrax solver; an implicit one takes steps of fixed size only with a root
            finder that has tolerances of its own.
        num_steps: number of equal steps; None for steps chosen by `rtol` and `atol`.
        rtol: relative tolerance of adaptive steps.
        atol: absolute tolerance of adaptive steps.
        controller: any diffrax step-size controller; replaces `num_steps`, `rtol` and `atol`.
        adjoint: any diffrax adjoint, how gradients are taken; None for reverse mode through equal
            steps, and recursive checkpointing through adaptive ones. Where memory is short, take
            `RecursiveCheckpointAdjoint(checkpoints=4)`, say. The gradient of `BacksolveAdjoint` is
            as accurate as its own solve backwards: give it a solver of high order,
            `BacksolveAdjoint(solver=diffrax.Tsit5())`; with `ReversibleHeun` in 16 steps it is
            some ten percent off.
        max_steps: most steps an adaptive solve may take.

    Raises:
        ConfigError: a number of steps below 1, or a tolerance that is not positive.

    Example:
        >>> import diffrax
        >>> SolverConfig(solver=diffrax.Tsit5(), num_steps=None, rtol=1e-4, atol=1e-6).max_steps
        4096
    """

    solver: diffrax.AbstractSolver = field(default_factory=diffrax.ReversibleHeun)
    num_steps: int | None = 16
    rtol: float = 1e-3
    atol: float = 1e-6
    controller: diffrax.AbstractStepSizeController | None = None
    adjoint: diffrax.AbstractAdjoint | None = None
    max_steps: int = 4096

    def __post_init__(self) -> None:
        for name in ("num_steps", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"`{name}` must be at least 1; got {value}.")
        for name in ("rtol", "atol"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`{name}` must be positive; got {getattr(self, name)}.")

    # A model holds its SolverConfig as static data, which JAX compares and hashes. Some diffrax
    # objects hold dictionaries or arrays and have no hash, but all are pytrees with a repr that is
    # complete but for the contents of arrays.
    @cached_property
    def _identity(self) -> tuple[object, ...]:
        leaves = jax.tree.leaves((self.solver, self.controller, self.adjoint))
        arrays = (np.asarray(leaf) for leaf in leaves if isinstance(leaf, (np.ndarray, jax.Array)))
        return repr(self), *((value.dtype, value.tobytes()) for value in arrays)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SolverConfig) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


class Solution(NamedTuple):
    """A solved ODE.

    Attributes:
        states: the state at the requested times, each leaf with a leading axis of length T.
        num_steps: steps taken, a scalar.
        result: 0 for success, otherwise what went wrong; see `check_result`.
    """

    states: PyTree
    num_steps: Int[Array, ""]
    result: Int[Array, ""]

    @property
    def ok(self) -> Bool[Array, ""]:
        """Whether the solve succeeded."""
        return self.result == SUCCESS


def solve(
    vector_field: Callable[[Any, PyTree, Any], PyTree],
    initial_state: PyTree,
    times: Float[Array, " T"],
    config: SolverConfig,
    args: Any = None,
) -> Solution:
    """Solve dh/dt = vector_field(t, h, args) over [0, 1] and read h at `times`.

    Args:
        vector_field: a module-level function; what it learns comes in `args`, never by closure.
        initial_state: h(0), a pytree of arrays.
        times: increasing, in [0, 1], shape (T,).
        config: solver, steps, adjoint.
        args: a pytree handed to `vector_field`.

    Returns:
        A `Solution`. A failed solve is no exception here, since this may run under `jit`: it is
        told in `result`, and the states are then not to be used.
    """
    solver, num_steps = config.solver, config.num_steps
    explicit = not isinstance(solver, diffrax.AbstractImplicitSolver)
    single = solver.term_structure is diffrax.AbstractTerm
    chosen = config.controller is not None or config.adjoint is not None
    if num_steps is not None and explicit and single and not chosen:
        states, steps, failure = _scan_equal_steps(
            vector_field, initial_state, times, solver, num_steps, args
        )
    else:
        states, steps, failure = _diffeqsolve(vector_field, initial_state, times, config, args)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(v)) for v in jax.tree.leaves(states)]))
    result = jnp.where((failure == SUCCESS) & ~finite, NOT_FINITE, failure)
    return Solution(states, steps, result)


def _scan_equal_steps(
    vector_field: Callable[[Any, PyTree, Any], PyTree],
    initial_state: PyTree,
    times: Float[Array, " T"],
    solver: diffrax.AbstractSolver,
    num_steps: int,
    args: Any,
) -> tuple[PyTree, Int[Array, ""], Int[Array, ""]]:
    terms = diffrax.ODETerm(vector_field)
    grid = jnp.arange(num_steps + 1, dtype=times.dtype) / num_steps

    def step(carry: tuple[PyTree, PyTree], between: tuple[Array, Array]) -> Any:
        state, memory = carry
        state, _, dense, memory, result = solver.step(
            terms, *between, state, args, memory, made_jump=False
        )
        return (state, memory), (dense, result == diffrax.RESULTS.successful)

    memory = solver.init(terms, grid[0], grid[1], initial_state, args)
    steps = (grid[:-1], grid[1:])
    _, (dense, succeeded) = jax.lax.scan(step, (initial_state, memory), steps)

    def read(time: Array) -> PyTree:
        index = jnp.clip((time * num_steps).astype(jnp.int32), 0, num_steps - 1)
        # Rounding may put a time one step too far; the interpolation is continuous there.
        own = jax.tree.map(lambda leaf: leaf[index], dense)
        between = {"t0": grid[index], "t1": grid[index + 1]}
        return solver.interpolation_cls(**between, **own).evaluate(time)

    failure = jnp.where(succeeded.all(), jnp.int32(SUCCESS), jnp.int32(FAILED))
    return jax.vmap(read)(times), jnp.int32(num_steps), failure


def _diffeqsolve(
    vector_field: Callable[[Any, PyTree, Any], PyTree],
    initial_state: PyTree,
    times: Float[Array, " T"],
    config: SolverConfig,
    args: Any,
) -> tuple[PyTree, Int[Array, ""], Int[Array, ""]]:
    controller, dt0, max_steps = config.controller, None, config.max_steps
    if controller is None and config.num_steps is not None:
        controller, dt0 = diffrax.ConstantStepSize(), 1.0 / config.num_steps
        max_steps = config.num_steps + 1  # one more, should rounding leave a last tiny step
    elif controller is None:
        controller = diffrax.PIDController(rtol=config.rtol, atol=config.atol)
    elif isinstance(controller, diffrax.ConstantStepSize):
        dt0 = 1.0 / (config.num_steps or 16)
    # Diffrax gets plain arrays: Flax Modules cannot be rebuilt inside the linear solves of implicit
    # solvers (forward mode, jax 0.11, flax 0.12.12).
    leaves, structure = jax.tree.flatten(args)

    def plain_field(time: Any, state: PyTree, leaves: Any) -> PyTree:
        return vector_field(time, state, jax.tree.unflatten(structure, leaves))

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(plain_field),
        config.solver,
        t0=0.0,
        t1=1.0,
        dt0=dt0,
        y0=initial_state,
        args=leaves,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=controller,
        adjoint=config.adjoint or diffrax.RecursiveCheckpointAdjoint(),
        max_steps=max_steps,
        throw=False,
    )
    exhausted = solution.result == diffrax.RESULTS.max_steps_reached
    failed = solution.result != diffrax.RESULTS.successful
    failure = jnp.select(
        [exhausted, failed], [jnp.int32(STEPS_EXHAUSTED), jnp.int32(FAILED)], jnp.int32(SUCCESS)
    )
    return solution.ys, solution.stats["num_steps"], failure


def check_result(result: Int[Array, ""]) -> None:
    """Raise a `SolverError` that names the failure and a remedy, unless `result` is success.

    Args:
        result: the `result` of a `Solution`, a concrete number (not inside `jit`).
    """
    code = int(result)
    if code != SUCCESS:
        raise SolverError(f"The ODE could not be solved: {_FAILURES[code]}.")
