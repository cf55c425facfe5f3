"""Solvers on work and precision: steps, tolerances and adjoints, before training and after it.

    .venv/bin/python -m benchmarks.solvers [--full]

What is measured, and against what, is told in `cpmm_jax.solver_study.compare`; `cpmm bench-solvers`
does the same to the model of a run. The pinwheel has one trajectory, the digits one for each class.
Compiling takes most of the time, so each size has a time limit, and candidates that are not reached
within it are counted below the table; the short form has three candidates, on the pinwheel.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

import cpmm_jax as cpmm
from benchmarks.report import Report, Table, main
from cpmm_jax.data.readers import load
from cpmm_jax.data.standardise import Standardizer
from cpmm_jax.errors import DataWarning
from cpmm_jax.plotting import plot_work_precision, save_figure
from cpmm_jax.solver_study import (
    SolverMeasurement,
    compare_solvers,
    default_candidates,
    recommend_solver,
)
from cpmm_jax.solver_study.timing import Timing

TOLERANCES = (1e-2, 1e-3)
SHORT = ("ReversibleHeun, 8 steps", "ReversibleHeun, 16 steps", "Tsit5, 4 steps")
COLUMNS = ("solver", "per gradient", "compile", "calls", "memory", "trajectory", "gradient")


@dataclass(frozen=True)
class Size:
    """A model, the data that it is trained on, and its time limit in full, in seconds."""

    data: str
    dim: int
    rank: int
    classes: int
    widths: tuple[int, int]
    seconds: float

    def __str__(self) -> str:
        return f"{self.data}: D = {self.dim}, R = {self.rank}, C = {self.classes}"


SIZES = (
    Size("pinwheel", 2, 1, 1, (128, 128), 90.0),
    Size("digits", 64, 4, 10, (256, 256), 130.0),
)


def make_model(size: Size) -> cpmm.CPMM:
    return cpmm.CPMM(size.dim, size.rank, size.classes, widths=size.widths, rngs=nnx.Rngs(0))


def train(size: Size, steps: int) -> cpmm.CPMM:
    data = load(size.data, labels=size.classes > 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # some pixels never change
        x = Standardizer.fit(data.x_train).transform(data.x_train)
    config = cpmm.TrainConfig(steps=steps, valid_fraction=0.0, report_every=steps)
    y = data.y_train if size.classes > 1 else None
    return cpmm.fit(make_model(size), x, y, config=config, progress=False).model


def undominated(measured: Sequence[SolverMeasurement]) -> list[SolverMeasurement]:
    """Keep those that none beats in both time and error, and the present settings."""
    kept, least = [], float("inf")
    for m in measured:  # in the order of time
        if m.error < least or m.own:
            kept.append(m)
        least = min(least, m.error)
    return kept


def row(m: SolverMeasurement) -> tuple[str, ...]:
    assert m.seconds_per_gradient and m.seconds_low and m.seconds_high  # measured
    return (
        m.name + (" (default)" if m.own else ""),
        str(Timing(m.seconds_per_gradient, m.seconds_low, m.seconds_high)),
        f"{m.compile_seconds:.1f} s",
        str(m.function_evaluations),
        "-" if m.memory_bytes is None else f"{m.memory_bytes / 1e6:.2f} MB",
        f"{m.trajectory_error:.1e}",
        f"{m.gradient_error:.1e}",
    )


def table_of(title: str, found: Sequence[SolverMeasurement], full: bool) -> Table:
    measured = sorted((m for m in found if m.ok), key=lambda m: m.seconds_per_gradient or 0.0)
    shown = undominated(measured) if full else measured
    notes = [f"{recommend_solver(found, tolerance).sentence}" for tolerance in TOLERANCES]
    if full:
        notes.append(
            f"Of {len(measured)} measured, those are listed that no other beats in both time and "
            f"error; the figure has all. {len(found) - len(measured)} failed or were not reached."
        )
    return Table(title, COLUMNS, [row(m) for m in shown], notes)


def measure(full: bool) -> Report:
    """Compare solvers, untrained and trained."""
    grid = default_candidates()
    tables, data, panels = [], {}, {}
    for size in SIZES if full else SIZES[:1]:
        candidates = grid if full else {name: grid[name] for name in SHORT}
        limit = size.seconds if full else 600.0
        untrained = compare_solvers(make_model(size), candidates, seconds=limit, progress=False)
        reached = {m.name: m.config for m in untrained if m.ok}  # compiled by now
        trained = compare_solvers(
            train(size, 300 if full else 50), reached, seconds=600.0, progress=False
        )
        for state, found in (("untrained", untrained), ("trained", trained)):
            title = f"{size}, {state}"
            tables.append(table_of(title, found, full))
            data[title] = panels[title] = [m.record() for m in found]
    return Report("solvers", tables, data, {"solvers.png": lambda path: draw(panels, path)})


def draw(panels: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    rows = len(panels) // 2
    _, axes = plt.subplots(rows, 2, figsize=(11, 4 * rows), layout="constrained", squeeze=False)
    for ax, (title, records) in zip(axes.flat, panels.items(), strict=True):
        plot_work_precision(records, ax=ax).set_title(title, fontsize="medium")
    save_figure(axes[0, 0], path)


if __name__ == "__main__":
    main("solvers", measure)
