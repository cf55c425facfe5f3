"""What scikit-learn's own checks do not ask: units, weights, missing labels, files, bad input."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import cpmm_jax as cpmm
from cpmm_jax.errors import ConfigError, DataError, DataWarning

Y = np.arange(240) % 3
X = np.random.default_rng(0).normal(size=(240, 2)) * [1.0, 100.0] + 6 * np.stack(
    [Y == 1, 100.0 * (Y == 2)], axis=1
)
QUICK: dict[str, Any] = {"max_iter": 40, "random_state": 0}
CLASSIFIERS = [cpmm.CPMMClassifier(**QUICK), cpmm.MFAClassifier(random_state=0)]
DENSITIES = [cpmm.CPMMDensity(**QUICK), cpmm.MFADensity(random_state=0)]
CLUSTERS = [cpmm.CPMMCluster(3, **QUICK), cpmm.MFACluster(3, random_state=0)]
ALL = [*CLASSIFIERS, *DENSITIES, *CLUSTERS]


def name(model: Any) -> str:
    return type(model).__name__


@pytest.fixture(autouse=True)
def short_fits() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


@pytest.mark.parametrize("model", DENSITIES, ids=name)
def test_densities_are_in_the_units_given(model: Any) -> None:
    far = X + [0.0, 1e10]  # where float32 has no digits left
    here, there = clone(model).fit(X), clone(model).fit(far)
    assert here.score(X) == pytest.approx(there.score(far), abs=0.3)
    finer = clone(model).fit(X * 1e3)
    difference = here.score(X) - finer.score(X * 1e3)
    assert difference == pytest.approx(2 * np.log(1e3), abs=0.3)
    drawn = here.sample(2000, random_state=1)
    np.testing.assert_allclose(drawn.std(axis=0), X.std(axis=0), rtol=0.2)


@pytest.mark.parametrize("model", CLASSIFIERS, ids=name)
def test_labels_of_any_type(model: Any) -> None:
    names = np.array(["a", "b", "c"])[Y]
    fitted = clone(model).fit(X, names)
    assert fitted.classes_.tolist() == ["a", "b", "c"]
    assert fitted.score(X, names) > 0.95
    assert fitted.predict_proba(X).shape == (240, 3)
    np.testing.assert_allclose(np.exp(fitted.predict_log_proba(X)), fitted.predict_proba(X))


@pytest.mark.parametrize("model", CLASSIFIERS, ids=name)
def test_rows_without_a_label_help(model: Any) -> None:
    partly = np.where(np.arange(240) < 9, Y, -1)
    fitted = clone(model).fit(X, partly)
    assert fitted.classes_.tolist() == [0, 1, 2]
    assert fitted.score(X, Y) > 0.95


def test_labels_spread_before_a_mixture_is_fitted() -> None:
    """Two rings: of a few rows on each no Gaussian could tell which it is."""
    angle, y = np.random.default_rng(0).uniform(0, 2 * np.pi, 400), np.arange(400) % 2
    rings = (1.0 + 2.0 * y)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    partly = np.where(np.arange(400) < 6, y, -1)
    assert cpmm.MFAClassifier(8, random_state=0).fit(rings, partly).score(rings, y) > 0.95


def test_minus_one_is_a_class_where_there_is_one_other() -> None:
    fitted = cpmm.MFAClassifier(1, random_state=0).fit(X, np.where(Y == 1, 1, -1))
    assert fitted.classes_.tolist() == [-1, 1]


@pytest.mark.parametrize("model", CLUSTERS, ids=name)
def test_clusters_are_found(model: Any) -> None:
    fitted = clone(model).fit(X)
    pairs = set(zip(fitted.labels_.tolist(), Y.tolist(), strict=True))
    counts = [np.sum((fitted.labels_ == a) & (b == Y)) for a, b in pairs]
    assert sum(sorted(counts)[-3:]) > 225
    np.testing.assert_array_equal(fitted.predict(X), fitted.labels_)
    np.testing.assert_allclose(fitted.predict_proba(X).sum(axis=1), 1.0)


@pytest.mark.parametrize("model", CLUSTERS, ids=name)
def test_the_number_of_clusters_is_found(model: Any) -> None:
    fitted = clone(model).set_params(n_clusters="auto", rank=1).fit(X)
    assert fitted.n_clusters_ == 3


@pytest.mark.parametrize("model", ALL, ids=name)
def test_a_loaded_estimator_predicts_without_jax(model: Any, tmp_path: Path) -> None:
    fitted = clone(model).fit(X, Y)
    (tmp_path / "model").write_bytes(pickle.dumps(fitted))
    np.save(tmp_path / "x.npy", X)
    program = (
        "import pickle, sys, numpy as np; sys.modules['jax'] = None; "
        "model = pickle.load(open('model', 'rb')); x = np.load('x.npy'); "
        "np.save('out.npy', model.score_samples(x))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), fitted.score_samples(X))


@pytest.mark.parametrize("model", ALL, ids=name)
def test_a_weight_is_a_number_of_rows(model: Any) -> None:
    weight = np.arange(240) % 4
    twice = np.repeat(np.arange(240), weight)
    weighted = clone(model).fit(X, Y, sample_weight=weight)
    repeated = clone(model).fit(X[twice], Y[twice])
    np.testing.assert_array_equal(weighted.score_samples(X), repeated.score_samples(X))


@pytest.mark.parametrize("model", ALL, ids=name)
def test_a_warm_start_goes_on(model: Any) -> None:
    fitted = clone(model).set_params(warm_start=True).fit(X, Y)
    before = fitted.score_samples(X).mean()
    shape = fitted.mixture_.means.shape
    fitted.fit(X, Y)
    assert fitted.mixture_.means.shape == shape
    assert fitted.score_samples(X).mean() > before - 0.1


def test_a_warm_start_of_a_long_trajectory_goes_on_at_the_data() -> None:
    x = np.random.default_rng(0).normal(size=(300, 2))
    model = cpmm.CPMMDensity(17, n_trajectories=1, max_iter=60, warm_start=True, random_state=0)
    before = model.fit(x).score(x)
    assert model.fit(x).n_iter_ == 60
    assert model._fitted.recipe.curriculum == "none" and model.score(x) > before - 0.05


def test_models_go_into_pipelines_and_searches() -> None:
    pipeline = make_pipeline(StandardScaler(), cpmm.MFAClassifier(random_state=0))
    assert cross_val_score(pipeline, X, Y, cv=2).min() > 0.9
    search = GridSearchCV(cpmm.MFADensity(random_state=0), {"n_components": [1, 3]}, cv=2).fit(X)
    assert search.best_params_ == {"n_components": 3}


def test_the_gradient_does_what_em_does() -> None:
    settings: dict[str, Any] = {"n_components": 3, "rank": 1, "random_state": 0}
    by_em = cpmm.MFADensity(**settings).fit(X)
    by_gradient = cpmm.MFADensity(**settings, method="gradient", max_iter=400).fit(X)
    assert by_gradient.score(X) == pytest.approx(by_em.score(X), abs=0.1)


def test_a_fit_that_has_not_ended_says_so() -> None:
    with pytest.warns(ConvergenceWarning, match="MFADensity had not converged after 1 iterations"):
        cpmm.MFADensity(3, max_iter=1, tol=0.0, random_state=0).fit(X)


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        (
            cpmm.MFAClassifier(),
            (X, np.arange(240) // 239),
            DataError,
            "two examples or more",
        ),
        (cpmm.MFAClassifier(), (X, None), DataError, "requires y to be passed"),
        (cpmm.MFACluster(300), (X,), ConfigError, "from 1 to 240"),
        (cpmm.MFACluster(0), (X,), ConfigError, "got 0"),
        (cpmm.MFADensity(), (np.where(X > 300, np.nan, X),), ValueError, "contains NaN"),
        (cpmm.MFADensity(method="guess"), (X,), ConfigError, "em, gradient; got 'guess'"),
        (cpmm.CPMMDensity(n_init=0), (X,), ConfigError, "`n_init` must be a whole number"),
        (cpmm.CPMMDensity(rank=5), (X,), ConfigError, "`rank` must be at most D = 2"),
        (cpmm.MFADensity(), (X, None, -np.ones(240)), DataError, "at least 0"),
        (cpmm.MFADensity(), (X, None, np.zeros(240)), ValueError, "non-zero"),
    ],
)
def test_bad_input(model: Any, given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model.fit(*given)


@pytest.mark.parametrize("model", CLUSTERS, ids=name)
def test_of_fewer_different_rows_there_are_fewer_clusters(model: Any) -> None:
    few = np.repeat([[1.0, 3.0], [2.0, 1.0], [3.0, 3.0], [4.0, 1.0]], 4, axis=0)
    with pytest.warns(DataWarning, match="4 rows are different, and `n_clusters` is 8"):
        fitted = clone(model).set_params(n_clusters=8).fit(few)
    assert fitted.n_clusters_ <= 4
    assert len(np.unique(fitted.labels_)) == fitted.n_clusters_


def test_a_clustering_that_goes_on_is_kept() -> None:
    model = cpmm.CPMMCluster(3, **QUICK, warm_start=True).fit(X)
    before = model.labels_
    again = model.set_params(random_state=1).fit(X)  # another seed would name them otherwise
    assert (again.labels_ == before).mean() > 0.97
