"""The mixture as NumPy computes it: densities, classes and samples in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cpmm_jax.errors import ArtifactError, ConfigError, DataError

PARAMETERS = ("class_logits", "logits", "means", "loadings", "log_noise")
# Sizes whose squares, divided by the smallest variance, still fit a float64: no inf - inf below.
_LARGEST, _LARGEST_LOG_NOISE = np.float64(1e100), np.float64(200.0)
_BLOCK_ELEMENTS = 2**22  # float64 numbers held at a time: 32 MiB
_RELATIVE_ERROR = 1e-10  # of max(1, |log p|); what the matrix-product form must promise

Array = NDArray[Any]


def require(rule: bool, message: str, error: type[Exception] = ArtifactError) -> None:
    """Raise `error` with `message` unless `rule` holds."""
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
        require(len(means) == 3 and 0 not in means, f"`means` must be (C, K, D); got {means}.")
        shapes = [means[:1], means[:2], means, (*means, *(self.loadings.shape[3:4] or "R")), means]
        for name, shape in zip(PARAMETERS, shapes, strict=True):
            array = getattr(self, name)
            real = array.dtype in (np.float32, np.float64)
            require(real, f"`{name}` must be float32 or float64; got dtype {array.dtype}.")
            rule = f"`{name}` must have shape {shape} to go with `means` of shape {means} (C, K, D)"
            require(array.shape == shape, f"{rule}; got {array.shape}.")
            largest = _LARGEST_LOG_NOISE if name == "log_noise" else _LARGEST
            for index in np.argwhere(~(np.abs(array) <= largest))[:1].tolist():  # NaN is not <=
                found = f"{array[tuple(index)]} at {tuple(index)}"
                require(False, f"`{name}` must be finite and at most {largest:g}; got {found}.")
        for name, count in (("class_names", means[0]), ("feature_names", means[2])):
            got = count if getattr(self, name) is None else len(getattr(self, name))
            require(got == count, f"`{name}` must hold {count}, as `means` {means} do; got {got}.")
        event = self.event_shape
        same = event is None or (min(event, default=1) > 0 and math.prod(event) == means[2])
        require(same, f"`event_shape` must hold D = {means[2]} entries in all; got {event}.")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is computed from the parameters when first asked for."""
        return {key: value for key, value in self.__dict__.items() if key != "_prepared"}

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

    def affine(self, scale: ArrayLike, shift: ArrayLike) -> Mixture:
        """Return, in float64, the mixture of x * scale + shift when x follows this one.

        Undoes a standardisation: log-densities then include its Jacobian. `scale` (D,) is not zero,
        `shift` (D,).
        """
        scale, shift = np.asarray(scale, np.float64), np.asarray(shift, np.float64)
        return replace(
            self,
            means=self.means * scale + shift,
            loadings=self.loadings * scale[:, None],
            log_noise=self.log_noise + 2.0 * np.log(np.abs(scale)),
        )

    def classes(self, indices: ArrayLike) -> Mixture:
        """Return the mixture of some of the classes, in the order of `indices`."""
        rows = np.asarray(indices)
        arrays = {name: getattr(self, name)[rows] for name in PARAMETERS}
        names = self.class_names and tuple(self.class_names[i] for i in rows)
        return replace(self, **arrays, class_names=names)

    def sample(self, rng: np.random.Generator, n: int) -> Array:
        """Draw n examples, shape (n, D); ConfigError where `rng` or `n` is unfit."""
        found = f"got {type(rng).__name__}. Pass np.random.default_rng(seed)."
        is_generator = isinstance(rng, np.random.Generator)
        require(is_generator, f"`rng` must be a numpy.random.Generator; {found}", ConfigError)
        is_count = isinstance(n, int | np.integer) and n >= 0
        require(is_count, f"`n` must be an integer, 0 or more; got {n!r}. Give one.", ConfigError)
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
        require(rows.dtype.kind in "biuf", real, DataError)
        if self.event_shape is not None and rows.ndim and rows.shape[1:] == self.event_shape:
            rows = rows.reshape(len(rows), self.dim)
        shapes = f"(N, {self.dim})" + (f" or (N, *{self.event_shape})" if self.event_shape else "")
        found = f"got {rows.shape}. Give one row per example, with the features that were fitted."
        fits = rows.ndim == 2 and rows.shape[1] == self.dim
        require(fits, f"`x` must have shape {shapes}; {found}", DataError)
        return rows


def _log_sum_exp(values: Array, axes: tuple[int, ...]) -> Array:
    peak = values.max(axis=axes, keepdims=True)
    total = np.log(np.sum(np.exp(values - peak), axis=axes, keepdims=True)) + peak
    return np.asarray(np.squeeze(total, axis=axes))


def _softmax(values: Array, axes: tuple[int, ...]) -> Array:
    weights = np.exp(values - values.max(axis=axes, keepdims=True))
    return np.asarray(weights / weights.sum(axis=axes, keepdims=True))
