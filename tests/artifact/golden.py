"""The golden file of the tests, what it must give, and random mixtures of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cpmm_jax import artifact

GOLDEN = Path(__file__).parent / "mixture_v1.npz"
GOLDEN_X = np.linspace(-2.0, 2.0, 12).reshape(3, 4)
GOLDEN_LOG_PROB = [-6.345268744580214, -8.242187325706695, -9.640150788774443]


def make_golden(path: Path = GOLDEN) -> None:
    """Write the golden file. It was run once; a file of schema 1 must stay readable for ever.

    python -c "from tests.artifact.golden import make_golden; make_golden()"
    """
    artifact.save(
        path,
        random_mixture(0, C=2, K=3, D=4, R=2, dtype=np.float32),
        class_names=["nought", "one"],
        feature_names=["a", "b", "c", "d"],
        event_shape=(2, 2),
        extra={"note": "golden"},
    )


def random_mixture(
    seed: int, C: int = 2, K: int = 3, D: int = 5, R: int = 2, dtype: Any = np.float64, **kw: Any
) -> artifact.Mixture:
    rng = np.random.default_rng(seed)
    shapes = [(C,), (C, K), (C, K, D), (C, K, D, R), (C, K, D)]
    scales = [1.0, 1.0, 2.0, 1.0, 0.7]
    parts = [rng.standard_normal(shape) * s for shape, s in zip(shapes, scales, strict=True)]
    return artifact.Mixture(*(part.astype(dtype) for part in parts), **kw)
