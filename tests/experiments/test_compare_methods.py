"""The comparison's methods, how they choose their settings, and what is said of their results."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from cpmm_jax.mixture.initialise import random_start
from experiments.compare import factor_analyzers
from experiments.compare.cells import Cell, Settings
from experiments.compare.methods import METHODS, Rows, make_method
from experiments.compare.search import Axes, Budget, Density, Fitted, search
from experiments.compare.statistics import Score, best_direct, compare, count_verdicts, interval
from experiments.compare.statistics import scores as read_scores
from experiments.compare.summary import draw, make_tables, summarise
from tests.experiments.stand_ins import SETTINGS, done

# The search


def fit_parabola(choice: dict[str, Any]) -> Density:
    if choice["a"] == 4:
        raise ValueError("cannot\nbe fitted")
    value = -((choice["a"] - 5) ** 2) - (choice["b"] - 1) ** 2
    return Density(lambda x: np.full(len(x), float(value)), 2, {"extra": 7})


AXES: Axes = {"a": (0, 1, 2, 3, 4, 5, 6), "b": (0, 1, 2)}
START = {"a": 0, "b": 0}
X = np.zeros((3, 1), np.float32)


def test_the_climb_finds_the_top_past_a_gap() -> None:
    found = search(AXES, START, fit_parabola, X, Budget(60.0))
    assert found.settings == {"a": 5, "b": 1, "extra": 7}
    assert found.num_parameters == 2
    assert [t.settings for t in found.trials[:3]] == [
        {"a": 0, "b": 0}, {"a": 1, "b": 0}, {"a": 2, "b": 0},
    ]  # fmt: skip
    tried = [tuple(t.settings.values()) for t in found.trials]
    assert len(set(tried)) == found.tried == len(tried)
    failed = [t for t in found.trials if t.settings["a"] == 4]
    assert failed[0].error == "ValueError: cannot" and failed[0].valid_log_likelihood is None


def test_a_spent_budget_still_finishes_the_first() -> None:
    assert search(AXES, START, fit_parabola, X, Budget(0.0)).tried == 1
    with pytest.raises(ValueError, match="the first failed with ValueError: cannot"):
        search({"a": (4,)}, {"a": 4}, fit_parabola, X, Budget(9.0))


def test_a_density_that_is_not_finite_is_no_candidate() -> None:
    def fit(choice: dict[str, Any]) -> Density:
        return Density(lambda x: np.full(len(x), -np.inf), 0, {})

    with pytest.raises(ValueError, match="3 of 3 that are not"):
        search({}, {}, fit, X, Budget(0.0))


# Methods


def fit_blobs(method: str, *, budget: float = 0.0, size: int | None = None) -> tuple[Fitted, Rows]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2)) * 0.1 + rng.integers(0, 2, (300, 1)) * 2.0 - 1.0
    rows = Rows(*np.split(x.astype(np.float32), [200]))
    settings = Settings("test", budget, size, None if size is None else 1, steps=20)
    made = make_method(Cell("blobs", method, 0, settings))
    return made.fit(rows, 0, Budget(budget)), rows


def test_sklearn_chooses_by_validation() -> None:
    found, rows = fit_blobs("sklearn_full", budget=2.0)
    scores = [trial.valid_log_likelihood for trial in found.trials]
    assert found.settings["components"] >= 2
    assert float(found.log_prob(rows.x_valid).mean()) == pytest.approx(max(s for s in scores if s))
    assert found.num_parameters == found.settings["components"] * 6


@pytest.mark.parametrize(("covariance", "expected"), [("full", 12), ("tied", 9), ("diag", 10)])
def test_sklearn_parameters(covariance: str, expected: int) -> None:
    settings = Settings("test", 0.0, 2, 1)
    method = make_method(Cell("blobs", f"sklearn_{covariance}", 0, settings))
    assert method.fit(fit_blobs("sklearn_diag")[1], 0, Budget(0.0)).num_parameters == expected


@pytest.mark.parametrize("method", ["em_mfa", "em_moves"])
def test_em_of_a_given_size(method: str) -> None:
    found, rows = fit_blobs(method, size=2)
    assert found.settings == {"components": 2, "rank": 1, "noise_floor": 1e-4}
    assert np.shape(found.log_prob(rows.x_valid)) == (100,)
    assert found.num_parameters == 2 * 7


@pytest.mark.parametrize("method", ["direct_kmeans", "direct_random"])
def test_the_direct_mixture_is_trained_from_its_start(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: dict[str, Any] = {}

    def untrained(model: Any, x: Any, **settings: Any) -> Any:
        called.update(settings, shape=x.shape)
        return SimpleNamespace(model=model)

    monkeypatch.setattr(factor_analyzers.cpmm, "fit", untrained)
    found, rows = fit_blobs(method, size=2)
    assert called["shape"] == (200, 2) and called["x_valid"] is rows.x_valid
    assert (called["config"].steps, called["config"].num_times) == (20, 1)
    assert np.shape(found.log_prob(rows.x_valid)) == (100,)
    assert found.num_parameters == 2 * 7 + 1


@pytest.mark.parametrize("size", [4, None])
@pytest.mark.parametrize("polished", [False, True])
def test_the_recipe_of_the_cpmm(
    polished: bool, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = []

    def untrained(x: Any, y: None, x_valid: Any, y_valid: None, recipe: Any, **_: Any) -> Any:
        recipes.append(recipe)
        return SimpleNamespace(mixture=random_start(x, 2, 1, seed=0), recipe=recipe)

    monkeypatch.setattr(factor_analyzers, "fit_mixture", untrained)
    found, _ = fit_blobs("cpmm_polish" if polished else "cpmm", size=size, budget=60.0)
    first, *others = recipes
    assert (first.steps, first.tails, first.refit) == (20, 0.0, False)
    assert {recipe.polish for recipe in recipes} == {polished}
    assert {recipe.local_start for recipe in recipes} == {True, False}
    assert ("tails" in found.settings) == (size is None)
    if size is not None:
        assert {recipe.num_components for recipe in recipes} == {4}
        assert {recipe.num_classes for recipe in recipes} == {2, 4}
    assert others and len({str(recipe) for recipe in recipes}) == found.tried


def test_the_flow() -> None:
    pytest.importorskip("flowjax")
    # flowjax broadcasts and promotes as NumPy does.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        found, rows = fit_blobs("flow")
        assert np.isfinite(found.log_prob(rows.x_valid)).all()
    assert found.num_parameters > 0


def test_every_method_can_be_made() -> None:
    for name in METHODS:
        if name != "flow":
            make_method(Cell("line", name, 0, SETTINGS))
    with pytest.raises(ValueError, match="must be one of"):
        make_method(Cell("line", "magic", 0, SETTINGS))


# Statistics


def test_intervals_are_those_of_student() -> None:
    a, b = np.random.default_rng(1).normal(size=(2, 5))
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    found = interval(list(a - b))
    assert found.mean == pytest.approx((a - b).mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    # By hand: mean 2, s = 1, and t(0.975, 2) = 4.302653.
    assert interval([1.0, 2.0, 3.0]).low == pytest.approx(2 - 4.302653 / np.sqrt(3), abs=1e-6)
    assert interval([1.0]) == (1.0, None, None)
    verdicts = [interval(v).verdict for v in ([1.0, 1.1], [-1.0, -1.1], [-1.0, 1.0], [5.0])]
    assert verdicts == ["win", "loss", "tie", None]


def by_seed(*tests: float, valid: float = 0.0) -> dict[int, Score]:
    return {seed: Score(test, valid, 1.0, 3) for seed, test in enumerate(tests)}


def test_the_best_direct_method_is_chosen_by_validation() -> None:
    methods = {
        "em_mfa": by_seed(-9.0, -9.0, valid=2.0),
        "direct_kmeans": by_seed(-1.0, -1.0, valid=1.0),  # better, but only in the test
        "direct_random": by_seed(-1.0, valid=3.0),  # failed at one seed
        "cpmm": by_seed(-8.0, -8.5, valid=9.0),  # not direct
    }
    assert best_direct(methods) == "em_mfa"
    found = compare(methods)
    assert found["reference"] == "em_mfa"
    assert found["methods"]["cpmm"]["difference"]["mean"] == pytest.approx(0.75)
    assert found["methods"]["em_mfa"]["difference"] is None
    assert found["methods"]["direct_random"]["difference"]["mean"] == pytest.approx(8.0)
    assert best_direct({"cpmm": by_seed(1.0)}) is None
    counts = count_verdicts({"one": found})
    assert counts["em_mfa"] == {"win": 0, "tie": 0, "loss": 0, "reference": 1}
    assert counts["direct_kmeans"]["win"] == 1 and counts["cpmm"]["tie"] == 1


def test_the_best_of_sklearn_is_chosen_for_each_seed() -> None:
    records = {}
    for method, valid in (("sklearn_full", (1.0, 2.0)), ("sklearn_diag", (2.0, 1.0))):
        for seed in (0, 1):
            cell = Cell("line", method, seed, SETTINGS)
            records[cell] = done(cell, 10.0 * valid[seed], valid[seed], seconds=2.0)
    broken = Cell("line", "cpmm", 0, SETTINGS)
    records[broken] = broken.failed("no luck")
    best = read_scores(records)["line"]["sklearn_best"]
    assert [best[seed].test for seed in (0, 1)] == [20.0, 20.0]
    assert best[0].seconds == 4.0
    summary = summarise(records, {"flow": "flowjax"})
    text = "\n".join(map(str, make_tables(summary)))
    assert summary["failed"] == {"line/cpmm/0": "no luck"} and "no luck" in text
    assert "flowjax is not installed" in text and "fewer than 5 seeds (2)" in text


def test_the_figure(tmp_path: Path) -> None:
    methods = {"em_mfa": by_seed(-2.0, -2.1), "cpmm": by_seed(-1.0, -1.3), "flow": by_seed(-1.0)}
    draw({"sets": {"line": compare(methods)}}, tmp_path / "summary.png")
    assert (tmp_path / "summary.png").stat().st_size > 0
