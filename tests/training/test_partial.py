"""Weights and missing labels: the loss, its validation, and what may be given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpmm_jax as cpmm
from cpmm_jax.errors import ConfigError, DataError
from cpmm_jax.mixture.em import fit_em, polish
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.models.direct import DirectMFA
from cpmm_jax.models.selection import broaden_by_validation, polish_by_validation
from cpmm_jax.training.objective import negative_log_likelihood

GROUPS = np.arange(400) % 2
X = (np.random.default_rng(0).normal(size=(400, 2)) + 4 * GROUPS[:, None]).astype(np.float32)
QUICK = cpmm.TrainConfig(steps=60, batch_size=64, report_every=30, num_times=1, learning_rate=0.03)


def classes() -> HierarchicalMFA:
    """Two classes near the groups."""
    parts = [fit_em(X[c == GROUPS] + 0.5, 2, 1, max_iter=3).mixture for c in range(2)]
    return HierarchicalMFA(
        jnp.zeros(2, jnp.float32), jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    )


def loss(*batch: Any) -> float:
    model = DirectMFA.from_mixture(classes())
    return float(negative_log_likelihood(model, jnp.zeros(1), *batch)[0])


def test_a_weight_of_two_is_a_row_given_twice() -> None:
    weight = np.arange(400) % 3
    twice = np.repeat(np.arange(400), weight)
    weighted = loss(X, GROUPS, jnp.asarray(weight / weight.mean(), jnp.float32))
    assert weighted == pytest.approx(loss(X[twice], GROUPS[twice]), rel=1e-5)


def test_a_class_that_is_not_known_is_summed_out() -> None:
    known = np.arange(400) < 100
    partly = jnp.asarray(np.where(known, GROUPS, -1))
    parts = [loss(X[known], GROUPS[known]), loss(X[~known])]
    assert loss(X, partly) == pytest.approx(np.average(parts, weights=[100, 300]), rel=1e-5)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_share_of_log_p_x_is_taken_away(share: float) -> None:
    joint = np.asarray(classes().class_log_prob(X), np.float64)
    total = np.logaddexp.reduce(joint, axis=1)
    known = np.arange(400) < 100
    each = np.where(known, joint[np.arange(400), GROUPS], total) - share * total
    partly = jnp.asarray(np.where(known, GROUPS, -1))
    assert loss(X, partly, None, share) == pytest.approx(-each.mean(), rel=1e-4)


def test_what_is_left_tells_the_classes_apart_the_better() -> None:
    """Two wide Gaussians cannot describe rings, but they can tell one from the other."""
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, 400)
    x = (1.0 + 1.5 * GROUPS)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    start = DirectMFA.from_mixture(classes())
    log_loss = []
    for share in (0.0, 0.95):
        config = replace(QUICK, steps=200, report_every=100, discriminative=share)
        mixture = cpmm.fit(start, x, GROUPS, config=config, progress=False).model.extract()
        proba = np.asarray(mixture.predict_proba(x))
        log_loss.append(-np.log(proba[np.arange(400), GROUPS]).mean())
    assert log_loss[1] < log_loss[0] - 0.01


def test_the_score_is_of_what_is_trained() -> None:
    config = replace(QUICK, discriminative=0.5)
    model = DirectMFA.from_mixture(classes())
    parts: dict[str, Any] = {"x_valid": X, "y_valid": GROUPS, "progress": False}
    result = cpmm.fit(model, X, GROUPS, config=config, **parts)
    joint = np.asarray(result.last_model.extract().class_log_prob(X))
    score = joint[np.arange(400), GROUPS] - 0.5 * np.logaddexp.reduce(joint, axis=1)
    assert result.history[-1]["valid_log_likelihood"] == pytest.approx(score.mean(), rel=1e-4)


def test_a_share_of_nothing_is_refused() -> None:
    config = replace(QUICK, discriminative=0.5)
    with pytest.raises(ConfigError, match=r"`discriminative` must be 0 without labels; got 0\.5"):
        cpmm.fit(DirectMFA.from_mixture(classes()), X, config=config)


def test_rows_of_no_weight_are_not_fitted() -> None:
    far = X.copy()
    far[::4] += 50.0
    weight = (np.arange(400) % 4 > 0).astype(float)
    model = DirectMFA.from_mixture(fit_em(X, 1, 1, max_iter=1).mixture)
    result = cpmm.fit(model, far, sample_weight=weight, config=QUICK, progress=False)
    np.testing.assert_allclose(result.model.extract().flatten().mean(), X.mean(axis=0), atol=0.5)


def test_few_labels_name_what_the_others_shape() -> None:
    partly = np.where(np.arange(400) < 8, GROUPS, -1)
    result = cpmm.fit(DirectMFA.from_mixture(classes()), X, partly, config=QUICK, progress=False)
    found = np.asarray(result.model.extract().predict_proba(X)).argmax(axis=1)
    assert (found == GROUPS).mean() > 0.98
    assert result.best_score is not None


@pytest.mark.parametrize("known", [8, 400])
def test_polishing_never_lowers_the_likelihood(known: int) -> None:
    partly = np.where(np.arange(400) < known, GROUPS, -1)
    mixture, scores = classes(), []
    for rounds in (0, 3, 20):
        polished = polish(mixture, X, partly, max_iter=rounds, tol=0.0)
        scores.append(-loss_of(polished, partly))
    assert scores[0] < scores[1] <= scores[2] + 1e-6


def loss_of(mixture: HierarchicalMFA, y: np.ndarray) -> float:
    model = DirectMFA.from_mixture(mixture, noise_floor=1e-6)
    return float(negative_log_likelihood(model, jnp.zeros(1), X, jnp.asarray(y))[0])


def test_polishing_with_weights_is_that_of_rows_given_twice() -> None:
    weight = 1 + np.arange(400) % 2
    twice = np.repeat(np.arange(400), weight)
    weighted = polish(classes(), X, GROUPS, sample_weight=weight)
    repeated = polish(classes(), X[twice], GROUPS[twice])
    np.testing.assert_allclose(weighted.log_prob(X), repeated.log_prob(X), atol=1e-3)


def test_validation_counts_weights_and_sums_classes_out() -> None:
    weight = 1.0 + np.arange(400) % 2
    twice = np.repeat(np.arange(400), weight.astype(int))
    partly = np.where(np.arange(400) < 200, GROUPS, -1)
    valid: dict[str, Any] = {"x_valid": X, "y_valid": partly, "weight_valid": weight}
    score = polish_by_validation(classes(), X, GROUPS, **valid, rounds=(0,)).scores[0]
    repeated = broaden_by_validation(classes(), X[twice], partly[twice]).scores[0.0]
    assert score == pytest.approx(repeated, rel=1e-5)
    assert score == pytest.approx(-loss(X[twice], jnp.asarray(partly[twice])), rel=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"y": np.full(400, -1)}, "must hold the class of some example"),
        ({"y": GROUPS - 2}, "labels >= -1"),
        ({"y": np.where(GROUPS == 1, -1, 0)}, "got none of class 1"),
        ({"sample_weight": np.ones(3)}, "one number for each of the 400"),
        ({"sample_weight": -np.ones(400)}, "finite and not negative"),
        ({"sample_weight": np.zeros(400)}, "positive for some example"),
        ({"sample_weight": np.full(400, np.nan)}, "got nan in row 0"),
    ],
)
def test_bad_labels_and_weights(given: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        cpmm.fit(DirectMFA.from_mixture(classes()), X, **given, config=QUICK, progress=False)
