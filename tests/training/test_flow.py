"""Training of the flow: known optima, couplings, the latent check, resuming, refusal, bad input."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from cpmm_jax.dynamics.flow import CNF
from cpmm_jax.dynamics.solve import SolverConfig
from cpmm_jax.dynamics.trace import HutchinsonTrace
from cpmm_jax.errors import ConfigError, DataError, FlowWarning, RunError, TrainingError
from cpmm_jax.training.config import TrainConfig
from cpmm_jax.training.flow import FlowResult, fit_flow
from cpmm_jax.training.flow_objective import (
    Ends,
    FlowMatching,
    MaximumLikelihood,
    OptimalTransportCoupling,
)
from cpmm_jax.training.latent import check_latent

MIX = np.array([[1.0, 0.0], [0.8, 0.5]])
LAW = scipy.stats.multivariate_normal([0.5, -0.3], MIX @ MIX.T)
X, X_VALID = (LAW.rvs(2000, random_state=seed).astype(np.float32) for seed in (0, 1))
OBJECTIVES = {
    "likelihood": MaximumLikelihood(),
    "matching": FlowMatching(),
    "optimal transport": FlowMatching(coupling=OptimalTransportCoupling()),
}
SHORT = {"steps": 300, "batch_size": 128, "learning_rate": 1e-2}


def build() -> CNF:
    return CNF(
        2,
        widths=(32,),
        activation="tanh",
        solver=SolverConfig(num_steps=8),
        eval_solver=SolverConfig(solver=diffrax.Bosh3(), num_steps=10),
        rngs=nnx.Rngs(0),
    )


@cache
def fitted(name: str) -> FlowResult:
    # Independent pairs make noisy gradients, but cheap steps.
    return fit(name, steps=2000 if name == "matching" else 300)


def fit(name: str = "matching", x: Any = X, x_valid: Any = X_VALID, **settings: Any) -> FlowResult:
    path = settings.pop("metrics_path", None)
    config = TrainConfig(**{**SHORT, **settings})
    return fit_flow(
        build(), x, objective=OBJECTIVES[name], config=config, x_valid=x_valid, metrics_path=path
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] if n == "optimal transport" else [])
        for n in OBJECTIVES
    ],
)
def test_a_gaussian_is_recovered(name: str) -> None:
    result = fitted(name)
    best = LAW.logpdf(X_VALID).mean()
    assert result.valid_log_likelihood == pytest.approx(best, abs=0.05)
    assert result.latent.ok
    assert result.best_loss == min(report["valid_loss"] for report in result.history)
    assert (result.refused, result.stopped) == (0, "finished")


def test_matching_gives_the_law_of_the_straight_paths() -> None:
    halfway = np.asarray(fitted("matching").flow.transform(X_VALID, 0.5), np.float64)
    covariance = 0.25 * (LAW.cov + np.eye(2))
    np.testing.assert_allclose(halfway.mean(axis=0), 0.5 * LAW.mean, atol=0.06)
    np.testing.assert_allclose(np.cov(halfway.T), covariance, atol=0.06)


def test_coupled_paths_are_shorter() -> None:
    lengths = {}
    for name in ("matching", "optimal transport"):
        latent = fitted(name).flow.transform(X_VALID, 1.0)
        lengths[name] = float(jnp.mean(jnp.sum((latent - X_VALID) ** 2, axis=1)))
    # The squared Wasserstein distance of the two Gaussians is the least there is.
    root = scipy.linalg.sqrtm(LAW.cov)
    least = (LAW.mean**2).sum() + np.trace(LAW.cov + np.eye(2) - 2 * root.real)
    assert lengths["optimal transport"] == pytest.approx(least, abs=0.15)
    assert lengths["optimal transport"] <= lengths["matching"] + 0.02


def test_assignment_is_the_best_permutation() -> None:
    rng = np.random.default_rng(0)
    x, e = rng.normal(size=(2, 5, 3))
    rows = OptimalTransportCoupling().assign(lambda: [(x, e)])[0]
    costs = {p: ((e[list(p)] - x) ** 2).sum() for p in itertools.permutations(range(5))}
    assert tuple(rows.tolist()) == min(costs, key=costs.__getitem__)


def test_penalties_are_the_energies() -> None:
    flow, x, key = build(), jnp.asarray(X[:8]), jax.random.key(0)
    flow.field.output.kernel[...] = jnp.full((32, 2), 0.05)

    @jax.jit
    def losses(flow: CNF) -> Any:
        weights = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.25))
        trace = HutchinsonTrace()
        terms = [
            MaximumLikelihood(trace=trace, kinetic=k, jacobian=j).loss(flow, x, key)[0]
            for k, j in weights
        ]
        reading = flow.read(x, jnp.ones(1), trace=trace, key=key, energies=True, solver=flow.solver)
        return terms, reading.kinetic, reading.jacobian

    (plain, kinetic, jacobian), speed, roughness = losses(flow)
    assert float(kinetic - plain) == pytest.approx(0.5 * float(speed.mean()), rel=1e-3)
    assert float(jacobian - plain) == pytest.approx(0.25 * float(roughness.mean()), rel=1e-3)


def test_matching_loss_by_hand() -> None:
    flow, x = build(), jnp.asarray(X[:4])
    e, v = jnp.ones((4, 2), x.dtype), jnp.array([0.0, 0.2, 0.5, 1.0], x.dtype)
    loss, _ = FlowMatching().loss(flow, x, Ends(e, v))  # an untrained flow stands still
    assert float(loss) == pytest.approx(float(np.mean((1.0 - np.asarray(x)) ** 2)), rel=1e-6)


def test_steps_depend_on_their_number_alone() -> None:
    with pytest.warns(FlowWarning):
        whole = fit("optimal transport", steps=40, report_every=40)
    with pytest.warns(FlowWarning):
        parts = fit("optimal transport", steps=40, report_every=7)
    for one, other in zip(
        jax.tree.leaves(whole.last_flow), jax.tree.leaves(parts.last_flow), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_reports_are_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    result = fit(metrics_path=path, report_every=150)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == list(result.history)
    assert [line["step"] for line in lines] == [150, 300]
    with pytest.raises(RunError, match="exists"):
        fit(metrics_path=path)


def test_without_validation_the_last_flow_is_taken() -> None:
    result = fit(x_valid=None, valid_fraction=0.0)
    assert result.best_loss is None
    assert result.valid_log_likelihood is None
    assert result.best_step == 300
    assert result.latent.num_examples == 2000


def test_training_stops_early_without_improvement() -> None:
    with pytest.warns(FlowWarning):
        result = fit(learning_rate=1e-30, report_every=10, patience=2)
    assert (result.stopped, result.steps, result.best_step) == ("early stopping", 20, 0)


@pytest.mark.nan  # a loss that is refused
def test_steps_that_are_not_finite_are_refused() -> None:
    with pytest.raises(TrainingError, match="4 refused steps in a row at step") as caught:
        fit(learning_rate=3e38, warmup_steps=0, max_refused=3)
    assert caught.value.result.stopped == "refused"
    assert caught.value.result.flow.transform(X_VALID, 1.0).shape == X_VALID.shape


def test_a_poor_latent_space_is_told() -> None:
    with pytest.warns(FlowWarning, match=r"standard normal; got .*covariance .*; train"):
        result = fit(steps=1)
    assert not result.latent.ok


@pytest.mark.parametrize("dim", [1, 2, 40])
def test_latent_check_knows_a_normal(dim: int) -> None:
    rng = np.random.default_rng(0)
    for count in (100, 2000):
        u = rng.normal(size=(count, dim))
        assert check_latent(u).ok
        assert not check_latent(u + 0.5).ok
        assert not check_latent(2 * u).ok
        assert not check_latent(np.full_like(u, np.nan)).ok


def test_latent_check_sees_the_shape() -> None:
    rng = np.random.default_rng(0)
    u = rng.normal(size=(2000, 2))
    ring = np.sqrt(2) * u / np.linalg.norm(u, axis=1, keepdims=True)
    signs = rng.choice([-1.0, 1.0], size=(2000, 2))
    for points in (ring, signs):  # mean and covariance are right
        check = check_latent(points)
        assert check.mean_error <= check.limits[0]
        assert check.covariance_error <= check.limits[1]
        assert check.quantile_error > check.limits[2]


BAD = {
    "another D": (lambda: fit(x=np.ones((9, 3))), DataError, "`x`.*D = 2.*got D = 3"),
    "NaN": (lambda: fit(x=[[0.0, np.nan]]), DataError, "`x` must be finite; got NaN"),
    "too large": (lambda: fit(x=[[0.0, 1e300]]), DataError, "`x` must be finite"),
    "validation": (lambda: fit(x_valid=np.ones((9, 3))), DataError, "`x_valid`.*got D = 3"),
    "patience": (
        lambda: fit(x_valid=None, valid_fraction=0.0, patience=1),
        ConfigError,
        "`patience`.*none",
    ),
    "steps": (lambda: fit(steps=0), ConfigError, "`steps`.*got 0"),
    "flow": (
        lambda: fit_flow(3, X, objective=FlowMatching()),  # type: ignore[arg-type]
        ConfigError,
        "`flow` must be a CNF; got int",
    ),
    "kinetic": (lambda: MaximumLikelihood(kinetic=-1.0), ConfigError, "`kinetic`.*got -1"),
    "jacobian": (lambda: MaximumLikelihood(jacobian=np.nan), ConfigError, "`jacobian`.*got nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
