"""Metrics against scikit-learn and SciPy."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from cpmm_jax.artifact import Mixture
from cpmm_jax.errors import DataWarning
from cpmm_jax.evaluate import evaluate

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
