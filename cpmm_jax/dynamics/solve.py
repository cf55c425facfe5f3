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

from cpmm_jax.dynamics.equal_steps import are_written_out, solve_equal_steps
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

    Equal steps of an explicit Runge-Kutta method or of the reversible Heun method, without an
    `adjoint`, are a `lax.scan` with its stages written out and every step kept for the gradient;
    the gradient of the field's kernels is formed once, after the loop, and where a perceptron has
    fewer hidden units than the state has entries, the loop runs over them
    (`dynamics.hidden_units`). `diffeqsolve` gives the same numbers, but is made for loops whose
    length is not known: it takes longer to run and three times as long to compile
    (`python -m benchmarks.training_step --full`).

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

    @property
    def is_written_out(self) -> bool:
        """Whether the solve is a scan over equal steps: no adjoint, no controller, explicit."""
        chosen = self.controller is not None or self.adjoint is not None
        return self.num_steps is not None and are_written_out(self.solver) and not chosen

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
    taps: Callable[[tuple[int, ...]], Any] | None = None,
) -> Solution:
    """Solve dh/dt = vector_field(t, h, args) over [0, 1] and read h at `times`.

    Args:
        vector_field: a module-level function; what it learns comes in `args`, never by closure.
        initial_state: h(0), a pytree of arrays.
        times: increasing, in [0, 1], shape (T,).
        config: solver, steps, adjoint.
        args: a pytree handed to `vector_field`.
        taps: makes taps for the calls of `vector_field`, which then gets them as a fourth argument;
            see `dynamics.deferred`. Used where the steps are equal and no adjoint is chosen.

    Returns:
        A `Solution`. A failed solve is no exception here, since this may run under `jit`: it is
        told in `result`, and the states are then not to be used.
    """
    # Times in the dtype of the state: steps computed from others would promote it, step by step.
    times = jnp.asarray(times, jnp.result_type(*jax.tree.leaves(initial_state)))
    if config.is_written_out:
        assert config.num_steps is not None

        def evaluate(t: Any, state: PyTree, tap: Any) -> PyTree:
            return vector_field(t, state, args, *tap)

        make_taps = (lambda lead: ()) if taps is None else (lambda lead: (taps(lead),))
        states = solve_equal_steps(
            evaluate, initial_state, times, config.solver, config.num_steps, make_taps
        )
        steps, failure = jnp.int32(config.num_steps), jnp.int32(SUCCESS)
    else:
        states, steps, failure = _diffeqsolve(vector_field, initial_state, times, config, args)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(v)) for v in jax.tree.leaves(states)]))
    result = jnp.where((failure == SUCCESS) & ~finite, NOT_FINITE, failure)
    return Solution(states, steps, result)


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
