"""`load`: a built-in name or a path -> `Dataset`."""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmm_jax.data.binary import read_idx, read_npy, read_npz, reading
from cpmm_jax.data.builtin import BUILTIN_NAMES, load_builtin
from cpmm_jax.data.checks import check_examples, check_length, listing, row_words, show, show_path
from cpmm_jax.data.dataset import Dataset, Part
from cpmm_jax.data.labels import encode_labels
from cpmm_jax.data.table import read_csv
from cpmm_jax.errors import DataError, DataWarning

FILE_KINDS = (
    ".npz (x, or x_train, x_valid, x_test; and y, or y_train, ...), .npy, .csv, "
    "or a folder of IDX files (train-images-idx3-ubyte, ...)"
)
_PARTS: tuple[Part, ...] = ("train", "valid", "test")
_IDX_PREFIXES: dict[Part, str] = {"train": "train", "test": "t10k"}


@dataclass(frozen=True, eq=False)
class _RawPart:
    """One part as it was read: arrays and what to call them in a message."""

    part: Part
    x: npt.NDArray[Any]
    y: npt.NDArray[Any] | None
    x_name: str
    y_name: str


def load(
    source: str | os.PathLike[str],
    *,
    labels: bool = False,
    label_column: str | None = None,
    seed: int = 0,
) -> Dataset:
    """Read data from a built-in name or a path.

    Labels that a source holds are read even where `labels` is False, since a model fitted without
    them can still be compared with them; labels that cannot serve as classes (a regression target,
    missing values) are then left out with a warning, where `labels=True` makes them an error.

    Args:
        source: a built-in name (`BUILTIN_NAMES`), or the path of an .npz file with `x`, or
            `x_train`, `x_valid`, `x_test`, and `y`, or `y_train`, ... (other arrays are ignored),
            an .npy file, a .csv file (header optional), or a folder of IDX files. A name wins over
            a folder of that name; write `./moons` for the folder. Images are flattened, their shape
            kept in `event_shape`.
        labels: class labels are needed; an error if the source has none.
        label_column: CSV only: header, or index from 0 in digits, of the column of labels.
        seed: for built-in data: of the draw and the division into parts.

    Returns:
        the data; parts that the source lacks are None (`split` makes them).

    Raises:
        DataError: unknown name or kind of file, damaged file, NaN or infinity, labels that are
            wanted and missing, of another length, or with gaps.

    Warns:
        DataWarning: labels that cannot serve as classes were left out.

    Example:
        >>> data = load("pinwheel", seed=0)
        >>> data.x_train.shape, data.x_valid.shape, data.num_classes
        ((3000, 2), (1000, 2), 5)
    """
    if isinstance(source, str) and source in BUILTIN_NAMES:
        _refuse_label_column(label_column, source)
        dataset = load_builtin(source, seed=seed)
        if labels and dataset.y_train is None:
            raise _no_labels(source, "examples alone", "fit it without labels")
        return dataset
    path = Path(source)
    suffix = path.suffix.lower()
    with reading(path, "data file"):
        kind = "folder" if path.is_dir() else "file" if path.is_file() else None
        size = path.stat().st_size if kind == "file" else 1
    if kind is None or (kind == "file" and suffix not in (".npz", ".npy", ".csv")):
        raise _unknown(source, kind is not None)
    if size == 0:
        raise DataError(f"{show_path(path)} must hold data; got an empty file; write it again.")
    if suffix == ".csv" and kind == "file":
        return _load_csv(path, labels=labels, label_column=label_column)
    _refuse_label_column(label_column, str(path))
    if kind == "folder":
        return _load_idx(path, labels=labels)
    if suffix == ".npz":
        return _load_npz(path, labels=labels)
    if labels:
        raise _no_labels(str(path), "one array", "use an .npz file with `x` and `y`")
    part = _RawPart("train", read_npy(path), None, path.name, "")
    return _assemble(path.stem, [part], labels=False)


def _unknown(source: str | os.PathLike[str], exists: bool) -> DataError:
    near = difflib.get_close_matches(str(source), BUILTIN_NAMES, n=1)
    got = "a file of another kind, " if exists else ""
    remedy = f"did you mean {near[0]!r}?" if near else "check the name or path."
    return DataError(
        f"data must be a built-in name ({', '.join(BUILTIN_NAMES)}) or an existing {FILE_KINDS}; "
        f"got {got}{show_path(source)}; {remedy}"
    )


def _no_labels(source: str, found: str, remedy: str) -> DataError:
    return DataError(
        f"{show_path(source)} must hold labels when they are asked for; got {found}; {remedy}."
    )


def _refuse_label_column(label_column: str | None, source: str) -> None:
    if label_column is not None:
        raise DataError(
            f"`label_column` must go with a .csv file; got {show(label_column)} for "
            f"{show_path(source)}; leave it out."
        )


