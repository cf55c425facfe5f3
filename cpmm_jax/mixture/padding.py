"""Rows of padding, so that few sizes, and few compiled programs, serve all data."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

SMALLEST, SMALL = 256, 2048


def padded_size(n: int) -> int:
    """Round a number of rows up to a power of two, from 256 to 2,048; larger ones stay.

    With many rows compiling counts for little beside the work that padding would add.
    """
    if n > SMALL:
        return n
    return max(SMALLEST, 1 << (n - 1).bit_length())


def pad_rows(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Append rows of zeros up to `padded_size`; they have to be made to count for nothing."""
    added = padded_size(len(array)) - len(array)
    return np.pad(array, [(0, added)] + [(0, 0)] * (array.ndim - 1))
