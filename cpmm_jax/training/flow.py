"""`fit_flow`: from data to the flow of the curriculum."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Float

from cpmm_jax.data.checks import check_examples, check_finite
from cpmm_jax.data.dataset import Dataset, split
from cpmm_jax.dynamics.course import FlowReading, latent_log_prob
from cpmm_jax.dynamics.flow import CNF
from cpmm_jax.dynamics.trace import ExactTrace, HutchinsonTrace, Trace, has_closed_trace
from cpmm_jax.errors import ConfigError, FlowWarning, TrainingError
from cpmm_jax.training.config import TrainConfig, default_optimizer, learning_rate_schedule
from cpmm_jax.training.flow_objective import Objective
from cpmm_jax.training.flow_step import (
    ASSIGNED_STEPS,
    FlowSettings,
    Plan,
    pair,
    pair_fixed,
    run_block,
    validation_loss,
)
from cpmm_jax.training.keeper import kept
from cpmm_jax.training.latent import LatentCheck, check_latent
from cpmm_jax.training.progress import Ending, MetricsFile, ProgressBar, number
from cpmm_jax.training.running import Report, Running
from cpmm_jax.training.snapshot_file import named_leaves
from cpmm_jax.training.snapshots import Checkpoints, fingerprint_of

EXACT_DIM = 128  # features above which a trace without a closed form is estimated at the end
CHECKED_ROWS = 2048  # training rows whose latent points are checked where there is no validation


@dataclass(frozen=True, eq=False)
class FlowResult:
    """What `fit_flow` found.

    Attributes:
        flow: the flow with the best parameters by validation; without a validation part the last.
        last_flow: the flow with the last parameters.
        history: one report per `report_every` steps, as in `metrics.jsonl`.
        best_step: steps done when `flow` was reached (0: the start was never improved on).
        best_loss: its validation loss, of the objective; None without validation.
        valid_log_likelihood: log-likelihood of the validation part under `flow` in nats per
            example, whatever the objective; None without validation, or where the solve failed.
        latent: how far the examples (of the validation part, else of training) are from a standard
            normal at v = 1.
        steps: steps done, refused ones included.
        refused: steps refused.
        returns: returns to good parameters, see `TrainConfig.max_refused`.
        seconds: wall time of the whole fit, compilation included.
        stopped: why the training ended; "refused" only on `TrainingError.result`.
    """

    flow: CNF
    last_flow: CNF
    history: tuple[dict[str, Any], ...]
    best_step: int
    best_loss: float | None
    valid_log_likelihood: float | None
    latent: LatentCheck
    steps: int
    refused: int
    returns: int
    seconds: float
    stopped: Ending


def fit_flow(
    flow: CNF,
    x: npt.ArrayLike,
    *,
    objective: Objective,
    config: TrainConfig | None = None,
    x_valid: npt.ArrayLike | None = None,
    progress: bool | None = None,
    metrics_path: str | Path | None = None,
    checkpoints: Checkpoints | str | Path | None = None,
    resume: bool = False,
) -> FlowResult:
    """Fit a continuous normalizing flow, by maximum likelihood or by flow matching.

    The data are taken in the units given (standardise them first: the latent space is a standard
    normal). `flow` itself is not changed. The randomness of a step is a function of
    the seed and of its number; the same seed on the same machine gives the same result.

    Each report holds `step`, `loss` (mean over the accepted steps since the last report),
    `valid_loss` (the objective's, with noise that stays the same), `learning_rate`, `grad_norm`,
    `ode_steps` (means too), `refused` (steps so far), `examples_per_second`, `seconds`.

    Args:
        flow: what to train.
        x: training examples, shape (N, D).
        objective: `MaximumLikelihood(...)` or `FlowMatching(...)`.
        config: settings; the defaults if None. Those of pseudotimes are not used.
        x_valid: validation examples; None to set `config.valid_fraction` of the rows aside.
        progress: True or False to show a progress bar or not; None to show it on a terminal.
        metrics_path: a new file for the reports, one JSON object per line.
        checkpoints: as for `fit`.
        resume: as for `fit`.

    Returns:
        A `FlowResult`.

    Raises:
        ConfigError: a setting out of range, or arguments that do not fit each other.
        DataError: bad examples.
        RunError: `metrics_path` exists or cannot be written.
        TrainingError: more than `config.max_refused` steps in a row were refused for a failed solve
            or a number that is not finite; its `result` holds the best flow so far.

    Warns:
        FlowWarning: the latent points are far from a standard normal.

    Source: CPMM paper, section 3.3; see the objectives.
    """
    start = time.perf_counter()
    config = TrainConfig() if config is None else config
    config.check()
    if not isinstance(flow, CNF):
        raise ConfigError(f"`flow` must be a CNF; got {type(flow).__name__}; build one first.")
    data = _prepare(flow, x, x_valid, config)
    run = _Run(flow, data, objective, config, start)
    identity = partial(
        fingerprint_of,
        flow,
        run.parts.fixed,
        config,
        named_leaves("data", data),
        objective=repr(objective),
    )
    with (
        kept(run, checkpoints, identity, resume=resume) as keeper,
        MetricsFile(metrics_path, run.history if resume else None) as metrics,
        ProgressBar(config.steps, shown=progress) as bar,
    ):
        while run.stopped is None:
            report = run.advance(keeper.between)
            metrics.write(report)
            bar.update({"valid_log_likelihood": report["valid_loss"], **report})
    result = run.result()
    if run.stopped == "refused":
        raise TrainingError(run.failure(), result)
    if not result.latent.ok:
        warnings.warn(
            "the flow's latent points should be a standard normal; got errors in standard "
            f"deviations {result.latent}; train for more steps, with a wider field, or on "
            "standardised data.",
            FlowWarning,
            stacklevel=2,
        )
    return result


class _Data(NamedTuple):
    train: Float[Array, "N D"]
    valid: Float[Array, "M D"] | None


def _prepare(
    flow: CNF, x: npt.ArrayLike, x_valid: npt.ArrayLike | None, config: TrainConfig
) -> _Data:
    def checked(values: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
        examples = check_examples(values, name=name, dim=flow.dim)
        with np.errstate(over="ignore"):
            cast = examples.astype(flow.dtype)
        check_finite(cast, name=name)  # again: float32 holds less than float64
        return cast

    data = Dataset("x", checked(x, "x"), None)
    valid = None if x_valid is None else checked(x_valid, "x_valid")
    if valid is None:
        cut = config.valid_fraction
        data = split(data, seed=config.seed, valid_fraction=cut, test_fraction=0.0)
        valid = data.x_valid
    if valid is None and config.patience is not None:
        raise ConfigError(
            f"`patience` must come with a validation part; got patience {config.patience} and "
            "none; give `x_valid` or a `valid_fraction` above 0."
        )
    return _Data(jnp.asarray(data.x_train), None if valid is None else jnp.asarray(valid))


class _Run(Running):
    """One call of `fit_flow` under way."""

    score_name = "valid_loss"

    def __init__(
        self, flow: CNF, data: _Data, objective: Objective, config: TrainConfig, start: float
    ) -> None:
        self.data = data
        keys = jax.random.split(jax.random.key(config.seed), 3)
        self.valid_key = keys[2]
        count = len(data.train)
        settings = FlowSettings(
            keys=keys[:2],
            num_examples=jnp.int32(count),
            max_refused=jnp.int32(config.max_refused),
            schedule=learning_rate_schedule(config),
        )
        super().__init__(flow, config, default_optimizer(config), settings, start)
        size = min(config.batch_size, count)
        self.plan = Plan(self.parts.graphdef, self.optimizer, objective, size)
        self.drawn = None
        if data.valid is not None:
            drawn = objective.draw(self.valid_key, data.valid.shape, data.valid.dtype)
            self.drawn = pair_fixed(self.plan, data.valid, drawn)
        self.begin_search()

    @property
    def batch_size(self) -> int:
        return self.plan.batch_size

    @property
    def has_validation(self) -> bool:
        return self.data.valid is not None

    def train(self, stop: int) -> None:
        goes_on = True
        while goes_on:
            first, train = self.state.step + 0, self.data.train  # a copy: the state is donated
            pairing = pair(self.plan, train, self.settings, first)
            until = stop if pairing is None else min(stop, int(first) + ASSIGNED_STEPS)
            self.state, self.totals = run_block(
                self.plan,
                self.state,
                self.totals,
                self.parts.fixed,
                train,
                self.settings,
                jnp.int32(until),
                pairing,
            )
            goes_on = int(self.state.step) == until < stop

    def score(self) -> float:
        """Return the validation loss, its sign changed."""
        if self.data.valid is None:
            return -math.inf
        arrays = self.state.params, self.parts.fixed, self.data.valid, self.drawn
        loss = float(validation_loss(self.plan, *arrays))
        return -loss if math.isfinite(loss) else -math.inf

    def rebuild(self) -> None:
        self.plan = self.plan._replace(graphdef=self.parts.graphdef)

    def advance(self, between: Callable[[], None] | None = None) -> Report:
        report = super().advance(between)
        score = report[self.score_name]
        report[self.score_name] = None if score is None else -score
        return report

    def result(self) -> FlowResult:
        """Put the flows together, and look at the latent points of the best."""
        valid = self.data.valid
        best = self.build(self.best())
        rows = self.data.train[:CHECKED_ROWS] if valid is None else valid
        exact = best.dim <= EXACT_DIM or has_closed_trace(best.field)
        trace = ExactTrace() if exact else HutchinsonTrace(num_samples=16)
        reading = _read_latent(best, rows, self.valid_key, trace)
        known = valid is not None and bool(reading.ok)
        return FlowResult(
            flow=best,
            last_flow=self.build(self.state.params),
            history=tuple(self.history),
            best_step=self.step if valid is None else self.best_step,
            best_loss=-self.best_score if self.best_score > -math.inf else None,
            valid_log_likelihood=number(latent_log_prob(reading).mean()) if known else None,
            latent=check_latent(np.where(reading.ok, reading.states[0], np.nan)),
            steps=self.step,
            refused=int(self.state.refused.sum()),
            returns=self.returns,
            seconds=time.perf_counter() - self.start,
            stopped=self.stopped or "finished",
        )


@partial(jax.jit, static_argnames="trace")
def _read_latent(flow: CNF, x: Array, key: Array, trace: Trace) -> FlowReading:
    with jax.default_matmul_precision("float32"):
        return flow.read(x, jnp.ones(1), trace=trace, key=key)
