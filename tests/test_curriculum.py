from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cpmm_jax.curriculum import (
    Curriculum,
    CustomCurriculum,
    FlowCurriculum,
    InterpolantCurriculum,
    NoCurriculum,
    Stages,
)
from cpmm_jax.dynamics.flow import CNF
from cpmm_jax.errors import ConfigError, DataError
from cpmm_jax.models.direct import DirectMFA
from cpmm_jax.training.loop import fit
from tests.training.stand_in import QUICK, FreeMixture, planted, start

X, Y = planted(600)
FLOW = CNF(2, widths=(8,), output_scale=0.5, rngs=nnx.Rngs(0))
THREE = Stages(positions=(1.0, 0.5, 0.0), last_share=0.5)


def shrink(x: Any, v: float) -> Any:
    return x * (1 - v)


PROVIDERS = {
    "none": NoCurriculum(),
    "interpolant": InterpolantCurriculum(stages=THREE),
    "flow": FlowCurriculum(FLOW, stages=THREE),
    "custom": CustomCurriculum(shrink, stages=THREE),
}


@pytest.mark.parametrize("name", PROVIDERS)
def test_data_are_at_zero(name: str) -> None:
    x = jnp.asarray(X[:20], jnp.float32)
    moved = PROVIDERS[name].at(x, 0.0, jax.random.key(0))
    np.testing.assert_allclose(moved, x, atol=1e-6)


def test_the_interpolant_has_the_law_of_its_formula() -> None:
    x = jnp.full((20_000, 2), 3.0)
    moved = np.asarray(InterpolantCurriculum().at(x, 0.25, jax.random.key(0)))
    np.testing.assert_allclose(moved.mean(axis=0), 0.75 * 3, atol=0.01)
    np.testing.assert_allclose(moved.std(axis=0), 0.25, atol=0.01)
    latent = np.asarray(InterpolantCurriculum().at(x, 1.0, jax.random.key(1)))
    np.testing.assert_allclose(np.cov(latent.T), np.eye(2), atol=0.05)


