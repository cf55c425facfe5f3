"""Rows of padding, so that few sizes, and few compiled programs, serve all data."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

SMALLEST, SMALL = 256, 2048  # rows
LARGE = 2**20  # rows from which memory counts for more than compiling


def padded_size(n: int, least_step: int = SMALL) -> int:
    """Round a number of rows up, where a row of padding costs memory but no work.

    To a multiple of `least_step`; of many rows by less than an eighth; of a million and more not at
    all.
    """
    if n >= LARGE:
        return n
    step = max(least_step, 2 ** (n.bit_length() - 4))
    return -(-n // step) * step


def padded_size_of_few(n: int) -> int:
    """Round a number of rows up, where a row of padding is work.

    To a power of two, from 256 to 2,048; of more rows by less than an eighth.
    """
    return padded_size(n, 1) if n > SMALL else max(SMALLEST, 1 << (n - 1).bit_length())


def pad_rows(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """Append rows of zeros, which must be made to count for nothing: (N, ...) -> (size, ...)."""
    return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1))
