"""Pixels recorded as whole numbers 0..255 <-> the unbounded space in which a density is fitted.

A whole number has no density. *Dequantisation* adds uniform noise u in (0, 1), which makes the
pixels continuous in (0, 256); by Jensen's inequality the mean of log p(x + u) is at most the log of
the probability that the density gives to the recorded image x, so that it can be compared with
those of discrete models. A smooth map then carries (0, 256) to where a mixture of Gaussians fits.

Sources: Theis, van den Oord and Bethge, "A note on the evaluation of generative models" (2016), on
dequantisation and bits; Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP"
(2017), section 4.1, on the logit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmm_jax.data.dataset import PARTS, Part
from cpmm_jax.errors import ConfigError, DataError

_LEVELS = 256
_TICKS = 2**15
_BLOCK = 4096  # images that are carried at a time
_Array = Any  # NumPy's or JAX's: what is computed is one definition for both


def check_pixels(x: npt.ArrayLike, *, name: str = "x") -> npt.NDArray[Any]:
    """Return `x`, of any shape, as an array once all of it are whole numbers in 0..255.

    Args:
        x: recorded pixels; integers, or floats that hold whole numbers.
        name: what to call `x` in a message.

    Raises:
        DataError: another dtype, or a value that is NaN, fractional or out of 0..255.
    """
    array = np.asarray(x)
    if array.dtype.kind not in "uif":
        raise DataError(
            f"`{name}` must hold pixels as integers or floats; got dtype {array.dtype}; "
            "convert them, for instance to uint8."
        )
    good = (array >= 0) & (array < _LEVELS) & (array == np.floor(array))  # NaN is none of these
    if not good.all():
        at = np.unravel_index(int(np.argmin(good)), array.shape)
        place = tuple(int(i) for i in at)
        raise DataError(
            f"`{name}` must hold pixels as they were recorded, whole numbers 0..255; got "
            f"{array[place]:g} at {place} ({good.size - np.count_nonzero(good)} such value(s)); "
            "undo any scaling and rounding error: (255 * x).round() where x is in [0, 1]."
        )
    return array


def are_recorded(x: npt.NDArray[Any]) -> bool:
    """Whether all values are whole numbers in 0..255, and not all of them 0 or 1."""
    whole = (x >= 0) & (x < _LEVELS) & (x == np.floor(x))
    return bool(whole.all()) and bool((x > 1).any())


def dequantise(key: _Array, x: _Array) -> _Array:
    """Add fresh uniform noise to recorded pixels: x + u, in (0, 256), of the shape of `x`.

    A pure function of the key, usable under `jit` and `vmap`: a training step that folds its number
    into the key sees other noise each time, and the same one when it is run again.

    Args:
        key: a JAX PRNG key; or NumPy's `Generator`, for the same in NumPy and float64.
        x: whole numbers 0..255, of any shape.

    Returns:
        x + u; u takes the 2**15 midpoints of equal cells of (0, 1), so that the sum is exact in
        float32 and stays inside the cell of its pixel, which float32 noise of more digits does not.

    Raises:
        DataError: see `check_pixels` (values are not checked where `x` is traced).

    Example:
        >>> image = np.array([[0, 255]], np.uint8)
        >>> y = dequantise(np.random.default_rng(0), image)
        >>> np.floor(y).tolist(), y.dtype
        ([[0.0, 255.0]], dtype('float64'))
    """
    if isinstance(key, np.random.Generator):
        return _noisy(key, check_pixels(x))
    import jax
    import jax.numpy as jnp

    if not isinstance(x, jax.core.Tracer):
        check_pixels(x)
    wide = jnp.issubdtype(jnp.result_type(x), jnp.floating) and jnp.result_type(x).itemsize > 2
    x = jnp.asarray(x, None if wide else jnp.float32)
    ticks = jax.random.bits(key, x.shape, "uint16") % _TICKS
    return x + (ticks.astype(x.dtype) + 0.5) / _TICKS


def _noisy(rng: np.random.Generator, x: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    ticks = rng.integers(_TICKS, size=x.shape, dtype=np.uint16)
    return x.astype(np.float64) + (ticks.astype(np.float64) + 0.5) / _TICKS


def noise_of(seed: int, part: Part) -> np.random.Generator:
    """Return the generator of the noise that is drawn once for a part of the data."""
    return np.random.default_rng([seed, 2 + PARTS.index(part)])  # `split` draws of earlier ones


def bits_per_dimension(log_prob: _Array, dim: int) -> _Array:
    """Convert log p of dequantised pixels, in nats, to bits for each of the `dim` dimensions.

    -log2 p(x + u) / D, with p a density over (0, 256)^D. Its mean over u is at least that of the
    probability which p gives to the recorded image, the integral over its cell.

    Example:
        >>> bits_per_dimension(-784 * math.log(256), 784)  # the uniform density
        8.0
    """
    return -log_prob / (dim * math.log(2.0))


class Pixels(ABC):
    """A smooth, increasing map between dequantised pixels and model space, pixel by pixel.

    Dequantised pixels are in (0, 256) and have shape (..., D). NumPy arrays are answered by NumPy,
    in their precision, JAX arrays by JAX, traced ones included; an object is hashable and fit for a
    static argument. Log-densities change by the Jacobian's determinant:

        log p(pixels) = log p(forward(pixels)) + log_det(pixels)
    """

    @abstractmethod
    def forward(self, pixels: _Array) -> _Array:
        """Map dequantised pixels to model space; the shape is kept."""

    @abstractmethod
    def inverse(self, z: _Array) -> _Array:
        """Map model space to dequantised pixels; the shape is kept."""

    @abstractmethod
    def log_slope(self, pixels: _Array) -> _Array:
        """Return the log of the derivative of `forward` at each pixel; the shape is kept."""

    def log_det(self, pixels: _Array) -> _Array:
        """Return log |det J| of `forward` per example; (..., D) -> (...,)."""
        return self.log_slope(pixels).sum(axis=-1)

    def carry(
        self,
        rng: np.random.Generator,
        x: npt.NDArray[Any],
        dtype: npt.DTypeLike = np.float32,
        *,
        name: str = "x",
    ) -> npt.NDArray[Any]:
        """Map recorded pixels to model space, with noise drawn once; block by block in float64.

        Args:
            rng: of the noise.
            x: whole numbers 0..255, shape (N, D).
            dtype: of the result.
            name: what to call `x` in a message.

        Raises:
            DataError: see `check_pixels`.
        """
        x = check_pixels(x, name=name)
        found = np.empty(x.shape, dtype)
        for first in range(0, len(x), _BLOCK):
            found[first : first + _BLOCK] = self.forward(_noisy(rng, x[first : first + _BLOCK]))
        return found


@dataclass(frozen=True)
class AffinePixels(Pixels):
    """z = (pixels - centre) / scale, by default within [-2, 2): about unit spread.

    A density on all of model space leaks beyond black and white, which costs some bits.

    Attributes:
        centre: in pixel units.
        scale: in pixel units, positive.

    Raises:
        ConfigError: `scale` is not positive, or a number is not finite.

    Example:
        >>> AffinePixels().forward(np.array([0.0, 128.0, 256.0])).tolist()
        [-2.0, 0.0, 2.0]
    """

    centre: float = 128.0
    scale: float = 64.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.centre) and 0.0 < self.scale < math.inf):
            raise ConfigError(
                "`centre` must be finite and `scale` positive; "
                f"got {self.centre} and {self.scale}; use for instance 128 and 64."
            )

    def forward(self, pixels: _Array) -> _Array:
        """Map dequantised pixels to model space; the shape is kept."""
        return (pixels - self.centre) / self.scale

    def inverse(self, z: _Array) -> _Array:
        """Map model space to dequantised pixels; values out of (0, 256) are not clipped."""
        return z * self.scale + self.centre

    def log_slope(self, pixels: _Array) -> _Array:
        """Return the log of the derivative of `forward` at each pixel; the shape is kept."""
        return _namespace(pixels).zeros_like(pixels) - math.log(self.scale)


@dataclass(frozen=True)
class LogitPixels(Pixels):
    """z = logit(p), p = alpha + (1 - 2 alpha) pixels / 256: all of model space is inside (0, 256).

    `alpha` keeps black and white at a finite distance. The masked autoregressive flow's published
    results have 1e-6 for MNIST and 0.05 for CIFAR-10 (Papamakarios et al., 2017), and give nats in
    model space, bits in that of the pixels.

    Attributes:
        alpha: in (0, 1/2).

    Raises:
        ConfigError: `alpha` is not in (0, 1/2).

    Example:
        >>> pixels = LogitPixels(alpha=0.05)
        >>> z = pixels.forward(np.array([0.5, 255.5]))
        >>> bool(abs(z.sum()) < 1e-12), pixels.inverse(z).round(6).tolist()
        (True, [0.5, 255.5])
    """

    alpha: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 0.5:
            raise ConfigError(
                f"`alpha` must be in (0, 1/2); got {self.alpha}; use 0.05, or 1e-6 for images of "
                "mostly black and white."
            )

    @property
    def _share(self) -> float:
        return (1.0 - 2.0 * self.alpha) / _LEVELS

    def _odds(self, pixels: _Array) -> tuple[_Array, _Array]:
        """Return p and 1 - p; each from its own end, where the other would cancel in float32."""
        return self.alpha + self._share * pixels, self.alpha + self._share * (_LEVELS - pixels)

    def forward(self, pixels: _Array) -> _Array:
        """Map dequantised pixels to model space; the shape is kept."""
        xp = _namespace(pixels)
        p, q = self._odds(pixels)
        return xp.log(p) - xp.log(q)

    def inverse(self, z: _Array) -> _Array:
        """Map model space to dequantised pixels; the shape is kept.

        Where z is beyond logit(1 - alpha), the pixels are slightly out of (0, 256).
        """
        # tanh saturates where the exponential of a logistic function would overflow.
        p = 0.5 * (1.0 + _namespace(z).tanh(0.5 * z))
        return (p - self.alpha) / self._share

    def log_slope(self, pixels: _Array) -> _Array:
        """Return the log of the derivative of `forward` at each pixel; the shape is kept."""
        xp = _namespace(pixels)
        p, q = self._odds(pixels)
        return math.log(self._share) - xp.log(p) - xp.log(q)


def _namespace(array: _Array) -> ModuleType:
    """Return the array's own library: NumPy, or jax.numpy for JAX arrays and tracers."""
    namespace: ModuleType = array.__array_namespace__()
    return namespace
