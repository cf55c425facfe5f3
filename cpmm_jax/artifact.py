"""The light mixture file, and its reader, which needs NumPy alone.

One `.npz` holds what is extracted from a trained model (schema 1): `schema` (int64 scalar),
`class_logits` (C,), `logits` (C, K), `means` (C, K, D), `loadings` (C, K, D, R) and `log_noise`
(C, K, D) in float32 or float64 as given, and `metadata`, a string of JSON with class_names,
feature_names, event_shape, created_by and extra. It is not compressed: parameters look like noise
to a compressor (a tenth would be saved) and reading stays as fast as the disk.

Reading trusts nothing in a file: it never unpickles, allocates nothing before the sizes in the
headers agree with the size of the file, and turns every fault into an `ArtifactError` of one line.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import ArrayLike, NDArray

from cpmm_jax import __version__
from cpmm_jax.errors import ArtifactError, ConfigError, DataError

if TYPE_CHECKING:
    from cpmm_jax.mixture.hierarchy import HierarchicalMFA

SCHEMA = 1
_PARAMETERS = ("class_logits", "logits", "means", "loadings", "log_noise")
# Sizes whose squares, divided by the smallest variance, still fit a float64: no inf - inf below.
_LARGEST, _LARGEST_LOG_NOISE = np.float64(1e100), np.float64(200.0)
_BLOCK_ELEMENTS = 2**22  # float64 numbers held at a time: 32 MiB
_RELATIVE_ERROR = 1e-10  # of max(1, |log p|); what the matrix-product form must promise
_INFLATION = 100  # most bytes that a byte of a compressed file may stand for, beyond 64 MiB

Array = NDArray[Any]


def _require(rule: bool, message: str, error: type[Exception] = ArtifactError) -> None:
    if not rule:
        raise error(message)


@dataclass(frozen=True, eq=False)
class Mixture:
    """p(x) = sum_c lambda_c sum_k w_ck N(x; mean_ck, psi_ck + L_ck L_ck^T), in float64 NumPy.

    Methods take x of shape (N, D), or (N, *event_shape) where one is stored, and raise `DataError`
    for another shape and for what is not a finite number. Log-probabilities are in nats.

    Attributes:
        class_logits: unnormalised log class weights, shape (C,).
        logits: unnormalised log-weights within each class, shape (C, K).
        means: shape (C, K, D).
        loadings: factor loadings L, shape (C, K, D, R); R may be 0.
        log_noise: log of the diagonal noise variances psi, shape (C, K, D).
        class_names: C names in the order of the classes, or None.
        feature_names: D names, or None.
        event_shape: shape of one example with D entries, such as (8, 8), or None.
        extra: whatever else was stored, as JSON has it.

    Raises:
        ArtifactError: a shape, dtype, value or number of names breaks a rule.

    Example:
        >>> two = Mixture(np.zeros(2), np.zeros((2, 1)), np.array([[[-1.0]], [[1.0]]]),
        ...               np.zeros((2, 1, 1, 0)), np.zeros((2, 1, 1)), class_names=("a", "b"))
        >>> two.predict([[3.0], [-2.0]]).tolist(), two.predict_proba([[0.0]]).tolist()
        (['b', 'a'], [[0.5, 0.5]])
    """

    class_logits: Array
    logits: Array
    means: Array
    loadings: Array
    log_noise: Array
    class_names: tuple[str, ...] | None = None
    feature_names: tuple[str, ...] | None = None
    event_shape: tuple[int, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        means = self.means.shape
        _require(len(means) == 3 and 0 not in means, f"`means` must be (C, K, D); got {means}.")
        shapes = [means[:1], means[:2], means, (*means, *(self.loadings.shape[3:4] or "R")), means]
        for name, shape in zip(_PARAMETERS, shapes, strict=True):
            array = getattr(self, name)
            real = array.dtype in (np.float32, np.float64)
            _require(real, f"`{name}` must be float32 or float64; got dtype {array.dtype}.")
            rule = f"`{name}` must have shape {shape} to go with `means` of shape {means} (C, K, D)"
            _require(array.shape == shape, f"{rule}; got {array.shape}.")
            largest = _LARGEST_LOG_NOISE if name == "log_noise" else _LARGEST
            for index in np.argwhere(~(np.abs(array) <= largest))[:1].tolist():  # NaN is not <=
                found = f"{array[tuple(index)]} at {tuple(index)}"
                _require(False, f"`{name}` must be finite and at most {largest:g}; got {found}.")
        for name, count in (("class_names", means[0]), ("feature_names", means[2])):
            got = count if getattr(self, name) is None else len(getattr(self, name))
            _require(got == count, f"`{name}` must hold {count}, as `means` {means} do; got {got}.")
        event = self.event_shape
        same = event is None or (min(event, default=1) > 0 and math.prod(event) == means[2])
        _require(same, f"`event_shape` must hold D = {means[2]} entries in all; got {event}.")

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return int(self.means.shape[0])

    @property
    def num_components(self) -> int:
        """Number of components of each class, K."""
        return int(self.means.shape[1])

    @property
    def dim(self) -> int:
        """Number of features, D."""
        return int(self.means.shape[2])

    @property
    def rank(self) -> int:
        """Number of factors, R."""
        return int(self.loadings.shape[3])

    def log_prob(self, x: ArrayLike) -> Array:
        """Evaluate log p(x); (N, D) -> (N,)."""
        return self._map_blocks(x, (), lambda joint: _log_sum_exp(joint, (1, 2)))

    def class_log_prob(self, x: ArrayLike) -> Array:
        """Evaluate log p(x, c); (N, D) -> (N, C)."""
        return self._map_blocks(x, (self.num_classes,), lambda joint: _log_sum_exp(joint, (2,)))

    def component_log_prob(self, x: ArrayLike) -> Array:
        """Evaluate log p(x, c, k); (N, D) -> (N, C, K)."""
        return self._map_blocks(x, (self.num_classes, self.num_components), lambda joint: joint)

    def predict_proba(self, x: ArrayLike) -> Array:
        """Compute p(c | x) by Bayes' rule; (N, D) -> (N, C)."""
        return _softmax(self.class_log_prob(x), (1,))

    def responsibilities(self, x: ArrayLike) -> Array:
        """Compute p(c, k | x); (N, D) -> (N, C, K)."""
        return _softmax(self.component_log_prob(x), (1, 2))

    def predict(self, x: ArrayLike) -> Array:
        """Find the most probable class; (N, D) -> (N,) names, or codes where there are no names."""
        codes: Array = np.argmax(self.class_log_prob(x), axis=1)
        return codes if self.class_names is None else np.array(self.class_names).take(codes)

    def sample(self, rng: np.random.Generator, n: int) -> Array:
        """Draw n examples, shape (n, D); ConfigError where `rng` or `n` is unfit."""
        found = f"got {type(rng).__name__}. Pass np.random.default_rng(seed)."
        is_generator = isinstance(rng, np.random.Generator)
        _require(is_generator, f"`rng` must be a numpy.random.Generator; {found}", ConfigError)
        is_count = isinstance(n, int | np.integer) and n >= 0
        _require(is_count, f"`n` must be an integer, 0 or more; got {n!r}. Give one.", ConfigError)
        prepared = self._prepared
        weights = np.exp(prepared.log_weights)
        component = rng.choice(weights.size, size=n, p=weights / weights.sum())
        draws, factors = rng.standard_normal((n, self.dim)), rng.standard_normal((n, self.rank))
        ends = np.cumsum(np.bincount(component, minlength=weights.size))[:-1]
        # Component by component: gathering loadings[component] would take n * D * R numbers.
        for k, rows in enumerate(np.split(np.argsort(component, kind="stable"), ends)):
            scaled = draws[rows] + factors[rows] @ prepared.scaled_loadings[k].T
            draws[rows] = prepared.means[k] + scaled / prepared.precision_root[k]
        return draws

    @cached_property
    def _prepared(self) -> SimpleNamespace:
        """What every example needs of the C * K components, computed when first asked for."""
        dim, rank, count = self.dim, self.rank, self.num_classes * self.num_components
        log_noise = self.log_noise.reshape(count, dim).astype(np.float64)
        means = self.means.reshape(count, dim).astype(np.float64)
        root = np.exp(-0.5 * log_noise)
        scaled = self.loadings.reshape(count, dim, rank) * root[:, :, None]
        # The capacitance matrix is M = I + L^T psi^-1 L = A^T A with A = (psi^-1/2 L; I). Its
        # Cholesky factor G comes from A = Q G^T: M has the square of A's condition number, may be
        # singular to rounding, and is never formed. W = G^-1 L^T psi^-1 is then Q^T psi^-1/2.
        identity = np.broadcast_to(np.eye(rank), (count, rank, rank))
        orthogonal, upper = np.linalg.qr(np.concatenate([scaled, identity], axis=1))
        basis = orthogonal[:, :dim]
        projection = basis * root[:, :, None]
        diagonal = np.abs(np.diagonal(upper, axis1=1, axis2=2))
        log_det = log_noise.sum(axis=1) + 2.0 * np.log(diagonal).sum(axis=1)
        class_logits, logits = self.class_logits.astype(np.float64), self.logits.astype(np.float64)
        class_weights = class_logits - _log_sum_exp(class_logits, (0,))
        log_weights = class_weights[:, None] + logits - _log_sum_exp(logits, (1,))[:, None]
        log_weights = log_weights.reshape(count)
        centre, precision = means.mean(axis=0), root**2
        b = means - centre
        return SimpleNamespace(
            log_weights=log_weights,  # (CK,), log p(c, k)
            constant=log_weights - 0.5 * (log_det + dim * math.log(2.0 * math.pi)),
            centre=centre,
            means=means,
            precision_root=root,  # (CK, D), psi^-1/2
            scaled_loadings=scaled,  # (CK, D, R), psi^-1/2 L
            basis=basis,  # (CK, D, R), the upper part of Q
            upper=upper,  # (CK, R, R), G^T
            squares=np.concatenate([precision, -2.0 * b * precision], axis=1).T.copy(),
            offset=np.sum(b * b * precision, axis=1),
            projection=projection.transpose(1, 0, 2).reshape(dim, count * rank),  # W
            shift=np.einsum("kdr,kd->kr", projection, b),  # W b
        )

    def _log_joint(self, x: Array) -> Array:
        """Evaluate log p(x, c, k) of one block; (n, D) -> (n, CK).

        With a = x - centre and b = mean - centre, the squared Mahalanobis length is
        a^2 . psi^-1 - 2 a . (b psi^-1) + b^2 . psi^-1 - |W a - W b|^2: matrix products over all
        components. Its terms may be much larger than their sum; where rounding may have spoiled
        the sum of an example and a component, that pair is evaluated again by residuals.
        """
        prepared = self._prepared
        a = x - prepared.centre
        quadratic = np.concatenate([a * a, a], axis=1) @ prepared.squares + prepared.offset
        magnitude = quadratic + 2.0 * prepared.offset  # bounds a^2 . psi^-1 up to a factor of 2
        projected = (a @ prepared.projection).reshape(len(x), *prepared.shift.shape)
        projected -= prepared.shift
        quadratic -= np.einsum("nkr,nkr->nk", projected, projected)
        joint: Array = prepared.constant - 0.5 * quadratic
        error = np.finfo(np.float64).eps * magnitude
        spoiled = error > _RELATIVE_ERROR * np.maximum(1.0, np.abs(joint))
        for k in np.flatnonzero(spoiled.any(axis=0)):
            rows = np.flatnonzero(spoiled[:, k])
            joint[rows, k] = prepared.constant[k] - 0.5 * self._residual_form(x[rows], int(k))
        return joint

    def _residual_form(self, x: Array, k: int) -> Array:
        """Squared Mahalanobis lengths to component k without cancellation; (n, D) -> (n,).

        It is the least value over factors z of |psi^-1/2 (x - mean - L z)|^2 + |z|^2: a sum of
        squares, in which the rounding of the best z counts only squared.
        """
        prepared = self._prepared
        residual = (x - prepared.means[k]) * prepared.precision_root[k]
        best = np.linalg.solve(prepared.upper[k], (residual @ prepared.basis[k]).T).T
        residual -= best @ prepared.scaled_loadings[k].T
        return np.asarray(np.sum(residual**2, axis=1) + np.sum(best**2, axis=1))

    def _map_blocks(
        self, x: ArrayLike, tail: tuple[int, ...], reduce: Callable[[Array], Array]
    ) -> Array:
        """Apply `reduce`, (n, C, K) -> (n, *tail), to log p(x, c, k), block by block."""
        rows, count = self._check_shape(x), self.num_classes * self.num_components
        size = max(1, _BLOCK_ELEMENTS // (count * (self.rank + 5) + 4 * self.dim))
        out = np.empty((len(rows), *tail))
        for start in range(0, len(rows), size):
            block = rows[start : start + size].astype(np.float64)
            for row, column in np.argwhere(~(np.abs(block) <= _LARGEST))[:1].tolist():
                name = f" ({self.feature_names[column]})" if self.feature_names else ""
                found = (
                    f"{block[row, column]:g} in row {start + row}, column {column}{name}, from 0"
                )
                rule = f"`x` must be finite and at most {_LARGEST:g}"
                raise DataError(f"{rule}; got {found}. Remove or impute it.")
            joint = self._log_joint(block).reshape(-1, self.num_classes, self.num_components)
            out[start : start + size] = reduce(joint)
        return out

    def _check_shape(self, x: ArrayLike) -> Array:
        try:
            rows = np.asarray(x)
        except ValueError as error:
            raise DataError(f"`x` must be an array; got {error} Make all rows equal.") from error
        real = f"`x` must hold numbers; got dtype {rows.dtype}. Convert it to float."
        _require(rows.dtype.kind in "biuf", real, DataError)
        if self.event_shape is not None and rows.ndim and rows.shape[1:] == self.event_shape:
            rows = rows.reshape(len(rows), self.dim)
        shapes = f"(N, {self.dim})" + (f" or (N, *{self.event_shape})" if self.event_shape else "")
        found = f"got {rows.shape}. Give one row per example, with the features that were fitted."
        fits = rows.ndim == 2 and rows.shape[1] == self.dim
        _require(fits, f"`x` must have shape {shapes}; {found}", DataError)
        return rows


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
        _require(path.is_file(), f"it must be a file; got {found}; check the path.")
        size = path.stat().st_size
        _require(size > 0, "it must be an .npz file; got an empty file.")
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
        _require(number >= 1, f"`schema` must be one positive integer; got {schema!r:.60}.")
        later = f"it was written by a later version, schema {number}; this version reads up to"
        _require(number <= SCHEMA, f"{later} {SCHEMA}; upgrade cpmm_jax.")
    missing = [name for name in ("schema", *_PARAMETERS, "metadata") if name not in held]
    found = ", ".join(repr(name) for name in sorted(held)[:8]) or "nothing"
    _require(not missing, f"it must hold {', '.join(missing)}, which it lacks; got {found}.")
    arrays: dict[str, Any] = {name: _read_array(archive, name, size) for name in _PARAMETERS}
    return Mixture(**arrays, **_read_metadata(_read_array(archive, "metadata", size)))


def _read_array(archive: zipfile.ZipFile, name: str, size: int) -> Array:
    """Read one array once its header, its entry and the size of the file agree."""
    info = archive.getinfo(f"{name}.npy")
    most = size if info.compress_type == zipfile.ZIP_STORED else _INFLATION * size + 2**26
    rule = f"`{name}` must hold at most {most} bytes in a file of {size}"
    _require(info.file_size <= most, f"{rule}; got an entry that claims {info.file_size}.")
    with archive.open(info) as stream:
        version = npy_format.read_magic(stream)
        _require(version <= (2, 0), f"`{name}` must be of .npy format 1 or 2; got {version}.")
        one = version == (1, 0)
        read = npy_format.read_array_header_1_0 if one else npy_format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        _require(not dtype.hasobject, f"`{name}` must hold plain values; got Python objects.")
        claimed, present = math.prod(shape) * dtype.itemsize, info.file_size - stream.tell()
        rule = f"`{name}` must hold the {claimed} bytes of its header's shape {shape} and {dtype}"
        _require(claimed == present, f"{rule}; got {present}.")
        data = stream.read(claimed + 1)  # one more: reaching the end makes zipfile check the CRC
    array: Array = np.ndarray(shape, dtype, data, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


def _read_metadata(array: Array) -> dict[str, Any]:
    text = array.shape == () and array.dtype.kind == "U"
    _require(text, f"`metadata` must be one string; got shape {array.shape}, dtype {array.dtype}.")
    try:
        metadata = json.loads(str(array[()]))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"`metadata` must be JSON; got {error}.") from error
    extra = metadata.get("extra", {}) if isinstance(metadata, dict) else None
    _require(isinstance(extra, dict), "`metadata`, and its `extra`, must be JSON objects.")
    result: dict[str, Any] = {"extra": extra}
    for name, kind in (("class_names", str), ("feature_names", str), ("event_shape", int)):
        value = metadata.get(name)
        whole = value is None or (isinstance(value, list) and {type(v) for v in value} <= {kind})
        _require(whole, f"`{name}` must be a list of {kind.__name__}; got {value!r:.60}.")
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
        mixture: a `HierarchicalMFA`, an `MFA` (stored as one class) or a `Mixture`.
        class_names: C names; where None, those of `mixture` if it has any. So for the rest.
        feature_names: D names.
        event_shape: shape of one example, D entries in all.
        extra: anything else to keep, as JSON can say it.

    Raises:
        ArtifactError: a shape, value or name breaks a rule, or the file cannot be written.
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
    arrays = _collect(mixture)
    Mixture(**arrays, **metadata)  # its checks
    try:
        text = json.dumps({**metadata, "created_by": f"cpmm_jax {__version__}"})
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"`extra` must be JSON; got {error}. Use plain types.") from error
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


