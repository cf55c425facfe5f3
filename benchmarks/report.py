"""Tables of a benchmark: printed, kept as JSON with their provenance, and put into README.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance

HERE = Path(__file__).parent
RESULTS = HERE / "results"  # of the full form, tracked
OUTPUT = Path("bench_output")  # of the short form


@dataclass(frozen=True)
class Table:
    """A table of text cells, and what is to be said below it.

    Attributes:
        title: what was measured.
        columns: heads of the columns.
        rows: as many cells in each.
        notes: sentences below.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        cells = [list(self.columns), *(list(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "| " + " | ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ) + " |"
            for row in cells
        ]  # fmt: skip
        rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))  # fmt: skip  # noqa: E501
        body = "\n".join([lines[0], f"|{rule}|", *lines[1:]])
        return "\n\n".join([f"**{self.title}**", body, *self.notes])


@dataclass(frozen=True)
class Report:
    """What one benchmark found.

    Attributes:
        name: the module under `benchmarks/`.
        tables: for people.
        data: the numbers behind them, for programs: anything JSON has.
        figures: by file name, functions that draw on a given path.
    """

    name: str
    tables: Sequence[Table]
    data: Any
    figures: dict[str, Callable[[Path], Any]] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write `NAME.json` and the figures into `folder`; on an accelerator `NAME.gpu.json`."""
        import jax

        folder.mkdir(parents=True, exist_ok=True)
        backend = jax.default_backend()
        path = folder / f"{self.name}{'' if backend == 'cpu' else '.' + backend}.json"
        content = {
            "provenance": provenance(),
            "tables": [asdict(table) for table in self.tables],
            "figures": sorted(self.figures),
            "data": self.data,
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        for name, draw in self.figures.items():
            draw(folder / name)
        return path


def main(name: str, measure: Callable[[bool], Report]) -> None:
    """Run one benchmark from the command line: `python -m benchmarks.NAME [--full]`.

    Args:
        name: the module.
        measure: measures; its argument says whether in full.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--full", action="store_true", help="all sizes; results go to README.md")
    full = parser.parse_args().full
    report = measure(full)
    for table in report.tables:
        print(f"\n{table}")
    print(f"\nwritten: {report.write(RESULTS if full else OUTPUT)}")
    if full:
        write_readme()
    sys.stdout.flush()


def write_readme() -> None:
    """Put the tables of all results into README.md, each under the command that regenerates it."""
    parts = [(HERE / "intro.md").read_text().rstrip()]
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        made = content["provenance"]
        versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items() if v)
        name, _, backend = path.stem.partition(".")
        parts.append(f"## {name}{backend and ' on a ' + backend.upper()}")
        parts.append(f"```bash\n.venv/bin/python -m benchmarks.{name} --full\n```")
        parts.append(
            f"{made['date']}, commit {made['commit']}, {made['device']}, {made['cores']} cores, "
            f"Python {made['python']}, {versions}."
        )
        parts += [str(Table(**table)) for table in content["tables"]]
        parts += [f"![{name}](results/{name})" for name in content["figures"]]
    (HERE / "README.md").write_text("\n\n".join(parts) + "\n")
