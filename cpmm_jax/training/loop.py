"""`fit`: training from data to the best parameters by validation."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy.typing as npt
import optax
from flax import nnx

from cpmm_jax.curriculum import Curriculum, NoCurriculum, check_curriculum
from cpmm_jax.dynamics.solve import check_result
from cpmm_jax.errors import SolverError, TrainingError
from cpmm_jax.training.config import TrainConfig, default_optimizer, learning_rate_schedule
from cpmm_jax.training.inputs import Data, Parts, prepare, take_apart
from cpmm_jax.training.progress import (
    Ending,
    MetricsFile,
    ProgressBar,
    ending,
    means,
    number,
    refusals,
    scheduled_rate,
)
from cpmm_jax.training.stages import Staircase
from cpmm_jax.training.state import (
    CAUSES,
    FAILED_SOLVE,
    BlockTotals,
    TrainState,
    initial_state,
    snapshot,
)
from cpmm_jax.training.step import Plan, Settings, make_keys, run_block, validation_score

logger = logging.getLogger("cpmm_jax")

Report = dict[str, Any]


@dataclass(frozen=True, eq=False)
class FitResult:
    """What `fit` found.

    Attributes:
        model: the model with the best parameters by validation; without a validation part the last.
        last_model: the model with the last parameters.
        history: one report per `report_every` steps, as in `metrics.jsonl`.
        best_step: steps done when `model` was reached (0: the start was never improved on).
        best_score: its validation log-likelihood in nats per example; None without validation.
        steps: steps done, refused ones included.
        refused: steps refused.
        seconds: wall time of the whole fit.
        compile_seconds: the part of it before the first step, spent tracing and compiling.
        stopped: why the training ended; "refused" only on `TrainingError.result`.
    """

    model: Any
    last_model: Any
    history: tuple[Report, ...]
    best_step: int
    best_score: float | None
    steps: int
    refused: int
    seconds: float
    compile_seconds: float
    stopped: Ending

    @property
    def converged(self) -> bool:
        """Whether the last tenth of the steps gained less than 0.01 nats, by validation if any."""
        best = self.best_score
        if best is None:
            return True
        before = 0.9 * self.steps
        scores = [r["valid_log_likelihood"] for r in self.history if r["step"] <= before]
        return max((s for s in scores if s is not None), default=-math.inf) > best - 0.01


def fit(
    model: Any,
    x: npt.ArrayLike,
    y: npt.ArrayLike | None = None,
    *,
    config: TrainConfig | None = None,
    curriculum: Curriculum = NoCurriculum(),  # noqa: B008
    x_valid: npt.ArrayLike | None = None,
    y_valid: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    weight_valid: npt.ArrayLike | None = None,
    optimizer: optax.GradientTransformation | None = None,
    metrics_path: str | Path | None = None,
    progress: bool | None = None,
    callback: Callable[[Report], None] | None = None,
    stage_callback: Callable[[float, Any], None] | None = None,
) -> FitResult:
    """Fit a model by maximum likelihood: of p(x, y) where y is known, of p(x) where it is not.

    The data are taken in the units given (standardise them first). `model` itself is not changed;
    only its `nnx.Param` leaves are trained. The same seed on the same machine gives the same
    result.

    Each report holds `step`, `loss` (mean over the accepted steps since the last report),
    `valid_log_likelihood` (nats per example, of what is trained on: log p(x, y) with labels, less
    the share of log p(x) that `config.discriminative` takes, else log p(x); uniform grid of
    `valid_times` pseudotimes), `learning_rate` (None if unknown), `grad_norm`, `ode_steps` (means
    too), `refused` (steps so far), `examples_per_second`,
    `seconds` (since the start). Under a curriculum each also holds `v`, the position of its stage,
    where the scores before the last stage are those of the data carried there; the best parameters
    and early stopping are looked for in the last stage, v = 0, alone.

    Args:
        model: a `flax.nnx.Module` with `read(times)`, such as `CPMM`.
        x: training examples, shape (N, D).
        y: class codes 0..C-1, shape (N,), -1 where the class is not known; None to train without
            labels (clustering where C > 1).
        config: settings; the defaults if None.
        curriculum: a map towards a Gaussian, along which to train first.
        x_valid: validation examples; None to set `config.valid_fraction` of the rows aside.
        y_valid: their labels, where `y` is given.
        sample_weight: how much each training example counts, shape (N,); only ratios matter.
        weight_valid: the same of the validation examples.
        optimizer: any optax transformation; None for Adam as described by `config`.
        metrics_path: a new file for the reports, one JSON object per line.
        progress: True or False to show a progress bar or not; None to show it on a terminal.
        callback: called with every report.
        stage_callback: called at the end of every stage of a curriculum with its position v and
            the model there; at v = 0 the best.

    Returns:
        A `FitResult`.

    Raises:
        ConfigError: a setting out of range, or arguments that do not fit each other.
        DataError: bad examples or labels, or fewer rows than components.
        RunError: `metrics_path` exists or cannot be written.
        TrainingError: more than `config.max_refused` steps in a row were refused for a failed solve
            or a number that is not finite; its `result` holds the best model so far.

    Source: CPMM paper, Algorithm 1.
    """
    start = time.perf_counter()
    config = TrainConfig() if config is None else config
    config.check()
    parts = take_apart(model)
    data = prepare(model, parts.params, x, y, x_valid, y_valid, config, sample_weight, weight_valid)
    check_curriculum(curriculum, data.train.x.shape[1])
    with MetricsFile(metrics_path) as metrics, ProgressBar(config.steps, shown=progress) as bar:
        run = _Run(parts, data, config, curriculum, optimizer, start)
        bar.restart()
        while run.stopped is None:
            report = run.advance()
            metrics.write(report)
            bar.update(report)
            if callback is not None:
                callback(report)
            if run.is_over and stage_callback is not None:
                stage_callback(run.stages.v, run.current())
            run.go_on()
    result = run.result()
    if run.stopped == "refused":
        raise TrainingError(run.failure(), result)
    if stage_callback is not None:
        stage_callback(run.stages.v, result.model)
    return result


class _Run:
    """One call of `fit` under way: the state on the device and the bookkeeping on the host."""

    def __init__(
        self,
        parts: Parts,
        data: Data,
        config: TrainConfig,
        curriculum: Curriculum,
        optimizer: optax.GradientTransformation | None,
        start: float,
    ) -> None:
        self.parts, self.config = parts, config
        self.stages = Staircase(curriculum, data, config.steps)
        self.settings = Settings(
            keys=make_keys(config.seed),
            num_examples=jnp.int32(data.num_examples),
            max_refused=jnp.int32(config.max_refused),
            schedule=learning_rate_schedule(config) if optimizer is None else None,
            position=jnp.float32(self.stages.v),
            discriminative=jnp.float32(config.discriminative),
        )
        self.plan = Plan(
            parts.graphdef,
            default_optimizer(config) if optimizer is None else optimizer,
            config.time_sampler,
            config.num_times,
            min(config.batch_size, data.num_examples),
            curriculum if curriculum.is_random else None,
        )
        self.start = start
        self.stopped: Ending | None = None
        self.is_over = False  # the stage
        self.history: list[Report] = []
        self.state: TrainState = initial_state(self.plan.optimizer, parts.params)

        compiling = time.perf_counter()
        self._compile()
        self._begin_stage()
        self.compile_seconds = time.perf_counter() - compiling

    def advance(self) -> Report:
        """Train up to the next report; decide whether to stop, in `self.stopped`."""
        config = self.config
        done = int(self.state.step)
        began = time.perf_counter()
        totals = self._run_until(self.stages.next_stop(done, config.report_every))
        seconds = time.perf_counter() - began
        step = int(self.state.step)
        score = self._score()
        if self.stages.is_last:
            self._keep_best(step, score)
        self.stopped = ending(self.state, config, self.stale)
        report = self._report(totals, score, (step - done) * self.plan.batch_size / seconds)
        self.is_over = self.stages.is_over(step, score)
        if report["refused"] and not (self.history and self.history[-1]["refused"]):
            logger.warning(
                "%d training step(s) refused by step %d (%s); parameters were left as they were",
                report["refused"],
                step,
                refusals(self.state),
            )
        self.history.append(report)
        return report

    def go_on(self) -> None:
        """Enter the next stage, where this one is over."""
        if self.is_over:
            self.stages.go_on(int(self.state.step))
            self._begin_stage()

    def current(self) -> Any:
        """Return the model with the present parameters."""
        return nnx.merge(self.parts.graphdef, snapshot(self.state.params), self.parts.fixed)

    def result(self) -> FitResult:
        """Put the models together."""
        last = nnx.merge(self.parts.graphdef, self.state.params, self.parts.fixed)
        best = last
        if self.best_params is not None:
            best = nnx.merge(self.parts.graphdef, self.best_params, self.parts.fixed)
        step = int(self.state.step)
        return FitResult(
            model=best,
            last_model=last,
            history=tuple(self.history),
            best_step=step if self.best_params is None else self.best_step,
            best_score=self.best_score if self.best_score > -math.inf else None,
            steps=step,
            refused=int(self.state.refused.sum()),
            seconds=time.perf_counter() - self.start,
            compile_seconds=self.compile_seconds,
            stopped=self.stopped or "finished",
        )

    def failure(self) -> str:
        """Say why the training could not go on, and what to change."""
        state = self.state
        rate = self._learning_rate()
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
        return (
            f"training must have solves that succeed and finite losses and gradients; got "
            f"{int(state.refused_in_a_row)} refused steps in a row at step {int(state.step)} of "
            f"{self.config.steps}{at} ({refusals(state)}, {int(state.refused.sum())} refused in "
            f"all); {remedy}."
        )

    def _begin_stage(self) -> None:
        """Set the position; at the last one the best is looked for, and the learning rate falls."""
        stages = self.stages
        schedule = self.settings.schedule
        if schedule is not None and stages.is_staged:
            begin = jnp.float32(int(self.state.step) if stages.is_last else self.config.steps)
            schedule = schedule._replace(begin=begin)
        self.settings = self.settings._replace(position=jnp.float32(stages.v), schedule=schedule)
        self.best_score, self.best_step, self.stale = self._score(), int(self.state.step), 0
        self.best_params = None if stages.valid is None else snapshot(self.state.params)

    def _compile(self) -> None:
        """Compile both programs side by side; the calls that follow find them."""
        programs = [run_block.lower(*self._block_arguments(0))]
        if self.stages.valid is not None:
            programs.append(validation_score.lower(*self._score_arguments()))
        with ThreadPoolExecutor(len(programs)) as pool:
            list(pool.map(lambda program: program.compile(), programs))

    def _block_arguments(self, stop: int) -> tuple[Any, ...]:
        state, fixed = self.state, self.parts.fixed
        return self.plan, state, fixed, self.stages.train, self.settings, jnp.int32(stop)

    def _score_arguments(self) -> tuple[Any, ...]:
        parts, times = self.parts, self.config.valid_times or self.config.num_times
        share = self.settings.discriminative
        return parts.graphdef, self.state.params, parts.fixed, self.stages.valid, times, share

    def _run_until(self, stop: int) -> BlockTotals:
        self.state, totals = run_block(*self._block_arguments(stop))
        return jax.block_until_ready(totals)

    def _score(self) -> float:
        """Return the validation score; -inf where there is none or it is not finite."""
        if self.stages.valid is None:
            return -math.inf
        score = float(validation_score(*self._score_arguments()))
        return score if math.isfinite(score) else -math.inf

    def _keep_best(self, step: int, score: float) -> None:
        improved = score > self.best_score
        self.stale = 0 if improved else self.stale + 1
        # As long as no score was finite the latest parameters stand in for the best.
        if self.stages.valid is not None and (improved or self.best_score == -math.inf):
            self.best_score, self.best_step = score, step
            self.best_params = snapshot(self.state.params)

    def _report(self, totals: BlockTotals, score: float, examples_per_second: float) -> Report:
        mean, rate = means(totals), self._learning_rate()
        position = {"v": self.stages.v} if self.stages.is_staged else {}
        return {
            "step": int(self.state.step),
            **position,
            "loss": mean["loss"],
            "valid_log_likelihood": number(score),
            "learning_rate": None if rate is None else number(rate),
            "grad_norm": mean["grad_norm"],
            "ode_steps": mean["ode_steps"],
            "refused": int(self.state.refused.sum()),
            "examples_per_second": number(examples_per_second),
            "seconds": number(time.perf_counter() - self.start),
        }

    def _learning_rate(self) -> float | None:
        """Return the learning rate of the last update; None for an optimiser that hides it."""
        if self.settings.schedule is not None:
            return scheduled_rate(self.settings.schedule, self.state)
        # Where it was wrapped in `optax.inject_hyperparams`, once.
        rates = optax.tree.get_all_with_path(self.state.opt_state, "learning_rate")
        return float(rates[0][1]) if len(rates) == 1 else None
