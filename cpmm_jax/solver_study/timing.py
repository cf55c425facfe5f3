"""Timings side by side: interleaved, awaited, medians with their spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, and the quartiles about it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return milliseconds or microseconds, the quartiles in brackets."""
        unit, scale = ("ms", 1e3) if self.median >= 1e-3 else ("us", 1e6)
        low, middle, high = (f"{scale * s:.3g}" for s in (self.low, self.median, self.high))
        return f"{middle} {unit} ({low}..{high})"


def interleave(
    cases: Mapping[str, Callable[[], Any]], *, seconds: float = 2.0, least: int = 3
) -> dict[str, Timing]:
    """Time zero-argument callables, one call of each in turn, so that all see the same machine.

    Before its turn each is called once untimed, unless that is long: what the call before left
    behind, gigabytes that the kernel takes back meanwhile for one, is not charged to the next.

    Args:
        cases: what to time, by name; each is called once before, to compile and to warm up. JAX's
            asynchronous results are awaited.
        seconds: time to spend on each case, about; one that has had it drops out.
        least: fewest calls of each.

    Returns:
        The timing of each, by name.

    Example:
        >>> interleave({"sum": lambda: sum(range(10))}, seconds=0.0)["sum"].median > 0
        True
    """
    for case in cases.values():
        jax.block_until_ready(case())
    spent: dict[str, list[float]] = {name: [] for name in cases}
    going = list(cases)
    while going:
        for name in going:
            if not spent[name] or spent[name][-1] < seconds:
                jax.block_until_ready(cases[name]())
            start = time.perf_counter()
            jax.block_until_ready(cases[name]())
            spent[name].append(time.perf_counter() - start)
        going = [n for n in going if len(spent[n]) < least or sum(spent[n]) < seconds]
    return {
        name: Timing(*(float(np.quantile(values, q)) for q in (0.5, 0.25, 0.75)))
        for name, values in spent.items()
    }
