"""The same laws for a model with an ODE in it."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from cpmm_jax.dynamics.solve import SolverConfig
from cpmm_jax.errors import TrainingError
from cpmm_jax.models.cpmm import CPMM
from cpmm_jax.training.loop import fit
from tests.training.stand_in import QUICK, planted, planted_log_prob

X, Y = planted(600)
SETTINGS = replace(QUICK, num_times=4, learning_rate=0.02)


def small() -> CPMM:
    solver = SolverConfig(num_steps=4)
    return CPMM(2, 1, num_classes=2, widths=(32,), solver=solver, rngs=nnx.Rngs(0))


def test_learns_and_gives_the_same_result_again() -> None:
    model = small()
    floor = np.asarray(model.log_floor[...])
    result = fit(model, X, Y, config=SETTINGS)
    x_test, y_test = planted(1000, seed=4)
    joint = np.asarray(result.model.extract(4).class_log_prob(x_test))[np.arange(1000), y_test]
    truth = planted_log_prob(x_test, y_test).mean()
    assert truth - 0.4 < joint.mean() <= truth
    assert result.history[0]["ode_steps"] == 4
    assert result.refused == 0
    np.testing.assert_array_equal(np.asarray(result.model.log_floor[...]), floor)
    again = fit(small(), X, Y, config=SETTINGS)
    assert again.compile_seconds < 0.5 * result.compile_seconds  # nothing compiled anew
    for a, b in zip(*map(jax.tree.leaves, (result.last_model, again.last_model)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.nan  # states of a failed solve
def test_a_field_that_blows_up_is_named() -> None:
    model = small()
    for leaf in jax.tree.leaves(model.field, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)):
        leaf[...] = leaf[...] * 1e30
    with pytest.raises(TrainingError, match="the state became infinite or NaN") as caught:
        fit(model, X, Y, config=replace(SETTINGS, max_refused=3, max_returns=0))
    assert "\n" not in str(caught.value)
    assert "failed ODE solve 4" in str(caught.value)
    result = caught.value.result
    for a, b in zip(*map(jax.tree.leaves, (result.model, model)), strict=True):
        np.testing.assert_array_equal(a, b)
