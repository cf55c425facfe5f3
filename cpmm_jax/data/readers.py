"""`load`: a built-in name or a path -> `Dataset`."""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from pathlib import Path

from cpmm_jax.data.binary import read_npy, read_npz, reading
from cpmm_jax.data.builtin import BUILTIN_NAMES, load_builtin
from cpmm_jax.data.checks import listing, show, show_path
from cpmm_jax.data.dataset import PARTS, Dataset
from cpmm_jax.data.images import FOLDER_KINDS, read_folder
from cpmm_jax.data.parts import RawPart, assemble
from cpmm_jax.data.table import read_csv
from cpmm_jax.errors import DataError

FILE_KINDS = (
    ".npz (x, or x_train, x_valid, x_test; and y, or y_train, ...), .npy, .csv, "
    f"or a folder of {FOLDER_KINDS}"
)


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
            an .npy file, a .csv file (header optional), or a folder of images: IDX files (plain or
            .gz), CIFAR-10 or CIFAR-100 in its binary version, or PNG files of one size, grey or RGB
            of 8 bits, which Pillow reads: `*.png`, without labels, `CLASS/*.png`, or either of them
            in the folders `train`, `valid` and `test`. A name wins over a folder of that name;
            write `./moons` for the folder. Images are flattened, (H, W) or (H, W, channels) in this
            order of axes; their shape is kept in `event_shape`.
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
        return _load_folder(path, labels=labels)
    if suffix == ".npz":
        return _load_npz(path, labels=labels)
    if labels:
        raise _no_labels(str(path), "one array", "use an .npz file with `x` and `y`")
    part = RawPart("train", read_npy(path), None, path.name, "")
    return assemble(path.stem, [part], labels=False)


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
    for part in ("train",) if whole else PARTS:
        ending = "" if whole else f"_{part}"
        if f"x{ending}" in arrays:
            y = arrays.get(f"y{ending}")
            parts.append(RawPart(part, arrays[f"x{ending}"], y, f"x{ending}", f"y{ending}"))
    if labels and parts[0].y is None:
        raise _no_labels(str(path), found, f"add `{parts[0].y_name}`")
    return assemble(path.stem, parts, labels=labels)


def _load_folder(path: Path, *, labels: bool) -> Dataset:
    parts = read_folder(path)
    if labels and parts[0].y is None:
        raise _no_labels(
            str(path),
            "images alone",
            "add train-labels-idx1-ubyte, or sort PNG files into one folder per class",
        )
    return assemble(path.name, parts, labels=labels)


def _load_csv(path: Path, *, labels: bool, label_column: str | None) -> Dataset:
    if labels and label_column is None:
        columns = read_csv(path).feature_names
        found = f"columns {listing([show(c) for c in columns])}" if columns else "no header"
        raise _no_labels(
            str(path), f"{found} and no word which one", "give `label_column` (its header or index)"
        )
    table = read_csv(path, label_column)
    part = RawPart("train", table.x, table.y, path.name, f"label column {label_column}")
    dataset = assemble(path.stem, [part], labels=labels, row=table.line)
    return replace(dataset, feature_names=table.feature_names)
