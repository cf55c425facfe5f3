"""Built-in data: scikit-learn's handwritten digits and the usual two-dimensional sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmm_jax.data.dataset import Dataset, generator, split
from cpmm_jax.errors import ConfigError, DataError

_Points = npt.NDArray[np.float64]
_Codes = npt.NDArray[np.int64]


def _balanced(rng: np.random.Generator, n: int, num_classes: int) -> _Codes:
    """Return class codes in random order, the classes' counts differing by one at most."""
    return rng.permutation(np.arange(n) % num_classes)


def _polar(radius: Any, angle: Any) -> _Points:
    """Return points (n, 2) from radii and angles in radians."""
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _moons(rng: np.random.Generator, n: int) -> tuple[_Points, _Codes | None]:
    """Two interleaving half circles of radius 1, with noise of standard deviation 0.1."""
    y = _balanced(rng, n, 2)
    upper = _polar(1.0, rng.uniform(0.0, np.pi, n))
    lower = np.array([1.0, 0.5]) - upper
    return np.where(y[:, None] == 0, upper, lower) + rng.normal(0.0, 0.1, (n, 2)), y


def _pinwheel(rng: np.random.Generator, n: int) -> tuple[_Points, _Codes | None]:
    """Five arms: a flat Gaussian at radius 1, sheared by an angle growing with the radius, times 2.

    Radial deviation 0.3, tangential deviation 0.1, shear rate 0.25 (Johnson et al., 2016).
    """
    y = _balanced(rng, n, 5)
    arm = rng.normal(0.0, [0.3, 0.1], (n, 2)) + [1.0, 0.0]
    angle = -(2 * np.pi * y / 5 + 0.25 * np.exp(arm[:, 0]))
    along, across = arm.T
    turned = _polar(along, angle) + _polar(across, angle + np.pi / 2)
    return 2.0 * turned, y


def _spirals(rng: np.random.Generator, n: int) -> tuple[_Points, _Codes | None]:
    """Two spirals of one and a half turns, the second the first one mirrored at the origin."""
    y = _balanced(rng, n, 2)
    angle = 3 * np.pi * np.sqrt(rng.uniform(size=n))  # the square root evens out the density
    points = _polar(-angle, -angle) + rng.uniform(0.0, 0.5, (n, 2))
    sign = np.where(y[:, None] == 0, 1.0, -1.0)
    return sign * points / 3.0 + rng.normal(0.0, 0.1, (n, 2)), y


def _circles(rng: np.random.Generator, n: int) -> tuple[_Points, _Codes | None]:
    """Two rings about the origin, of radius 1 and 0.5, with noise of standard deviation 0.05."""
    y = _balanced(rng, n, 2)
    ring = _polar(np.where(y == 0, 1.0, 0.5), rng.uniform(0.0, 2 * np.pi, n))
    return ring + rng.normal(0.0, 0.05, (n, 2)), y


def _eight_gaussians(rng: np.random.Generator, n: int) -> tuple[_Points, _Codes | None]:
    """Eight modes on a ring of radius 4, standard deviation 0.5, all divided by sqrt(2)."""
    y = _balanced(rng, n, 8)
    return (_polar(4.0, np.pi * y / 4) + rng.normal(0.0, 0.5, (n, 2))) / np.sqrt(2.0), y


def _twenty_five_gaussians(rng: np.random.Generator, n: int) -> tuple[_Points, _Codes | None]:
    """A 5 x 5 grid of modes at spacing 1 about the origin, standard deviation 0.05."""
    y = _balanced(rng, n, 25)
    return np.stack([y // 5 - 2.0, y % 5 - 2.0], axis=1) + rng.normal(0.0, 0.05, (n, 2)), y


def _checkerboard(rng: np.random.Generator, n: int) -> tuple[_Points, _Codes | None]:
    """Uniform on the eight dark fields, of side 2, of a 4 x 4 board over [-4, 4]^2; no classes."""
    cell = _balanced(rng, n, 8)
    row = cell // 2
    column = 2 * (cell % 2) + row % 2
    corner = np.stack([column, row], axis=1)
    return 2.0 * (corner + rng.uniform(size=(n, 2))) - 4.0, None


_PLANAR: dict[str, Callable[[np.random.Generator, int], tuple[_Points, _Codes | None]]] = {
    "moons": _moons,
    "pinwheel": _pinwheel,
    "spirals": _spirals,
    "circles": _circles,
    "8gaussians": _eight_gaussians,
    "25gaussians": _twenty_five_gaussians,
    "checkerboard": _checkerboard,
}
PLANAR_NAMES = tuple(_PLANAR)
BUILTIN_NAMES = ("digits", *PLANAR_NAMES)


def make(name: str, n: int, seed: int) -> tuple[npt.NDArray[np.float32], _Codes | None]:
    """Draw `n` points of a two-dimensional set.

    Args:
        name: one of `PLANAR_NAMES`.
        n: number of points.
        seed: the same seed draws the same points.

    Returns:
        points, float32 (n, 2), and their class codes (arm, moon, ring or mode), int64 (n,), or None
        for a set without classes (checkerboard).

    Raises:
        DataError: unknown name.
        ConfigError: `n` < 1 or `seed` < 0.

    Example:
        >>> x, y = make("pinwheel", 100, seed=0)
        >>> x.shape, sorted(set(y.tolist()))
        ((100, 2), [0, 1, 2, 3, 4])
    """
    if name not in _PLANAR:
        raise DataError(
            f"`name` must be a two-dimensional set ({', '.join(PLANAR_NAMES)}); got {name!r}; "
            "use one of these names."
        )
    if n < 1:
        raise ConfigError(f"`n` must be at least 1; got {n}; use for instance 5000.")
    x, y = _PLANAR[name](generator(seed), n)
    return x.astype(np.float32), y


def load_builtin(name: str, *, seed: int = 0, n: int = 5000) -> Dataset:
    """Return a built-in data set, with its parts.

    Two-dimensional sets: `n` points in parts of 60, 20 and 20 % (train, valid, test). Digits: the
    1,797 images of scikit-learn, 8 x 8 grey levels 0..16, stratified 75/25 (train, test).

    Raises:
        DataError: unknown name, or scikit-learn is not installed (digits).
    """
    if name == "digits":
        return split(_digits(), seed=seed, valid_fraction=0.0, test_fraction=0.25)
    x, y = make(name, n, seed)
    names = None if y is None else tuple(str(code) for code in range(int(y.max()) + 1))
    whole = Dataset(name, x, y, class_names=names)
    return split(whole, seed=seed, valid_fraction=0.2, test_fraction=0.2)


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "`digits` must be read from scikit-learn; got no such package here; "
            "install it with: pip install 'cpmm_jax[sklearn]'."
        ) from error
    bunch = load_digits()
    return Dataset(
        "digits",
        bunch.data.astype(np.float32),  # whole numbers 0..16, exact
        bunch.target.astype(np.int64),
        class_names=tuple(str(digit) for digit in bunch.target_names),
        feature_names=tuple(bunch.feature_names),
        event_shape=(8, 8),
    )
