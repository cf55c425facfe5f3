"""Host-side checks of examples and labels, shared by the readers, `fit` and the evaluation.

They run on concrete NumPy arrays, before anything is traced, and every message is one line: the
name of the thing, the rule, what was found, and a remedy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmm_jax.errors import DataError


def show(value: object, limit: int = 60) -> str:
    """Return `repr(value)` on one line, cut to `limit` characters, for use in a message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def show_path(path: object, limit: int = 160) -> str:
    """Return a path in quotes on one line; of a very long one the end, which holds the name."""
    text = " ".join(repr(str(path)).split())
    return text if len(text) <= limit else "'..." + text[-(limit - 4) :]


def listing(items: list[str], limit: int = 8) -> str:
    """Join names for a message, naming at most `limit` of them and counting the rest."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def row_words(index: int) -> str:
    """Name a row of an array; the default wherever a message has to point at one."""
    return f"row {index} (counting from 0)"


def _column(index: int) -> str:
    return f"column {index}"


def float_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the native float type that holds `dtype` (real numbers) without loss where one does.

    Small integers (images) go to float32, which represents them exactly at half the memory.
    """
    if dtype.kind in "iub":
        return np.dtype(np.float32 if dtype.itemsize <= 2 else np.float64)
    return np.dtype(np.float32 if dtype.itemsize <= 4 else np.float64)


def as_matrix(x: npt.ArrayLike, *, name: str = "x", dim: int | None = None) -> npt.NDArray[Any]:
    """Return `x` as a native float array (N, D); shape and type are checked, values are not.

    Args:
        x: examples, (N, D); float32 and float64 are kept (and not copied), other numbers converted.
        name: what to call `x` in a message.
        dim: the D that is expected, that of training.

    Raises:
        DataError: not numbers, not 2-D, no rows, no columns, or another D than `dim`.
    """
    try:
        array = np.asarray(x)
    except ValueError as error:  # NumPy's answer to nested lists of unequal lengths
        raise DataError(
            f"`{name}` must be a rectangular (N, D) array; got rows of different lengths; "
            "pad or drop the short ones."
        ) from error
    if array.dtype.kind not in "fiub":
        raise DataError(
            f"`{name}` must hold real numbers; got dtype {array.dtype}{_first_word(array)}; "
            "convert it first, for instance with .astype(float)."
        )
    if array.ndim != 2:
        raise DataError(
            f"`{name}` must have shape (N, D), one example per row; got shape {array.shape}; "
            "reshape it, for instance with .reshape(N, -1), or .reshape(-1, 1) for one feature."
        )
    if 0 in array.shape:
        raise DataError(
            f"`{name}` must have at least one row and one column; got shape {array.shape}; "
            "give data that are not empty."
        )
    if dim is not None and array.shape[1] != dim:
        raise DataError(
            f"`{name}` must have the D = {dim} features of training; got D = {array.shape[1]} "
            "(D at evaluation different from training); give the same columns in the same order."
        )
    return array.astype(float_type(array.dtype), copy=False)


def _first_word(array: npt.NDArray[Any]) -> str:
    """Say where the first cell of a 2-D text or object array is that is not a number."""
    if array.ndim != 2 or array.dtype.kind not in "USO":
        return ""
    for (row, column), cell in np.ndenumerate(array):
        try:
            float(cell)
        except (TypeError, ValueError):
            return f", {row_words(row)}, {_column(column)} being {show(array.item(row, column))}"
    return ""


def check_finite(
    x: npt.NDArray[Any],
    *,
    name: str = "x",
    row: Callable[[int], str] = row_words,
    column: Callable[[int], str] = _column,
) -> None:
    """Raise DataError if `x` (N, D) holds a NaN or infinity, naming the first and their number.

    `row` and `column` turn an index into words, so that a table can name its lines and headers.
    """
    finite = np.isfinite(x)
    if finite.all():
        return
    first_row, first_column = divmod(int(np.argmin(finite)), x.shape[1])
    count = finite.size - int(np.count_nonzero(finite))
    rows = len(x) - int(np.count_nonzero(finite.all(axis=1)))
    value = x[first_row, first_column]
    what = "NaN" if np.isnan(value) else "infinity" if value > 0 else "-infinity"
    raise DataError(
        f"`{name}` must be finite; got {what} in {row(first_row)}, {column(first_column)} "
        f"({count} such value(s) in {rows} row(s)); drop those rows or fill in the values."
    )


def check_examples(
    x: npt.ArrayLike, *, name: str = "x", dim: int | None = None
) -> npt.NDArray[Any]:
    """Check examples and return them as a float array.

    Args:
        x: examples, (N, D); float32 and float64 are kept (and not copied), other numbers converted.
        name: what to call `x` in a message.
        dim: the D that is expected, that of training.

    Returns:
        `x` as float32 or float64, (N, D), N >= 1, D >= 1, finite.

    Raises:
        DataError: not numbers, not 2-D, empty, NaN or infinity, or another D than `dim`.

    Example:
        >>> check_examples([[1, 2], [3, 4]]).shape
        (2, 2)
        >>> check_examples([[1.0], [float("nan")]])
        Traceback (most recent call last):
            ...
        cpmm_jax.errors.DataError: `x` must be finite; got NaN in row 1 (counting from 0), \
column 0 (1 such value(s) in 1 row(s)); drop those rows or fill in the values.
    """
    array = as_matrix(x, name=name, dim=dim)
    check_finite(array, name=name)
    return array


