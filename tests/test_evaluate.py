"""Metrics against scikit-learn and SciPy."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.special
import scipy.stats
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from cpmm_jax.artifact import Mixture
from cpmm_jax.data import AffinePixels, LogitPixels, dequantise
from cpmm_jax.errors import DataError, DataWarning
from cpmm_jax.evaluate import evaluate, evaluate_pixels

CENTRES = np.array([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
MIXTURE = Mixture(
    np.log([0.5, 0.3, 0.2]),
    np.zeros((3, 1)),
    CENTRES[:, None],
    np.zeros((3, 1, 2, 0)),
    np.zeros((3, 1, 2)),
)


@pytest.fixture
def labelled(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    y = rng.choice(3, 200, p=[0.5, 0.3, 0.2])
    return CENTRES[y] + rng.standard_normal((200, 2)), y


def test_scores_of_classes(labelled: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = labelled
    joint = np.stack(
        [
            np.log(p) + scipy.stats.multivariate_normal(m, np.eye(2)).logpdf(x)
            for p, m in zip([0.5, 0.3, 0.2], CENTRES, strict=True)
        ],
        axis=1,
    )
    scores = evaluate(MIXTURE, x, y)
    assert set(scores) == {"log_likelihood", "joint_log_likelihood", "accuracy"}
    assert scores["log_likelihood"] == pytest.approx(np.log(np.exp(joint).sum(1)).mean())
    assert scores["joint_log_likelihood"] == pytest.approx(joint[np.arange(200), y].mean())
    assert scores["accuracy"] == pytest.approx((joint.argmax(1) == y).mean())


def test_scores_of_clusters(labelled: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = labelled
    scores = evaluate(MIXTURE, x, (y + 1) % 3, supervised=False)
    clusters = MIXTURE.predict(x)
    assert set(scores) == {"log_likelihood", "nmi", "ari"}
    assert scores["nmi"] == pytest.approx(normalized_mutual_info_score(y, clusters))
    assert scores["ari"] == pytest.approx(adjusted_rand_score(y, clusters))
    assert set(evaluate(MIXTURE, x)) == {"log_likelihood"}


def test_without_scikit_learn(
    labelled: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.warns(DataWarning, match="scikit-learn; got no such package"):
        assert set(evaluate(MIXTURE, *labelled, supervised=False)) == {"log_likelihood"}


def test_scores_of_pixels(rng: np.random.Generator) -> None:
    """Against SciPy: a logistic-normal density of the pixels, per example and coordinate."""
    x = rng.integers(0, 256, (300, 2)).astype(np.float32)
    pixels = LogitPixels(alpha=0.05)
    scores = evaluate_pixels(MIXTURE, np.random.default_rng(1), x, pixels)
    y = dequantise(np.random.default_rng(1), x)
    p = 0.05 + 0.9 * y / 256
    z = scipy.special.logit(p)
    weighted = [
        w * scipy.stats.multivariate_normal(m, np.eye(2)).pdf(z)
        for w, m in zip([0.5, 0.3, 0.2], CENTRES, strict=True)
    ]
    log_prob = np.log(np.sum(weighted, axis=0))
    pixel_log_prob = log_prob + np.log(0.9 / 256 / (p * (1 - p))).sum(axis=1)
    assert scores == {
        "log_likelihood": pytest.approx(log_prob.mean()),
        "pixel_log_likelihood": pytest.approx(pixel_log_prob.mean()),
        "bits_per_dimension": pytest.approx(-pixel_log_prob.mean() / np.log(2) / 2),
    }


def test_pixels_by_blocks_are_pixels_at_once(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rng.integers(0, 256, (30, 2))
    at_once = evaluate_pixels(MIXTURE, np.random.default_rng(1), x, AffinePixels())
    monkeypatch.setattr("cpmm_jax.evaluate._BLOCK_ELEMENTS", 8)
    by_blocks = evaluate_pixels(MIXTURE, np.random.default_rng(1), x, AffinePixels())
    assert by_blocks == pytest.approx(at_once, rel=1e-12)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.full((3, 2), 0.5), "whole numbers 0..255; got 0.5 at"),
        (np.zeros((3, 4)), "D = 2 features"),
        (np.zeros((0, 2)), "at least one row"),
        (np.zeros((3, 1, 2)), r"shape \(N, D\)"),
    ],
)
def test_bad_pixels_are_refused(x: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_pixels(MIXTURE, np.random.default_rng(0), x, AffinePixels())
