"""Where and when a training is saved, what it belongs to, and from where it goes on."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cpmm_jax.dynamics.flow import CNF
from cpmm_jax.errors import ConfigError, RunError, SnapshotWarning
from cpmm_jax.models.cpmm import CPMM
from cpmm_jax.training.checkpoint import describe_model
from cpmm_jax.training.config import TrainConfig
from cpmm_jax.training.snapshot_file import (
    Snapshot,
    data_of,
    read_snapshot,
    versions_now,
    write_snapshot,
)

logger = logging.getLogger("cpmm_jax")

_PART, _OLD, _DAMAGED = ".part", ".old", ".damaged"

Fingerprint = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where and how often a training is saved.

    The constructor stores; `check` (called by `fit`) refuses what is out of range.

    Attributes:
        folder: the folder of snapshots, of this training alone; made where it is missing.
        every_seconds: seconds between two snapshots; None to count steps alone.
        every_steps: training steps between two; None to count seconds alone.
        keep: newest snapshots that are kept; each holds the best parameters too.
        allow_changes: whether to go on with other settings or data than those of the snapshot.
    """

    folder: str | Path
    every_seconds: float | None = 30.0
    every_steps: int | None = None
    keep: int = 2
    allow_changes: bool = False

    def check(self) -> None:
        """Raise ConfigError if a setting is out of its range."""
        for name, least in (("every_seconds", 0.0), ("every_steps", 1), ("keep", 1)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ConfigError(f"`{name}` must be at least {least}; got {value!r}.")


class Saver:
    """Saves a training into its folder, in the background, and reads the newest good snapshot.

    Args:
        checkpoints: where and how often; None for never.
        fingerprint: settings and data of the training, see `fingerprint_of`.
    """

    def __init__(self, checkpoints: Checkpoints | None, fingerprint: Fingerprint) -> None:
        self._settings, self._fingerprint = checkpoints, fingerprint
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._pending: Future[bool] | None = None
        self._last_time, self._last_step = time.monotonic(), 0
        self._failing = False
        if checkpoints is None:
            return
        checkpoints.check()
        self._folder = Path(checkpoints.folder).resolve()  # Orbax wants an absolute path
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"`checkpoints` must name a folder that can be written; got {str(self._folder)!r} "
                f"({error.strerror}); choose another."
            ) from error

    def close(self) -> None:
        """Await what is being written."""
        self._pool.shutdown(wait=True)

    @property
    def is_on(self) -> bool:
        """Whether anything is saved at all."""
        return self._settings is not None

    def due(self, step: int) -> bool:
        """Tell whether it is time for a snapshot, and the one before is written."""
        settings = self._settings
        if settings is None or (self._pending is not None and not self._pending.done()):
            return False
        waited, done = time.monotonic() - self._last_time, step - self._last_step
        by_time = settings.every_seconds is not None and waited >= settings.every_seconds
        return by_time or (settings.every_steps is not None and done >= settings.every_steps)

    def save(self, step: int, snapshot: Snapshot, *, wait: bool = False) -> bool:
        """Save a snapshot, in the background unless `wait`; where that fails, warn and go on.

        Returns:
            Whether it is saved; True where that is not known yet.
        """
        if self._settings is None:
            return True
        # A copy, here: the next step overwrites them.
        arrays = {name: np.array(array) for name, array in snapshot.arrays.items()}
        if self._pending is not None:
            self._pending.result()
        self._pending = self._pool.submit(self._write, step, Snapshot(arrays, snapshot.host))
        self._last_time, self._last_step = time.monotonic(), step
        return self._pending.result() if wait else True

    def tidy(self) -> None:
        """Put right what a killed process has left half done."""
        for path in self._folder.iterdir():
            if path.suffix == _OLD and not path.with_suffix("").exists():
                path.rename(path.with_suffix(""))
            elif path.suffix in (_OLD, _PART) and path.stem.isdigit():
                shutil.rmtree(path, ignore_errors=True)

    def restore(self) -> Snapshot | None:
        """Return the newest snapshot that is not damaged; None where there is none at all.

        Raises:
            RunError: all are damaged, or of other settings or data.

        Warns:
            SnapshotWarning: a damaged one is passed over, or there is none.
        """
        folders = sorted((p for p in self._folder.iterdir() if p.name.isdigit()), reverse=True)
        causes = []
        for folder in folders:
            try:
                snapshot = read_snapshot(folder)
            except RunError as error:
                causes.append(folder)
                _warn(f"a snapshot is passed over: {error}")
                continue
            self._compare(folder, snapshot.host.pop("fingerprint"), snapshot.host["versions"])
            for damaged in causes:  # so that it takes nobody's place
                with suppress(OSError):
                    damaged.rename(damaged.with_suffix(_DAMAGED))
            self._last_step = int(folder.name)
            return snapshot
        if causes:
            raise RunError(
                f"{str(self._folder)!r} must hold an undamaged snapshot to go on from; got "
                f"{len(causes)} damaged; begin anew, without `resume`, in another folder."
            )
        _warn(f"there is no snapshot in {str(self._folder)!r}; training begins at step 0")
        return None

    def check_empty(self) -> None:
        """Raise RunError if there are snapshots, of an earlier training."""
        found = [path.name for path in self._folder.iterdir() if path.name.isdigit()]
        if found:
            raise RunError(
                f"{str(self._folder)!r} must hold no snapshots, since training begins anew; got "
                f"that of step {int(max(found))}; go on from it with `resume`, or choose another "
                "folder."
            )

    def _compare(self, folder: Path, stored: Fingerprint, versions: Any) -> None:
        assert self._settings is not None
        changes = differences(stored, self._fingerprint)
        if changes and not self._settings.allow_changes:
            raise RunError(
                f"{str(folder)!r} must belong to these settings and data to go on from; got "
                f"{'; '.join(changes)}; set them as they were, or allow changes."
            )
        if found := differences(versions, versions_now()):
            _warn(f"the snapshot is of other software: {'; '.join(found)}; last digits may differ")

    def _write(self, step: int, snapshot: Snapshot) -> bool:
        final = self._folder / f"{step:08d}"
        part, old = final.with_suffix(_PART), final.with_suffix(_OLD)
        host = {"fingerprint": self._fingerprint, **snapshot.host}
        try:
            write_snapshot(part, Snapshot(snapshot.arrays, host))
            if final.exists():
                final.rename(old)
            part.rename(final)
            shutil.rmtree(old, ignore_errors=True)
            assert self._settings is not None
            kept = sorted(path for path in self._folder.iterdir() if path.name.isdigit())
            for earlier in kept[: -self._settings.keep]:
                shutil.rmtree(earlier, ignore_errors=True)
        except Exception as error:  # Orbax raises of every kind; training goes on
            shutil.rmtree(part, ignore_errors=True)
            if not self._failing:  # once, not every half a minute
                reason = " ".join(str(error).split())[:200]
                _warn(
                    f"the snapshot of step {step} could not be saved ({reason}); training goes on"
                )
            self._failing = True
            return False
        self._failing = False
        return True


