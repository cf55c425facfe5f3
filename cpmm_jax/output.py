"""Files that the command line writes: complete, or not there at all."""

from __future__ import annotations

import csv
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmm_jax.data.checks import show_path
from cpmm_jax.errors import RunError

_OUT_KINDS = (".csv", ".npz")


def is_csv(out: str) -> bool:
    """Return whether a table is to be a .csv, else an .npz.

    Raises:
        RunError: neither.
    """
    suffix = Path(out).suffix.lower()
    if suffix not in _OUT_KINDS:
        raise RunError(
            f"--out must name a file ending in {' or '.join(_OUT_KINDS)}; got {show_path(out)}; "
            "rename it."
        )
    return suffix == ".csv"


def write_columns(out: str, columns: dict[str, npt.NDArray[Any]], *, overwrite: bool) -> None:
    """Write named arrays as an .npz, or as the columns of a .csv."""
    if not is_csv(out):
        write_file(out, lambda part: _save_npz(part, columns), overwrite)
        return

    def save_csv(part: Path) -> None:
        with part.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(columns)
            writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))

    write_file(out, save_csv, overwrite)


def _save_npz(part: Path, columns: dict[str, npt.NDArray[Any]]) -> None:
    with part.open("wb") as stream:
        np.savez(stream, **columns)  # type: ignore[arg-type]


def check_new(path: Path, overwrite: bool) -> None:
    """Raise RunError if a file is there that may not be replaced."""
    if path.exists() and (not overwrite or path.is_dir()):
        raise RunError(
            f"{show_path(path)} must not exist yet; got one; choose another name, or replace a "
            "file with `--overwrite`."
        )


def write_file(out: str, write: Callable[[Path], object], overwrite: bool) -> None:
    """Write a file beside its place and move it there when it is complete."""
    path = Path(out)
    check_new(path, overwrite)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        raise RunError(
            f"{show_path(path)} must be in a folder that can be written; "
            f"got {error.strerror or error}; choose another name."
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()
