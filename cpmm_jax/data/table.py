"""Reader of comma-separated tables, header optional, one column of labels optional."""

from __future__ import annotations

import csv
import itertools
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmm_jax.data.binary import reading
from cpmm_jax.data.checks import check_finite, listing, show, show_path
from cpmm_jax.errors import DataError


@dataclass(frozen=True, eq=False)
class Table:
    """What a CSV file holds.

    Attributes:
        x: the feature columns, float64 (N, D), finite.
        y: the label column as text, (N,), or None.
        columns: how to name the feature columns, from the header or by number.
        feature_names: the header of the feature columns, or None without a header.
        lines: line of the file (counting from 1) on which each row ends, (N,).
    """

    x: npt.NDArray[np.float64]
    y: npt.NDArray[np.str_] | None
    columns: list[str]
    feature_names: tuple[str, ...] | None
    lines: npt.NDArray[Any]

    def line(self, row: int) -> str:
        """Name a row by its line in the file."""
        return f"line {self.lines[row]}"


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _find_label(label_column: str, first: list[str], has_header: bool, what: str) -> int:
    """Return the index of the label column, given by its header or, as digits, by its index."""
    if has_header and first.count(label_column) == 1:
        return first.index(label_column)
    if label_column.isdecimal() and int(label_column) < len(first):
        return int(label_column)
    named = f"names {listing([show(cell) for cell in first])}" if has_header else "no header"
    raise DataError(
        f"`label_column` must name one column of {what} by its header or its index "
        f"0..{len(first) - 1}; got {show(label_column)} where the file has {len(first)} column(s), "
        f"{named}; give one of these."
    )


def read_csv(path: Path, label_column: str | None = None) -> Table:
    """Read a CSV file in UTF-8; the cells of every column but that of the labels are numbers.

    The first line is a header if one of its cells (the label's apart, where given by index) is
    neither a number nor empty. Blank lines are skipped.

    Args:
        path: the file.
        label_column: header, or index from 0 in digits, of the column of labels.

    Raises:
        DataError: unreadable, empty, ragged (line named), text or a missing value in a numeric
            column (line and column named), NaN or infinity, or no such label column.
    """
    what = show_path(path)
    with reading(path, "CSV file in UTF-8"), path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        filled = _filled(reader)
        first = next(filled, None)
        if first is None:
            raise _empty(path)
        first = [cell.strip() for cell in first]
        width = len(first)
        by_index = int(label_column) if label_column and label_column.isdecimal() else None
        header = any(cell and not _is_number(cell) for j, cell in enumerate(first) if j != by_index)
        label = None if label_column is None else _find_label(label_column, first, header, what)
        columns = [show(cell) if header else f"{j}" for j, cell in enumerate(first)]
        values, labels, lines = array("d"), [], array("q")
        rows = filled if header else itertools.chain([first], filled)
        for row in rows:
            if len(row) != width:
                raise DataError(
                    f"{what} must have {width} cells on every line, as on its first; "
                    f"got {len(row)} on line {reader.line_num} (ragged); "
                    "complete or drop that line."
                )
            if label is not None:
                labels.append(row.pop(label))
            try:
                values.extend(map(float, row))
            except ValueError:
                raise _not_a_number(row, columns, label, reader.line_num, what) from None
            lines.append(reader.line_num)
    if not lines:
        raise DataError(f"{what} must hold rows of numbers; got a header alone; give data.")
    if label is not None:
        del columns[label], first[label]
    if not columns:
        raise DataError(
            f"{what} must have a column of numbers beside the labels; got the labels alone; "
            "add features."
        )
    table = Table(
        np.frombuffer(values, np.float64).reshape(len(lines), len(columns)),
        None if label is None else np.array(labels, np.str_),
        columns,
        tuple(first) if header else None,
        np.frombuffer(lines, np.int64),
    )
    check_finite(table.x, name=path.name, row=table.line, column=lambda j: f"column {columns[j]}")
    return table


def count_columns(path: Path) -> int:
    """Return the number of cells on the first line of a CSV file.

    Raises:
        DataError: unreadable or empty.
    """
    with reading(path, "CSV file in UTF-8"), path.open(encoding="utf-8-sig", newline="") as stream:
        first = next(_filled(csv.reader(stream, strict=True)), None)
        if first is None:
            raise _empty(path)
        return len(first)


def _filled(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """Leave out blank lines."""
    return (row for row in reader if len(row) > 1 or (row and row[0].strip()))


def _empty(path: Path) -> DataError:
    return DataError(f"{show_path(path)} must hold rows of numbers; got an empty file; give data.")


def _not_a_number(
    row: list[str], columns: list[str], label: int | None, line: int, what: str
) -> DataError:
    """Describe the first cell of `row` (the label taken out) that is not a number."""
    names = [name for j, name in enumerate(columns) if j != label]
    j = next(j for j, cell in enumerate(row) if not _is_number(cell))
    state = "" if row[j].strip() else " (missing)"
    return DataError(
        f"{what} must have numbers in every column but that of the labels; got {show(row[j])}"
        f"{state} on line {line}, column {names[j]}; correct or drop it, "
        "or name the column of labels."
    )
