"""Snapshots of a training under way, from which it goes on to the same result, bit by bit.

A folder of snapshots holds one folder for each, named by its step:

    00001200/arrays/      in Orbax's format, by name: `model/field/layers/0/kernel`, ... (what is
                          trained), `best/...` (by validation), `good/...` (at the last report),
                          `optimizer/...`, `totals/...` (since the last report), `step`, `refused`
    00001200/state.json   what the host keeps: reports, best score, stage of the curriculum, returns
                          to good parameters; settings, data and versions that it belongs to; and a
                          checksum of this and of `arrays/` (schema 1)

Batches, pseudotimes and noise are functions of the seed and of the step, so no position in the data
and no generator is stored. `state.json` is written last, and the folder then gets its name: one
that has it is complete. They are written in the background; the newest few are kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from cpmm_jax import __version__
from cpmm_jax.dynamics.flow import CNF
from cpmm_jax.errors import ConfigError, RunError, SnapshotWarning
from cpmm_jax.models.cpmm import CPMM
from cpmm_jax.training.checkpoint import checksum, describe_model
from cpmm_jax.training.config import TrainConfig

logger = logging.getLogger("cpmm_jax")

SCHEMA = 1
ARRAYS, STATE = "arrays", "state.json"
_PART = ".part"
_LIBRARIES = ("jax", "flax", "optax", "diffrax", "orbax-checkpoint", "numpy")

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


class Snapshot(NamedTuple):
    """What was saved: arrays by name, and what the host keeps."""

    arrays: dict[str, Any]
    host: dict[str, Any]


class Saver:
    """Saves a training into its folder, in the background, and reads the newest good snapshot.

    Args:
        checkpoints: where and how often; None for never.
        fingerprint: settings and data of the training, see `fingerprint_of`.
    """

    def __init__(self, checkpoints: Checkpoints | None, fingerprint: Fingerprint) -> None:
        self._settings, self._fingerprint = checkpoints, fingerprint
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._pending: Future[None] | None = None
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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

    def save(self, step: int, snapshot: Snapshot, *, wait: bool = False) -> None:
        """Save a snapshot, in the background unless `wait`; where that fails, warn and go on."""
        if self._settings is None:
            return
        arrays = jax.device_get(snapshot.arrays)  # here: the next step overwrites them
        if self._pending is not None:
            self._pending.result()
        self._pending = self._pool.submit(self._write, step, Snapshot(arrays, snapshot.host))
        if wait:
            self._pending.result()
        self._last_time, self._last_step = time.monotonic(), step

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
                causes.append(str(error))
                _warn(f"a snapshot is passed over: {error}")
                continue
            self._compare(folder, snapshot.host.pop("fingerprint"))
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

    def _compare(self, folder: Path, stored: Fingerprint) -> None:
        assert self._settings is not None
        changes = differences(stored, self._fingerprint)
        if changes and not self._settings.allow_changes:
            raise RunError(
                f"{str(folder)!r} must belong to these settings and data to go on from; got "
                f"{'; '.join(changes)}; set them as they were, or allow changes."
            )

    def _write(self, step: int, snapshot: Snapshot) -> None:
        part, final = self._folder / f"{step:08d}{_PART}", self._folder / f"{step:08d}"
        host = {"fingerprint": self._fingerprint, **snapshot.host}
        try:
            shutil.rmtree(part, ignore_errors=True)
            write_snapshot(part, Snapshot(snapshot.arrays, host))
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            self._failing = False
        except Exception as error:
            shutil.rmtree(part, ignore_errors=True)
            if not self._failing:  # once, not every half a minute
                reason = " ".join(str(error).split())[:200]
                _warn(
                    f"the snapshot of step {step} could not be saved ({reason}); training goes on"
                )
            self._failing = True
            return
        assert self._settings is not None
        kept = sorted(path for path in self._folder.iterdir() if path.name.isdigit())
        for old in kept[: -self._settings.keep]:
            shutil.rmtree(old, ignore_errors=True)


def _warn(message: str) -> None:
    logger.warning(message)
    warnings.warn(message, SnapshotWarning, stacklevel=3)


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Write a snapshot into a new folder, `state.json` last."""
    import orbax.checkpoint as ocp  # not with the package: it takes its time

    folder.mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:  # leaving it awaits the writing
        checkpointer.save(folder / ARRAYS, nested(snapshot.arrays))
    versions = {"cpmm_jax": __version__, **{name: version(name) for name in _LIBRARIES}}
    content = {"schema": SCHEMA, "versions": versions, **snapshot.host}
    content["checksum"] = checksum(content, folder / ARRAYS)
    (folder / STATE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_snapshot(folder: Path) -> Snapshot:
    """Read what `write_snapshot` has written.

    Raises:
        RunError: incomplete, damaged, or of another schema.
    """
    import orbax.checkpoint as ocp

    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}, not {SCHEMA}")
        if content.pop("checksum") != checksum(content, folder / ARRAYS):
            raise ValueError("files that are not those written")
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(folder / ARRAYS)
        if "fingerprint" not in content:
            raise ValueError("no fingerprint")
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"{str(folder)!r} must be an undamaged snapshot; got {type(error).__name__}: {reason}; "
            "remove it."
        ) from error
    return Snapshot(flat(arrays), content)


def named_leaves(prefix: str, tree: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by their paths, `prefix/path/to/leaf`; keys as their data."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        _name(prefix, path): _data(leaf)
        for path, leaf in leaves
        if np.size(leaf)  # Orbax refuses arrays without entries
    }


def from_named(prefix: str, template: Any, arrays: Mapping[str, Any]) -> Any:
    """Return a pytree like `template` with the leaves of `named_leaves`.

    Raises:
        RunError: one is missing, or of another shape or type.
    """

    def find(path: Any, leaf: Any) -> Any:
        if not np.size(leaf):
            return leaf
        name = _name(prefix, path)
        found, wanted = arrays.get(name), _data(leaf)
        if found is None or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            got = "none" if found is None else f"{found.dtype}{list(found.shape)}"
            raise RunError(
                f"the snapshot must hold {name!r} as {wanted.dtype}{list(wanted.shape)}; got {got};"
                " go on with the model and the optimiser that it was saved from."
            )
        array = jnp.array(found)  # a copy: its buffer is donated
        return jax.random.wrap_key_data(array) if wanted is not leaf else array

    return jax.tree_util.tree_map_with_path(find, template)


def _name(prefix: str, path: Any) -> str:
    parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    return "/".join([prefix, *(part for part in parts if part != "value")])  # of an nnx.Param


def _data(leaf: Any) -> Any:
    leaf = jnp.asarray(leaf)
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return dictionaries within dictionaries for names with slashes."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = np.asarray(array)
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Undo `nested`."""
    arrays: dict[str, Any] = {}
    for name, value in tree.items():
        inner = f"{prefix}{name}"
        arrays |= flat(value, f"{inner}/") if isinstance(value, Mapping) else {inner: value}
    return arrays


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
        **others,
    }


def _plain(value: Any) -> Any:
    """Return what JSON gives back as it is."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | None) else repr(value)


def _hash(arrays: Any) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(_data(array)).tobytes())
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
