"""NDB and JS: how samples fall into the bins of the training data, without a density.

The training data are cut into the cells of their k-means centres, and the share of samples in each
cell is compared with that of the training data. A mode that a model drops leaves its cells empty.

Source: Richardson and Weiss, "On GANs and GMMs" (2018), section 2, and the code published with it,
which standardises the columns first for CelebA and not for MNIST: here the caller does so, or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmm_jax.data.checks import check_examples
from cpmm_jax.errors import ConfigError, DataError

_SIGNIFICANCE = 0.05  # of the two-tailed test of each bin
_MAX_ITERATIONS = 100
_BLOCK_ELEMENTS = 2**22  # float64 numbers held at a time: 32 MiB

_Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class BinScores:
    """How a sample fills the bins, compared with the training data.

    Attributes:
        ndb: share of bins whose proportion differs significantly, in [0, 1] (the paper's NDB / B);
            about 0.05 for samples of the same distribution, by the level of the test.
        js: Jensen-Shannon divergence of the two lists of proportions, in nats, in [0, log 2].
        proportions: of the sample in each bin, (B,).
        differs: bins whose proportion differs significantly, (B,).
    """

    ndb: float
    js: float
    proportions: _Matrix
    differs: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Bins:
    """The cells nearest to each of B centres, and how many training examples are in each.

    Attributes:
        centres: k-means centres, float64 (B, D), in the units of the training data.
        counts: training examples in each cell, int64 (B,).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> train = np.concatenate([rng.normal(0, 1, (500, 2)), rng.normal(9, 1, (500, 2))])
        >>> bins = Bins.fit(train, 10, seed=0)
        >>> bins.score(train).ndb, bins.score(train).js
        (0.0, 0.0)
        >>> bins.score(train[:500]).ndb  # one of two modes
        1.0
    """

    centres: _Matrix
    counts: npt.NDArray[np.int64]

    @classmethod
    def fit(cls, x: npt.ArrayLike, num_bins: int = 100, *, seed: int) -> Bins:
        """Cut the space by k-means of training examples (scikit-learn's, k-means++, one start).

        Args:
            x: training examples, (N, D).
            num_bins: B.
            seed: of the start of k-means.

        Raises:
            ConfigError: `num_bins` is less than 1, or scikit-learn is not installed.
            DataError: see `check_examples`; or fewer examples than bins.
        """
        try:
            from sklearn.cluster import KMeans
        except ImportError as error:
            raise ConfigError(
                "bins are found by scikit-learn; got no such package here; "
                "install it with: pip install 'cpmm_jax[sklearn]'."
            ) from error
        x = check_examples(x)
        if num_bins < 1:
            raise ConfigError(f"`num_bins` must be at least 1; got {num_bins}; use 100.")
        if len(x) < num_bins:
            raise DataError(
                f"`x` must have at least as many rows as there are bins; got {len(x)} rows for "
                f"{num_bins} bins; use fewer bins, or more data."
            )
        found = KMeans(num_bins, n_init=1, max_iter=_MAX_ITERATIONS, random_state=seed).fit(x)
        centres = found.cluster_centers_.astype(np.float64)
        return cls(centres, _counts(x, centres))

    def score(self, samples: npt.ArrayLike) -> BinScores:
        """Compare samples, (M, D), with the training data, bin by bin.

        Each bin has a two-tailed z-test of two proportions with pooled variance, at 5 %. The test
        counts on many examples in each bin: the published scores have 20,000 samples for 100 bins.

        Raises:
            DataError: see `check_examples`; or another D than in training.
        """
        samples = check_examples(samples, name="samples", dim=self.centres.shape[1])
        n, m = self.counts.sum(), len(samples)
        counts = _counts(samples, self.centres)
        p, q = self.counts / n, counts / m
        pooled = (self.counts + counts) / (n + m)
        error = np.sqrt(pooled * (1.0 - pooled) * (1.0 / n + 1.0 / m))
        differs = np.abs(p - q) > NormalDist().inv_cdf(1.0 - _SIGNIFICANCE / 2.0) * error
        middle = 0.5 * (p + q)
        js = 0.5 * (_divergence(p, middle) + _divergence(q, middle))
        return BinScores(float(differs.mean()), js, q, differs)


def _counts(x: npt.NDArray[Any], centres: _Matrix) -> npt.NDArray[np.int64]:
    """Return how many rows of `x` (N, D) are nearest to each of the centres, (B,)."""
    # Of |x - c|^2 / 2 the part that depends on c; about the mean of the centres, so that data far
    # from the origin keep their digits.
    origin = centres.mean(axis=0)
    centred = centres - origin
    half = 0.5 * np.sum(centred**2, axis=1)
    counts = np.zeros(len(centres), np.int64)
    rows = max(1, _BLOCK_ELEMENTS // (len(centres) + x.shape[1]))
    for start in range(0, len(x), rows):
        block = x[start : start + rows].astype(np.float64) - origin
        nearest = np.argmin(half - block @ centred.T, axis=1)
        counts += np.bincount(nearest, minlength=len(centres))
    return counts


def _divergence(p: _Matrix, q: _Matrix) -> float:
    """Return the Kullback-Leibler divergence of p from q in nats; q > 0 where p > 0."""
    held = p > 0
    return float(np.sum(p[held] * np.log(p[held] / q[held])))
