"""The file: read without trust, written at once or not at all."""

from __future__ import annotations

import json
import math
import os
import secrets
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy_format

from cpmm_jax import __version__
from cpmm_jax.artifact.mixture import PARAMETERS, Array, Mixture, require
from cpmm_jax.errors import ArtifactError

if TYPE_CHECKING:
    from cpmm_jax.mixture.hierarchy import HierarchicalMFA

SCHEMA = 1
METADATA = ("class_names", "feature_names", "event_shape", "extra")
_INFLATION = 100  # most bytes that a byte of a compressed file may stand for, beyond 64 MiB


def load(path: str | os.PathLike[str]) -> Mixture:
    """Read a mixture file, without JAX and without unpickling anything.

    Args:
        path: a file written by `save`.

    Returns:
        A `Mixture` whose arrays have the dtype of the file.

    Raises:
        ArtifactError: the file is missing, damaged, foreign, or of a later schema.

    Example:
        >>> import tempfile
        >>> one = Mixture(*(np.zeros(s) for s in [1, (1, 1), (1, 1, 2), (1, 1, 2, 0), (1, 1, 2)]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(Path(folder, "mixture.npz"), one)
        ...     load(Path(folder, "mixture.npz")).log_prob([[0.0, 0.0]]).round(4).tolist()
        [-1.8379]
    """
    path = Path(path)
    try:
        found = "a folder" if path.is_dir() else "no such file"
        require(path.is_file(), f"it must be a file; got {found}; check the path.")
        size = path.stat().st_size
        require(size > 0, "it must be an .npz file; got an empty file.")
        with zipfile.ZipFile(path) as archive:
            return _read(archive, size)
    except Exception as error:  # zipfile, zlib and NumPy's header parser raise a dozen kinds
        reason = f"it must be a sound .npz file; got {type(error).__name__}: {error}."
        reason = str(error) if isinstance(error, ArtifactError) else reason
        message = (
            f"{path}: cannot be read as a mixture: {reason} Write it again with `cpmm export`."
        )
        raise ArtifactError(" ".join(message.split())) from error


def _read(archive: zipfile.ZipFile, size: int) -> Mixture:
    held = {name.removesuffix(".npy") for name in archive.namelist()}
    if "schema" in held:  # before anything else: a later schema may have other arrays
        schema = _read_array(archive, "schema", size)
        number = int(schema) if schema.shape == () and schema.dtype.kind in "iu" else 0
        require(number >= 1, f"`schema` must be one positive integer; got {schema!r:.60}.")
        later = f"it was written by a later version, schema {number}; this version reads up to"
        require(number <= SCHEMA, f"{later} {SCHEMA}; upgrade cpmm_jax.")
    missing = [name for name in ("schema", *PARAMETERS, "metadata") if name not in held]
    found = ", ".join(repr(name) for name in sorted(held)[:8]) or "nothing"
    require(not missing, f"it must hold {', '.join(missing)}, which it lacks; got {found}.")
    arrays: dict[str, Any] = {name: _read_array(archive, name, size) for name in PARAMETERS}
    return Mixture(**arrays, **_read_metadata(_read_array(archive, "metadata", size)))


def _read_array(archive: zipfile.ZipFile, name: str, size: int) -> Array:
    """Read one array once its header, its entry and the size of the file agree."""
    info = archive.getinfo(f"{name}.npy")
    most = size if info.compress_type == zipfile.ZIP_STORED else _INFLATION * size + 2**26
    rule = f"`{name}` must hold at most {most} bytes in a file of {size}"
    require(info.file_size <= most, f"{rule}; got an entry that claims {info.file_size}.")
    with archive.open(info) as stream:
        version = npy_format.read_magic(stream)
        require(version <= (2, 0), f"`{name}` must be of .npy format 1 or 2; got {version}.")
        one = version == (1, 0)
        read = npy_format.read_array_header_1_0 if one else npy_format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        require(not dtype.hasobject, f"`{name}` must hold plain values; got Python objects.")
        claimed, present = math.prod(shape) * dtype.itemsize, info.file_size - stream.tell()
        rule = f"`{name}` must hold the {claimed} bytes of its header's shape {shape} and {dtype}"
        require(claimed == present, f"{rule}; got {present}.")
        data = stream.read(claimed + 1)  # one more: reaching the end makes zipfile check the CRC
    array: Array = np.ndarray(shape, dtype, data, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


def _read_metadata(array: Array) -> dict[str, Any]:
    text = array.shape == () and array.dtype.kind == "U"
    require(text, f"`metadata` must be one string; got shape {array.shape}, dtype {array.dtype}.")
    try:
        metadata = json.loads(str(array[()]))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"`metadata` must be JSON; got {error}.") from error
    extra = metadata.get("extra", {}) if isinstance(metadata, dict) else None
    require(isinstance(extra, dict), "`metadata`, and its `extra`, must be JSON objects.")
    result: dict[str, Any] = {"extra": extra}
    for name, kind in (("class_names", str), ("feature_names", str), ("event_shape", int)):
        value = metadata.get(name)
        whole = value is None or (isinstance(value, list) and {type(v) for v in value} <= {kind})
        require(whole, f"`{name}` must be a list of {kind.__name__}; got {value!r:.60}.")
        result[name] = None if value is None else tuple(value)
    return result


