"""Data: synthetic sets, readers, checks, standardisation. NumPy alone, no JAX."""

from __future__ import annotations

from cpmm_jax.data.builtin import BUILTIN_NAMES, PLANAR_NAMES, make
from cpmm_jax.data.checks import check_enough_rows, check_examples, check_labels
from cpmm_jax.data.dataset import Dataset, split
from cpmm_jax.data.labels import recode_labels
from cpmm_jax.data.readers import FILE_KINDS, load
from cpmm_jax.data.standardise import Standardizer
from cpmm_jax.data.tabular import load_tabular

__all__ = [
    "BUILTIN_NAMES",
    "FILE_KINDS",
    "PLANAR_NAMES",
    "Dataset",
    "Standardizer",
    "check_enough_rows",
    "check_examples",
    "check_labels",
    "load",
    "load_tabular",
    "make",
    "recode_labels",
    "split",
]
