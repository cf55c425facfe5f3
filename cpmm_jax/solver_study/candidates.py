"""Candidates: a grid of solver settings, each said in a few words, and its evaluations counted."""

from __future__ import annotations

import diffrax

from cpmm_jax.dynamics.solve import SolverConfig

_MOST_EVALUATIONS = 110  # of a candidate with equal steps: beyond, other solvers are cheaper


def describe(config: SolverConfig) -> str:
    """Say settings in a few words.

    Example:
        >>> describe(SolverConfig(num_steps=8))
        'ReversibleHeun, 8 steps'
        >>> describe(SolverConfig(solver=diffrax.Tsit5(), num_steps=None, rtol=1e-4, atol=1e-4))
        'Tsit5, tolerance 0.0001'
    """
    parts = [type(config.solver).__name__]
    if config.controller is not None:
        parts.append(type(config.controller).__name__)
    elif config.num_steps is not None:
        parts.append(f"{config.num_steps} steps")
    elif config.rtol == config.atol:
        parts.append(f"tolerance {config.rtol:g}")
    else:
        parts.append(f"rtol {config.rtol:g}, atol {config.atol:g}")
    if isinstance(config.adjoint, diffrax.BacksolveAdjoint):
        back = config.adjoint.kwargs.get("solver")
        parts.append("backsolve" + ("" if back is None else f" by {type(back).__name__}"))
    elif isinstance(config.adjoint, diffrax.RecursiveCheckpointAdjoint):
        count = config.adjoint.checkpoints
        parts.append("checkpoints" if count is None else f"{count} checkpoints")
    elif config.adjoint is not None:
        parts.append(type(config.adjoint).__name__.removesuffix("Adjoint").lower())
    return ", ".join(parts)


def default_candidates() -> dict[str, SolverConfig]:
    """Return a grid of solvers, steps, tolerances and adjoints by name, the most promising first.

    Nine explicit solvers in 4, 8, 16 and 32 equal steps, as far as these are cheap; four of them at
    tolerances of 1e-2 to 1e-6; and some equal steps whose gradient is taken otherwise: by recursive
    checkpointing with room for 4 steps, by `DirectAdjoint`, and by an ODE backwards
    (`BacksolveAdjoint`).

    Example:
        >>> list(default_candidates())[:2]
        ['ReversibleHeun, 8 steps', 'Midpoint, 8 steps']
    """
    heun, midpoint, tsit5 = diffrax.ReversibleHeun(), diffrax.Midpoint(), diffrax.Tsit5()
    few = diffrax.RecursiveCheckpointAdjoint(checkpoints=4)
    direct, back = diffrax.DirectAdjoint(), diffrax.BacksolveAdjoint(solver=tsit5)
    solvers: list[diffrax.AbstractSolver] = [heun, midpoint, tsit5, diffrax.Bosh3()]
    solvers += [diffrax.Heun(), diffrax.Ralston()]
    solvers += [diffrax.Euler(), diffrax.Dopri5(), diffrax.Dopri8()]
    equal = [
        config
        for steps in (8, 4, 16, 32)
        for config in (SolverConfig(solver=solver, num_steps=steps) for solver in solvers)
        if (count_evaluations(config, steps) or 0) <= _MOST_EVALUATIONS
    ]
    adaptive = [
        SolverConfig(solver=solver, num_steps=None, rtol=tolerance, atol=tolerance)
        for solver in (tsit5, diffrax.Bosh3(), diffrax.Dopri5(), diffrax.Dopri8())
        for tolerance in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    ]
    adjoints = [
        SolverConfig(solver=solver, num_steps=steps, adjoint=adjoint)
        for solver, steps in ((heun, 16), (midpoint, 8), (tsit5, 4))
        for adjoint in (few, back, direct)
    ]
    first = [
        *(SolverConfig(solver=solver, num_steps=8) for solver in (heun, midpoint)),
        SolverConfig(num_steps=32),
        SolverConfig(solver=tsit5, num_steps=4),
        SolverConfig(num_steps=4),
        SolverConfig(solver=midpoint, num_steps=4),
        SolverConfig(solver=diffrax.Bosh3(), num_steps=4),
        *adaptive[:5],  # one program
        *adjoints[:2],
    ]
    return {describe(config): config for config in (*first, *equal, *adaptive, *adjoints)}


def count_evaluations(config: SolverConfig, num_steps: int) -> int | None:
    """Return how often the field is evaluated forwards in `num_steps` steps, rejected ones too.

    A Runge-Kutta method evaluates it once for each stage; where the first stage is the last of the
    step before, one less after the first step. Reversible Heun evaluates it once to start and once
    in each step. Adaptive solves evaluate nothing more: diffrax starts them with a step of 0.01.
    What the gradient evaluates again on its way back is not counted.

    Returns:
        The number; None for a solver that is not explicit.

    Example:
        >>> count_evaluations(SolverConfig(num_steps=16), 16)
        17
        >>> count_evaluations(SolverConfig(solver=diffrax.Tsit5(), num_steps=4), 4)
        25
    """
    solver = config.solver
    if isinstance(solver, diffrax.ReversibleHeun):
        return 1 + num_steps
    if isinstance(solver, diffrax.Euler):
        return num_steps
    if not isinstance(solver, diffrax.AbstractERK):
        return None
    tableau = solver.tableau
    if not isinstance(tableau, diffrax.ButcherTableau):
        return None
    shared = 1 if tableau.fsal else 0  # the first stage is the last of the step before
    return num_steps * (tableau.num_stages - shared) + shared


def is_adaptive(config: SolverConfig) -> bool:
    """Return whether the steps follow tolerances."""
    if config.controller is None:
        return config.num_steps is None
    return isinstance(config.controller, diffrax.PIDController)
