"""What was measured of one candidate, and what is recommended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from cpmm_jax.dynamics.solve import SolverConfig
from cpmm_jax.errors import ConfigError
from cpmm_jax.solver_study.candidates import is_adaptive

SUCCESS = "success"


@dataclass(frozen=True, kw_only=True)
class SolverMeasurement:
    """What one candidate costs and how far off it is; None where it failed or was not reached.

    Attributes:
        name: of the candidate.
        config: its settings.
        own: whether these are the present settings of the model.
        result: "success", or what went wrong.
        seconds_per_gradient: wall time of one solve with its gradient, the median.
        seconds_low: its lower quartile.
        seconds_high: its upper quartile.
        compile_seconds: to trace and compile; candidates that differ in nothing but tolerances
            share one program, and its time. Near 0 for what this process has compiled before.
        num_steps: steps taken, rejected ones included.
        function_evaluations: of the field, forwards (see `count_evaluations`); None also for a
            solver that is not explicit.
        memory_bytes: working memory of the compiled program; None also where the compiler does not
            tell.
        trajectory_error: relative error of the components read.
        gradient_error: relative error of the gradient.
    """

    name: str
    config: SolverConfig
    own: bool = False
    result: str = SUCCESS
    seconds_per_gradient: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    compile_seconds: float | None = None
    num_steps: int | None = None
    function_evaluations: int | None = None
    memory_bytes: int | None = None
    trajectory_error: float | None = None
    gradient_error: float | None = None

    @property
    def ok(self) -> bool:
        """Whether everything was measured."""
        return self.result == SUCCESS

    @property
    def error(self) -> float:
        """The larger of both errors; infinite where it failed."""
        if self.trajectory_error is None or self.gradient_error is None:
            return float("inf")
        return max(self.trajectory_error, self.gradient_error)

    def record(self) -> dict[str, Any]:
        """Return plain values, for JSON and for `plotting.plot_work_precision`."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "config"}
        adjoint = self.config.adjoint
        return {
            **own,
            "solver": type(self.config.solver).__name__,
            "adaptive": is_adaptive(self.config),
            "adjoint": None if adjoint is None else type(adjoint).__name__,
        }


class Recommendation(NamedTuple):
    """What to use.

    Attributes:
        measurement: the recommended candidate.
        sentence: why, and what the present settings cost against it, in words.
    """

    measurement: SolverMeasurement
    sentence: str


def recommend_solver(
    measurements: Sequence[SolverMeasurement], tolerance: float = 1e-2
) -> Recommendation:
    """Choose the cheapest candidate whose trajectory and gradient are within a relative error.

    Where none is within it, the most accurate one is chosen, and the sentence says so.

    Args:
        measurements: what `compare_solvers` returned.
        tolerance: largest relative error.

    Returns:
        A `Recommendation`.

    Raises:
        ConfigError: no candidate succeeded.

    Example:
        >>> measured = {"trajectory_error": 1e-3, "seconds_low": 0.01, "seconds_high": 0.01}
        >>> fast = SolverMeasurement(name="Midpoint, 4 steps", config=SolverConfig(num_steps=4),
        ...     seconds_per_gradient=0.01, gradient_error=2e-3, **measured)
        >>> recommend_solver([fast], 1e-2).sentence
        'Within a relative error of 0.01 the cheapest is Midpoint, 4 steps: 10 ms per gradient, ...
    """
    measured = [m for m in measurements if m.seconds_per_gradient is not None]
    if not measured:
        raise ConfigError(
            "`measurements` must hold at least one success; got "
            f"{'; '.join(sorted({m.result for m in measurements})) or 'none at all'}."
        )
    within = [m for m in measured if m.error <= tolerance]
    if within:
        best = min(within, key=_seconds)
        start = f"Within a relative error of {tolerance:g} the cheapest is {best.name}"
    else:
        best = min(measured, key=lambda m: m.error)
        start = (
            f"None of {len(measured)} candidates is within a relative error of {tolerance:g}; "
            f"the most accurate is {best.name}"
        )
    sentence = f"{start}: {_cost(best)}."
    own = next((m for m in measurements if m.own), None)
    if own is not None:
        sentence += f" {_compare(own, best, tolerance)}"
    return Recommendation(best, sentence)


def _seconds(measurement: SolverMeasurement) -> float:
    assert measurement.seconds_per_gradient is not None  # measured
    return measurement.seconds_per_gradient


def _cost(m: SolverMeasurement) -> str:
    return (
        f"{1e3 * _seconds(m):.3g} ms per gradient, errors of {m.trajectory_error:.1e} "
        f"(trajectory) and {m.gradient_error:.1e} (gradient)"
    )


def _compare(own: SolverMeasurement, best: SolverMeasurement, tolerance: float) -> str:
    """Say what the model's present settings cost against the best."""
    if own is best:
        return "These are the present settings."
    present = f"The present settings, {own.name},"
    if not own.ok:
        return f"{present} failed: {own.result}"
    bound = "" if own.error <= tolerance else ", beyond that bound"
    ratio = _seconds(own) / _seconds(best)
    pace = "no clear difference in time" if _overlap(own, best) else f"{ratio:.2g} times as long"
    return f"{present} take {_cost(own)}{bound}: {pace}."


def _overlap(a: SolverMeasurement, b: SolverMeasurement) -> bool:
    """Whether the quartiles of two timings overlap."""
    if a.seconds_low is None or b.seconds_low is None:
        return False
    if a.seconds_high is None or b.seconds_high is None:
        return False
    return a.seconds_low <= b.seconds_high and b.seconds_low <= a.seconds_high
