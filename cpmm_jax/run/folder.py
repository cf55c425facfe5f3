"""The folder of a run while it is made: hidden, locked, put in its place when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cpmm_jax.errors import CpmmError, Interrupted, RunError

ORDER, TRAINING = "fit.json", Path("checkpoints", "training")  # of an unfinished run


def part_of(path: str | os.PathLike[str]) -> Path:
    """Return the hidden folder in which a run is made."""
    path = Path(path)
    return path.with_name(f".{path.name}.part")


@contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give a hidden folder to fill, which becomes `path` when all went well.

    It is kept where the fit was interrupted, or crashed after it had been saved; where data or
    settings are wrong it disappears. An older run at `path` is replaced at the end only, and only
    with `overwrite`.

    Raises:
        RunError: `path` exists, is no run that may be replaced, or cannot be written; or a fit of
            it is under way, or unfinished.
    """
    path = Path(path)
    check_free(path, overwrite=overwrite)
    part = part_of(path)
    if part.exists():
        with _alone(part):
            if not overwrite:
                raise RunError(
                    f"{str(path)!r} must not be begun yet; got an unfinished fit; go on with "
                    f"`cpmm fit --resume {path}`, or begin anew with `--overwrite`."
                )
        shutil.rmtree(part)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
    except OSError as error:
        raise RunError(
            f"{str(path)!r} must lie in a folder that can be written; "
            f"got {error.strerror or error}; choose another `--out`."
        ) from error
    try:
        with _alone(part):
            yield part
    except (Interrupted, KeyboardInterrupt):
        raise
    except BaseException as error:
        if isinstance(error, CpmmError) or not any(part.glob(f"{TRAINING}/*/0*")):
            shutil.rmtree(part, ignore_errors=True)
        raise
    _finish(part, path)


@contextmanager
def old_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the hidden folder of an unfinished run, which becomes `path` when all went well.

    Raises:
        RunError: there is none, or another process is at it.
    """
    path = Path(path)
    part = part_of(path)
    if not (part / ORDER).is_file():
        found = "a finished one" if (path / "config.json").is_file() else "none"
        raise RunError(
            f"{str(path)!r} must be an unfinished run to go on with; got {found}; "
            "begin with `cpmm fit DATA --out`."
        )
    with _alone(part):
        yield part
    _finish(part, path)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise RunError if something is at `path` that may not be replaced."""
    if not (path.is_symlink() or path.exists()):
        return
    is_run = (path / "config.json").is_file() and (path / "mixture.npz").is_file()
    if overwrite and not is_run and not (path.is_dir() and not any(path.iterdir())):
        raise RunError(
            f"{str(path)!r} must be a run folder to be replaced; got something else, which is "
            "left alone; choose another `--out`."
        )
    if not overwrite:
        raise RunError(
            f"{str(path)!r} must not exist yet; got one; "
            "choose another `--out`, or replace it with `--overwrite`."
        )


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Hold the lock of a folder, which the system takes back from a process that is killed."""
    from filelock import FileLock, Timeout  # reading a run needs none

    try:
        with FileLock(part / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise RunError(
            f"{str(part)!r} must be used by one process at a time; got another one that fits "
            "there; wait for it, or choose another `--out`."
        ) from error


def _finish(part: Path, path: Path) -> None:
    for name in (".lock", ORDER):
        (part / name).unlink(missing_ok=True)
    shutil.rmtree(part / TRAINING, ignore_errors=True)
    _put_in_place(part, path)


def _put_in_place(part: Path, path: Path) -> None:
    old = part.with_suffix(".old")
    try:
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            os.replace(old, path)
        raise RunError(
            f"{str(path)!r} must be replaceable; got {error.strerror or error}; "
            "choose another `--out`."
        ) from error
    shutil.rmtree(old, ignore_errors=True)
