"""The folder of a run while it is made: hidden, locked, put in its place when it is complete."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cpmm_jax.errors import Interrupted, RunError
from cpmm_jax.files import LOCK, locked

ORDER, TRAINING = "fit.json", Path("checkpoints", "training")  # of an unfinished run


def part_of(path: str | os.PathLike[str]) -> Path:
    """Return the hidden folder in which a run is made."""
    path = Path(path)
    return path.with_name(f".{path.name}.part")


@contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give a hidden folder to fill, which becomes `path` when all went well.

    It is kept where the fit was interrupted, or failed after it had been saved; where data or
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
        with locked(part):
            begun = any((part / name).is_file() for name in (ORDER, "config.json"))
            if begun and not overwrite:
                raise RunError(
                    f"{str(path)!r} must not be begun yet; got an unfinished fit; go on with "
                    f"`cpmm fit --resume {path}`, or begin anew with `--overwrite`."
                )
            away = part.with_name(f"{part.name}.{secrets.token_hex(4)}")
            os.replace(part, away)
        shutil.rmtree(away, ignore_errors=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
    except OSError as error:
        raise RunError(
            f"{str(path)!r} must lie in a folder that can be written; "
            f"got {error.strerror or error}; choose another `--out`."
        ) from error
    try:
        with locked(part):
            yield part
            _put_in_place(part, path, overwrite=overwrite)
    except (Interrupted, KeyboardInterrupt):
        raise
    except BaseException:
        if not any(part.glob(f"{TRAINING}/*/0*")):  # nothing is lost
            shutil.rmtree(part, ignore_errors=True)
        raise
    _clean(path)


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
    with locked(part):
        yield part
        _put_in_place(part, path, overwrite=_may_replace(part))
    _clean(path)


def _may_replace(part: Path) -> bool:
    return bool(json.loads((part / ORDER).read_text(encoding="utf-8"))["overwrite"])


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


def _put_in_place(part: Path, path: Path, *, overwrite: bool) -> None:
    """Give a complete folder its name; an older run there is kept until that is done.

    Raises:
        RunError: `path` has been taken meanwhile, or cannot be replaced.
    """
    check_free(path, overwrite=overwrite)
    old = part.with_suffix(".old")
    try:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)  # of a process that was killed here
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


def _clean(path: Path) -> None:
    """Remove from a finished run what only an unfinished one needs."""
    for name in (LOCK, ORDER):
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(path / TRAINING, ignore_errors=True)
