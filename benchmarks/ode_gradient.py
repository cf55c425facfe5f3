"""The gradient through the ODE alone, beside a bare `jax.lax.scan` over Runge-Kutta steps.

A part of `benchmarks.training_step`. The error of each is taken against a solution in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import cpmm_jax as cpmm
from benchmarks.report import Table
from cpmm_jax.dynamics.solve import SolverConfig
from cpmm_jax.dynamics.trajectory import StratifiedTimes, TrajectoryState, integrate
from cpmm_jax.mixture.mfa import MFA
from cpmm_jax.solver_study.timing import Timing, interleave

DEFAULT = f"default: {type(SolverConfig().solver).__name__}, {SolverConfig().num_steps} steps"
HEUN = SolverConfig(solver=diffrax.Heun(), num_steps=16)


def of_timing(timings: Mapping[str, Timing], name: str) -> dict[str, float]:
    """Return one timing as plain numbers, with its ratio to the first."""
    first = next(iter(timings.values()))
    return asdict(timings[name]) | {"ratio": timings[name].median / first.median}


def relative_error(value: Any, reference: Any) -> float:
    """Return |value - reference| / |reference|, the norms over all leaves."""
    pairs = zip(jax.tree.leaves(value), jax.tree.leaves(reference), strict=True)
    parts = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    error = sum(float(np.sum((a - b) ** 2)) for a, b in parts)
    return float(np.sqrt(error / sum(float(np.sum(b**2)) for _, b in parts)))


Solve = Callable[[Any, TrajectoryState, jax.Array], MFA]


def by_library(config: SolverConfig) -> Solve:
    """Return our solve: (field, initial, times) to components (C, T, ...)."""

    def solve(field: Any, initial: TrajectoryState, times: jax.Array) -> MFA:
        return integrate(field, initial, times, config).states

    return solve


def heun(f: Any, t: Any, dt: float, h: jax.Array) -> jax.Array:
    first = f(t, h)
    return h + 0.5 * dt * (first + f(t + dt, h + dt * first))


def midpoint(f: Any, t: Any, dt: float, h: jax.Array) -> jax.Array:
    return h + dt * f(t + 0.5 * dt, h + 0.5 * dt * f(t, h))


def runge_kutta_4(f: Any, t: Any, dt: float, h: jax.Array) -> jax.Array:
    first = f(t, h)
    second = f(t + 0.5 * dt, h + 0.5 * dt * first)
    third = f(t + 0.5 * dt, h + 0.5 * dt * second)
    fourth = f(t + dt, h + dt * third)
    return h + dt / 6 * (first + 2 * second + 2 * third + fourth)


def by_scan(scheme: Any, num_steps: int) -> Solve:
    """Return the barest solve: a scan over equal steps, read by linear interpolation; S = 1."""

    def solve(field: Any, initial: TrajectoryState, times: jax.Array) -> MFA:
        states = jax.tree.map(lambda leaf: leaf[:, 0], initial)
        _, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], states))
        start = jax.vmap(lambda state: ravel_pytree(state)[0])(states)
        f = jax.vmap(field, (None, 0))

        def step(h: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = scheme(f, j / num_steps, 1.0 / num_steps, h)
            return h, h

        _, ends = jax.lax.scan(step, start, jnp.arange(num_steps))
        path = jnp.concatenate([start[None], ends])
        position = times * num_steps
        left = jnp.minimum(position.astype(jnp.int32), num_steps - 1)
        weight = (position - left)[:, None, None]
        read = path[left] * (1 - weight) + path[left + 1] * weight
        return jax.vmap(jax.vmap(unravel))(jnp.moveaxis(read, 0, 1)).component

    return solve


REFERENCE = by_scan(runge_kutta_4, 256)
SHORT_SOLVES = {
    DEFAULT: by_library(SolverConfig()),
    "bare scan: Heun, 16 steps": by_scan(heun, 16),
}
FULL_SOLVES = SHORT_SOLVES | {
    "bare scan: midpoint, 16 steps": by_scan(midpoint, 16),
    "default by diffeqsolve, 16 checkpoints": by_library(
        SolverConfig(adjoint=diffrax.RecursiveCheckpointAdjoint(checkpoints=16))
    ),
    "ReversibleHeun, 8 steps": by_library(SolverConfig(num_steps=8)),
    "Heun, 16 steps": by_library(HEUN),
}


@partial(jax.jit, static_argnums=0)
def gradient(solve: Solve, field: Any, initial: TrajectoryState, times: jax.Array) -> Any:
    """Return the components, and the gradient of their sum of squares by field and h(0)."""

    def loss(field: Any, initial: TrajectoryState) -> tuple[jax.Array, MFA]:
        components = solve(field, initial, times)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(components)), components

    derivative, components = jax.grad(loss, argnums=(0, 1), has_aux=True)(field, initial)
    return components, derivative


def exact(problem: tuple[Any, TrajectoryState, jax.Array]) -> Any:
    """Return what `gradient` does, in float64 by small steps, on the host."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), problem)
        return jax.tree.map(np.asarray, gradient(REFERENCE, *wide))


def read_times() -> jax.Array:
    """Return eight stratified pseudotimes, rounded to ends of the reference's steps."""
    return jnp.round(256 * StratifiedTimes()(jax.random.key(1), 8)) / 256


def measure_gradients(
    models: Mapping[str, cpmm.CPMM], solves: Mapping[str, Solve], **effort: Any
) -> tuple[list[Table], Any]:
    """Time the gradient through the ODE; each solve is compiled once for all models."""
    problems = {name: (m.field, m.initial_state(), read_times()) for name, m in models.items()}
    compiled, compile_seconds = {}, {}
    for name, solve in solves.items():
        start = time.perf_counter()
        compiled[name] = gradient.lower(solve, *next(iter(problems.values()))).compile()
        compile_seconds[name] = time.perf_counter() - start
    tables, data = [], {}
    for which, problem in problems.items():
        calls = {name: partial(call, *problem) for name, call in compiled.items()}
        reference = exact(problem)
        timings = interleave(calls, **effort)
        numbers = {}
        for name, call in calls.items():
            results = zip(call(), reference, strict=True)
            trajectory, derivative = (relative_error(*pair) for pair in results)
            errors = {"trajectory_error": trajectory, "gradient_error": derivative}
            compiling = {"compile_seconds": compile_seconds[name]}
            numbers[name] = compiling | of_timing(timings, name) | errors
        data[which] = numbers
        tables.append(gradient_table(which, models[which], timings, numbers))
    return tables, data


def gradient_table(
    which: str, model: cpmm.CPMM, timings: Mapping[str, Timing], numbers: Any
) -> Table:
    widths = tuple(layer.out_features for layer in model.field.layers)
    rows = [
        [
            name,
            str(timings[name]),
            f"{row['ratio']:.2f}",
            f"{row['compile_seconds']:.1f}",
            f"{row['trajectory_error']:.1e}",
            f"{row['gradient_error']:.1e}",
        ]
        for name, row in numbers.items()
    ]
    return Table(
        f"Gradient through the ODE alone, {which} field (D = {model.dim}, C = {model.num_classes}, "
        f"rank {model.rank}, widths {widths}, 8 pseudotimes)",
        ["", "time", "ratio", "compile (s)", "trajectory error", "gradient error"],
        rows,
        [
            "Ratios to the first row. Errors are relative, against Runge-Kutta in 256 steps in "
            "float64; pseudotimes lie between the steps, so that both include the interpolation: "
            "linear for ReversibleHeun and the bare scans, of higher order for Heun."
        ],
    )
