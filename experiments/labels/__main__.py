"""Who classifies, and who finds the classes unseen?

    python -m experiments.labels classify [--sets A,B] [--labels 1,0.1,0.01] [--seeds 5] [--jobs 2]
    python -m experiments.labels cluster [--sets A,B] [--seeds 5] [--jobs 2]

Classifiers are fitted to the training part and scored once on the test part: accuracy, log-loss in
nats, and calibration error (mean gap between confidence and accuracy over fifteen equally full
bins). Where labels are hidden, ours see the rows without them; the others see the labelled rows.
Clusterings see all rows and no label: normalised mutual information, adjusted Rand index, accuracy
after matching clusters to classes one to one. Cells that are done are not run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.report import Report, Table
from experiments.ablation import shown
from experiments.compare.cells import Cell, Record, Settings, is_done, read
from experiments.compare.runner import run_cells
from experiments.labels.measures import classify, group, name_of
from experiments.labels.methods import CLASSIFIERS, CLUSTERERS
from experiments.labels.sets import TABLES, all_rows, labelled_set

OUTPUT = Path("bench_output") / "labels"
METRICS = {
    "classify": ("accuracy", "log_loss", "calibration_error"),
    "cluster": ("nmi", "ari", "accuracy"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cells that are not done and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m experiments.labels", description=__doc__)
    parser.add_argument("task", choices=METRICS)
    parser.add_argument("--sets", help="labelled sets, separated by commas")
    parser.add_argument("--methods", help="separated by commas; default: all")
    parser.add_argument("--labels", default="1", help="parts of the labels that are seen")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=OUTPUT)
    given = parser.parse_args(argv)
    task = given.task
    sets = given.sets.split(",") if given.sets else list(TABLES)
    possible = CLASSIFIERS if task == "classify" else CLUSTERERS
    methods = given.methods.split(",") if given.methods else list(possible)
    if task == "classify":
        parts = [float(part) for part in given.labels.split(",")]
        sets = [name if part == 1 else f"{name}@{part:g}" for part in parts for name in sets]
    cells = {
        (dataset, method, seed): Cell(dataset, method, seed, Settings(task, 0.0))
        for seed in range(given.seeds)
        for dataset in sets
        for method in methods
    }
    load = partial(labelled_set if task == "classify" else all_rows, data_dir=given.data_dir)
    measure = classify if task == "classify" else group
    folder = given.out / task
    run_cells(list(cells.values()), folder, name_of, load, jobs=given.jobs, measure=measure)
    report = tabulate(task, {key: read(folder, cell) for key, cell in cells.items()})
    report.write(given.out)
    print("\n\n".join(map(str, report.tables)))
    return 0


def tabulate(task: str, records: dict[tuple[str, str, int], Record | None]) -> Report:
    """Return a table for each metric: means and 95 % intervals over the seeds."""
    sets = list(dict.fromkeys(dataset for dataset, _, _ in records))
    methods = list(dict.fromkeys(method for _, method, _ in records))
    tables, numbers = [], {}
    for metric in METRICS[task]:
        rows = []
        for dataset in sets:
            row = [dataset]
            for method in methods:
                values = [
                    found["metrics"][metric]
                    for (d, m, _), found in records.items()
                    if (d, m) == (dataset, method) and found is not None and is_done(found)
                ]
                numbers[f"{metric}/{dataset}/{method}"] = values
                row.append(shown(values, signed=False))
            rows.append(row)
        tables.append(Table(f"{task}: {metric}, mean ± 95 % interval", ["", *methods], rows))
    return Report(task, tables, numbers)


if __name__ == "__main__":
    sys.exit(main())
