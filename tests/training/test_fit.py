from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from cpmm_jax.data.batches import batch_indices
from cpmm_jax.errors import ConfigError, DataError, RunError
from cpmm_jax.mixture.padding import padded_size
from cpmm_jax.training.inputs import prepare
from cpmm_jax.training.loop import FitResult, fit
from cpmm_jax.training.step import run_block
from tests.training.stand_in import QUICK, FreeMixture, planted, planted_log_prob, start

X, Y = planted(600)


def arrays(model: nnx.Module) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


def assert_same(one: nnx.Module, other: nnx.Module) -> None:
    for a, b in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("labelled", [pytest.param(False, marks=pytest.mark.slow), True])
def test_recovers_a_planted_mixture(labelled: bool) -> None:
    x_test, y_test = planted(4000, seed=9)
    result = fit(start(log_noise=0.5), X, Y if labelled else None, config=QUICK)
    mixture = result.model.read(np.linspace(0, 1, 2)).mixture
    if labelled:
        score = np.asarray(mixture.class_log_prob(x_test))[np.arange(len(x_test)), y_test]
        truth = planted_log_prob(x_test, y_test)
    else:
        score, truth = np.asarray(mixture.log_prob(x_test)), planted_log_prob(x_test)
    # 17 parameters on 540 rows cost about 17 / (2 * 540) = .016 nats.
    assert truth.mean() - 0.05 < score.mean() <= truth.mean() + 0.001
    assert result.stopped == "finished"
    assert result.steps == 250
    assert result.refused == 0
    assert [report["step"] for report in result.history] == [60, 120, 180, 240, 250]
    best = max(result.history, key=lambda report: report["valid_log_likelihood"])
    assert (best["step"], best["valid_log_likelihood"]) == (result.best_step, result.best_score)
    assert 0 < result.compile_seconds < result.seconds


def test_score_is_that_of_the_returned_model() -> None:
    x_valid, y_valid = planted(60, seed=3)
    result = fit(start(), X[:540], Y[:540], config=QUICK, x_valid=x_valid, y_valid=y_valid)
    mixture = result.model.read(np.linspace(0, 1, 2)).mixture
    joint = np.asarray(mixture.class_log_prob(x_valid))[np.arange(60), y_valid]
    assert result.best_score == pytest.approx(joint.mean(), rel=1e-5)


def test_same_seed_same_result_and_no_new_trace() -> None:
    first = fit(start(), X, Y, config=QUICK)
    traces = FreeMixture.traces
    second = fit(start(), X, Y, config=QUICK)
    assert_same(first.model, second.model)
    assert_same(first.last_model, second.last_model)
    timing = ("seconds", "examples_per_second")
    for one, other in zip(first.history, second.history, strict=True):
        assert {k: one[k] for k in one.keys() - timing} == {
            k: other[k] for k in other.keys() - timing
        }
    other = fit(start(), X, Y, config=replace(QUICK, seed=1))
    pairs = zip(arrays(first.model), arrays(other.model), strict=True)
    assert any((a != b).any() for a, b in pairs)
    assert FreeMixture.traces == traces


def test_blocks_do_not_matter() -> None:
    """How often training reports changes nothing about what it does."""
    coarse = fit(start(), X, config=replace(QUICK, report_every=250))
    traces = FreeMixture.traces
    fine = fit(start(), X, config=replace(QUICK, report_every=17))
    assert_same(coarse.last_model, fine.last_model)
    assert FreeMixture.traces == traces


def test_going_between_sizes_traces_each_once() -> None:
    """As a search over the numbers of components and the batch sizes does."""
    sizes = [(2, 30), (5, 50)]
    settings = [replace(QUICK, steps=2, num_times=t, batch_size=b) for t, b in sizes]
    for config in settings:
        fit(start(), X, config=config)
    traces = FreeMixture.traces
    for config in settings:
        fit(start(), X, config=config)
    assert FreeMixture.traces == traces


def test_only_parameters_are_trained() -> None:
    """Few rows too: all are one batch; and no validation: the last model is the best."""
    model = start(floor=0.25)
    before = arrays(model)
    decay = optax.inject_hyperparams(optax.adamw)(learning_rate=0.125, weight_decay=0.5)
    settings = replace(QUICK, steps=25, report_every=10, batch_size=1000, valid_fraction=0.0)
    traces = FreeMixture.traces
    result = fit(model, X[:20], config=settings, optimizer=decay)
    assert FreeMixture.traces - traces == 1  # the shorter last block included
    for a, b in zip(before, arrays(model), strict=True):
        np.testing.assert_array_equal(a, b)  # the model given is left alone
    np.testing.assert_array_equal(np.asarray(result.last_model.floor[...]), [0.25, 0.25])
    assert (np.asarray(result.last_model.means[...]) != np.asarray(model.means[...])).all()
    assert (result.best_score, result.best_step) == (None, 25)
    assert_same(result.model, result.last_model)
    for report in result.history:
        assert report["learning_rate"] == 0.125
        assert report["valid_log_likelihood"] is None
        assert np.isfinite(report["loss"])


