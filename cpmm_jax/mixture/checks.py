"""Checks of sizes, noise floors and examples, on the host, before anything is traced."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike
from jaxtyping import Float

from cpmm_jax.errors import ConfigError, DataError


def check_sizes(dim: int, rank: int, **counts: int) -> None:
    """Raise ConfigError unless D and the named counts are at least 1 and R lies in 0..D."""
    for name, value in {"dim": dim, **counts}.items():
        if value < 1:
            raise ConfigError(f"`{name}` must be at least 1; got {value}.")
    if not 0 <= rank <= dim:
        raise ConfigError(f"`rank` must lie between 0 and D = {dim}, the features; got {rank}.")


def check_noise(initial_noise: float) -> None:
    """Raise ConfigError unless `initial_noise` is a positive variance."""
    if not initial_noise > 0:
        raise ConfigError(f"`initial_noise` must be a positive variance; got {initial_noise}.")


def check_noise_floor(floor: Float[ArrayLike, "*D"], dim: int) -> npt.NDArray[Any]:
    """Return the smallest noise variance of each feature, shape (D,).

    Raises:
        ConfigError: neither a positive number nor D of them.
    """
    array = np.asarray(floor, np.float64)
    if array.shape not in ((), (dim,)) or not np.all(array > 0):
        raise ConfigError(
            f"`noise_floor` must be positive, a number or an array of shape ({dim},); "
            f"got shape {array.shape}, smallest {array.min() if array.size else None}."
        )
    return np.broadcast_to(array, (dim,))


def check_rows(
    x: Float[ArrayLike, "N D"], num_components: int | None, rank: int | None
) -> npt.NDArray[Any]:
    """Return examples as a floating-point array, after checks of them and of K and R.

    Raises:
        DataError: not of shape (N, D), not finite, or fewer examples than components.
        ConfigError: K or R missing or out of range.
    """
    rows = np.asarray(x)
    if rows.ndim != 2 or 0 in rows.shape:
        raise DataError(f"`x` must have shape (N, D), with N and D at least 1; got {rows.shape}.")
    if not np.issubdtype(rows.dtype, np.floating):
        rows = rows.astype(np.float32)
    if not np.isfinite(rows).all():
        row, column = np.argwhere(~np.isfinite(rows))[0]
        raise DataError(
            f"`x` must be finite; got {rows[row, column]} in row {row}, column {column}. "
            "Leave such rows out, or fill them in."
        )
    if num_components is None or num_components < 1:
        raise ConfigError(f"`num_components` must be at least 1; got {num_components}.")
    if rank is None or not 0 <= rank <= rows.shape[1]:
        raise ConfigError(
            f"`rank` must lie between 0 and D = {rows.shape[1]}, the features; got {rank}."
        )
    if len(rows) < num_components:
        raise DataError(
            f"`x` must have at least as many rows as components, {num_components}; got {len(rows)}."
        )
    return rows


def check_weight(
    weight: npt.ArrayLike | None, n: int, *, name: str = "sample_weight"
) -> npt.NDArray[np.float64] | None:
    """Return how much each of `n` examples counts, float64 (N,); None where all count alike.

    Raises:
        DataError: not numbers, another shape, a weight that is negative or not finite, or zeros
            only.
    """
    if weight is None:
        return None
    array = np.asarray(weight)
    if array.dtype.kind not in "fiub" or array.shape != (n,):
        raise DataError(
            f"`{name}` must hold one number for each of the {n} examples; got shape "
            f"{array.shape} of {array.dtype}; leave it out where all count alike."
        )
    found = array.astype(np.float64)
    bad = ~(np.isfinite(found) & (found >= 0))
    if bad.any():
        first = int(np.argmax(bad))
        raise DataError(
            f"`{name}` must be finite and not negative; got {found[first]:g} in row {first} "
            f"(counting from 0; {np.count_nonzero(bad)} such weight(s)); "
            "give 0 to examples that do not count."
        )
    if not found.any():
        raise DataError(
            f"`{name}` must be positive for some example; got zeros only; leave it out where all "
            "count alike."
        )
    return found