save_mixture = save


def load_mixture(path: str | os.PathLike[str]) -> HierarchicalMFA:
    """Read a mixture file as a `HierarchicalMFA` of float32 JAX arrays; errors as for `load`."""
    import jax.numpy as jnp

    from cpmm_jax.mixture.hierarchy import HierarchicalMFA
    from cpmm_jax.mixture.mfa import MFA

    mixture = load(path)
    arrays = (jnp.asarray(getattr(mixture, name), jnp.float32) for name in _PARAMETERS)
    return HierarchicalMFA(next(arrays), MFA(*arrays))


def _collect(mixture: Any) -> dict[str, Any]:
    """Take the parameters of a HierarchicalMFA, an MFA (as one class) or a Mixture."""
    source = getattr(mixture, "components", mixture)
    try:
        arrays = {name: _as_float(getattr(source, name)) for name in _PARAMETERS[1:]}
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
    _require(
        not isinstance(values, str), f"`{name}` must be a sequence; got the string {values!r}."
    )
    return None if values is None else tuple(kind(value) for value in values)


def _log_sum_exp(values: Array, axes: tuple[int, ...]) -> Array:
    peak = values.max(axis=axes, keepdims=True)
    total = np.log(np.sum(np.exp(values - peak), axis=axes, keepdims=True)) + peak
    return np.asarray(np.squeeze(total, axis=axes))


def _softmax(values: Array, axes: tuple[int, ...]) -> Array:
    weights = np.exp(values - values.max(axis=axes, keepdims=True))
    return np.asarray(weights / weights.sum(axis=axes, keepdims=True))