def check_length(y: npt.NDArray[Any], n: int, *, name: str = "y") -> None:
    """Raise DataError unless `y` is 1-D and holds `n` labels."""
    if y.ndim != 1:
        raise DataError(
            f"`{name}` must have shape (N,), one label per example; got shape {y.shape}; "
            "turn one-hot rows into labels with .argmax(axis=1)."
        )
    if len(y) != n:
        raise DataError(
            f"`{name}` must have one label for each of the {n} examples; got {len(y)} labels "
            "(labels of another length); check that examples and labels belong together."
        )


def whole_labels(
    y: npt.NDArray[Any],
    *,
    name: str = "y",
    row: Callable[[int], str] = row_words,
    least: int = 0,
) -> npt.NDArray[np.int64]:
    """Return numeric labels (N,) as int64, refusing gaps: missing, fractional, or negative ones.

    `least` is the lowest label: -1 where that marks those not known.

    Raises:
        DataError: NaN or infinite, non-integer or negative labels, or a type that is no number.
    """
    if y.dtype.kind not in "iubf":
        raise DataError(
            f"`{name}` must hold integer labels; got dtype {y.dtype}; "
            "number the classes 0, 1, 2, ... first."
        )
    if y.dtype.kind == "f":
        refuse(~np.isfinite(y), y, name, row, "a label in every row", "drop those rows")
        refuse(
            (y != np.floor(y)) | (np.abs(y) > 2.0**53),
            y,
            name,
            row,
            "whole numbers as labels",
            "number the classes, or leave the labels out if this is a regression target",
        )
    elif y.dtype.kind == "u":
        refuse(y > np.iinfo(np.int64).max, y, name, row, "labels below 2**63", "renumber them")
    remedy = "mark missing ones as -1" if least else "drop those rows if this marks a missing label"
    refuse(y < least, y, name, row, f"labels >= {least}", remedy)
    return y.astype(np.int64, copy=False)


def refuse(
    bad: npt.NDArray[np.bool_],
    y: npt.NDArray[Any],
    name: str,
    row: Callable[[int], str],
    rule: str,
    remedy: str,
) -> None:
    """Raise DataError if any of `bad` (N,) is set, showing the first such label of `y` (N,)."""
    if bad.any():
        first = int(np.argmax(bad))
        raise DataError(
            f"`{name}` must have {rule}; got {show(y[first].item())} in {row(first)} "
            f"({np.count_nonzero(bad)} such label(s)); {remedy}."
        )


def check_labels(
    y: npt.ArrayLike,
    n: int,
    *,
    name: str = "y",
    num_classes: int | None = None,
    require_all: bool = False,
    unknown: bool = False,
) -> npt.NDArray[np.int64]:
    """Check class codes 0..C-1 and return them as int64.

    Args:
        y: class codes, (N,), whole numbers.
        n: number of examples that they belong to.
        name: what to call `y` in a message.
        num_classes: C, where it is known (a model's). Without it the labels themselves define the
            classes, and each of 0..max(y) must occur.
        require_all: every one of the `num_classes` must occur (a part to train on).
        unknown: whether -1 may stand where the class is not known.

    Returns:
        `y` as int64, (N,).

    Raises:
        DataError: another length, missing, fractional or negative labels, a code >= C, or a class
            without any example where all are needed.

    Example:
        >>> check_labels([0, 2, 1], 3).tolist()
        [0, 2, 1]
    """
    array = np.asarray(y)
    check_length(array, n, name=name)
    codes = whole_labels(array, name=name, least=-1 if unknown else 0)
    if num_classes is not None:
        refuse(
            codes >= num_classes,
            codes,
            name,
            row_words,
            f"class codes 0..{num_classes - 1}",
            "build the model with more classes, or renumber the labels",
        )
    if n and (require_all or num_classes is None):
        present = np.unique(codes[codes >= 0])
        if not len(present):
            raise DataError(
                f"`{name}` must hold the class of some example; got -1 (unknown) {n} times; "
                "leave the labels out to cluster."
            )
        total = int(present[-1]) + 1 if num_classes is None else num_classes
        if len(present) < total:
            # The first absent code, found without a table of `total` entries: y may hold 10**12.
            absent = int(np.argmax(present != np.arange(len(present))))
            absent = len(present) if present[absent] == absent else absent
            raise DataError(
                f"`{name}` must hold every class 0..{total - 1}; got none of class {absent} "
                f"({total - len(present)} classes absent: labels with gaps); "
                "renumber the classes without gaps."
            )
    return codes


def check_enough_rows(n: int, num_components: int) -> None:
    """Raise DataError if there are fewer rows than mixture components.

    Args:
        n: number of training examples.
        num_components: total number of components of the mixture.
    """
    if n < num_components:
        raise DataError(
            f"the training data must have at least as many rows as the mixture has components; "
            f"got {n} rows for {num_components} components; "
            f"use at most {n} components, or more data."
        )