def test_parameters_follow_the_documented_batches() -> None:
    """Plain gradient descent on the batches of `batch_indices`, done again by hand."""
    # The second transformation asks for the loss; it leaves the first steps as they are.
    descent = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    data: dict[str, Any] = {"x": X[:540], "y": Y[:540], "x_valid": X[540:], "y_valid": Y[540:]}
    traces = FreeMixture.traces
    settings = replace(QUICK, steps=3, report_every=2)
    result = fit(start(), config=settings, optimizer=descent, **data)
    assert FreeMixture.traces - traces <= 2
    graphdef, params, rest = nnx.split(start(), nnx.Param, ...)
    key = jax.random.split(jax.random.key(settings.seed))[0]

    @jax.jit
    @jax.grad
    def gradient(params: Any, x: Any, y: Any) -> Any:
        mixture = nnx.merge(graphdef, params, rest).read(np.zeros(2)).mixture
        return -mixture.class_log_prob(x)[np.arange(128), y].mean()

    for step in range(3):
        rows = np.asarray(batch_indices(key, step, 128, 540))
        grads = gradient(params, X[rows].astype(np.float32), Y[rows])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    expected = nnx.merge(graphdef, params, rest)
    for a, b in zip(arrays(result.last_model), arrays(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_early_stopping_returns_the_best() -> None:
    settings = replace(QUICK, report_every=5, patience=4)
    result = fit(start(spread=0.1, log_noise=-1.4), X, config=settings)
    assert result.stopped == "early stopping"
    assert result.steps == result.best_step + 20 < 250
    scores = [report["valid_log_likelihood"] for report in result.history]
    assert result.best_score >= max(scores)
    assert scores[-1] < result.best_score
    fresh = fit(start(spread=0.1, log_noise=-1.4), X, config=replace(settings, patience=None))
    assert fresh.history[len(scores) - 1]["valid_log_likelihood"] == scores[-1]


def test_a_start_that_is_never_improved_on_is_kept() -> None:
    model = start()
    nearby = np.asarray(model.means[...]).reshape(-1, 2).repeat(15, axis=0)
    result = fit(model, X[:540] + 5.0, config=QUICK, x_valid=nearby)
    assert (result.best_step, result.steps) == (0, 250)
    assert_same(result.model, model)


def test_metrics_file_is_written_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lengths: list[int] = []

    def callback(report: dict[str, Any]) -> None:
        lines = path.read_text().splitlines()
        lengths.append(len(lines))
        assert json.loads(lines[-1]) == report

    result = fit(start(), X, config=QUICK, metrics_path=path, callback=callback)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lengths == [1, 2, 3, 4, 5]
    assert lines == list(result.history)
    assert list(lines[0]) == [
        "step",
        "loss",
        "valid_log_likelihood",
        "learning_rate",
        "grad_norm",
        "ode_steps",
        "refused",
        "returns",
        "examples_per_second",
        "seconds",
    ]
    assert lines[0]["ode_steps"] == 7
    with pytest.raises(RunError, match="must name a new file"):
        fit(start(), X, config=QUICK, metrics_path=path)
    with pytest.raises(RunError, match="must be writable"):
        fit(start(), X, config=QUICK, metrics_path=tmp_path / "none" / "metrics.jsonl")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "shown"),
    [
        (io.StringIO, None, False),
        (Terminal, None, True),
        (Terminal, False, False),
        (io.StringIO, True, True),
    ],
)
def test_progress_bar_only_where_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], progress: bool | None, shown: bool
) -> None:
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    fit(start(), X, config=QUICK, progress=progress)
    text = stderr.getvalue()
    assert bool(text) is shown
    for word in ("loss=", "valid=", "ode=7", "ex/s=", "250/250", "<"):
        assert (word in text) is shown


