"""Labels as they stand in a file -> class codes 0..C-1 and the names of the classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmm_jax.data.checks import listing, refuse, row_words, show, whole_labels
from cpmm_jax.data.dataset import Dataset
from cpmm_jax.errors import DataError

# How tables commonly spell "no label here".
_MISSING = ("", "nan", "NaN", "NAN", "NA", "N/A", "null", "NULL", "?")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _values(
    y: npt.NDArray[Any], name: str, row: Callable[[int], str]
) -> npt.NDArray[np.int64] | npt.NDArray[np.str_]:
    """Return labels as int64 where all of them are numbers, else as stripped strings."""
    if y.dtype.kind not in "US":
        return whole_labels(y, name=name, row=row)
    try:
        text = np.char.strip(np.char.decode(y, "utf-8") if y.dtype.kind == "S" else y)
    except UnicodeDecodeError as error:
        raise DataError(
            f"`{name}` must hold labels in UTF-8; got other bytes; save the labels as text."
        ) from error
    refuse(np.isin(text, _MISSING), text, name, row, "a label in every row", "drop those rows")
    if all(_NUMBER.fullmatch(label) for label in np.unique(text)):
        return whole_labels(text.astype(np.float64), name=name, row=row)
    return text


def encode_labels(
    parts: Sequence[tuple[str, npt.NDArray[Any]]], *, row: Callable[[int], str] = row_words
) -> tuple[list[npt.NDArray[np.int64]], tuple[str, ...]]:
    """Re-code labels as 0..C-1 by the sorted distinct values of the first (training) part.

    Args:
        parts: (name for messages, labels (N,)) of each part, the training part first; whole
            numbers or strings.
        row: turns a row index into words for a message.

    Returns:
        the codes of each part, int64 (N,), and the class names in the order of the codes.

    Raises:
        DataError: labels with gaps: a missing, fractional or negative label, or a class in a later
            part that the training part lacks.

    Example:
        >>> codes, names = encode_labels([("y", np.array([3, 8, 3]))])
        >>> codes[0].tolist(), names
        ([0, 1, 0], ('3', '8'))
    """
    train_name, train = parts[0][0], _values(parts[0][1], parts[0][0], row)
    classes, train_codes = np.unique(train, return_inverse=True)
    coded = [train_codes.astype(np.int64)]
    for name, labels in parts[1:]:
        values: npt.NDArray[Any] = _values(labels, name, row)
        known: npt.NDArray[Any] = classes
        if values.dtype.kind != known.dtype.kind:  # numbers on one side, words on the other
            values, known = values.astype(np.str_), known.astype(np.str_)
        order = np.argsort(known)
        codes = order[np.clip(np.searchsorted(known, values, sorter=order), 0, len(known) - 1)]
        refuse(
            known[codes] != values,
            values,
            name,
            row,
            f"only classes that occur in `{train_name}`",
            "move examples of that class to the training part, or drop them",
        )
        coded.append(codes.astype(np.int64))
    return coded, tuple(str(label) for label in classes.tolist())


def recode_labels(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """Return `dataset` with its labels coded in the order of `class_names`, those of a model.

    A file that is evaluated may hold only some of the classes, so its own codes 0..C-1 need not be
    those of training; the names connect them. A data set without labels is returned as it is.

    Args:
        dataset: labelled data, with `class_names`.
        class_names: names of the model's classes in the order of its codes.

    Raises:
        DataError: `dataset` has a class that is not among `class_names`.
    """
    own, names = dataset.class_names, tuple(class_names)
    if own is None or own == names:
        return dataset
    unknown = [show(name) for name in own if name not in names]
    if unknown:
        raise DataError(
            f"the labels of {show(dataset.name)} must be classes of the model "
            f"({listing([show(name) for name in names])}); got {listing(unknown)}; "
            "drop those examples, or the labels."
        )
    codes = np.array([names.index(name) for name in own], np.int64)

    def recoded(y: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int64] | None:
        return None if y is None else codes[y]

    return replace(
        dataset,
        y_train=recoded(dataset.y_train),
        y_valid=recoded(dataset.y_valid),
        y_test=recoded(dataset.y_test),
        class_names=names,
    )
