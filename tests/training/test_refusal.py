"""A step that went wrong is refused: nothing changes, it is counted, and too many end the fit."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cpmm_jax.data.batches import batch_indices
from cpmm_jax.errors import TrainingError
from cpmm_jax.training.config import default_optimizer, learning_rate_schedule
from cpmm_jax.training.loop import fit
from cpmm_jax.training.state import empty_totals, initial_state, snapshot
from cpmm_jax.training.step import Examples, Plan, Settings, make_keys, run_block
from tests.training.stand_in import QUICK, FreeMixture, planted, start

X, _ = planted(600)


def same(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def batches_with(row: int, steps: int) -> list[bool]:
    """Say of each step whether its batch of 128 from 540 rows holds `row`."""
    key = make_keys(QUICK.seed)[0]
    rows = jax.vmap(lambda step: batch_indices(key, step, 128, 540))(jnp.arange(steps))
    return (np.asarray(rows) == row).any(axis=1).tolist()


@pytest.mark.nan  # in the examples
def test_a_poisoned_batch_changes_no_bit() -> None:
    graphdef, params, fixed = nnx.split(start(), nnx.Param, ...)
    x = X[:540].astype(np.float32)
    x[17, 1] = np.nan
    plan = Plan(graphdef, default_optimizer(QUICK), QUICK.time_sampler, 2, 128)
    state = initial_state(plan.optimizer, params)
    data = Examples(jnp.asarray(x), None)
    numbers = jnp.int32(540), jnp.int32(9)
    settings = Settings(
        make_keys(QUICK.seed), *numbers, learning_rate_schedule(QUICK), *[jnp.float32(0)] * 2
    )
    poisoned = batches_with(17, 12)
    assert 1 < sum(poisoned) < 4
    in_a_row = 0
    for step in range(12):
        before = snapshot((state.params, state.opt_state))
        state, totals = run_block(
            plan, state, empty_totals(), fixed, data, settings, jnp.int32(step + 1)
        )
        assert same((state.params, state.opt_state), before) == poisoned[step]
        assert int(totals.accepted) == 1 - poisoned[step]
        assert np.isfinite(float(totals.loss))
        assert state.refused.tolist() == [0, sum(poisoned[: step + 1]), 0, 0]
        in_a_row = in_a_row + 1 if poisoned[step] else 0
        assert int(state.refused_in_a_row) == in_a_row
        assert int(state.step) == step + 1


def test_failed_solves_are_borne_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="cpmm_jax"):
        result = fit(start(fails_before=0.6), X, config=QUICK)
    refused = [report["refused"] for report in result.history]
    assert refused == sorted(refused)
    assert refused[-1] == result.refused
    assert 25 < result.refused < 80  # the last of two stratified times is below 0.6 once in five
    assert result.stopped == "finished"
    assert result.best_score > fit(start(), X, config=QUICK).best_score - 0.05
    [record] = caplog.records
    assert "refused" in record.getMessage()
    assert "failed ODE solve" in record.getMessage()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.last_model.means))


def test_an_outlier_that_overflows_is_passed_over() -> None:
    x = X[:540].copy()
    x[5] = 1e25  # squared it overflows float32
    result = fit(start(), x, config=QUICK, x_valid=X[540:])
    assert result.refused == sum(batches_with(5, 250))
    assert np.isfinite(result.history[-1]["loss"])


@pytest.mark.nan  # what is refused
@pytest.mark.parametrize(
    ("model", "optimizer", "cause", "remedy"),
    [
        (start(fails_before=2.0), None, "failed ODE solve", "became infinite"),
        (start(log_noise=np.nan), None, "non-finite loss", "standardise"),
        (start(cusp=0.0), None, "non-finite gradient", "lower the learning rate or clip"),
        (start(), optax.scale(float("inf")), "non-finite update", "lower the learning rate"),
    ],
    ids=["solve", "loss", "gradient", "update"],
)
def test_too_many_in_a_row_end_the_fit(
    model: FreeMixture, optimizer: Any, cause: str, remedy: str
) -> None:
    with pytest.raises(TrainingError) as caught:
        fit(model, X, config=replace(QUICK, max_refused=4, max_returns=0), optimizer=optimizer)
    message = str(caught.value)
    assert "\n" not in message
    assert "5 refused steps in a row at step 5 of 250" in message
    assert f"{cause} 5" in message
    assert remedy in message
    assert ("learning rate 0." in message) == (optimizer is None)
    result = caught.value.result
    assert (result.steps, result.refused, result.stopped) == (5, 5, "refused")
    assert result.history[-1]["loss"] is None
    assert same(nnx.state(result.last_model), nnx.state(model))


@pytest.mark.nan  # the score where a solve fails
def test_the_best_model_survives_the_end() -> None:
    """The first mean travels from -4 towards -2; beyond -2.6 the solve fails for good."""
    model = start(fails_above=-2.6)
    model.means[...] = model.means[...].at[0, 0, 0].set(-4.0)
    with pytest.raises(TrainingError, match="failed ODE solve 21") as caught:
        fit(model, X, config=replace(QUICK, report_every=5, max_returns=0))
    result = caught.value.result
    assert 0 < result.best_step <= result.steps - 21
    assert (
        float(result.model.means[...][0, 0, 0])
        <= -2.6
        < float(result.last_model.means[...][0, 0, 0])
    )
    assert result.history[-1]["valid_log_likelihood"] is None
    scores = [r["valid_log_likelihood"] for r in result.history]
    assert result.best_score == max(s for s in scores if s is not None)
