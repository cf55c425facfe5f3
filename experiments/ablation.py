"""What matters in the recipe: one setting changed at a time, the rest as the recipe has it.

    python -m experiments.ablation --sets A,B [--changes C,D] [--seeds 5] [--jobs 2]

Every mixture has 40 components of rank 4 (D - 1 at most), is trained once, and polished by EM as
long as validation gains. The table gives the test log-likelihood of the recipe, and by how much
each change moves it, in nats of the standardised data. Cells that are done are not run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.report import Report, Table
from cpmm_jax.recipe import Recipe, recommend
from experiments.compare.cells import Cell, Settings, is_done, read
from experiments.compare.factor_analyzers import fit_recipe
from experiments.compare.methods import Rows, Size
from experiments.compare.runner import run_cells
from experiments.compare.search import Budget, Density, Fitted, search
from experiments.compare.statistics import interval
from experiments.density_sets import density_set, names

OUTPUT = Path("bench_output") / "ablation"
SIZE = Size(40, 4)
Change = Callable[[Recipe], Recipe]


def divided(times: int) -> Change:
    """Return the change to trajectories of so many times, of the same number of components."""

    def change(recipe: Recipe) -> Recipe:
        count = recipe.num_classes * recipe.num_times // times
        return replace(recipe, num_classes=count, num_times=times, train_times=times, divisions=())

    return change


CHANGES: dict[str, Change] = {
    "recipe": lambda r: r,
    "times_1": divided(1),
    "times_2": divided(2),
    "times_4": divided(4),
    "times_8": divided(8),
    "other_start": lambda r: replace(r, local_start=not r.local_start),
    "rate_third": lambda r: replace(r, learning_rate=r.learning_rate / 3),
    "rate_double": lambda r: replace(r, learning_rate=2 * r.learning_rate),
    "batch_1024": lambda r: replace(r, batch_size=1024),
    "steps_double": lambda r: replace(r, steps=2 * r.steps),
    "width_double": lambda r: replace(r, widths=tuple(2 * width for width in r.widths)),
    "no_polish": lambda r: replace(r, polish=False),
}


@dataclass(frozen=True)
class Changed:
    """The CPMM by its recipe, with one change."""

    name: str

    def fit(self, data: Rows, seed: int, budget: Budget) -> Fitted:
        """Fit once."""
        n, dim = data.x_train.shape
        recipe = recommend(n, dim, **SIZE.within(dim)._asdict(), seed=seed)
        recipe = CHANGES[self.name](replace(recipe, polish=True))

        def once(_: object) -> Density:
            return fit_recipe(data, recipe, tails=False)

        return search({}, {}, once, data.x_valid, budget)


def make_method(cell: Cell) -> Changed:
    """Return the method of a cell, which bears the name of a change."""
    return Changed(cell.method)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cells that are not done and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ablation", description="Change one setting at a time."
    )
    parser.add_argument("--sets", help="data sets, separated by commas; default: all")
    parser.add_argument("--changes", help="of the settings, separated by commas; default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=OUTPUT)
    given = parser.parse_args(argv)
    sets = given.sets.split(",") if given.sets else names(given.data_dir)
    changes = list(CHANGES)
    if given.changes:
        changes = ["recipe", *(c for c in given.changes.split(",") if c != "recipe")]
        if unknown := [change for change in changes if change not in CHANGES]:
            parser.error(f"--changes must be of {', '.join(CHANGES)}; got {', '.join(unknown)}")
    settings = Settings("ablation", 0.0, *SIZE)
    cells = {
        (dataset, change, seed): Cell(dataset, change, seed, settings)
        for seed in range(given.seeds)
        for dataset in sets
        for change in changes
    }
    load = partial(density_set, data_dir=given.data_dir)
    run_cells(list(cells.values()), given.out, make_method, load, jobs=given.jobs)
    found = {}
    for key, cell in cells.items():
        record = read(given.out, cell)
        if record is not None and is_done(record):
            found[key] = record["metrics"]["test_log_likelihood"]
    numbers = {
        f"{dataset}/{change}": [
            found[dataset, change, seed]
            - (0.0 if change == "recipe" else found[dataset, "recipe", seed])
            for seed in range(given.seeds)
            if {(dataset, "recipe", seed), (dataset, change, seed)} <= found.keys()
        ]
        for change in changes
        for dataset in sets
    }
    rows = [[c, *(shown(numbers[f"{d}/{c}"], c != "recipe") for d in sets)] for c in changes]
    title = "Test log-likelihood of the recipe, and what a change adds, mean ± 95 % interval (nats)"
    table = Table(title, ["", *sets], rows)
    Report("ablation", [table], numbers).write(given.out)
    print(table)
    return 0


def shown(values: Sequence[float], signed: bool) -> str:
    """Return mean and half-width of the interval."""
    if not values:
        return "-"
    mean, _, high = interval(values)
    half = "" if high is None else f" ± {high - mean:.3f}"
    return f"{mean:{'+' if signed else ''}.3f}{half}"


if __name__ == "__main__":
    sys.exit(main())
