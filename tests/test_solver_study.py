"""Solvers compared on a small model: errors, counts, failures, and advice that holds."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmm_jax.dynamics.solve import SolverConfig, solve
from cpmm_jax.errors import ConfigError, SolverError
from cpmm_jax.plotting import plot_work_precision
from cpmm_jax.solver_study import (
    SolverMeasurement,
    compare_solvers,
    count_evaluations,
    default_candidates,
    describe,
    recommend_solver,
)
from cpmm_jax.solver_study.timing import interleave
from cpmm_jax.training.checkpoint import load_model, save_model
from tests.models.small import QUICK, small

DOPRI8 = diffrax.Dopri8()
CANDIDATES = {
    "few": SolverConfig(num_steps=2),
    "refused": SolverConfig(solver=diffrax.Kvaerno3(), num_steps=4),
}


def _adaptive(tolerance: float) -> SolverConfig:
    """Return the settings of the reference at another tolerance: the same program."""
    return SolverConfig(solver=DOPRI8, num_steps=None, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module", autouse=True)
def short_timing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpmm_jax.solver_study.compare._TIMING", 0.0)  # three rounds
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SolverMeasurement]:
    """Return equal steps in float32, against a reference in as many steps that compiles sooner."""
    folder = tmp_path_factory.mktemp("study") / "model"
    save_model(folder, small())
    with pytest.MonkeyPatch.context() as patch:
        reference = SolverConfig(solver=DOPRI8, num_steps=32)
        patch.setattr("cpmm_jax.solver_study.compare._REFERENCE", reference)
        found = compare_solvers(load_model(folder), CANDIDATES, num_times=3, seconds=600.0)
    assert found[0].own and [m.name for m in found[1:]] == list(CANDIDATES)
    return {m.name: m for m in found}


@pytest.fixture(scope="module")
def adaptive() -> dict[str, SolverMeasurement]:
    """Return tolerances in float64, against the reference itself."""
    candidates = {
        **{f"{tolerance:g}": _adaptive(tolerance) for tolerance in (1e-2, 1e-4, 1e-6, 1e-8)},
        "impossible": _adaptive(1e-300),
        "equal": SolverConfig(solver=DOPRI8, num_steps=32),
    }
    model = small(solver=candidates["0.01"])
    with jax.enable_x64(True):
        model = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model)
        found = compare_solvers(model, candidates, num_times=3, seconds=600.0)
    return {m.name: m for m in found}


@pytest.mark.slow
def test_errors_fall_as_work_grows(
    measured: dict[str, SolverMeasurement], adaptive: dict[str, SolverMeasurement]
) -> None:
    pairs = [(measured["few"], measured[describe(QUICK)])]
    pairs += pairwise(adaptive[name] for name in ("0.01", "0.0001", "1e-06", "1e-08"))
    for more, less in pairs:  # both start with a step of 0.01, and may then take as many
        assert more.num_steps <= less.num_steps
        assert more.function_evaluations <= less.function_evaluations
        assert more.trajectory_error > less.trajectory_error
        assert more.gradient_error > less.gradient_error


@pytest.mark.slow
def test_the_reference_is_exact(adaptive: dict[str, SolverMeasurement]) -> None:
    assert adaptive["equal"].error < 1e-9  # other steps, another way to the gradient
    assert adaptive["1e-08"].error < 1e-6


def test_costs_are_told(
    measured: dict[str, SolverMeasurement], adaptive: dict[str, SolverMeasurement]
) -> None:
    own = measured[describe(QUICK)]
    assert (own.config, own.num_steps, own.function_evaluations) == (QUICK, 8, 9)
    assert 0 < own.seconds_low <= own.seconds_per_gradient <= own.seconds_high
    assert own.memory_bytes > 0 and own.compile_seconds > 0
    assert adaptive["0.01"].own
    assert adaptive["0.01"].compile_seconds == adaptive["1e-08"].compile_seconds  # one program


def test_failures_are_told_and_end_nothing(
    measured: dict[str, SolverMeasurement], adaptive: dict[str, SolverMeasurement]
) -> None:
    for case, reason in (
        (adaptive["impossible"], "used up `max_steps`"),
        (measured["refused"], "implicit solver"),
    ):
        assert not case.ok and reason in case.result
        assert case.error == np.inf and case.seconds_per_gradient is None


def test_records_are_plain_and_drawn(measured: dict[str, SolverMeasurement]) -> None:
    records = [m.record() for m in measured.values()]
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    ax = plot_work_precision(records)
    (line,) = ax.lines
    assert line.get_linestyle() == "-" and len(line.get_xdata()) == 2  # failures left out
    assert ax.get_legend().get_texts()[0].get_text() == "present"


def test_what_is_not_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(study: Any, case: SolverMeasurement) -> Any:
        return replace(case, trajectory_error=0.0, gradient_error=0.0), lambda: None

    monkeypatch.setattr("cpmm_jax.solver_study.compare._Study.__init__", lambda *_: None)
    monkeypatch.setattr("cpmm_jax.solver_study.compare._Study.prepare", prepare)
    first, *others = compare_solvers(small(), seconds=1e-9)
    assert first.own and first.ok and first.seconds_per_gradient is not None
    assert {m.result for m in others} == {"not reached within 1e-09 s"}
    assert len(others) == len(default_candidates()) - 1  # the model's 8 steps are one of these
    alike = small(solver=SolverConfig(num_steps=8, rtol=0.5))  # the same in words
    names = [m.name for m in compare_solvers(alike, seconds=1e-9)]
    assert len(names) == len(set(names)) == len(default_candidates()) + 1


@pytest.mark.parametrize("settings", [{"num_times": 0}, {"seconds": 0.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"`{next(iter(settings))}` must be .* got 0"):
        compare_solvers(small(), **settings)


def test_a_reference_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(result: Any) -> None:
        raise SolverError("It broke.")

    monkeypatch.setattr("cpmm_jax.solver_study.compare.check_result", fail)
    monkeypatch.setattr("cpmm_jax.solver_study.compare._REFERENCE", QUICK)
    with pytest.raises(SolverError, match="The reference, Dopri8 at 1e-10, failed: It broke"):
        compare_solvers(small(), {}, num_times=3)


calls: list[float] = []


def _counted(t: Any, state: jax.Array, _: Any) -> jax.Array:
    jax.debug.callback(lambda t: calls.append(float(t)), t)
    return jnp.cos(t) - state


@pytest.mark.parametrize(
    "config",
    [
        SolverConfig(num_steps=3),
        SolverConfig(solver=diffrax.Euler(), num_steps=3),
        SolverConfig(solver=diffrax.Midpoint(), num_steps=3),
        SolverConfig(solver=diffrax.Tsit5(), num_steps=3),
        _adaptive(1e-3),
    ],
    ids=describe,
)
def test_evaluations_are_those_counted(config: SolverConfig) -> None:
    calls.clear()
    solution = solve(_counted, jnp.ones(2), jnp.array([0.4, 1.0]), config)
    solution.states.block_until_ready()
    jax.effects_barrier()
    assert len(calls) == count_evaluations(config, int(solution.num_steps))


def test_only_explicit_solvers_are_counted() -> None:
    assert count_evaluations(SolverConfig(solver=diffrax.Kvaerno3()), 4) is None
    assert count_evaluations(SolverConfig(solver=diffrax.Sil3()), 4) is None


def test_candidates_have_names_of_their_own() -> None:
    candidates = default_candidates()
    assert {describe(config) for config in candidates.values()} == set(candidates)
    assert len({hash(config) for config in candidates.values()}) == len(candidates)
    assert describe(SolverConfig()) in candidates


def _case(name: str, ms: float, error: float, **other: Any) -> SolverMeasurement:
    return SolverMeasurement(
        name=name,
        config=SolverConfig(),
        seconds_per_gradient=ms / 1e3,
        seconds_low=0.9 * ms / 1e3,
        seconds_high=1.1 * ms / 1e3,
        trajectory_error=error / 2,
        gradient_error=error,
        **other,
    )


FAILED = SolverMeasurement(name="broken", config=SolverConfig(), result="It broke.")
CASES = [_case("fast", 1, 1e-1), _case("good", 4, 1e-3), _case("exact", 9, 1e-6), FAILED]


@pytest.mark.parametrize(
    ("own", "tolerance", "name", "sentence"),
    [
        (_case("own", 8, 2e-3), 1e-2, "good", "cheapest is good: 4 ms.*own, take 8 ms.*: 2 times"),
        (_case("own", 2, 0.05), 1e-2, "good", "own, take 2 ms.*, beyond that bound: 0.5 times"),
        (_case("own", 4.4, 1e-3), 1e-2, "good", "own, take .*: no clear difference in time"),
        (_case("own", 3, 1e-3), 1e-2, "own", "These are the present settings"),
        (replace(FAILED, name="own"), 1e-2, "good", "The present settings, own, failed: It broke"),
        (None, 0.2, "fast", "Within a relative error of 0.2 the cheapest is fast: 1 ms"),
        (
            None,
            1e-9,
            "exact",
            "None of 3 candidates is within .* 1e-09; the most accurate is exact",
        ),
    ],
)
def test_the_cheapest_within_the_bound_is_recommended(
    own: SolverMeasurement | None, tolerance: float, name: str, sentence: str
) -> None:
    cases = CASES if own is None else [replace(own, own=True), *CASES]
    advice = recommend_solver(cases, tolerance)
    assert advice.measurement.name == name
    assert re.search(sentence, advice.sentence), advice.sentence


def test_advice_holds_on_the_model(measured: dict[str, SolverMeasurement]) -> None:
    best = recommend_solver(list(measured.values()), 0.1).measurement
    within = [m for m in measured.values() if m.error <= 0.1]
    assert best in within
    assert best.seconds_per_gradient == min(m.seconds_per_gradient for m in within)


def test_no_success_gives_no_advice() -> None:
    with pytest.raises(ConfigError, match="at least one success; got It broke"):
        recommend_solver([FAILED])


def test_a_turn_begins_with_a_call_that_is_not_timed_unless_calls_are_long() -> None:
    calls = {"short": 0, "long": 0}

    def call(name: str, seconds: float) -> None:
        calls[name] += 1
        time.sleep(seconds)

    cases = {"short": lambda: call("short", 0.0), "long": lambda: call("long", 0.02)}
    interleave(cases, seconds=0.01, least=3)
    assert calls["long"] == 1 + 1 + 3  # warm, before the first turn, and three turns
    assert calls["short"] >= 1 + 2 * 3
