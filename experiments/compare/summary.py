"""From the cells' records to tables, a figure and a summary for programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import Report, Table
from cpmm_jax.plotting import save_figure
from experiments.compare.cells import Cell, Record, read
from experiments.compare.methods import DIRECT, METHODS
from experiments.compare.statistics import compare, count_verdicts, scores

ENOUGH_SEEDS = 5
ORDER = tuple(dict.fromkeys([*DIRECT, *METHODS]))


def summarise(records: Mapping[Cell, Record | None], missing: Mapping[str, str]) -> dict[str, Any]:
    """Return everything that the tables say, and the numbers behind it, for programs.

    Args:
        records: by cell; None for those that did not run.
        missing: methods that could not run, and the package that each lacks.
    """
    sets = {name: compare(methods) for name, methods in scores(records).items()}
    return {
        "settings": next((cell.config["settings"] for cell in records), None),
        "sets": sets,
        "verdicts": count_verdicts(sets),
        "failed": {
            str(cell): record["error"]
            for cell, record in records.items()
            if record is not None and record["status"] == "failed"
        },
        "missing": dict(missing),
    }


def report(folder: Path, cells: Sequence[Cell], missing: Mapping[str, str]) -> Report:
    """Summarise the records of `cells`, and write `summary.json`, `.md` and `.png`."""
    summary = summarise({cell: read(folder, cell) for cell in cells}, missing)
    tables = make_tables(summary)
    figures: dict[str, Callable[[Path], Any]] = {}
    if any(differences(summary).values()):
        figures["summary.png"] = partial(draw, summary)
    made = Report("summary", tables, summary, figures)
    made.write(folder)
    (folder / "summary.md").write_text("\n\n".join(map(str, tables)) + "\n")
    return made


def make_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return the tables for people."""
    sets = summary["sets"]
    names = [name for name in ORDER if name in summary["verdicts"]]
    head = ("data set", *names)
    tables = [
        Table(
            "Test log-likelihood (nats per standardised example), mean ± 95 % interval over seeds",
            head,
            [(key, *(_score(one, name) for name in names)) for key, one in sets.items()],
            _remarks(summary),
        ),
        Table(
            "Difference to the best direct method, mean ± 95 % interval over the same seeds",
            ("data set", "best direct method", *names),
            [
                (key, one["reference"] or "-", *(_difference(one, name) for name in names))
                for key, one in sets.items()
            ],
            [
                "Direct methods are the mixtures with free parameters; the best one is chosen for "
                "each data set by the mean validation log-likelihood. A win: the whole interval "
                "lies above zero; a loss: below; a tie: neither."
            ],
        ),
        Table(
            "Against the best direct method, data sets",
            ("method", "wins", "ties", "losses", "is itself the best direct"),
            [(name, *map(str, summary["verdicts"][name].values())) for name in names],
        ),
        Table(
            "Seconds to search and fit, and parameters of what was chosen, means over seeds",
            head,
            [(key, *(_cost(one, name) for name in names)) for key, one in sets.items()],
        ),
    ]
    if summary["failed"]:
        rows = list(summary["failed"].items())
        tables.append(Table("Failed cells", ("cell", "reason"), rows))
    return tables


def _remarks(summary: Mapping[str, Any]) -> list[str]:
    remarks = [
        f"Not compared: {name} ({package} is not installed)."
        for name, package in summary["missing"].items()
    ]
    methods = [m for one in summary["sets"].values() for m in one["methods"].values()]
    fewest = min((len(method["seeds"]) for method in methods), default=0)
    if fewest < ENOUGH_SEEDS:
        remarks.append(f"Some means are over fewer than {ENOUGH_SEEDS} seeds ({fewest}).")
    return remarks


def _plus_minus(found: Mapping[str, Any], sign: str = "") -> str:
    half = "" if found["high"] is None else f" ± {found['high'] - found['mean']:.3f}"
    return f"{found['mean']:{sign}.3f}{half}"


def _score(one: Mapping[str, Any], name: str) -> str:
    if name not in one["methods"]:
        return "-"
    method = one["methods"][name]
    best = max(m["test_log_likelihood"]["mean"] for m in one["methods"].values())
    text = _plus_minus(method["test_log_likelihood"])
    return f"**{text}**" if method["test_log_likelihood"]["mean"] == best else text


def _difference(one: Mapping[str, Any], name: str) -> str:
    difference = one["methods"].get(name, {}).get("difference")
    if difference is None:
        return "-"
    verdict = one["methods"][name]["verdict"]
    return _plus_minus(difference, "+") + (f" {verdict}" if verdict else "")


def _cost(one: Mapping[str, Any], name: str) -> str:
    if name not in one["methods"]:
        return "-"
    method = one["methods"][name]
    return f"{method['seconds']:.1f} s, {method['num_parameters']:,.0f}"


def differences(summary: Mapping[str, Any]) -> dict[str, list[tuple[int, Mapping[str, Any]]]]:
    """Return, for each method that is not direct, the row of a data set and the difference."""
    rows = list(summary["sets"].values())
    return {
        name: [
            (row, one["methods"][name]["difference"])
            for row, one in enumerate(rows)
            if one["methods"].get(name, {}).get("difference") is not None
        ]
        for name in ORDER
        if name not in DIRECT
    }


def draw(summary: Mapping[str, Any], path: Path) -> Path:
    """Draw the differences to the best direct method, one row for each data set."""
    import matplotlib.pyplot as plt

    sets = list(summary["sets"])
    _, ax = plt.subplots(figsize=(7.0, 1.5 + 0.35 * len(sets)), layout="constrained")
    drawn = {name: found for name, found in differences(summary).items() if found}
    for i, (name, found) in enumerate(drawn.items()):
        offset = 0.5 * ((i + 0.5) / len(drawn) - 0.5)
        means = [difference["mean"] for _, difference in found]
        halves = [0.0 if d["high"] is None else d["high"] - d["mean"] for _, d in found]
        heights = [row + offset for row, _ in found]
        ax.errorbar(means, heights, xerr=halves, fmt="o", markersize=4, capsize=2, label=name)
    ax.axvline(0.0, color="grey", linewidth=1)
    ax.set_xscale("symlog", linthresh=0.1)
    ax.xaxis.set_major_formatter("{x:g}")
    labels = [f"{name}\n({summary['sets'][name]['reference']})" for name in sets]
    ax.set_yticks(range(len(sets)), labels, fontsize=7)
    ax.set_ylim(len(sets) - 0.5, -0.5)
    ax.set_xlabel("test log-likelihood less that of the best direct method, nats")
    ax.figure.legend(loc="outside upper center", ncols=len(drawn))
    return save_figure(ax, path)
