"""Whether a flow's latent points look like a standard normal."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Float


class LatentCheck(NamedTuple):
    """How far latent points are from a standard normal, and how far they may be.

    Each number is about the size of the misfit in standard deviations, whatever D is. A limit is a
    misfit that is borne, plus what the sampling of so many points explains.

    Attributes:
        mean_error: |mean| / sqrt(D), the root mean square of the features' means.
        covariance_error: |covariance - I|_F / sqrt(D).
        quantile_error: root mean square distance of the quantiles of the features and of the radius
            |u| from those of a normal and a chi distribution; of the two the larger.
        limits: the largest acceptable value of each.
        num_examples: points that were looked at.
    """

    mean_error: float
    covariance_error: float
    quantile_error: float
    limits: tuple[float, float, float]
    num_examples: int

    @property
    def ok(self) -> bool:
        """Whether no error exceeds its limit (an error that is not finite does)."""
        return all(error <= limit for error, limit in zip(self[:3], self.limits, strict=True))

    def __str__(self) -> str:
        names = ("mean", "covariance", "quantiles")
        parts = zip(names, self[:3], self.limits, strict=True)
        errors = ", ".join(
            f"{name} {error:.3g} (limit {limit:.2g})" for name, error, limit in parts
        )
        return f"{errors}, of {self.num_examples} points"


def check_latent(u: Float[npt.NDArray[np.floating], "N D"]) -> LatentCheck:
    """Compare latent points with a standard normal.

    Args:
        u: points at v = 1, shape (N, D).

    Returns:
        A `LatentCheck`.

    Example:
        >>> import numpy as np
        >>> u = np.random.default_rng(0).normal(size=(1000, 3))
        >>> check_latent(u).ok, check_latent(u + 0.5).ok
        (True, False)
    """
    from scipy.special import gammaincinv, ndtri  # quantiles of the normal and the chi-squared

    u = np.asarray(u, np.float64)
    count, dim = u.shape
    noise = 1 / math.sqrt(count)
    limits = (0.1 + 2 * noise, 0.2 + 1.5 * noise * math.sqrt(dim + 1), 0.1 + 2 * noise)
    if not np.isfinite(u).all():
        return LatentCheck(math.nan, math.nan, math.nan, limits, count)
    mean = u.mean(axis=0)
    covariance = (u - mean).T @ (u - mean) / count
    levels = (np.arange(count) + 0.5) / count
    features = np.sort(u, axis=0) - ndtri(levels)[:, None]
    radius = np.sort(np.linalg.norm(u, axis=1)) - np.sqrt(2 * gammaincinv(dim / 2, levels))
    return LatentCheck(
        mean_error=float(np.linalg.norm(mean)) / math.sqrt(dim),
        covariance_error=float(np.linalg.norm(covariance - np.eye(dim))) / math.sqrt(dim),
        quantile_error=max(math.sqrt(np.mean(part**2)) for part in (features, radius)),
        limits=limits,
        num_examples=count,
    )
