"""Where a training run stands in its curriculum, and what the examples are there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cpmm_jax.curriculum import Curriculum, check_carried
from cpmm_jax.training.inputs import Data
from cpmm_jax.training.step import Examples

Course = Callable[[float], Float[Array, "N D"]]


class Staircase:
    """The stages of one run, from the first to v = 0.

    Attributes:
        train: training examples of the stage (as given where each step draws its own).
        valid: validation examples of the stage, or None.
        start: the step at which it began.

    Args:
        curriculum: provider and stages.
        data: training and validation examples.
        steps: training steps of the whole run.
    """

    def __init__(self, curriculum: Curriculum, data: Data, steps: int) -> None:
        self._curriculum, self._data = curriculum, data
        self._positions = curriculum.stages.positions
        self._ends = curriculum.stages.ends(steps)
        self._train: Course | None = None
        if self.is_staged and not curriculum.is_random:
            self._train = curriculum.course(data.train.x[: data.num_examples])
        self._valid: Course | None = None
        if self.is_staged and data.valid is not None:
            self._valid = curriculum.course(data.valid.x)
        self._score: float
        self._begin(0, 0)

    @property
    def v(self) -> float:
        """Position of the stage."""
        return self._positions[self._index]

    @property
    def is_staged(self) -> bool:
        """Whether there is more than the stage of the data themselves."""
        return len(self._positions) > 1

    @property
    def is_last(self) -> bool:
        """Whether the stage is that of the data themselves."""
        return self._index == len(self._positions) - 1

    def next_stop(self, step: int, report_every: int) -> int:
        """Return the step up to which to train before the next report."""
        if self._curriculum.stages.tolerance is not None and not self.is_last:
            report_every = min(report_every, self._curriculum.stages.least_steps)
        return min(step + report_every, self._ends[self._index])

    def is_over(self, step: int, score: float) -> bool:
        """Tell whether to go on to the next stage, given the validation score."""
        if self.is_last:
            return False
        tolerance = self._curriculum.stages.tolerance
        gain = score - self._score
        self._score = score
        if step >= self._ends[self._index]:
            return True
        if tolerance is None or step - self.start < self._curriculum.stages.least_steps:
            return False
        if self._target is not None:
            return score >= self._target - tolerance
        return gain < tolerance

    def go_on(self, step: int) -> None:
        """Enter the next stage at `step`."""
        self._begin(self._index + 1, step)

    def place(self) -> dict[str, Any]:
        """Return where the run stands, as JSON holds it."""
        score = self._score if math.isfinite(self._score) else None
        return {"index": self._index, "start": self.start, "score": score}

    def put(self, place: dict[str, Any]) -> None:
        """Go to a place that `place` has returned."""
        if place["index"] != self._index:
            self._begin(place["index"], place["start"])
        self._score = -math.inf if place["score"] is None else place["score"]

    def _begin(self, index: int, step: int) -> None:
        while self._ends[index] <= step and index < len(self._ends) - 1:
            index += 1  # fewer steps than stages
        self._index, self.start = index, step
        self._score = -math.inf
        train, valid = self._data.train, self._data.valid
        self.train = self._moved(train, self._train)
        self.valid = None if valid is None else self._moved(valid, self._valid)
        self._target: float | None = None
        adaptive = self._curriculum.stages.tolerance is not None and not self.is_last
        if adaptive and self.valid is not None:
            self._target = self._curriculum.target(self.valid.x, self.v)

    def _moved(self, examples: Examples, course: Course | None) -> Examples:
        if course is None or self.is_last:
            return examples
        count = self._data.num_examples if examples is self._data.train else len(examples.x)
        moved = check_carried(examples.x[:count], course(self.v), self.v)
        padded = jnp.pad(moved, [(0, len(examples.x) - count), (0, 0)])
        return examples._replace(x=jax.block_until_ready(padded))