def _warn(message: str) -> None:
    logger.warning(message)
    warnings.warn(message, SnapshotWarning, stacklevel=3)


def fingerprint_of(
    model: Any, fixed: Any, config: TrainConfig, data: Mapping[str, Any], **others: Any
) -> Fingerprint:
    """Return what a training depends on, as JSON holds it.

    Args:
        model: what is trained.
        fixed: its arrays that are not trained; those that are come with a snapshot.
        config: settings.
        data: arrays by name, or None.
        **others: what else there is, of text and numbers.
    """
    settings = {f.name: _plain(getattr(config, f.name)) for f in fields(config)}
    parts = {
        name: {"shape": list(np.shape(array)), "sha256": _hash([array])}
        for name, array in data.items()
        if array is not None
    }
    described: dict[str, Any] = {"kind": type(model).__name__}
    if isinstance(model, CPMM | CNF):
        with suppress(ConfigError):  # a solver with settings of its own
            described = _plain(describe_model(model))
    return {
        "model": described,
        "fixed": _hash(jax.tree.leaves(fixed)),
        "config": settings,
        "data": parts,
        **_plain(others),
    }


def _plain(value: Any) -> Any:
    """Return what JSON gives back as it is."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, str | int | float | None):
        return value
    name = getattr(value, "__qualname__", None)  # of a function, whose repr is its address
    return f"{value.__module__}.{name}" if name else re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _hash(arrays: Any) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(data_of(array)).tobytes())
    return total.hexdigest()[:16]


def differences(then: Any, now: Any, name: str = "") -> list[str]:
    """Return in words what differs between two fingerprints."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        found = []
        for key in sorted({*then, *now}):
            inner = f"{name}.{key}" if name else str(key)
            found += differences(then.get(key), now.get(key), inner)
        return found
    return [] if then == now else [f"`{name}` was {then!r} and is {now!r}"]
