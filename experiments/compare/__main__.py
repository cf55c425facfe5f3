"""The command line: `python -m experiments.compare --preset smoke|main`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from experiments.compare.cells import Cell, Settings
from experiments.compare.methods import METHODS, SIZED, make_method, missing_packages
from experiments.compare.runner import run_cells

OUTPUT = Path("bench_output") / "compare"


@dataclass(frozen=True)
class Preset:
    """A comparison by name.

    Attributes:
        sets: data sets; None for all there are.
        methods: methods.
        seeds: number of seeds.
        budget: seconds in which each method may search.
        steps: training steps; None for each method's own number.
    """

    sets: tuple[str, ...] | None
    methods: tuple[str, ...]
    seeds: int
    budget: float
    steps: int | None


PRESETS = {
    "smoke": Preset(
        sets=("pinwheel",),
        methods=("sklearn_full", "sklearn_tied", "sklearn_diag", "cpmm"),
        seeds=2,
        budget=1.0,
        steps=100,
    ),
    "main": Preset(sets=None, methods=METHODS, seeds=5, budget=60.0, steps=None),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cells that are not done, then summarise all; 1 if any failed, 130 if interrupted."""
    from experiments import density_sets

    parser = _parser()
    given = parser.parse_args(argv)
    preset = PRESETS[given.preset]
    if (given.components is None) != (given.rank is None):
        parser.error("--components and --rank go together")
    sized = given.components is not None
    possible = SIZED if sized else METHODS
    known = density_sets.names(given.data_dir)
    sets = given.sets or preset.sets or tuple(known)
    methods = given.methods or [name for name in preset.methods if name in possible]
    for option, names, accepted in (("sets", sets, known), ("methods", methods, possible)):
        if unknown := [name for name in names if name not in accepted]:
            parser.error(
                f"--{option} must be of {', '.join(accepted)}; got {', '.join(unknown)}"
                + (" (with --components and --rank)" if sized and option == "methods" else "")
            )
    missing = missing_packages(methods)
    for name, package in missing.items():
        print(f"{name} is left out: {package} is not installed")

    budget = preset.budget if given.budget is None else given.budget
    settings = Settings(given.preset, budget, given.components, given.rank, preset.steps)
    size = f"_{given.components}x{given.rank}" if sized else ""
    folder = given.out or OUTPUT / f"{given.preset}{size}"
    cells = [
        Cell(dataset, method, seed, settings)
        for seed in range(given.seeds or preset.seeds)
        for dataset in sets
        for method in methods
        if method not in missing
    ]
    load = partial(density_sets.density_set, data_dir=given.data_dir)
    try:
        run_cells(cells, folder, make_method, load, jobs=given.jobs)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130

    from experiments.compare.summary import report  # loads JAX, which no run should wait for

    made = report(folder, cells, missing)
    for table in made.tables:
        print(f"\n{table}")
    print(f"\nwritten: {folder}/summary.json, summary.md" + ", ".join(["", *made.figures]))
    return 1 if made.data["failed"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare",
        description="Compare density estimators. Cells that are done are not run again.",
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, required=True)
    add("--jobs", type=_positive, default=1, metavar="N", help="worker processes (1)")
    add("--data-dir", type=Path, metavar="DIR", help="folder of data sets beside the built-in ones")
    add("--out", type=Path, metavar="DIR", help=f"cells and summary ({OUTPUT}/PRESET)")
    add("--sets", type=_names, metavar="A,B", help="data sets")
    add("--methods", type=_names, metavar="A,B", help=f"of {', '.join(METHODS)}")
    add("--seeds", type=_positive, metavar="N", help="number of seeds, each its own split")
    add("--budget", type=float, metavar="SECONDS", help="in which each method may search")
    add("--components", type=_positive, metavar="K", help="of every mixture, with --rank")
    add(
        "--rank",
        type=_positive,
        metavar="R",
        help="of every mixture, at most D - 1; with --components",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in text.split(",") if name))  # each once


if __name__ == "__main__":
    sys.exit(main())
