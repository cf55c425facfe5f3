"""How settings are chosen: by validation, within a budget of seconds, from small steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cpmm_jax.errors import CpmmError

Choice = dict[str, Any]  # a value for each setting
Axes = dict[str, Sequence[Any]]  # the values of each setting, from low to high
LogProb = Callable[[npt.NDArray[np.float32]], Any]  # (N, D) -> (N,) nats


@dataclass(frozen=True)
class Budget:
    """Seconds to spend, counted from the moment that it is made."""

    seconds: float
    start: float = field(default_factory=time.perf_counter)

    def left(self) -> float:
        """Return the seconds left; negative when overdrawn."""
        return self.seconds - (time.perf_counter() - self.start)


class Density(NamedTuple):
    """One fitted candidate.

    Attributes:
        log_prob: (N, D) -> (N,), in nats.
        num_parameters: numbers that it holds.
        found: settings that the fit itself chose by validation, beyond those asked for.
    """

    log_prob: LogProb
    num_parameters: int
    found: Choice


class Trial(NamedTuple):
    """What became of one candidate; `valid_log_likelihood` is None where it failed."""

    settings: Choice
    valid_log_likelihood: float | None
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class Fitted:
    """The best candidate.

    Attributes:
        log_prob: (N, D) -> (N,), in nats.
        num_parameters: numbers that it holds.
        settings: what validation chose.
        trials: every candidate tried, in order.
    """

    log_prob: LogProb
    num_parameters: int
    settings: Choice
    trials: tuple[Trial, ...]

    @property
    def tried(self) -> int:
        """Number of candidates tried."""
        return len(self.trials)


def search(
    axes: Axes,
    start: Choice,
    fit: Callable[[Choice], Density],
    x_valid: npt.NDArray[np.float32],
    budget: Budget,
) -> Fitted:
    """Fit candidates until the budget is spent, and return the best by validation.

    The first is always finished. Another is begun where as much time is left as the last one took.
    A candidate that cannot be fitted (more components than rows, a singular covariance) is noted
    and passed over.

    Args:
        axes: values to choose from; see `climb` for the order.
        start: the first candidate.
        fit: fits one candidate.
        x_valid: validation examples, shape (N, D).
        budget: of the whole search.

    Raises:
        ValueError: no candidate could be fitted.
    """
    trials: list[Trial] = []
    best: tuple[float, Density, Choice] | None = None
    for settings in climb(axes, start, trials):
        if trials and budget.left() < trials[-1].seconds:
            break
        began = time.perf_counter()
        try:
            density = fit(settings)
            score = mean_log_likelihood(density.log_prob, x_valid)
        except (ValueError, ArithmeticError, CpmmError) as error:
            seconds = time.perf_counter() - began
            trials.append(Trial(settings, None, seconds, one_line(error)))
            continue
        trials.append(Trial(settings, score, time.perf_counter() - began))
        if best is None or score > best[0]:
            best = score, density, settings
    if best is None:
        raise ValueError(f"no candidate could be fitted; the first failed with {trials[0].error}")
    _, density, settings = best
    return Fitted(density.log_prob, density.num_parameters, settings | density.found, tuple(trials))


def mean_log_likelihood(log_prob: LogProb, x: npt.NDArray[np.float32]) -> float:
    """Return the mean of log p(x) in nats.

    Raises:
        ValueError: it is not finite.
    """
    values = np.asarray(log_prob(x), np.float64)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"log p(x) must be finite; got {bad} of {len(values)} that are not")
    return float(values.mean())


def one_line(error: BaseException) -> str:
    """Return the kind and the first line of an error."""
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first}"


def climb(axes: Axes, start: Choice, trials: Sequence[Trial]) -> Iterator[Choice]:
    """Propose `start`, then the untried neighbours of the best so far until none is left.

    Neighbours differ in one setting: one step up its axis, one down, then two up, which bridges a
    single bad value; earlier axes come first. So from a small start sizes grow until validation
    falls, and then the other settings get their turn.

    Args:
        axes: by setting, its values from low to high.
        start: one of the values on each axis.
        trials: those so far; the caller adds to them before asking for more.
    """
    proposed = [start]
    yield start
    while True:
        fitted = [trial for trial in trials if trial.valid_log_likelihood is not None]
        best = max(fitted, key=_score).settings if fitted else start
        new = next((s for s in _neighbours(best, axes) if s not in proposed), None)
        if new is None:
            return
        proposed.append(new)
        yield new


def _score(trial: Trial) -> float:
    assert trial.valid_log_likelihood is not None
    return trial.valid_log_likelihood


def _neighbours(centre: Choice, axes: Axes) -> Iterator[Choice]:
    for step in (1, -1, 2):
        for name, values in axes.items():
            index = list(values).index(centre[name]) + step
            if 0 <= index < len(values):
                yield centre | {name: values[index]}