def test_a_flow_carries_to_all_stages_as_to_each(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, curriculum = jnp.asarray(X[:50], jnp.float32), PROVIDERS["flow"]
    with caplog.at_level("INFO", "cpmm_jax"):
        together = curriculum.course(x)
        monkeypatch.setattr("cpmm_jax.curriculum.MOST_BYTES", 0)
        apart = curriculum.course(x)
    said = [record.getMessage() for record in caplog.records]
    assert "at once" in said[0]
    assert "stage by stage" in said[1]
    for v in THREE.positions:
        np.testing.assert_allclose(together(v), apart(v), atol=1e-4)


@pytest.mark.parametrize(
    ("stages", "steps", "ends"),
    [
        (THREE, 100, [25, 50, 100]),
        (Stages.linear(5, last_share=0.2), 50, [10, 20, 30, 40, 50]),
        (Stages(positions=(0.0,), last_share=1.0), 7, [7]),
        (THREE, 1, [0, 0, 1]),
    ],
)
def test_steps_are_divided(stages: Stages, steps: int, ends: list[int]) -> None:
    stages.check()
    assert stages.ends(steps) == ends


def test_positions_by_rule() -> None:
    assert Stages.linear(3).positions == (1.0, 0.5, 0.0)
    geometric = Stages.geometric(4, first=0.8, smallest=0.1)
    np.testing.assert_allclose(geometric.positions, (0.8, 0.283, 0.1, 0.0))


@pytest.mark.parametrize("name", PROVIDERS)
def test_fit_goes_down_the_stages(name: str) -> None:
    config = replace(QUICK, steps=240, report_every=60)
    result = fit(start(), X, Y, config=config, curriculum=PROVIDERS[name])
    if name == "none":
        assert "v" not in result.history[0]
        return
    assert [report["step"] for report in result.history] == [60, 120, 180, 240]
    assert [report["v"] for report in result.history] == [1.0, 0.5, 0.0, 0.0]
    assert result.best_step >= 120  # the best is looked for on the data themselves
    rates = [report["learning_rate"] for report in result.history]
    assert rates[1] == pytest.approx(config.learning_rate)  # full strength until the last stage
    assert rates[3] == pytest.approx(config.learning_rate * config.final_learning_rate, rel=0.2)
    mixture = result.model.read(np.linspace(0, 1, 2)).mixture
    plain = fit(start(), X, Y, config=config)
    assert result.best_score > plain.best_score - 0.05
    assert np.isfinite(mixture.log_prob(X)).all()


@pytest.mark.parametrize("name", ["interpolant", pytest.param("flow", marks=pytest.mark.slow)])
def test_stages_trace_nothing_anew(name: str) -> None:
    config = replace(QUICK, steps=8, report_every=8)
    fit(start(), X, config=config, curriculum=PROVIDERS[name])
    traces = FreeMixture.traces
    more = replace(PROVIDERS[name], stages=Stages.linear(5))
    fit(start(), X, config=config, curriculum=more)
    assert FreeMixture.traces == traces


@dataclass(frozen=True, eq=False)
class Known(Curriculum):
    """The data at every position, with a target."""

    value: float | None = None

    def at(self, x: Any, v: Any, key: Any) -> Any:
        return x

    def target(self, u: Any, v: float) -> float | None:
        return self.value


@pytest.mark.parametrize(
    ("value", "tolerance", "left"),
    [
        (-1e3, 0.1, True),  # a target that is reached at once
        (1e3, 0.1, False),  # one that never is
        (None, 1e3, True),  # no target: gains below the tolerance
    ],
)
def test_a_stage_is_left_when_the_mixture_has_caught_up(
    value: float | None, tolerance: float, left: bool
) -> None:
    stages = replace(THREE, tolerance=tolerance, least_steps=10)
    config = replace(QUICK, steps=120, report_every=120)
    result = fit(start(), X, config=config, curriculum=Known(value, stages=stages))
    ends = {report["v"]: report["step"] for report in result.history}
    # Without a target a gain is known from the second report on.
    expected = {1.0: 10 if value else 20, 0.5: 20 if value else 40, 0.0: 120}
    assert ends == (expected if left else {1.0: 30, 0.5: 60, 0.0: 120})


def test_components_are_apart_after_the_first_stage() -> None:
    """At v = 1 equal components are an optimum; starting apart, they stay apart."""
    stages = Stages(positions=(1.0, 0.0), last_share=0.01)
    model = DirectMFA(2, 1, 9, initial_noise=0.1, rngs=nnx.Rngs(0))
    config = replace(QUICK, steps=400, num_times=1, learning_rate=1e-2)
    result = fit(model, X, config=config, curriculum=InterpolantCurriculum(stages=stages))
    means = np.asarray(result.last_model.means[...])[0]
    between = np.linalg.norm(means[:, None] - means[None], axis=-1)
    assert np.median(between[np.triu_indices(9, 1)]) > 0.7
    assert means.var(axis=0).mean() > 0.3  # of the unit variance of the latent space


def test_stages_can_be_watched() -> None:
    seen: list[tuple[float, Any]] = []
    config = replace(QUICK, steps=40, report_every=5)
    curriculum = PROVIDERS["interpolant"]
    result = fit(
        start(),
        X,
        config=config,
        curriculum=curriculum,
        stage_callback=lambda v, model: seen.append((v, model)),
    )
    assert [v for v, _ in seen] == [1.0, 0.5, 0.0]
    assert seen[-1][1] is result.model
    first, second = (model.read(jnp.zeros(1)).mixture.components.means for _, model in seen[:2])
    assert np.isfinite(first).all()  # not given away to the steps that followed
    assert np.abs(first - second).max() > 0


def test_providers_see_the_examples_alone() -> None:
    """Not the rows of zeros to which they are padded: a map may be undefined there."""
    seen = []

    def on_circle(x: Any, v: float) -> Any:
        seen.append(len(x))
        return x / jnp.linalg.norm(x, axis=1, keepdims=True) ** v

    config = replace(QUICK, steps=4, report_every=2)
    fit(start(), X, config=config, curriculum=CustomCurriculum(on_circle, stages=THREE))
    assert set(seen) == {540, 60}


@dataclass(frozen=True, eq=False)
class Broken(Curriculum):
    kind: str = ""

    def at(self, x: Any, v: Any, key: Any) -> Any:
        return x[:-1] if self.kind == "shape" else jnp.full_like(x, jnp.nan)


@pytest.mark.nan  # what a provider returns
@pytest.mark.parametrize(
    ("curriculum", "kind", "words"),
    [
        (FlowCurriculum(CNF(3, rngs=nnx.Rngs(0))), ConfigError, "D = 2 features.*got 3"),
        (Broken("shape", stages=THREE), DataError, r"shape that it is given.*got .*v = 1"),
        (Broken("value", stages=THREE), DataError, "finite values.*rows.*v = 1"),
        (shrink, ConfigError, "must be a Curriculum.*got function; wrap"),
        (InterpolantCurriculum(stages=Stages(positions=())), ConfigError, "lie in"),
        (InterpolantCurriculum(stages=Stages(positions=(1.5, 0.0))), ConfigError, "lie in.*1.5"),
        (InterpolantCurriculum(stages=Stages(positions=(1.0, 0.5))), ConfigError, "end at 0"),
        (InterpolantCurriculum(stages=Stages(positions=(0.5, 1.0, 0.0))), ConfigError, "must fall"),
        (InterpolantCurriculum(stages=replace(THREE, last_share=0.0)), ConfigError, "last_share"),
        (InterpolantCurriculum(stages=replace(THREE, tolerance=0.0)), ConfigError, "tolerance"),
        (InterpolantCurriculum(stages=replace(THREE, least_steps=0)), ConfigError, "least_steps"),
    ],
)
def test_bad_curricula(curriculum: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        fit(start(), X, config=QUICK, curriculum=curriculum)
    assert "\n" not in str(caught.value)
