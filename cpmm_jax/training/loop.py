"""`fit`: training from data to the best parameters by validation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy.typing as npt
import optax

from cpmm_jax.curriculum import (
    Curriculum,
    NoCurriculum,
    check_curriculum,
    describe_curriculum,
)
from cpmm_jax.data.pixels import Pixels
from cpmm_jax.errors import RunError, TrainingError
from cpmm_jax.training.config import TrainConfig, default_optimizer, learning_rate_schedule
from cpmm_jax.training.inputs import Data, prepare, take_apart
from cpmm_jax.training.keeper import kept
from cpmm_jax.training.progress import Ending, MetricsFile, ProgressBar
from cpmm_jax.training.running import Report, Running
from cpmm_jax.training.snapshot_file import Snapshot, named_leaves
from cpmm_jax.training.snapshots import Checkpoints, fingerprint_of
from cpmm_jax.training.stages import Staircase
from cpmm_jax.training.state import snapshot
from cpmm_jax.training.step import Plan, Settings, make_keys, run_block, validation_score


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
        returns: returns to good parameters, see `TrainConfig.max_refused`.
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
    returns: int
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
    pixels: Pixels | None = None,
    optimizer: optax.GradientTransformation | None = None,
    metrics_path: str | Path | None = None,
    progress: bool | None = None,
    checkpoints: Checkpoints | str | Path | None = None,
    resume: bool = False,
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
        pixels: where examples are images as they were recorded, whole numbers 0..255: the map to
            the space of the model. They are dequantised anew in every step, those of the validation
            once, and so are all where a curriculum carries them along a map of its own.
        optimizer: any optax transformation; None for Adam as described by `config`.
        metrics_path: a new file for the reports, one JSON object per line.
        progress: True or False to show a progress bar or not; None to show it on a terminal.
        checkpoints: where to save the training while it runs, a folder or a `Checkpoints`. SIGTERM
            and SIGINT then save and end it (see `Interrupted`).
        resume: whether to go on from the newest snapshot in `checkpoints`: the result is the same,
            bit by bit, as if training had never stopped. The other arguments must be as they were.
        callback: called with every report.
        stage_callback: called at the end of every stage of a curriculum with its position v and
            the model there; at v = 0 the best.

    Returns:
        A `FitResult`.

    Raises:
        ConfigError: a setting out of range, or arguments that do not fit each other.
        DataError: bad examples or labels, or fewer rows than components.
        RunError: `metrics_path` exists or cannot be written; snapshots that are all damaged, in use
            by another process, or of other settings or data.
        Interrupted: a signal has ended the training, which was saved.
        TrainingError: more than `config.max_refused` steps in a row were refused for a failed solve
            or a number that is not finite, after `config.max_returns` returns; its `result` holds
            the best model so far.

    Source: CPMM paper, Algorithm 1.
    """
    start = time.perf_counter()
    config = TrainConfig() if config is None else config
    config.check()
    parts = take_apart(model)
    check_curriculum(curriculum, model.dim)
    carried = len(curriculum.stages.positions) > 1 and not curriculum.is_random
    weights = (sample_weight, weight_valid)
    data = prepare(
        model, parts.params, x, y, x_valid, y_valid, config, *weights, pixels, once=carried
    )
    run = _Run(model, data, config, curriculum, optimizer, start, None if carried else pixels)
    identity = partial(
        fingerprint_of,
        model,
        parts.fixed,
        config,
        {**named_leaves("train", data.train), **named_leaves("valid", data.valid)},
        curriculum=describe_curriculum(curriculum),
        optimizer="Adam" if optimizer is None else "given",
        **({} if pixels is None else {"pixels": [type(pixels).__qualname__, vars(pixels)]}),
    )
    with (
        kept(run, checkpoints, identity, resume=resume) as keeper,
        MetricsFile(metrics_path, run.history if resume else None) as metrics,
        ProgressBar(config.steps, shown=progress) as bar,
    ):
        bar.restart()
        while run.stopped is None:
            report = run.advance(keeper.between)
            metrics.write(report)
            bar.update(report)
            if callback is not None:
                callback(report)
            if run.is_over and stage_callback is not None:
                stage_callback(run.stages.v, run.build(snapshot(run.state.params)))
            run.go_on()
    result = run.result()
    if run.stopped == "refused":
        raise TrainingError(run.failure(), result)
    if stage_callback is not None:
        stage_callback(run.stages.v, result.model)
    return result


