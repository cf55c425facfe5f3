"""Snapshots of a training under way, from which it goes on to the same result, bit by bit.

A folder of snapshots holds one folder for each, named by its step:

    00001200/arrays/      in Orbax's format, by name: `model/field/layers/0/kernel`, ... (what is
                          trained), `best/...` (by validation), `tried/...` (at the last report),
                          `good/...` (at one from which steps were accepted), `optimizer/...`,
                          `totals/...` (since the last report), `step`, `refused`
    00001200/state.json   what the host keeps: reports, best score, stage of the curriculum, returns
                          to good parameters; settings, data and versions that it belongs to; and a
                          checksum of this and of `arrays/` (schema 1)

Batches, pseudotimes and noise are functions of the seed and of the step, so no position in the data
and no generator is stored. `state.json` is written last, and the folder then gets its name: one
that has it is complete. They are written in the background; the newest few are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cpmm_jax import __version__
from cpmm_jax.errors import Interrupted, RunError
from cpmm_jax.training.checkpoint import checksum

SCHEMA = 1
ARRAYS, STATE = "arrays", "state.json"
_LIBRARIES = ("jax", "flax", "optax", "diffrax", "orbax-checkpoint", "numpy")


class Snapshot(NamedTuple):
    """What was saved: arrays by name, and what the host keeps."""

    arrays: dict[str, Any]
    host: dict[str, Any]


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Write a snapshot into a new folder, `state.json` last."""
    import orbax.checkpoint as ocp  # not with the package: it takes its time

    folder.mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:  # leaving it awaits the writing
        checkpointer.save(folder / ARRAYS, nested(snapshot.arrays))
    content = {"schema": SCHEMA, "versions": versions_now(), **snapshot.host}
    content["checksum"] = checksum(content, folder / ARRAYS)
    (folder / STATE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def versions_now() -> dict[str, str]:
    """Return the versions of libraries, the kind of device, and the precision."""
    return {
        "cpmm_jax": __version__,
        **{name: version(name) for name in _LIBRARIES},
        "device": jax.default_backend(),
        "x64": str(jax.config.read("jax_enable_x64")),
    }


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
    except Interrupted:  # by a signal, while reading
        raise
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
        _name(prefix, path): data_of(leaf)
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
        found, wanted = arrays.get(name), data_of(leaf)
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
    if len(parts) > 1 and parts[-1] == "value":  # of an nnx.Param
        del parts[-1]
    return "/".join([prefix, *parts])


def data_of(leaf: Any) -> Any:
    """Return an array as it is stored: of a PRNG key its data."""
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
