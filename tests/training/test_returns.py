"""Trouble during training: back to good parameters, with half the learning rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffrax
import jax.numpy as jnp
import pytest

import cpmm_jax as cpmm
from cpmm_jax.errors import Interrupted, TrainingError
from tests.models.small import small
from tests.training.stand_in import QUICK, FreeMixture, start
from tests.training.test_snapshots import X, Y, assert_same, stop_at, train


@pytest.mark.nan  # the score where a solve fails
def test_training_returns_from_where_solves_fail(caplog: pytest.LogCaptureFixture) -> None:
    """The solve fails as soon as the first mean is large; at a lower rate it gets no further."""
    model = start(fails_above=-2.6)
    model.means[...] = model.means[...].at[0, 0, 0].set(-4.0)
    model.solver = cpmm.SolverConfig(num_steps=None, max_steps=5)
    with pytest.raises(TrainingError, match="after 2 returns to good parameters") as caught:
        cpmm.fit(model, X, config=replace(QUICK, report_every=5, max_returns=2), progress=False)
    result = caught.value.result
    assert result.returns == 2
    assert [r["returns"] for r in result.history] == sorted(r["returns"] for r in result.history)
    rates = [r["learning_rate"] for r in result.history if r["step"] > 20]
    assert rates[-1] < 0.3 * rates[0]
    assert sum("half the learning rate" in r.getMessage() for r in caplog.records) == 2
    assert result.last_model.solver.max_steps == 5  # steps were not what was short


@pytest.mark.nan  # the score where a solve fails
def test_after_a_return_training_ends_well(tmp_path: Path) -> None:
    """Steps far too long lead to where no solve succeeds; from before it half of them go on."""
    model = start(fails_above=0.0)
    model.means[...] = model.means[...].at[0, 0, 0].set(-4.0)
    config = replace(QUICK, learning_rate=3.0, report_every=5)
    fitted: dict[str, Any] = {"config": config, "progress": False}
    whole = cpmm.fit(model, X, Y, **fitted)
    assert (whole.stopped, whole.returns) == ("finished", 2)
    assert whole.refused == 42
    assert whole.best_score > train().best_score
    with pytest.raises(Interrupted):
        cpmm.fit(model, X, Y, **fitted, checkpoints=tmp_path, callback=stop_at(20))
    assert_same(cpmm.fit(model, X, Y, **fitted, checkpoints=tmp_path, resume=True), whole)


def test_without_validation_training_returns_from_before_the_trouble() -> None:
    model = start(fails_above=0.0)
    model.means[...] = model.means[...].at[0, 0, 0].set(-4.0)
    config = replace(QUICK, learning_rate=3.0, report_every=5, valid_fraction=0.0)
    result = cpmm.fit(model, X, Y, config=config, progress=False)
    assert result.stopped == "finished" and 0 < result.returns <= 3


@pytest.mark.nan  # the density of a failed solve
@pytest.mark.slow
def test_a_solver_out_of_steps_is_given_more(tmp_path: Path) -> None:
    solver = cpmm.SolverConfig(
        solver=diffrax.Heun(), num_steps=None, rtol=1e-2, atol=1e-2, max_steps=5
    )
    model = small(solver=solver)
    config = replace(QUICK, steps=60, report_every=20, max_refused=3)
    fitted: dict[str, Any] = {"config": config, "progress": False}
    whole = cpmm.fit(model, X, Y, **fitted)
    assert (whole.stopped, whole.returns, whole.refused) == ("finished", 1, 4)
    assert whole.model.solver.max_steps == 20
    with pytest.raises(Interrupted):
        cpmm.fit(model, X, Y, **fitted, checkpoints=tmp_path, callback=stop_at(2))
    assert_same(cpmm.fit(model, X, Y, **fitted, checkpoints=tmp_path, resume=True), whole)


class Stiff(FreeMixture):
    """The further the first mean, the more steps; the steps of a solve are not its cost here."""

    def read(self, times: Any) -> Any:
        reading = super().read(times)
        far = jnp.abs(self.means[...]).max() > 8.0
        return reading._replace(num_steps=jnp.where(far, 700, 7))


def test_a_field_that_becomes_stiff_is_slowed_down(caplog: pytest.LogCaptureFixture) -> None:
    model = Stiff(start().means[...])
    model.means[...] = model.means[...].at[0, 0, 0].set(-7.9)
    config = replace(QUICK, learning_rate=6.0, report_every=5)
    result = cpmm.fit(model, X, Y, config=config, progress=False)
    steps = [report["ode_steps"] for report in result.history]
    assert max(steps) > 10 * steps[0] and steps[-1] == 7.0
    assert result.refused == 0 < result.returns <= 3
    assert "stiff" in caplog.text
