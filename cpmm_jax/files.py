"""Files that more than one process may want, or that must be complete: locks and small JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpmm_jax.errors import RunError

LOCK = ".lock"


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


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, complete or not at all.

    Raises:
        RunError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise RunError(
            f"{str(path)!r} must be in a folder that can be written; got "
            f"{error.strerror or error}; make space, or choose another."
        ) from error
