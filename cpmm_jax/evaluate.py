"""Metrics from a mixture and data, with NumPy alone (and scikit-learn for clusterings)."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmm_jax.artifact import Mixture
from cpmm_jax.data import Pixels, bits_per_dimension, check_examples, check_pixels, dequantise
from cpmm_jax.errors import DataWarning

_BLOCK_ELEMENTS = 2**22  # float64 numbers dequantised at a time: 32 MiB


def evaluate(
    mixture: Mixture,
    x: npt.ArrayLike,
    y: npt.NDArray[np.int64] | None = None,
    *,
    supervised: bool = True,
) -> dict[str, float]:
    """Score a mixture on examples, and its classes on their labels.

    Args:
        mixture: an `artifact.Mixture` in the units of `x`.
        x: examples, shape (N, D).
        y: class codes, shape (N,), or None.
        supervised: whether the classes of the mixture are those of `y`. Otherwise they are
            clusters, found without labels, and are compared with `y` as partitions.

    Returns:
        `log_likelihood`, the mean of log p(x) in nats per example, and of a mixture of dequantised
        pixels `bits_per_dimension`, for which noise must have been added to `x`; with labels
        `accuracy` of the most probable class and `joint_log_likelihood`, the mean of log p(x, y),
        if supervised, else `nmi` (normalised mutual information) and `ari` (adjusted Rand index).

    Warns:
        DataWarning: scikit-learn, which computes `nmi` and `ari`, is not installed.

    Example:
        >>> two = Mixture(np.zeros(2), np.zeros((2, 1)), np.array([[[-3.0]], [[3.0]]]),
        ...               np.zeros((2, 1, 1, 0)), np.zeros((2, 1, 1)))
        >>> evaluate(two, [[-2.0], [4.0]], np.array([0, 1]))["accuracy"]
        1.0
    """
    joint = mixture.class_log_prob(x)
    metrics = {"log_likelihood": float(np.mean(np.logaddexp.reduce(joint, axis=1)))}
    if mixture.extra.get("dequantised"):
        bits = bits_per_dimension(metrics["log_likelihood"], mixture.dim)
        metrics["bits_per_dimension"] = bits
    if y is None:
        return metrics
    classes = np.argmax(joint, axis=1)
    if supervised:
        metrics["joint_log_likelihood"] = float(np.mean(joint[np.arange(len(y)), y]))
        metrics["accuracy"] = float(np.mean(classes == y))
        return metrics
    return {**metrics, **_agreement(y, classes)}


def evaluate_pixels(
    mixture: Mixture, rng: np.random.Generator, x: npt.ArrayLike, pixels: Pixels
) -> dict[str, float]:
    """Score a mixture in model space on recorded images, in nats and in bits per dimension.

    Uniform noise is added to each pixel once, so the scores vary a little with `rng`.

    Args:
        mixture: an `artifact.Mixture` of `pixels.forward(x + u)`.
        rng: of the noise u.
        x: recorded pixels, whole numbers 0..255, shape (N, D).
        pixels: the map to model space.

    Returns:
        means over the examples: `log_likelihood` of log p in model space and `pixel_log_likelihood`
        of log p of the dequantised pixels in (0, 256), both in nats per example, and
        `bits_per_dimension`, the latter as -log2 p / D: 8 for the uniform density.

    Raises:
        DataError: see `check_examples` and `check_pixels`.

    Example:
        >>> from cpmm_jax.data import AffinePixels
        >>> normal = Mixture(np.zeros(1), np.zeros((1, 1)), np.zeros((1, 1, 2)),
        ...                  np.zeros((1, 1, 2, 0)), np.zeros((1, 1, 2)))
        >>> x = np.full((1000, 2), 128, np.uint8)  # grey, the most likely image
        >>> scores = evaluate_pixels(normal, np.random.default_rng(0), x, AffinePixels())
        >>> round(scores["bits_per_dimension"], 3)  # log2(64 sqrt(2 pi))
        7.326
    """
    x = check_pixels(check_examples(x, dim=mixture.dim))
    rows = max(1, _BLOCK_ELEMENTS // mixture.dim)
    total = slopes = 0.0
    for start in range(0, len(x), rows):
        y = dequantise(rng, x[start : start + rows])
        total += float(mixture.log_prob(pixels.forward(y)).sum())
        slopes += float(pixels.log_det(y).sum())
    nats, pixel_nats = total / len(x), (total + slopes) / len(x)
    return {
        "log_likelihood": nats,
        "pixel_log_likelihood": pixel_nats,
        "bits_per_dimension": bits_per_dimension(pixel_nats, mixture.dim),
    }


def _agreement(y: npt.NDArray[np.int64], clusters: npt.NDArray[Any]) -> dict[str, float]:
    try:
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    except ImportError:
        warnings.warn(
            "`nmi` and `ari` are computed by scikit-learn; got no such package here; they are left "
            "out; install it with: pip install 'cpmm_jax[sklearn]'.",
            DataWarning,
            stacklevel=3,
        )
        return {}
    return {
        "nmi": float(normalized_mutual_info_score(y, clusters)),
        "ari": float(adjusted_rand_score(y, clusters)),
    }
