"""Metrics from a mixture and data, with NumPy alone (and scikit-learn for clusterings)."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmm_jax.artifact import Mixture
from cpmm_jax.errors import DataWarning


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
        `log_likelihood`, the mean of log p(x) in nats per example; with labels `accuracy` of the
        most probable class and `joint_log_likelihood`, the mean of log p(x, y), if supervised, else
        `nmi` (normalised mutual information) and `ari` (adjusted Rand index).

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
    if y is None:
        return metrics
    classes = np.argmax(joint, axis=1)
    if supervised:
        metrics["joint_log_likelihood"] = float(np.mean(joint[np.arange(len(y)), y]))
        metrics["accuracy"] = float(np.mean(classes == y))
        return metrics
    return {**metrics, **_agreement(y, classes)}


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
