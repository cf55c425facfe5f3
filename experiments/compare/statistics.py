"""What several seeds say: means, intervals, and who is better where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.compare.cells import Cell, Record, is_done
from experiments.compare.methods import DIRECT, SKLEARN

CONFIDENCE = 0.95
Verdict = Literal["win", "tie", "loss"]


class Score(NamedTuple):
    """One cell: log-likelihoods in nats per example, seconds of the fit, parameters."""

    test: float
    valid: float
    seconds: float
    num_parameters: float


Scores = dict[str, dict[int, Score]]  # by method and seed


class Interval(NamedTuple):
    """A mean and its 95 % interval; without one where there is a single value."""

    mean: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> Verdict | None:
        """Whether a difference is above zero, below, or neither; None for a single value."""
        if self.low is None or self.high is None:
            return None
        return "win" if self.low > 0 else "loss" if self.high < 0 else "tie"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean with the 95 % interval of Student's t."""
    from scipy.stats import t

    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Interval(mean, None, None)
    quantile = t.ppf((1 + CONFIDENCE) / 2, n - 1)
    half = float(quantile * np.std(values, ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half)


def scores(records: Mapping[Cell, Record | None]) -> dict[str, Scores]:
    """Return the scores of the finished cells by data set, method and seed.

    The method `sklearn_best` is made here: for each seed that one of scikit-learn's, where there
    are several, which is best by validation, at the price of them all.
    """
    found: dict[str, Scores] = {}
    for cell, record in records.items():
        if record is None or not is_done(record):
            continue
        metrics = record["metrics"]
        score = Score(
            metrics["test_log_likelihood"],
            metrics["valid_log_likelihood"],
            metrics["seconds"],
            metrics["num_parameters"],
        )
        found.setdefault(cell.dataset, {}).setdefault(cell.method, {})[cell.seed] = score
    for methods in found.values():
        family = [methods[name] for name in SKLEARN if name in methods]
        if len(family) > 1:
            seeds = sorted(set.intersection(*(set(member) for member in family)))
            best = {seed: _best_of([member[seed] for member in family]) for seed in seeds}
            if best:
                methods["sklearn_best"] = best
    return found


def _best_of(family: Sequence[Score]) -> Score:
    best = max(family, key=lambda score: score.valid)
    return best._replace(seconds=sum(score.seconds for score in family))


def best_direct(methods: Scores) -> str | None:
    """Return the mixture with free parameters that is best by mean validation log-likelihood.

    One that failed at some seeds stands behind those that did not.
    """
    candidates = [name for name in DIRECT if name in methods]
    return max(candidates, key=lambda name: _standing(methods[name]), default=None)


def _standing(by_seed: Mapping[int, Score]) -> tuple[int, float]:
    return len(by_seed), float(np.mean([score.valid for score in by_seed.values()]))


def compare(methods: Scores) -> dict[str, Any]:
    """Summarise one data set.

    Returns:
        `reference`, the best direct method (or None), and by method the seeds, the test
        log-likelihoods, their interval, the mean validation log-likelihood, seconds and parameters,
        and the interval of the differences to the reference at the same seeds, with the verdict.
    """
    reference = best_direct(methods)
    return {
        "reference": reference,
        "methods": {
            name: _summarise(by_seed, None if name == reference else methods.get(reference or ""))
            for name, by_seed in methods.items()
        },
    }


def _summarise(
    by_seed: Mapping[int, Score], reference: Mapping[int, Score] | None
) -> dict[str, Any]:
    seeds = sorted(by_seed)
    values = [by_seed[seed].test for seed in seeds]
    summary: dict[str, Any] = {
        "seeds": seeds,
        "test_log_likelihoods": values,
        "test_log_likelihood": interval(values)._asdict(),
        "valid_log_likelihood": float(np.mean([by_seed[seed].valid for seed in seeds])),
        "seconds": float(np.mean([by_seed[seed].seconds for seed in seeds])),
        "num_parameters": float(np.mean([by_seed[seed].num_parameters for seed in seeds])),
        "difference": None,
        "verdict": None,
    }
    shared = [seed for seed in seeds if seed in (reference or {})]
    if reference is not None and shared:
        difference = interval([by_seed[seed].test - reference[seed].test for seed in shared])
        summary |= {"difference": difference._asdict(), "verdict": difference.verdict}
    return summary


def count_verdicts(sets: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return by method how many data sets it wins, ties and loses against the best direct one."""
    counts: dict[str, dict[str, int]] = {}
    for summary in sets.values():
        for name, method in summary["methods"].items():
            own = counts.setdefault(name, {"win": 0, "tie": 0, "loss": 0, "reference": 0})
            if name == summary["reference"]:
                own["reference"] += 1
            elif method["verdict"] is not None:
                own[method["verdict"]] += 1
    return counts
