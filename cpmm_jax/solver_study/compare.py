"""Which solver for this model: time, memory and error of the gradient through its ODE.

Every candidate reads one model's components at the same pseudotimes and takes the gradient of their
mean square by all parameters that shape them, as a training step does without its density. Errors
are relative, |a - b| / |b| over all entries, against the same two computed in float64 by Dopri8 at
tolerances of 1e-10. The pseudotimes are a stratified draw, as in training, so that what a solver
loses by reading between its steps counts.

Whatever the error, a field that was trained with one solver has learned along with that solver's
errors. Compare before training, or train anew after a change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from cpmm_jax.dynamics.solve import Solution, SolverConfig, check_result
from cpmm_jax.dynamics.trajectory import StratifiedTimes, integrate
from cpmm_jax.errors import ConfigError, SolverError
from cpmm_jax.models.cpmm import CPMM
from cpmm_jax.solver_study.candidates import count_evaluations, default_candidates, describe
from cpmm_jax.solver_study.measurement import SolverMeasurement
from cpmm_jax.solver_study.timing import Timing, interleave

_REFERENCE = SolverConfig(solver=diffrax.Dopri8(), num_steps=None, rtol=1e-10, atol=1e-10)
_PREPARING = 0.8  # of the time limit; the rest is for timing
_TIMING = 1.0  # seconds for each candidate, where the limit leaves so much


def compare_solvers(
    model: CPMM,
    candidates: Mapping[str, SolverConfig] | None = None,
    *,
    num_times: int = 8,
    seconds: float = 120.0,
    progress: bool | None = None,
) -> list[SolverMeasurement]:
    """Measure solver settings on a model: time and memory of a gradient, and errors.

    Compiling takes most of the time, seconds for each candidate. Candidates are taken in their
    order until the time limit is near; the model's present settings come first and are always
    measured. Then all are timed in turn, so that all see the same machine, each result awaited.

    Args:
        model: untrained or trained.
        candidates: settings by name; `default_candidates()` by default.
        num_times: pseudotimes at which the components are read.
        seconds: time limit, about; candidates whose turn has not come are "not reached".
        progress: True or False to show a progress bar on stderr or not; None where it is a
            terminal.

    Returns:
        One measurement for each candidate, the model's present settings first. One that fails is
        told in `result` and ends nothing.

    Raises:
        ConfigError: `num_times` or `seconds` out of range.
        SolverError: the reference itself cannot be solved.
    """
    started = time.perf_counter()
    if num_times < 1:
        raise ConfigError(f"`num_times` must be at least 1; got {num_times}.")
    if not seconds > 0:
        raise ConfigError(f"`seconds` must be positive; got {seconds}.")
    candidates = default_candidates() if candidates is None else candidates
    study = _Study(model, num_times)
    measurements: list[SolverMeasurement] = []
    calls: dict[str, Callable[[], Any]] = {}
    cases = _own_first(model.solver, candidates)
    with _progress_bar(len(cases), progress) as bar:
        for case in cases:
            bar.set_postfix_str(case.name)
            if measurements and time.perf_counter() - started > _PREPARING * seconds:
                case = replace(case, result=f"not reached within {seconds:g} s")
            else:
                case, call = study.prepare(case)
                if case.ok:
                    calls[case.name] = call
            measurements.append(case)
            bar.update()
        left = max(0.0, seconds - (time.perf_counter() - started))
        timings = interleave(calls, seconds=min(left / max(len(calls), 1), _TIMING))
    return [_timed(case, timings.get(case.name)) for case in measurements]


def _own_first(
    own: SolverConfig, candidates: Mapping[str, SolverConfig]
) -> list[SolverMeasurement]:
    cases = [
        SolverMeasurement(name=name, config=config, own=config == own)
        for name, config in candidates.items()
    ]
    if not any(case.own for case in cases):
        name = describe(own)
        name += " (own)" if name in candidates else ""  # they differ in what a name does not say
        cases.append(SolverMeasurement(name=name, config=own, own=True))
    return sorted(cases, key=lambda case: not case.own)


def _progress_bar(total: int, shown: bool | None) -> Any:
    from tqdm import tqdm  # only where it is seen

    disable = None if shown is None else not shown  # None: where stderr is no terminal
    return tqdm(total=total, unit="solver", dynamic_ncols=True, disable=disable)


def _loss(
    params: Any, times: jax.Array, config: SolverConfig, field_per_class: bool
) -> tuple[jax.Array, Solution]:
    field, initial = params
    solution = integrate(field, initial, times, config, field_per_class=field_per_class)
    leaves = jax.tree.leaves(solution.states)
    total = sum(jnp.sum(jnp.square(leaf)) for leaf in leaves)
    return total / sum(leaf.size for leaf in leaves), solution


@partial(jax.jit, static_argnames=("config", "field_per_class"))
def _gradient(
    params: Any,
    times: jax.Array,
    tolerances: tuple[float, float] | None,
    *,
    config: SolverConfig,
    field_per_class: bool,
) -> tuple[Solution, Any]:
    """Return the solution and the gradient; tolerances are arguments, no part of the program."""
    if tolerances is not None:
        rtol, atol = tolerances
        config = replace(config, controller=diffrax.PIDController(rtol=rtol, atol=atol))
    differentiate = jax.value_and_grad(_loss, has_aux=True)
    (_, solution), gradient = differentiate(params, times, config, field_per_class)
    return solution, gradient


def _take_out_tolerances(
    config: SolverConfig,
) -> tuple[SolverConfig, tuple[float, float] | None]:
    if config.controller is None and config.num_steps is None:
        return replace(config, rtol=1.0, atol=1.0), (config.rtol, config.atol)
    return config, None


class _Study:
    """One model, its pseudotimes and its reference; programs by the settings that shape them."""

    def __init__(self, model: CPMM, num_times: int) -> None:
        self.inputs = (
            (model.field, model.initial_state()),
            StratifiedTimes()(jax.random.key(0), num_times),
        )
        self.field_per_class = model.field_per_class
        self.programs: dict[SolverConfig, tuple[Any, float]] = {}
        with jax.enable_x64(True):
            inputs = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), self.inputs)
            config, tolerances = _take_out_tolerances(_REFERENCE)
            solution, gradient = _gradient(
                *inputs, tolerances, config=config, field_per_class=self.field_per_class
            )
            try:
                check_result(solution.result)
            except SolverError as error:
                raise SolverError(f"The reference, Dopri8 at 1e-10, failed: {error}") from error
            self.reference = _vector(solution.states), _vector(gradient)

    def prepare(self, case: SolverMeasurement) -> tuple[SolverMeasurement, Callable[[], Any]]:
        """Compile and run a candidate once; return it with its errors, and the call to time."""
        config, tolerances = _take_out_tolerances(case.config)
        try:
            program, compile_seconds = self._compile(config, tolerances)
            call = partial(program, *self.inputs, tolerances)
            solution, gradient = jax.block_until_ready(call())
            check_result(solution.result)
            trajectory_error, gradient_error = (
                float(np.linalg.norm(_vector(value) - exact) / np.linalg.norm(exact))
                for value, exact in zip((solution.states, gradient), self.reference, strict=True)
            )
            if not np.isfinite(gradient_error):
                raise SolverError("The gradient is infinite or NaN.")
        except Exception as error:  # whatever it is, it is the result of this candidate
            reason = " ".join(str(error).split()) or type(error).__name__
            return replace(case, result=reason), lambda: None
        num_steps = int(solution.num_steps)
        case = replace(
            case,
            compile_seconds=compile_seconds,
            num_steps=num_steps,
            function_evaluations=count_evaluations(case.config, num_steps),
            memory_bytes=getattr(program.memory_analysis(), "temp_size_in_bytes", None),
            trajectory_error=trajectory_error,
            gradient_error=gradient_error,
        )
        return case, call

    def _compile(
        self, config: SolverConfig, tolerances: tuple[float, float] | None
    ) -> tuple[Any, float]:
        if config not in self.programs:
            start = time.perf_counter()
            lowered = _gradient.lower(
                *self.inputs, tolerances, config=config, field_per_class=self.field_per_class
            )
            self.programs[config] = lowered.compile(), time.perf_counter() - start
        return self.programs[config]


def _vector(tree: Any) -> npt.NDArray[np.float64]:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def _timed(case: SolverMeasurement, timing: Timing | None) -> SolverMeasurement:
    if timing is None:
        return case
    return replace(
        case,
        seconds_low=timing.low,
        seconds_per_gradient=timing.median,
        seconds_high=timing.high,
    )