def save(
    path: str | os.PathLike[str],
    mixture: Any,
    *,
    class_names: Iterable[Any] | None = None,
    feature_names: Iterable[Any] | None = None,
    event_shape: Iterable[int] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a mixture file; an older file of that name stays until the new one is complete.

    Args:
        path: the file, written under exactly this name.
        mixture: see `to_mixture`, as for the names.
        class_names: C names.
        feature_names: D names.
        event_shape: shape of one example, D entries in all.
        extra: anything else to keep, as JSON can say it.

    Raises:
        ArtifactError: a shape, value or name breaks a rule, or the file cannot be written.
    """
    light = to_mixture(
        mixture,
        class_names=class_names,
        feature_names=feature_names,
        event_shape=event_shape,
        extra=extra,
    )
    metadata = {name: getattr(light, name) for name in METADATA}
    try:
        text = json.dumps({**metadata, "created_by": f"cpmm_jax {__version__}"})
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"`extra` must be JSON; got {error}. Use plain types.") from error
    arrays = {name: getattr(light, name) for name in PARAMETERS}
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:  # in the same folder, so that the replacement is atomic
            np.savez(file, schema=np.int64(SCHEMA), metadata=np.array(text), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        message = f"{path}: must be a file in a writable folder; got {error.strerror or error}."
        raise ArtifactError(f"{message} Choose another place.") from error
    finally:
        with suppress(OSError):
            part.unlink()


def to_mixture(
    mixture: Any,
    *,
    class_names: Iterable[Any] | None = None,
    feature_names: Iterable[Any] | None = None,
    event_shape: Iterable[int] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Mixture:
    """Return the light mixture of a fitted one, what `load` gives after `save`.

    Args:
        mixture: a `HierarchicalMFA`, an `MFA` (taken as one class) or a `Mixture`.
        class_names: C names; where None, those of `mixture` if it has any. So for the rest.
        feature_names: D names.
        event_shape: shape of one example, D entries in all.
        extra: anything else to keep.

    Raises:
        ArtifactError: a shape, value or name breaks a rule.
    """
    given = {
        "class_names": _to_tuple("class_names", class_names, str),
        "feature_names": _to_tuple("feature_names", feature_names, str),
        "event_shape": _to_tuple("event_shape", event_shape, int),
        "extra": extra,
    }
    metadata: dict[str, Any] = {
        name: getattr(mixture, name, None) if value is None else value
        for name, value in given.items()
    }
    metadata["extra"] = dict(metadata["extra"] or {})
    return Mixture(**_collect(mixture), **metadata)


save_mixture = save


def load_mixture(path: str | os.PathLike[str]) -> HierarchicalMFA:
    """Read a mixture file as a `HierarchicalMFA` of float32 JAX arrays; errors as for `load`."""
    import jax.numpy as jnp

    from cpmm_jax.mixture.hierarchy import HierarchicalMFA
    from cpmm_jax.mixture.mfa import MFA

    mixture = load(path)
    arrays = (jnp.asarray(getattr(mixture, name), jnp.float32) for name in PARAMETERS)
    return HierarchicalMFA(next(arrays), MFA(*arrays))


def _collect(mixture: Any) -> dict[str, Any]:
    """Take the parameters of a HierarchicalMFA, an MFA (as one class) or a Mixture."""
    source = getattr(mixture, "components", mixture)
    try:
        arrays = {name: _as_float(getattr(source, name)) for name in PARAMETERS[1:]}
    except (AttributeError, TypeError) as error:
        message = f"`mixture` must be an MFA, HierarchicalMFA or Mixture; got {error}."
        raise ArtifactError(f"{message} Extract one from a model first.") from error
    if hasattr(mixture, "class_logits"):
        return {"class_logits": _as_float(mixture.class_logits), **arrays}
    arrays = {name: array[None] for name, array in arrays.items()}
    return {"class_logits": np.zeros(1, arrays["means"].dtype), **arrays}


def _as_float(values: Any) -> Array:
    """Keep float32 and float64; widen what is narrower, such as bfloat16, to float32."""
    array = np.asarray(values)
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)


def _to_tuple(name: str, values: Iterable[Any] | None, kind: type) -> tuple[Any, ...] | None:
    require(not isinstance(values, str), f"`{name}` must be a sequence; got the string {values!r}.")
    return None if values is None else tuple(kind(value) for value in values)