def test_bar_is_closed_and_an_interruption_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())

    def interrupt(report: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(start(), X, config=QUICK, progress=True, callback=interrupt)
    assert stderr.getvalue().endswith("\n")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": np.where(np.arange(1200).reshape(600, 2) == 7, np.nan, X)},
            DataError,
            "NaN in row 3",
        ),
        ({"x": X[:, :1]}, DataError, "D = 2 features"),
        ({"x": X * 1e300}, DataError, "`x` must fit float32"),
        ({"x": X[:4]}, DataError, "at least as many rows"),
        ({"y": Y[:-1]}, DataError, "labels of another length"),
        ({"y": Y + 1}, DataError, r"class codes 0\.\.1"),
        ({"y": Y * 0}, DataError, "class 1"),
        ({"x_valid": X[:, :1]}, DataError, "`x_valid`"),
        ({"x_valid": X, "y": Y}, ConfigError, "`y_valid` must be given"),
        ({"x_valid": X, "y_valid": Y}, ConfigError, "y missing"),
        ({"y": Y, "y_valid": Y}, ConfigError, "x_valid missing"),
        ({"model": None}, ConfigError, "`model` must be a flax.nnx.Module"),
        ({"model": nnx.List([])}, ConfigError, "`model` must be a flax.nnx.Module"),
        ({"model": FreeMixture(np.zeros((1, 1, 2))), "y": Y}, ConfigError, "num_classes=2"),
        ({"config": replace(QUICK, steps=0)}, ConfigError, "`steps`"),
        (
            {"config": replace(QUICK, patience=2, valid_fraction=0.0)},
            ConfigError,
            "`patience` must come with",
        ),
    ],
)
def test_bad_input_gets_one_line(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"model": start(), "x": X, "config": QUICK} | change
    with pytest.raises(error, match=message) as caught:
        fit(**arguments)
    assert "\n" not in str(caught.value)


def test_one_class_may_have_labels() -> None:
    model = FreeMixture(np.zeros((1, 2, 2)))
    data = prepare(model, np.float32(0), X, np.zeros(600), None, None, QUICK)
    train, valid = data.train, data.valid
    assert data.num_examples == 540 and set(train.y.tolist()) == {0}
    assert valid.x.shape == (60, 2)
    assert train.x.dtype == np.float32


def test_other_numbers_compile_nothing_anew() -> None:
    """Neither another learning rate, nor other steps, nor another number of rows."""
    fit(start(), X[:500], config=QUICK)
    before = run_block._cache_size()
    other = replace(QUICK, steps=QUICK.steps - 7, learning_rate=1e-3, seed=5, max_refused=3)
    fit(start(), X[:431], config=replace(other, valid_fraction=0.0))
    assert run_block._cache_size() == before


def test_padding_rows_are_never_drawn() -> None:
    """A batch of all examples, which takes each row once, is that of the examples alone."""
    config = replace(QUICK, batch_size=600, valid_fraction=0.0, steps=3, report_every=1)
    x = X[:57]
    losses = [report["loss"] for report in fit(start(), x, config=config).history]
    shifted = [r["loss"] for r in fit(start(), np.flip(x, axis=0).copy(), config=config).history]
    np.testing.assert_allclose(losses, shifted, rtol=1e-5)  # the order of the rows is no matter
    times = QUICK.time_sampler(
        jax.random.fold_in(jax.random.split(jax.random.key(QUICK.seed))[1], 0), QUICK.num_times
    )
    mixture = start().read(times).mixture
    np.testing.assert_allclose(losses[0], -mixture.log_prob(x).mean(), rtol=1e-5)


def test_sizes_are_few_and_padding_is_small() -> None:
    sizes = {padded_size(n) for n in range(1, 20_000, 7)}
    assert len(sizes) <= 10
    for n in (1, 2048, 5000, 123_456, 999_999, 2**20, 2**20 + 1):
        assert n <= padded_size(n) <= max(2048, n + max(2048, n / 8))
    assert padded_size(2**20 + 1) == 2**20 + 1


@pytest.mark.parametrize(
    ("scores", "converged"), [((-3.0, -2.0, -1.999), True), ((-3.0, -2.0, -1.9), False)]
)
def test_a_fit_has_converged_where_its_end_gained_little(
    scores: tuple[float, ...], *, converged: bool
) -> None:
    reports = [
        {"step": step, "valid_log_likelihood": score}
        for step, score in zip((80, 90, 100), scores, strict=True)
    ]
    counts = {"steps": 100, "refused": 0, "returns": 0, "seconds": 1.0, "compile_seconds": 0.0}
    found = FitResult(None, None, tuple(reports), 100, max(scores), stopped="finished", **counts)
    assert found.converged is converged
