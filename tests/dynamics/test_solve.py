"""The one call of diffrax: any solver, any adjoint, any controller; failures are named."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from cpmm_jax.dynamics.fields import MLPField
from cpmm_jax.dynamics.solve import (
    FAILED,
    NOT_FINITE,
    STEPS_EXHAUSTED,
    SUCCESS,
    Solution,
    SolverConfig,
    check_result,
    solve,
)
from cpmm_jax.errors import ConfigError, SolverError

TIMES = (0.1, 0.45, 1.0)
EVERY_STEP = diffrax.RecursiveCheckpointAdjoint()
DIRECT = diffrax.DirectAdjoint()
FORWARD = diffrax.ForwardMode()
ADAPTIVELY = {"num_steps": None, "rtol": 1e-7, "atol": 1e-7}
BACKSOLVE_TSIT5 = diffrax.BacksolveAdjoint(solver=diffrax.Tsit5())

# Solver, adjoint, tolerance, settings. Derivatives of the discretised solve are exact; those of
# Backsolve carry the error of the solve backwards, and those of adaptive steps the tolerance.
TABLE: list[tuple[diffrax.AbstractSolver, diffrax.AbstractAdjoint, float, dict[str, Any]]] = [
    (diffrax.ReversibleHeun(), EVERY_STEP, 1e-8, {}),
    (diffrax.Bosh3(), EVERY_STEP, 1e-5, ADAPTIVELY),
    (diffrax.Tsit5(), DIRECT, 1e-8, {}),
    (diffrax.ReversibleHeun(), BACKSOLVE_TSIT5, 5e-3, {"num_steps": 64}),
    # Forward mode is the cheapest to compile; tests/models has Heun with Backsolve.
    (diffrax.Heun(), FORWARD, 1e-8, {}),
    (diffrax.Euler(), FORWARD, 1e-8, {}),
    (diffrax.Midpoint(), FORWARD, 1e-8, {}),
    (diffrax.Ralston(), FORWARD, 1e-8, {}),
    (diffrax.Dopri5(), FORWARD, 1e-8, {}),
    (diffrax.Dopri8(), FORWARD, 1e-8, {}),
    (diffrax.LeapfrogMidpoint(), FORWARD, 1e-8, {}),
    (diffrax.Kvaerno3(), FORWARD, 1e-5, ADAPTIVELY),
]

EVERY_RUN = {diffrax.ReversibleHeun, diffrax.Tsit5, diffrax.Euler, diffrax.Dopri5}

# What diffrax itself turns down: settings, and its reason.
REJECTED = {
    "an adjoint that knows the last time only": (
        {"adjoint": diffrax.ImplicitAdjoint()},
        "ImplicitAdjoint.* with `saveat=SaveAt\\(t1=True\\)`",
    ),
    "a solver for two coupled fields": (
        {"solver": diffrax.SemiImplicitEuler()},
        "Terms are not compatible with solver",
    ),
    "a solver without an error estimate, adaptively": (
        {"solver": diffrax.Euler(), "num_steps": None},
        "a solver that does not provide error estimates",
    ),
    "an implicit solver in fixed steps, its root finder without tolerances": (
        {"solver": diffrax.Kvaerno3()},
        "tolerances for the implicit solver have not been specified",
    ),
}


def move(t: Any, state: Array, field: MLPField) -> Array:
    return field(t, state)  # type: ignore[no-any-return]


def decay(t: Any, state: Array, rate: Any) -> Array:
    return -rate * state


def grow(t: Any, state: Array, rate: Any) -> Array:
    """dh/dt = rate h^2 from h(0) = 1 is infinite at t = 1 / rate."""
    return rate * state**2


@partial(jax.jit, static_argnums=0)
def solved(config: SolverConfig) -> Solution:
    return solve(decay, jnp.ones(2), jnp.array([0.5, 1.0]), config, args=1.0)


@pytest.mark.parametrize(
    ("solver", "adjoint", "tolerance", "settings"),
    [
        pytest.param(*row, marks=[] if type(row[0]) in EVERY_RUN else [pytest.mark.slow])
        for row in TABLE
    ],
    ids=[f"{type(row[0]).__name__}-{type(row[1]).__name__}" for row in TABLE],
)
def test_gradients_match_finite_differences(
    x64: None, solver: Any, adjoint: Any, tolerance: float, settings: dict[str, Any]
) -> None:
    config = SolverConfig(solver=solver, adjoint=adjoint, **settings)
    field = MLPField(2, widths=(4,), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    point = (field, jnp.array([0.3, -0.5]))
    direction = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(1.0, 1.0 + leaf.size)).reshape(leaf.shape), point
    )
    weights = jnp.array([[1.0, -0.5], [0.3, 0.7], [-1.0, 0.4]])

    def value(field: MLPField, start: Array) -> Array:
        return jnp.sum(weights * solve(move, start, jnp.array(TIMES), config, args=field).states)

    # One program gives the value, for the differences, and the derivative along the direction.
    @jax.jit
    def value_and_slope(point: Any) -> tuple[Array, Array]:
        if isinstance(adjoint, diffrax.ForwardMode):
            return jax.jvp(value, point, direction)
        result, gradient = jax.value_and_grad(value, argnums=(0, 1))(*point)
        slopes = jax.tree.map(jnp.vdot, gradient, direction)
        return result, jnp.sum(jnp.stack(jax.tree.leaves(slopes)))

    def at(step: float) -> Array:
        return value_and_slope(jax.tree.map(lambda p, d: p + step * d, point, direction))[0]

    expected = (at(1e-5) - at(-1e-5)) / 2e-5
    assert abs(expected) > 0.1
    np.testing.assert_allclose(value_and_slope(point)[1], expected, rtol=tolerance)


def test_the_table_has_every_solver_and_adjoint() -> None:
    solvers = {"Euler", "Heun", "Midpoint", "Ralston", "Bosh3", "Tsit5", "Dopri5", "Dopri8"}
    adjoints = {"RecursiveCheckpointAdjoint", "DirectAdjoint", "BacksolveAdjoint", "ForwardMode"}
    assert solvers | {"ReversibleHeun", "Kvaerno3"} <= {type(row[0]).__name__ for row in TABLE}
    assert adjoints == {type(row[1]).__name__ for row in TABLE}


@pytest.mark.parametrize("name", REJECTED)
def test_diffrax_says_what_does_not_go_together(name: str) -> None:
    settings, reason = REJECTED[name]
    with pytest.raises(Exception, match=reason):
        solved(SolverConfig(**settings))


def test_forward_mode_has_no_reverse() -> None:
    config = SolverConfig(adjoint=diffrax.ForwardMode(), num_steps=2)
    with pytest.raises(ValueError, match="everse-mode"):
        jax.grad(lambda rate: solve(decay, jnp.ones(1), jnp.ones(1), config, rate).states.sum())(
            1.0
        )


@pytest.mark.parametrize("num_steps", [1, 3, 10, 49])
def test_fixed_steps(num_steps: int) -> None:
    solution = solved(SolverConfig(solver=diffrax.Euler(), num_steps=num_steps))
    assert int(solution.num_steps) == num_steps
    assert bool(solution.ok)
    expected = (1.0 - 1.0 / num_steps) ** num_steps
    np.testing.assert_allclose(solution.states[-1], np.full(2, expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("solver", [diffrax.ReversibleHeun(), diffrax.Tsit5()])
def test_equal_steps_by_scan_are_those_of_diffeqsolve(
    x64: None, solver: diffrax.AbstractSolver
) -> None:
    field = MLPField(2, widths=(4,), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    times = jnp.array([0.0, 0.2, 0.55, 0.6, 1.0])  # on the five steps, and between

    def value(field: MLPField, start: Array, config: SolverConfig) -> Array:
        states = solve(move, start, times, config, args=field).states
        return jnp.sum(jnp.sin(jnp.arange(10.0).reshape(5, 2) + states))

    both = jax.jit(jax.value_and_grad(value, argnums=(0, 1)), static_argnums=2)
    scan = SolverConfig(solver=solver, num_steps=5)
    got = both(field, jnp.array([0.3, -0.5]), scan)
    expected = both(field, jnp.array([0.3, -0.5]), replace(scan, adjoint=EVERY_STEP))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def test_adaptive_steps_follow_the_tolerances(x64: None) -> None:
    steps, errors = [], []
    for tolerance in (1e-3, 1e-8):
        config = SolverConfig(
            solver=diffrax.Tsit5(), num_steps=None, rtol=tolerance, atol=tolerance
        )
        solution = solved(config)
        steps.append(int(solution.num_steps))
        errors.append(float(jnp.max(jnp.abs(solution.states[-1] - np.exp(-1.0)))))
        assert errors[-1] < 10 * tolerance
    assert steps == sorted(steps) and steps[0] < steps[-1]
    assert errors == sorted(errors, reverse=True)


def test_a_controller_of_the_user_decides() -> None:
    ticks = jnp.array([0.0, 0.2, 0.5, 1.0])
    config = SolverConfig(solver=diffrax.Euler(), controller=diffrax.StepTo(ts=ticks))
    solution = solved(config)
    assert int(solution.num_steps) == 3
    np.testing.assert_allclose(solution.states[:, 0], [0.8 * 0.7, 0.8 * 0.7 * 0.5], rtol=1e-6)
    constant = SolverConfig(controller=diffrax.ConstantStepSize(), num_steps=5)
    assert int(solved(constant).num_steps) == 5
    assert int(solved(replace(constant, num_steps=None)).num_steps) == 16


def test_settings_compare_by_value() -> None:
    """JAX compares them to decide whether to compile again."""

    def ticks(*values: float) -> SolverConfig:
        return SolverConfig(controller=diffrax.StepTo(ts=jnp.array(values)))

    makers = [
        SolverConfig,
        lambda: SolverConfig(num_steps=8),
        lambda: SolverConfig(num_steps=None, rtol=1e-4),
        lambda: SolverConfig(solver=diffrax.Tsit5()),
        lambda: SolverConfig(solver=diffrax.Kvaerno3(), num_steps=None),
        lambda: SolverConfig(adjoint=diffrax.BacksolveAdjoint()),
        lambda: SolverConfig(adjoint=diffrax.BacksolveAdjoint(solver=diffrax.Tsit5())),
        lambda: SolverConfig(controller=diffrax.PIDController(rtol=1e-3, atol=1e-3)),
        lambda: SolverConfig(controller=diffrax.PIDController(rtol=1e-3, atol=1e-4)),
        lambda: ticks(0.0, 0.5, 1.0),
        lambda: ticks(0.0, 0.2, 1.0),
    ]
    for i, first in enumerate(makers):
        for j, second in enumerate(makers):
            assert (first() == second()) is (i == j)
            assert (hash(first()) == hash(second())) is (i == j)
    assert SolverConfig() != "SolverConfig()"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "`num_steps` must be at least 1; got 0"),
        ({"num_steps": -3}, "`num_steps` must be at least 1; got -3"),
        ({"max_steps": 0}, "`max_steps` must be at least 1; got 0"),
        ({"rtol": 0.0}, "`rtol` must be positive; got 0.0"),
        ({"atol": -1.0}, "`atol` must be positive; got -1.0"),
        ({"rtol": float("nan")}, "`rtol` must be positive; got nan"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SolverConfig(**settings)


ADAPTIVE = SolverConfig(solver=diffrax.Tsit5(), num_steps=None, max_steps=50)
CHORD = diffrax.Kvaerno3(root_finder=diffrax.VeryChord(rtol=1e-5, atol=1e-5))


@pytest.mark.nan  # states of a failed solve
@pytest.mark.parametrize(
    ("config", "rate", "code", "words"),
    [
        (SolverConfig(num_steps=32), 0.5, SUCCESS, ()),
        (replace(ADAPTIVE, max_steps=3, rtol=1e-6), 0.9, STEPS_EXHAUSTED, ("`max_steps`", "Raise")),
        (ADAPTIVE, 3.0, STEPS_EXHAUSTED, ("`max_steps`", "without bound")),
        (SolverConfig(), 30.0, NOT_FINITE, ("infinite or NaN", "learning rate")),
        (SolverConfig(solver=diffrax.Euler()), np.nan, NOT_FINITE, ("infinite or NaN",)),
        (SolverConfig(solver=CHORD), 30.0, FAILED, ("controller stopped", "`num_steps`")),
    ],
)
def test_a_failed_solve_is_a_code_then_an_error(
    config: SolverConfig, rate: float, code: int, words: tuple[str, ...]
) -> None:
    def run(rate: Array) -> Solution:
        return solve(grow, jnp.ones(2, jnp.float32), jnp.array([0.5, 1.0]), config, args=rate)

    solution = jax.jit(run)(jnp.float32(rate))  # no exception inside a compiled function
    assert int(solution.result) == code
    assert bool(solution.ok) is (code == SUCCESS)
    if code == SUCCESS:
        check_result(solution.result)
        np.testing.assert_allclose(solution.states[0], np.full(2, 1 / 0.75), rtol=1e-2)
        return
    with pytest.raises(SolverError, match="The ODE could not be solved") as caught:
        check_result(solution.result)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
