"""A fit under way, of a mixture or of a flow: the state on the device, the books on the host."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from cpmm_jax.dynamics.solve import STEPS_EXHAUSTED, SolverConfig, check_result
from cpmm_jax.errors import SolverError
from cpmm_jax.training.config import TrainConfig
from cpmm_jax.training.inputs import Parts, take_apart
from cpmm_jax.training.progress import Ending, ending, means, number, refusals, scheduled_rate
from cpmm_jax.training.snapshot_file import Snapshot, from_named, named_leaves
from cpmm_jax.training.state import (
    CAUSES,
    FAILED_SOLVE,
    BlockTotals,
    TrainState,
    empty_totals,
    initial_state,
    snapshot,
)

logger = logging.getLogger("cpmm_jax")

Report = dict[str, Any]

LOOK = 1.0  # seconds of training between two looks at the clock, where there is one
SLOWER = 0.5  # times the learning rate, after a return
STIFF = 10.0  # times the ODE steps of the first report (up to 5 are usual): a field that is stiff
MORE_STEPS = 4  # times `max_steps`, after a return because solves ran out of them


class Running(ABC):
    """One call of `fit` or `fit_flow` under way.

    Where steps are refused again and again, or an adaptive solver takes `STIFF` times the steps it
    took at first, training *returns* to the parameters of the last report from which steps were
    accepted, with half the learning rate and an optimiser that has forgotten; where solves failed
    for want of steps, the solver may take more. This happens `config.max_returns` times at most,
    and is told in every report.

    Args:
        model: what is trained.
        config: settings.
        optimizer: an optax transformation.
        settings: what the compiled step takes besides state and data.
        start: when the call began.
    """

    score_name: ClassVar[str]  # in the reports

    def __init__(
        self,
        model: Any,
        config: TrainConfig,
        optimizer: optax.GradientTransformation,
        settings: Any,
        start: float,
    ) -> None:
        self.config, self.optimizer, self.settings, self.start = config, optimizer, settings, start
        self.parts: Parts = take_apart(model)
        self.state: TrainState = initial_state(optimizer, self.parts.params)
        self.totals: BlockTotals = empty_totals()  # since the last report
        self.reported = 0  # step of the last report
        self.good: Any = snapshot(self.state.params)  # steps from there were accepted
        self.tried: Any = self.good  # of the last report: whether they are good will be seen
        self.returns = 0
        self.stopped: Ending | None = None
        self.history: list[Report] = []
        self.best_score, self.best_step, self.stale = -math.inf, 0, 0
        self.best_params: Any = None
        self._chunk = 1

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Examples in a step."""

    @property
    @abstractmethod
    def has_validation(self) -> bool:
        """Whether there are validation examples."""

    @abstractmethod
    def train(self, stop: int) -> None:
        """Train up to a step, with the sums of the steps added to `totals`."""

    @abstractmethod
    def score(self) -> float:
        """Return the validation score, the higher the better; -inf where there is none."""

    @abstractmethod
    def rebuild(self) -> None:
        """Compile anew for other `parts`."""

    @property
    def step(self) -> int:
        """Steps done, refused ones included."""
        return int(self.state.step)

    def next_stop(self) -> int:
        """Return the step of the next report."""
        return min(self.reported + self.config.report_every, self.config.steps)

    def position(self) -> dict[str, Any]:
        """Return what a report tells of the stage."""
        return {}

    def counts(self) -> bool:
        """Tell whether the best parameters are looked for by now."""
        return True

    def advance(self, between: Callable[[], None] | None = None) -> Report:
        """Train up to the next report; decide whether to stop, in `stopped`.

        Args:
            between: called every second or so; it may save, and may raise.
        """
        began, first, stop = time.perf_counter(), self.step, self.next_stop()
        while self.step < stop and not self._in_trouble():
            chunk, done = stop, self.step
            if between is not None:
                between()
                chunk = min(stop, done + self._chunk)
            since = time.perf_counter()
            self.train(chunk)
            jax.block_until_ready(self.totals)
            each = (time.perf_counter() - since) / max(1, self.step - done)
            self._chunk = max(1, min(2 * self._chunk, int(LOOK / each)))
        seconds = time.perf_counter() - began
        step, score = self.step, self.score()
        if self.counts():
            self._keep_best(step, score)
        self.stopped = ending(self.state, self.config, self.stale)
        report = self._report(score, (step - first) * self.batch_size / seconds)
        if report["refused"] and not (self.history and self.history[-1]["refused"]):
            logger.warning(
                "%d training step(s) refused by step %d (%s); parameters were left as they were",
                report["refused"],
                step,
                refusals(self.state),
            )
        self.history.append(report)
        accepted = int(self.totals.accepted)
        self.totals, self.reported = empty_totals(), step
        self._return_or_go_on(accepted)
        return report

    def best(self) -> Any:
        """Return the best parameters; without validation the last."""
        return self.state.params if self.best_params is None else self.best_params

    def build(self, params: Any) -> Any:
        """Return the model with other parameters."""
        return nnx.merge(self.parts.graphdef, params, self.parts.fixed)

    def learning_rate(self) -> float | None:
        """Return the learning rate of the last update; None for an optimiser that hides it."""
        if self.settings.schedule is not None:
            return scheduled_rate(self.settings.schedule, self.state)
        # Where it was wrapped in `optax.inject_hyperparams`, once.
        rates = optax.tree.get_all_with_path(self.state.opt_state, "learning_rate")
        return float(rates[0][1]) if len(rates) == 1 else None

    def begin_search(self) -> None:
        """Look for the best parameters from here on."""
        self.best_score, self.best_step, self.stale = self.score(), self.step, 0
        self.best_params = snapshot(self.state.params) if self.has_validation else None

    def failure(self) -> str:
        """Say why the training could not go on, and what to change."""
        state = self.state
        rate = self.learning_rate()
        at = "" if rate is None else f" and learning rate {rate:.3g}"
        remedies = (
            "",
            "standardise the data, raise the noise floor or lower the learning rate",
            "lower the learning rate or clip the gradient",
            "lower the learning rate",
        )
        cause = int(state.refused.argmax())
        remedy = remedies[cause]
        if CAUSES[cause] == FAILED_SOLVE:
            try:
                check_result(state.last_failure)
            except SolverError as error:
                remedy = str(error).removesuffix(".")
        returned = f" after {self.returns} returns to good parameters" if self.returns else ""
        return (
            f"training must have solves that succeed and finite losses and gradients; got "
            f"{int(state.refused_in_a_row)} refused steps in a row at step {self.step} of "
            f"{self.config.steps}{at}{returned} ({refusals(state)}, {int(state.refused.sum())} "
            f"refused in all); {remedy}."
        )

    def saved(self) -> Snapshot:
        """Return everything from which training goes on."""
        state = self.state
        arrays = {
            **named_leaves("model", state.params),
            **named_leaves("optimizer", state.opt_state),
            **named_leaves("good", self.good),
            **named_leaves("tried", self.tried),
            **named_leaves("best", self.best_params),
            **{f"totals/{name}": getattr(self.totals, name) for name in _TOTALS},
            **{name: getattr(state, name) for name in _COUNTERS},
        }
        host = {
            "step": self.step,
            "reported": self.reported,
            "returns": self.returns,
            "more_steps": self._max_steps(),
            "has_best": self.best_params is not None,
            "best_score": number(self.best_score),
            "best_step": self.best_step,
            "stale": self.stale,
            "stopped": self.stopped,
            "seconds": time.perf_counter() - self.start,
            "history": list(self.history),  # written while training goes on
        }
        return Snapshot(arrays, host)

    def restore(self, saved: Snapshot) -> None:
        """Put back what `saved` has returned.

        Raises:
            RunError: an array is missing, or of another shape or type.
        """
        arrays, host = saved
        if (steps := host["more_steps"]) is not None and steps != self._max_steps():
            self._allow_steps(steps)
        params = from_named("model", self.state.params, arrays)
        self.good = self.tried = from_named("good", self.state.params, arrays)
        if any(name.startswith("tried/") for name in arrays):  # the first files lack it
            self.tried = from_named("tried", self.state.params, arrays)
        self.best_params = None
        if host["has_best"]:
            self.best_params = from_named("best", self.state.params, arrays)
        self.state = TrainState(
            params=params,
            opt_state=from_named("optimizer", self.state.opt_state, arrays),
            **{name: jnp.array(arrays[name]) for name in _COUNTERS},
        )
        self.totals = BlockTotals(**{name: jnp.array(arrays[f"totals/{name}"]) for name in _TOTALS})
        score = host["best_score"]
        self.best_score = -math.inf if score is None else score
        self.best_step, self.stale = host["best_step"], host["stale"]
        if host["stopped"] is not None:  # unless it may now take more steps
            self.stopped = ending(self.state, self.config, self.stale)
        self.history, self.reported, self.returns = host["history"], host["reported"], 0
        for _ in range(host["returns"]):
            self._slow_down()
        self.start = time.perf_counter() - host["seconds"]

    def _in_trouble(self) -> bool:
        return int(self.state.refused_in_a_row) > self.config.max_refused

    def _is_stiff(self) -> bool:
        steps = [report["ode_steps"] for report in self.history]
        known = [count for count in steps if count]
        return bool(known) and steps[-1] is not None and steps[-1] > STIFF * known[0]

    def _return_or_go_on(self, accepted: int) -> None:
        """Go back to the last good parameters where there is trouble; else they are these."""
        if accepted:
            self.good = self.tried
        refused = self.stopped == "refused"
        schedule = self.settings.schedule
        able = self.returns < self.config.max_returns and schedule is not None
        if not refused and not (self._is_stiff() and able and self.stopped is None):
            self.tried = snapshot(self.state.params)
            return
        if not able or self.step >= self.config.steps:
            return
        short = refused and int(self.state.last_failure) == STEPS_EXHAUSTED
        if short and (steps := self._max_steps()) is not None:
            self._allow_steps(MORE_STEPS * steps)
        self._slow_down()
        self.tried = self.good
        fresh = initial_state(self.optimizer, self.good)
        self.state = TrainState(
            step=self.state.step,
            params=fresh.params,
            opt_state=fresh.opt_state,
            refused=self.state.refused,
            refused_in_a_row=fresh.refused_in_a_row,
            last_failure=self.state.last_failure,
        )
        self.stopped = None
        logger.warning(
            "training returns to the parameters of an earlier report at step %d (%s), with half "
            "the learning rate: return %d of at most %d",
            self.step,
            refusals(self.state) if refused else "the field has become stiff",
            self.returns,
            self.config.max_returns,
        )

    def _slow_down(self) -> None:
        self.returns += 1
        schedule = self.settings.schedule
        self.settings = self.settings._replace(
            schedule=schedule._replace(peak=SLOWER * schedule.peak)
        )

    def _max_steps(self) -> int | None:
        """Return the most steps of an adaptive solver; None where they are equal."""
        solver = getattr(self.build(self.state.params), "solver", None)
        adaptive = isinstance(solver, SolverConfig) and solver.num_steps is None
        return solver.max_steps if adaptive and solver is not None else None

    def _allow_steps(self, steps: int) -> None:
        model = self.build(self.state.params)
        model.solver = replace(model.solver, max_steps=steps)
        self.parts = take_apart(model)
        self.rebuild()

    def _keep_best(self, step: int, score: float) -> None:
        improved = score > self.best_score
        self.stale = 0 if improved else self.stale + 1
        # As long as no score was finite the latest parameters stand in for the best.
        if self.has_validation and (improved or self.best_score == -math.inf):
            self.best_score, self.best_step = score, step
            self.best_params = snapshot(self.state.params)

    def _report(self, score: float, examples_per_second: float) -> Report:
        mean, rate = means(self.totals), self.learning_rate()
        return {
            "step": self.step,
            **self.position(),
            "loss": mean["loss"],
            self.score_name: number(score),
            "learning_rate": None if rate is None else number(rate),
            "grad_norm": mean["grad_norm"],
            "ode_steps": mean["ode_steps"],
            "refused": int(self.state.refused.sum()),
            "returns": self.returns,
            "examples_per_second": number(examples_per_second),
            "seconds": number(time.perf_counter() - self.start),
        }


_COUNTERS = ("step", "refused", "refused_in_a_row", "last_failure")
_TOTALS = ("loss", "grad_norm", "ode_steps", "accepted")
