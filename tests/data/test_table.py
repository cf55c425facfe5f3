"""CSV files: headers, label columns, and cells that cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cpmm_jax.data import load
from tests.data.files import Case, assert_refused_in_one_line, text


@pytest.mark.parametrize(
    ("content", "column", "names", "classes"),
    [
        ("1,2\n3,4\n", None, None, None),
        ("a,b\n1,2\n\n3,4\n", None, ("a", "b"), None),
        ("\ufeffa, b\r\n1, 2\r\n3, 4\r\n", None, ("a", "b"), None),
        ("a,kind,b\n1,u,2\n3,v,4\n", "kind", ("a", "b"), ("u", "v")),
        ("1,u,2\n3,v,4\n", "1", None, ("u", "v")),
        ("a,b,kind\n1,2,7\n3,4,5\n", "2", ("a", "b"), ("5", "7")),
        ('"a\nb",b\n1,2\n3,4\n', None, ("a\nb", "b"), None),
    ],
)
def test_csv(
    tmp_path: Path, content: str, column: str | None, names: tuple, classes: tuple
) -> None:
    data = load(text(tmp_path, content), label_column=column)
    np.testing.assert_array_equal(data.x_train, [[1.0, 2.0], [3.0, 4.0]])
    assert data.feature_names == names and data.class_names == classes


BAD: dict[str, Case] = {
    "empty csv": (lambda f: text(f, ""), {}, ["empty file"]),
    "blank csv": (lambda f: text(f, "\n \n\n"), {}, ["empty file"]),
    "header alone": (lambda f: text(f, "a,b\n"), {}, ["header alone"]),
    "csv is binary": (lambda f: text(f, b"\x93NUMPY\xff\x00\n"), {}, ["UTF-8", "foreign"]),
    "csv with NUL": (lambda f: text(f, "1,2\n1,\0\n"), {}, ["'\\x00'", "line 2"]),
    "word in a column": (
        lambda f: text(f, "a,b\n1,2\n3,four\n"),
        {},
        ["'four'", "line 3", "column 'b'"],
    ),
    "word without header": (
        lambda f: text(f, "1,2\n3,four\n"),
        {},
        ["'four'", "line 2", "column 1"],
    ),
    "missing cell": (lambda f: text(f, "1,2\n3,\n"), {}, ["''", "(missing)", "line 2", "column 1"]),
    "missing cell at first": (lambda f: text(f, "1,\n3,4\n"), {}, ["(missing)", "line 1"]),
    "ragged": (
        lambda f: text(f, "a,b\n1,2\n\n3,4,5\n"),
        {},
        ["2 cells", "got 3 on line 4", "ragged"],
    ),
    "NaN in a table": (
        lambda f: text(f, "a,b\n1,2\n\n3,nan\n"),
        {},
        ["NaN in line 4", "column 'b'", "1 such"],
    ),
    "infinity in a table": (lambda f: text(f, "1,2\n1e999,4\n"), {}, ["infinity in line 2"]),
    "unknown label column": (
        lambda f: text(f, "a,b\n1,2\n"),
        {"label_column": "c"},
        ["'c'", "'a', 'b'"],
    ),
    "label column beyond": (
        lambda f: text(f, "1,2\n"),
        {"label_column": "2"},
        ["0..1", "'2'", "no header"],
    ),
    "two label columns": (lambda f: text(f, "a,a\n1,2\n"), {"label_column": "a"}, ["one column"]),
    "labels alone": (lambda f: text(f, "a\n1\n"), {"label_column": "a"}, ["labels alone"]),
    "open quote": (lambda f: text(f, '1,2\n"3,4\n'), {}, ["damaged"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_get_one_clear_line(case: str, tmp_path: Path) -> None:
    assert_refused_in_one_line(BAD[case], tmp_path)
