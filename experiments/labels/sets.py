"""Labelled sets in their own units, in two parts.

Parts are taken as they are given; a set without a test part is cut 70/30 by seed, class by class.
Classes of fewer than ten examples are left out. For clustering all rows are taken, without a cut.
`mnist:64` is a set's first 64 principal components, found without labels in the training part.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cpmm_jax.data import BUILTIN_NAMES, Dataset, load
from cpmm_jax.data.dataset import split
from cpmm_jax.errors import DataError, DataWarning

FEWEST = 10  # examples of a class
TABLES = (
    "pendigits",
    "optdigits",
    "vowel",
    "winequality_red",
    "winequality_white",
    "ecoli",
    "glass",
)


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Examples (N, D) in the units of the source, and class codes (N,).

    In `y_train` -1 marks the rows whose label is hidden.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def labelled_set(name: str, seed: int, *, data_dir: Path | None = None) -> LabelledSet:
    """Return a set by name, `pendigits`, or with a part of its labels, `pendigits@0.1`.

    Every class keeps two labels at least.

    Args:
        name: of a built-in set or a file in the folder, and the part of the labels; and how many
            principal components, `mnist:64@0.1`.
        seed: of the cut, and of which labels are kept.
        data_dir: the folder; by default that of CPMM_DATA_DIR.

    Raises:
        DataError: there is no such set, or it has no labels.
    """
    name, _, part = name.partition("@")
    data = _with_common_classes(read_set(name, data_dir))
    if data.x_test is None:
        data = split(data, seed=seed, valid_fraction=0.0, test_fraction=0.3)
    assert data.y_train is not None and data.x_test is not None and data.y_test is not None
    shown = data.y_train if not part else _some(data.y_train, float(part), seed)
    return LabelledSet(name, data.x_train, shown, data.x_test, data.y_test)


def all_rows(name: str, seed: int, *, data_dir: Path | None = None) -> LabelledSet:
    """Return all rows of a set, the test part with the others, and no rows apart."""
    data = _with_common_classes(read_set(name, data_dir))
    parts = [data.part(which) for which in ("train", "valid", "test")]
    x = np.concatenate([part[0] for part in parts if part[0] is not None])
    y = np.concatenate([part[1] for part in parts if part[1] is not None])
    return LabelledSet(name, x, y, x[:0], y[:0])


def read_set(name: str, data_dir: Path | None) -> Dataset:
    """Return a set as it is; of a name like `mnist:64` its first principal components."""
    name, _, components = name.partition(":")
    if components:
        return _principal(read_set(name, data_dir), int(components))
    if name in BUILTIN_NAMES:
        return load(name)
    folder = data_dir or os.environ.get("CPMM_DATA_DIR")
    path = None if not folder else Path(folder, f"{name}.npz")
    if path is None or not path.is_file():
        raise DataError(
            f"`name` must be a built-in set, or a file in the folder CPMM_DATA_DIR; got {name!r}; "
            "name the folder that holds it."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return load(path)


def _principal(data: Dataset, count: int) -> Dataset:
    from sklearn.decomposition import PCA

    axes = PCA(count, random_state=0).fit(data.x_train)
    parts = {f"x_{part}": data.part(part)[0] for part in ("train", "valid", "test")}
    moved = {
        name: axes.transform(x).astype(np.float32) for name, x in parts.items() if x is not None
    }
    return replace(data, **moved, event_shape=None)


def _with_common_classes(data: Dataset) -> Dataset:
    if data.y_train is None:
        raise DataError(f"{data.name!r} must have labels; got none; choose another set.")
    counts = np.bincount(data.y_train)
    kept = np.flatnonzero(counts >= FEWEST)
    codes = np.full(len(counts), -1)
    codes[kept] = np.arange(len(kept))
    found: dict[str, Any] = {}
    for part in ("train", "valid", "test"):
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        if x is not None and y is not None:
            mine = codes[y] >= 0
            found |= {f"x_{part}": x[mine], f"y_{part}": codes[y[mine]]}
    return replace(data, **found)


def _some(y: np.ndarray, part: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shown = np.full(len(y), -1)
    for c in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == c))
        rows = rows[: max(2, round(part * len(rows)))]
        shown[rows] = c
    return shown