def _load_npz(path: Path, *, labels: bool) -> Dataset:
    wanted = [f"{kind}{part}" for kind in "xy" for part in ("", "_train", "_valid", "_test")]
    arrays, names = read_npz(path, wanted)
    found = f"arrays {listing([show(name) for name in names])}" if names else "no arrays"
    if ("x" in arrays) == ("x_train" in arrays):
        raise DataError(
            f"{show_path(path)} must hold examples either as `x` or as `x_train` (and `x_valid`, "
            f"`x_test`); got {found}; rename the array of examples."
        )
    whole = "x" in arrays
    parts = []
    for part in ("train",) if whole else _PARTS:
        ending = "" if whole else f"_{part}"
        if f"x{ending}" in arrays:
            y = arrays.get(f"y{ending}")
            parts.append(_RawPart(part, arrays[f"x{ending}"], y, f"x{ending}", f"y{ending}"))
    if labels and parts[0].y is None:
        raise _no_labels(str(path), found, f"add `{parts[0].y_name}`")
    return _assemble(path.stem, parts, labels=labels)


def _load_idx(path: Path, *, labels: bool) -> Dataset:
    with reading(path, "folder of IDX files"):
        files = sorted(entry.name for entry in path.iterdir())
    parts = []
    for part, prefix in _IDX_PREFIXES.items():
        images = _idx_file(files, f"{prefix}-images")
        if images is None:
            continue
        codes = _idx_file(files, f"{prefix}-labels")
        y = None if codes is None else read_idx(path / codes)
        parts.append(_RawPart(part, read_idx(path / images), y, images, codes or ""))
    found = f"files {listing([show(name) for name in files])}" if files else "no files"
    if not parts or parts[0].part != "train":
        raise DataError(
            f"the folder {show_path(path)} must hold train-images-idx3-ubyte (and "
            "train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte; each plain "
            f"or .gz); got {found}; check the path."
        )
    if labels and parts[0].y is None:
        raise _no_labels(str(path), found, "add train-labels-idx1-ubyte")
    return _assemble(path.name, parts, labels=labels)


def _idx_file(files: list[str], stem: str) -> str | None:
    """Return the file of that stem; sorted, the plain one comes before the compressed one."""
    pattern = re.compile(re.escape(stem) + r"[-.]idx[0-9]-ubyte(\.gz)?")
    return next((name for name in files if pattern.fullmatch(name)), None)


def _load_csv(path: Path, *, labels: bool, label_column: str | None) -> Dataset:
    if labels and label_column is None:
        columns = read_csv(path).feature_names
        found = f"columns {listing([show(c) for c in columns])}" if columns else "no header"
        raise _no_labels(
            str(path), f"{found} and no word which one", "give `label_column` (its header or index)"
        )
    table = read_csv(path, label_column)
    part = _RawPart("train", table.x, table.y, path.name, f"label column {label_column}")
    dataset = _assemble(path.stem, [part], labels=labels, row=table.line)
    return replace(dataset, feature_names=table.feature_names)


def _assemble(
    name: str,
    parts: list[_RawPart],
    *,
    labels: bool,
    row: Callable[[int], str] = row_words,
) -> Dataset:
    """Check and flatten the parts (the training part first) and code their labels."""
    fields: dict[str, Any] = {}
    shape = parts[0].x.shape[1:]
    for raw in parts:
        x = raw.x
        if x.ndim > 2:
            if x.shape[1:] != shape:
                raise DataError(
                    f"`{raw.x_name}` must hold examples of shape {shape}, as `{parts[0].x_name}`; "
                    f"got {x.shape[1:]}; bring the parts to one shape."
                )
            x = x.reshape(len(x), -1) if x.size else x.reshape(len(x), 0)
        dim = fields["x_train"].shape[1] if "x_train" in fields else None
        fields[f"x_{raw.part}"] = check_examples(x, name=raw.x_name, dim=dim)
        if raw.y is not None:
            y = raw.y[:, 0] if raw.y.ndim == 2 and raw.y.shape[1] == 1 else raw.y
            check_length(y, len(x), name=raw.y_name)
            fields[f"y_{raw.part}"] = y
    fields.update(_coded(parts, fields, labels=labels, row=row))
    return Dataset(name, event_shape=tuple(shape) if len(shape) > 1 else None, **fields)


def _coded(
    parts: list[_RawPart],
    fields: dict[str, Any],
    *,
    labels: bool,
    row: Callable[[int], str],
) -> dict[str, Any]:
    """Return the `y_*` fields as codes, and `class_names`; all None without usable labels."""
    given = [raw for raw in parts if f"y_{raw.part}" in fields]
    if not given:
        return {}
    try:
        if given[0].part != "train":
            raise DataError(
                f"`{given[0].y_name}` must come with labels of the training part, which define the "
                "classes; got none; add them."
            )
        named = [(raw.y_name, np.asarray(fields[f"y_{raw.part}"])) for raw in given]
        codes, class_names = encode_labels(named, row=row)
    except DataError as error:
        if labels:
            raise
        warnings.warn(f"labels are left out: {error}", DataWarning, stacklevel=5)
        return {f"y_{raw.part}": None for raw in given}
    coded: dict[str, Any] = {f"y_{raw.part}": code for raw, code in zip(given, codes, strict=True)}
    return {**coded, "class_names": class_names}
