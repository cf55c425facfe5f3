"""Data: synthetic sets, readers, checks, standardisation, pixels. No JAX until it is asked for."""

from __future__ import annotations

from cpmm_jax.data.builtin import BUILTIN_NAMES, PLANAR_NAMES, make
from cpmm_jax.data.checks import check_enough_rows, check_examples, check_labels
from cpmm_jax.data.dataset import Dataset, split
from cpmm_jax.data.labels import recode_labels
from cpmm_jax.data.pixels import (
    AffinePixels,
    LogitPixels,
    Pixels,
    bits_per_dimension,
    check_pixels,
    dequantise,
)
from cpmm_jax.data.readers import FILE_KINDS, load
from cpmm_jax.data.standardise import Standardizer
from cpmm_jax.data.tabular import load_tabular

__all__ = [
    "BUILTIN_NAMES",
    "FILE_KINDS",
    "PLANAR_NAMES",
    "AffinePixels",
    "Dataset",
    "LogitPixels",
    "Pixels",
    "Standardizer",
    "bits_per_dimension",
    "check_enough_rows",
    "check_examples",
    "check_labels",
    "check_pixels",
    "dequantise",
    "load",
    "load_tabular",
    "make",
    "recode_labels",
    "split",
]
