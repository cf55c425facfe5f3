"""NDB and JS against SciPy's tests, and on samples whose answer is known."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.spatial
import scipy.stats

from cpmm_jax.bins import Bins
from cpmm_jax.errors import ConfigError, DataError

CENTRES = np.array([[x, y] for x in range(3) for y in range(3)]) * 8.0  # nine modes


def draw(rng: np.random.Generator, n: int, modes: int = 9) -> np.ndarray:
    return CENTRES[rng.integers(modes, size=n)] + rng.standard_normal((n, 2))


def test_samples_of_the_same_distribution_differ_at_the_nominal_level() -> None:
    shares, divergences = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        scores = Bins.fit(draw(rng, 20000), seed=seed).score(draw(rng, 10000))
        shares.append(scores.ndb)
        divergences.append(scores.js)
    # Of 500 tests 25 differ by chance, give or take 5; k-means follows the training data a bit.
    assert 0.02 < np.mean(shares) < 0.10
    assert max(divergences) < 0.005


def test_a_dropped_mode_is_seen(rng: np.random.Generator) -> None:
    bins = Bins.fit(draw(rng, 20000), seed=0)
    whole, dropped = bins.score(draw(rng, 10000)), bins.score(draw(rng, 10000, modes=8))
    gone = np.linalg.norm(bins.centres - CENTRES[8], axis=1) < 4
    assert gone.sum() > 5
    assert dropped.differs[gone].all() and not dropped.proportions[gone].any()
    assert dropped.ndb > 3 * whole.ndb and dropped.ndb > gone.mean()
    assert dropped.js > 10 * whole.js
    # A ninth of the mass is gone, and what remains keeps its proportions.
    p = np.array([1 / 9, 8 / 9])
    js = scipy.spatial.distance.jensenshannon(p, [0, 1]) ** 2
    assert dropped.js == pytest.approx(js, rel=0.1)


def test_scores_are_those_of_scipy(rng: np.random.Generator) -> None:
    train, samples = draw(rng, 3000) + 1e6, draw(rng, 700, modes=7) + 1e6
    bins = Bins.fit(train, 20, seed=0)
    nearest = scipy.spatial.cKDTree(bins.centres)
    counts = np.bincount(nearest.query(train)[1], minlength=20)
    found = np.bincount(nearest.query(samples)[1], minlength=20)
    np.testing.assert_array_equal(bins.counts, counts)
    scores = bins.score(samples)
    np.testing.assert_allclose(scores.proportions, found / 700)
    # Without correction, the chi-squared test of a 2 x 2 table is the z-test with pooled variance.
    p_values = [
        scipy.stats.chi2_contingency([[a, 3000 - a], [b, 700 - b]], correction=False).pvalue
        for a, b in zip(counts, found, strict=True)
    ]
    np.testing.assert_array_equal(scores.differs, np.array(p_values) < 0.05)
    assert scores.ndb == scores.differs.mean()
    js = scipy.spatial.distance.jensenshannon(counts / 3000, found / 700) ** 2
    assert scores.js == pytest.approx(js)


def test_a_single_bin_never_differs(rng: np.random.Generator) -> None:
    scores = Bins.fit(draw(rng, 50), 1, seed=0).score(draw(rng, 5, modes=1))
    assert (scores.ndb, scores.js) == (0.0, 0.0)


def test_the_seed_decides(rng: np.random.Generator) -> None:
    x = draw(rng, 500)
    first, again, other = (Bins.fit(x, 30, seed=seed).centres for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_bad_input(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(rng, 50)
    with pytest.raises(DataError, match=r"`x` must have at least as many rows.*50 rows for 100"):
        Bins.fit(x, seed=0)
    with pytest.raises(ConfigError, match="`num_bins` must be at least 1; got 0"):
        Bins.fit(x, 0, seed=0)
    with pytest.raises(DataError, match="NaN"):
        Bins.fit(x * np.nan, 5, seed=0)
    bins = Bins.fit(x, 5, seed=0)
    with pytest.raises(DataError, match="`samples` must have the D = 2 features"):
        bins.score(x[:, :1])
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ConfigError, match=r"cpmm_jax\[sklearn\]"):
        Bins.fit(x, 5, seed=0)
