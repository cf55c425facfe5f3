"""Standardisation of examples, and the smallest noise that makes sense in each column."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmm_jax.data.checks import as_matrix, check_examples, listing
from cpmm_jax.errors import DataError, DataWarning

_GREYS = 256  # at most, of pixels on a grid
_SEEN = 1000  # images that are looked at first
_CHUNK = 1 << 20  # numbers converted to float64 at a time (8 MiB)
_Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Standardizer:
    """The affine map z = (x - shift) / scale, column by column, and the grain of each column.

    Attributes:
        shift: column means, float64 (D,), in the units of the data.
        scale: column standard deviations, float64 (D,), positive, in the units of the data.
        resolution: step of the grid on which a column was recorded, float64 (D,), in the units of
            the data; 0 where the column looks continuous.

    Example:
        >>> s = Standardizer.fit([[1.0, 10.0], [2.0, 30.0], [2.0, 10.0], [1.0, 10.0], [1.0, 10.0]])
        >>> s.resolution.tolist()
        [1.0, 20.0]
        >>> bool(abs(s.transform([[1.4, 14.0]])).max() < 1e-6)
        True
    """

    shift: _Vector
    scale: _Vector
    resolution: _Vector

    @classmethod
    def fit(
        cls,
        x: npt.ArrayLike,
        *,
        names: Sequence[str] | None = None,
        weight: npt.NDArray[np.float64] | None = None,
    ) -> Standardizer:
        """Measure shift, scale and resolution of training examples.

        A column with fewer distinct values than half its rows is taken to be recorded on a grid;
        its resolution is the smallest gap between distinct values (gaps of the size of a rounding
        error apart). A constant column gets its value as shift, and scale and resolution 1.

        Args:
            x: training examples, (N, D).
            names: names of the columns, for the warnings.
            weight: for how many rows each example stands, positive, (N,); None for one.

        Raises:
            DataError: see `check_examples`; or values too large for float64 sums.

        Warns:
            DataWarning: constant columns (once, naming them), duplicated columns (once, the pairs).
        """
        x = check_examples(x)
        dim = x.shape[1]
        label = list(names) if names is not None else [f"column {j}" for j in range(dim)]
        total = len(x) if weight is None else max(len(x), float(weight.sum()))
        rounding = 8 * float(np.finfo(x.dtype).eps)
        shift, scale, resolution = np.zeros(dim), np.ones(dim), np.zeros(dim)
        constant = np.zeros(dim, np.bool_)
        for j in range(dim):
            column = x[:, j].astype(np.float64)
            values = np.unique(column)
            constant[j] = len(values) == 1
            if constant[j]:
                shift[j], resolution[j] = values[0], 1.0
                continue
            shift[j], scale[j] = _moments(column, label[j], weight)
            if len(values) < total / 2:
                gaps = np.diff(values)
                gaps = gaps[gaps > rounding * max(-values[0], values[-1])]
                resolution[j] = gaps.min() if len(gaps) else 0.0
        if constant.any():
            found = [label[j] for j in np.flatnonzero(constant)]
            warnings.warn(
                f"{len(found)} of {dim} columns are constant ({listing(found)}); their noise is "
                "floored and they tell nothing; drop them if that is not wanted.",
                DataWarning,
                stacklevel=2,
            )
        pairs = _duplicates(x, constant)
        if pairs:
            found = [f"{label[i]} = {label[j]}" for i, j in pairs]
            warnings.warn(
                f"{len(pairs)} pair(s) of columns are equal ({listing(found)}); the density is "
                "degenerate along them up to the noise floor; drop one of each.",
                DataWarning,
                stacklevel=2,
            )
        return cls(shift, scale, resolution)

    @classmethod
    def fit_images(cls, x: npt.ArrayLike, *, recorded: bool) -> Standardizer:
        """Measure one shift and scale of all pixels, so that an image stays one.

        Args:
            x: training images, (N, D).
            recorded: whether they are whole numbers, of which each stands for the interval up to
                the next, as after `dequantise`; shift and scale are then of these.

        Raises:
            DataError: see `check_examples`; or pixels that are all the same.
        """
        x = check_examples(x)
        shift = float(x.mean(dtype=np.float64))
        rows = max(1, _CHUNK // x.shape[1])  # of which a copy in float64 is made
        blocks = (x[i : i + rows].astype(np.float64) - shift for i in range(0, len(x), rows))
        scale = float(np.sqrt(sum(np.sum(block**2) for block in blocks) / x.size))
        if not scale > 0:
            raise DataError(
                f"`x` must have pixels that vary; got {shift:g} in all of {len(x)} images; "
                "give other images."
            )
        ones = np.ones(x.shape[1])
        if recorded:  # with the mean and the variance of the uniform noise
            scale = float(np.sqrt(scale**2 + 1 / 12))
            return cls((shift + 0.5) * ones, scale * ones, ones)
        values = np.unique(x[:_SEEN])
        values = np.unique(x) if len(values) <= _GREYS else values
        grid = len(values) <= _GREYS and len(values) < x.size / 2
        resolution = np.full(x.shape[1], float(np.diff(values).min()) if grid else 0.0)
        resolution[np.ptp(x, axis=0) == 0] = scale  # the floor of what tells nothing is the highest
        return cls(shift * ones, scale * ones, resolution)

    @property
    def dim(self) -> int:
        """Number of features D."""
        return len(self.shift)

    def transform(self, x: npt.ArrayLike) -> npt.NDArray[Any]:
        """Return z = (x - shift) / scale, (N, D), float32 or float64 as `x`.

        Raises:
            DataError: `x` is not numeric, not (N, D), or D differs from training.
        """
        return self._apply(as_matrix(x, name="x", dim=self.dim), forward=True)

    def inverse(self, z: npt.ArrayLike) -> npt.NDArray[Any]:
        """Return x = z * scale + shift, (N, D), float32 or float64 as `z`.

        Raises:
            DataError: `z` is not numeric, not (N, D), or D differs from training.
        """
        return self._apply(as_matrix(z, name="z", dim=self.dim), forward=False)

    def _apply(self, x: npt.NDArray[Any], *, forward: bool) -> npt.NDArray[Any]:
        # In float64, rows at a time: float32 would lose the digits of data far from the origin.
        out = np.empty(x.shape, x.dtype)
        rows = max(1, _CHUNK // self.dim)
        for start in range(0, len(x), rows):
            block = x[start : start + rows].astype(np.float64)
            if forward:
                block = (block - self.shift) / self.scale
            else:
                block = block * self.scale + self.shift
            out[start : start + rows] = block
        return out

    def noise_floor(self, least: float = 1e-5, most: float = 5e-3) -> _Vector:
        """Return the smallest noise variance to allow per column, (D,), in standardised units.

        A value recorded with step d stands for the interval of width d about it, and a uniform
        error over that interval has variance d^2 / 12. A density with less noise than this reads
        the recording, not the thing recorded: its log-likelihood grows without bound as a component
        collapses onto a value that repeats. The bounds are parts of the column's variance: `least`
        serves columns without a visible step, and `most` keeps a coarse step from hiding what
        little a column tells.

        Args:
            least: smallest floor of any column.
            most: largest floor of any column.

        Returns:
            resolution^2 / (12 scale^2) within the bounds, float64 (D,); `most` where a column is
            constant.
        """
        return np.clip((self.resolution / self.scale) ** 2 / 12.0, least, most)


def _moments(column: _Vector, name: str, weight: _Vector | None) -> tuple[float, float]:
    """Return mean and standard deviation by two passes; the variance is never E[x^2] - mean^2."""

    def average(values: _Vector) -> float:
        return float(values.mean() if weight is None else np.average(values, weights=weight))

    with np.errstate(over="ignore", invalid="ignore"):
        mean = average(column)
        centred = column - mean
        mean += average(centred)  # takes out the rounding of the first pass
        centred = column - mean
        # Relative to the largest deviation, the squares neither overflow nor underflow.
        spread = float(np.abs(centred).max())
        std = spread * float(np.sqrt(average((centred / spread) ** 2))) if spread > 0 else 0.0
    if not (np.isfinite(mean) and np.isfinite(std) and std > 0):
        raise DataError(
            f"`x` must have columns whose mean and spread float64 can hold; got {name} with values "
            f"from {column.min():.3g} to {column.max():.3g}; rescale that column."
        )
    return mean, std


def _duplicates(x: npt.NDArray[Any], constant: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return pairs (first, later) of equal columns, constant ones left out."""
    pairs: list[tuple[int, int]] = []
    seen: dict[int, list[int]] = {}
    for j in np.flatnonzero(~constant).tolist():
        column = x[:, j] + 0.0  # turns -0.0, equal to 0.0 but of other bytes, into 0.0
        alike = seen.setdefault(hash(column.tobytes()), [])
        first = next((i for i in alike if np.array_equal(x[:, i], column)), None)
        if first is None:
            alike.append(j)
        else:
            pairs.append((first, j))
    return pairs