class _Run(Running):
    """One call of `fit` under way."""

    score_name = "valid_log_likelihood"

    def __init__(
        self,
        model: Any,
        data: Data,
        config: TrainConfig,
        curriculum: Curriculum,
        optimizer: optax.GradientTransformation | None,
        start: float,
        pixels: Pixels | None,
    ) -> None:
        self.stages = Staircase(curriculum, data, config.steps)
        settings = Settings(
            keys=make_keys(config.seed),
            num_examples=jnp.int32(data.num_examples),
            max_refused=jnp.int32(config.max_refused),
            schedule=learning_rate_schedule(config) if optimizer is None else None,
            position=jnp.float32(self.stages.v),
            discriminative=jnp.float32(config.discriminative),
        )
        rule = default_optimizer(config) if optimizer is None else optimizer
        super().__init__(model, config, rule, settings, start)
        self.plan = Plan(
            self.parts.graphdef,
            rule,
            config.time_sampler,
            config.num_times,
            min(config.batch_size, data.num_examples),
            curriculum if curriculum.is_random else None,
            pixels,
        )
        self.is_over = False  # the stage
        compiling = time.perf_counter()
        self._compile()
        self._begin_stage()
        self.compile_seconds = time.perf_counter() - compiling

    @property
    def batch_size(self) -> int:
        return self.plan.batch_size

    @property
    def has_validation(self) -> bool:
        return self.stages.valid is not None

    def train(self, stop: int) -> None:
        self.state, self.totals = run_block(*self._block_arguments(stop))

    def score(self) -> float:
        if self.stages.valid is None:
            return -math.inf
        score = float(validation_score(*self._score_arguments()))
        return score if math.isfinite(score) else -math.inf

    def rebuild(self) -> None:
        self.plan = self.plan._replace(graphdef=self.parts.graphdef)
        self._compile()

    def next_stop(self) -> int:
        return self.stages.next_stop(self.reported, self.config.report_every)

    def position(self) -> dict[str, Any]:
        return {"v": self.stages.v} if self.stages.is_staged else {}

    def counts(self) -> bool:
        return self.stages.is_last

    def advance(self, between: Callable[[], None] | None = None) -> Report:
        report = super().advance(between)
        score = report[self.score_name]
        self.is_over = self.stages.is_over(self.step, -math.inf if score is None else score)
        return report

    def go_on(self) -> None:
        """Enter the next stage, where this one is over."""
        if self.is_over:
            self.stages.go_on(self.step)
            self._begin_stage()
            self.is_over = False

    def saved(self) -> Snapshot:
        arrays, host = super().saved()
        return Snapshot(arrays, {**host, "stage": self.stages.place()})

    def restore(self, saved: Snapshot) -> None:
        try:
            self.stages.put(saved.host["stage"])
        except LookupError as error:
            raise RunError(
                "the snapshot must be of a training along the same curriculum; got another; "
                "begin anew."
            ) from error
        self._set_position()
        super().restore(saved)

    def result(self) -> FitResult:
        """Put the models together."""
        return FitResult(
            model=self.build(self.best()),
            last_model=self.build(self.state.params),
            history=tuple(self.history),
            best_step=self.step if self.best_params is None else self.best_step,
            best_score=self.best_score if self.best_score > -math.inf else None,
            steps=self.step,
            refused=int(self.state.refused.sum()),
            returns=self.returns,
            seconds=time.perf_counter() - self.start,
            compile_seconds=self.compile_seconds,
            stopped=self.stopped or "finished",
        )

    def _begin_stage(self) -> None:
        self._set_position()
        self.begin_search()

    def _set_position(self) -> None:
        """Set the position; at the last one the learning rate falls."""
        stages = self.stages
        schedule = self.settings.schedule
        if schedule is not None and stages.is_staged:
            begin = jnp.float32(stages.start if stages.is_last else self.config.steps)
            schedule = schedule._replace(begin=begin)
        self.settings = self.settings._replace(position=jnp.float32(stages.v), schedule=schedule)

    def _compile(self) -> None:
        """Compile both programs side by side; the calls that follow find them."""
        programs = [run_block.lower(*self._block_arguments(0))]
        if self.stages.valid is not None:
            programs.append(validation_score.lower(*self._score_arguments()))
        with ThreadPoolExecutor(len(programs)) as pool:
            list(pool.map(lambda program: program.compile(), programs))

    def _block_arguments(self, stop: int) -> tuple[Any, ...]:
        state, totals, fixed = self.state, self.totals, self.parts.fixed
        return self.plan, state, totals, fixed, self.stages.train, self.settings, jnp.int32(stop)

    def _score_arguments(self) -> tuple[Any, ...]:
        parts, times = self.parts, self.config.valid_times or self.config.num_times
        share = self.settings.discriminative
        return parts.graphdef, self.state.params, parts.fixed, self.stages.valid, times, share
