"""Files that are written complete or not at all, and folders that one process has to itself."""

from __future__ import annotations

import csv
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmm_jax.data.checks import show_path
from cpmm_jax.errors import RunError

LOCK = ".lock"
_OUT_KINDS = (".csv", ".npz")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which the system takes back from a process that is killed.

    Raises:
        RunError: another process holds it, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout  # reading a run needs none

    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RunError(
            f"{str(folder)!r} must be used by one process at a time; got another one that trains "
            "there; wait for it, or choose another folder."
        ) from error
    except OSError as error:
        raise RunError(
            f"{str(folder)!r} must be a folder that can be written; got {error.strerror or error}; "
            "choose another."
        ) from error
    try:
        yield
    finally:
        lock.release()


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
    """Write a new file.

    Args:
        out: its path.
        write: fills the file that it is given.
        overwrite: whether it may replace one.

    Raises:
        RunError: there is one, or it cannot be written.
    """
    check_new(Path(out), overwrite)
    _complete(Path(out), write)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, in place of one that is there.

    Raises:
        RunError: it cannot be written.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    _complete(path, lambda part: part.write_text(text, encoding="utf-8"))


def _complete(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, and move it there when it is complete."""
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
