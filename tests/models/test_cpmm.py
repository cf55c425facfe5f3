"""The model: what is learned, what is read, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from cpmm_jax.dynamics.solve import NOT_FINITE, STEPS_EXHAUSTED, SolverConfig
from cpmm_jax.dynamics.trajectory import GridTimes
from cpmm_jax.errors import ConfigError, SolverError
from cpmm_jax.models.cpmm import CPMM

QUICK = SolverConfig(num_steps=8)
EXHAUSTED = SolverConfig(solver=diffrax.Heun(), num_steps=None, max_steps=2, rtol=1e-6, atol=1e-6)
NAMES = {  # as checkpoints name them
    "augmented",
    "class_logits",
    "field/layers/0/bias",
    "field/layers/0/kernel",
    "field/output/bias",
    "field/output/kernel",
    "field/times/0/kernel",
    "log_floor",
    "log_noise",
    "logits",
    "loadings",
    "means",
    "trajectory_logits",
}


def small(seed: int = 0, **settings: Any) -> CPMM:
    """Return D = 2, R = 1, C = 2, S = 3."""
    sizes = {"dim": 2, "rank": 1, "num_classes": 2, "num_trajectories": 3}
    cheap = {"augmented": 4, "widths": (8,), "solver": QUICK}
    return CPMM(**(sizes | cheap | settings), rngs=nnx.Rngs(seed))


def uneven(model: CPMM) -> CPMM:
    """Give the classes and trajectories weights of their own."""
    lead = model.trajectory_logits[...].shape
    model.trajectory_logits[...] = jnp.cos(jnp.arange(np.prod(lead))).reshape(lead)
    model.class_logits[...] = jnp.linspace(-0.5, 0.5, lead[0])
    return model


def examples(n: int, dim: int = 2, seed: int = 7) -> Array:
    return jax.random.normal(jax.random.key(seed), (n, dim))


def leaves(tree: Any) -> list[Array]:
    return jax.tree.leaves(tree)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("num_times", [1, 5])
def test_shapes(rank: int, num_times: int) -> None:
    model = CPMM(3, rank, 2, 2, widths=(8,), solver=QUICK, rngs=nnx.Rngs(0))
    mixture = model.extract(num_times)
    lead = (2, 2 * num_times)
    assert mixture.class_logits.shape == (2,)
    assert mixture.components.logits.shape == lead
    assert mixture.components.means.shape == (*lead, 3)
    assert mixture.components.loadings.shape == (*lead, 3, rank)
    assert mixture.components.log_noise.shape == (*lead, 3)
    chex.assert_tree_all_finite(mixture)


def test_one_feature() -> None:
    model = CPMM(1, 1, widths=(8,), solver=QUICK, rngs=nnx.Rngs(0))
    assert bool(jnp.all(jnp.isfinite(model.extract(4).log_prob(jnp.zeros((3, 1))))))


def test_reading_reports_steps_and_success() -> None:
    reading = small().read(jnp.array([0.2, 0.9]))
    assert int(reading.num_steps) == 8
    assert bool(reading.ok)


def test_extraction_has_any_number_of_times() -> None:
    """The trajectory does not depend on where it is read."""
    model = small()
    few, many = model.extract(3), model.extract(9)
    assert (few.num_components, many.num_components) == (9, 27)
    # The midpoints of 3 cells are among those of 9.
    thinned = many.components.means.reshape(2, 3, 9, 2)[:, :, 1::3]
    means = few.components.means.reshape(2, 3, 3, 2)
    np.testing.assert_allclose(thinned, means, rtol=1e-4, atol=1e-5)
    # More times are a finer rule for the same integral.
    x = examples(20)
    fine = model.extract(200).log_prob(x)
    errors = [float(jnp.max(jnp.abs(mixture.log_prob(x) - fine))) for mixture in (few, many)]
    assert errors[1] < 0.3 * errors[0]
    assert errors[1] < 0.05


def test_untrained_trajectories_cross_standardised_data() -> None:
    for dim in (2, 16, 64):
        travelled = []
        for seed in range(4):
            means = CPMM(dim, min(2, dim), rngs=nnx.Rngs(seed)).extract(33).components.means[0]
            travelled.append(float(jnp.mean(jnp.max(means, axis=0) - jnp.min(means, axis=0))))
        assert 0.2 < np.mean(travelled) < 3.0, dim
        assert min(travelled) > 0.1, dim


def test_zero_output_starts_at_rest() -> None:
    components = small(output_scale=0.0).extract(4).components
    by_time = components.means.reshape(2, 3, 4, 2)
    np.testing.assert_allclose(by_time, jnp.repeat(by_time[:, :, :1], 4, axis=2), rtol=1e-5)


def test_starts_at_given_means_with_given_noise() -> None:
    centres = np.arange(12.0).reshape(2, 3, 2) - 5.0
    model = small(initial_means=centres, initial_noise=0.04, noise_floor=1e-6)
    first = jax.tree.map(
        lambda leaf: leaf.reshape(2, 3, 500, -1)[:, :, 0], model.extract(500).components
    )
    np.testing.assert_allclose(first.means, centres, atol=0.02)
    np.testing.assert_allclose(jnp.exp(first.log_noise), np.full((2, 3, 2), 0.04), rtol=0.02)


@pytest.mark.parametrize("floor", [1e-2, np.array([1e-3, 4.0])])
def test_noise_floor_bounds_every_variance(floor: Any) -> None:
    model = small(noise_floor=floor, initial_noise=1e-8)
    noise = jnp.exp(model.extract(16).components.log_noise)
    assert bool(jnp.all(noise >= 0.999 * np.broadcast_to(floor, (1, 1, 2))))
    assert float(jnp.min(noise[..., 0])) < 2e-2


def test_weights_are_constant_along_a_trajectory_unless_they_evolve() -> None:
    constant, evolving = uneven(small()), uneven(small(evolve_weights=True))
    assert constant.logits is None
    logits = constant.extract(6).components.logits.reshape(2, 3, 6)
    expected = jnp.repeat(constant.trajectory_logits[...][..., None], 6, axis=2)
    np.testing.assert_array_equal(logits, expected)
    moving = evolving.extract(6).components.logits.reshape(2, 3, 6)
    assert float(jnp.min(jnp.std(moving, axis=2))) > 0.01
    np.testing.assert_allclose(
        evolving.mixture(jnp.zeros(1)).components.logits, evolving.trajectory_logits[...], atol=1e-6
    )


def test_augmented_channels_matter_but_are_no_part_of_the_mixture() -> None:
    model = small()
    assert model.augmented[...].shape == (2, 3, 4)
    assert not np.any(jax.jit(jax.grad(_means_at_start))(model).augmented[...])
    assert np.any(jax.jit(jax.grad(_means_at_end))(model).augmented[...])
    none = small(augmented=0)
    assert none.augmented[...].shape == (2, 3, 0)
    chex.assert_tree_all_finite(none.extract(2))


def _means_at_start(model: CPMM) -> Array:
    return jnp.sum(model.mixture(jnp.zeros(1)).components.means ** 2)


def _means_at_end(model: CPMM) -> Array:
    return jnp.sum(model.mixture(jnp.ones(1)).components.means ** 2)


def test_classes_have_fields_of_their_own() -> None:
    model = small(field_per_class=True)
    assert all(leaf.shape[0] == 2 for leaf in leaves(model.field))
    kernel = model.field.output.kernel[...]
    assert bool(jnp.all(kernel[0] != kernel[1]))

    @jax.jit
    @jax.grad
    def gradient(model: CPMM) -> Array:
        first = jax.tree.map(lambda leaf: leaf[0], model.mixture(GridTimes()(None, 3)).components)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves(first))  # type: ignore[return-value]

    of_first = gradient(model)
    for leaf in leaves((of_first.field, of_first.means, of_first.augmented)):
        assert np.any(leaf[0])
        assert not np.any(leaf[1])
    shared = gradient(small())
    assert not np.any(shared.means[...][1])
    assert all(np.any(leaf) for leaf in leaves(shared.field))


def test_backsolve_gives_the_gradient_of_the_likelihood() -> None:
    x, times = examples(20), GridTimes()(None, 4)
    accurate = SolverConfig(solver=diffrax.Heun(), num_steps=32)
    backwards = replace(accurate, adjoint=diffrax.BacksolveAdjoint())

    @jax.jit
    @jax.grad
    def gradient(model: CPMM) -> Array:
        return -jnp.mean(model.mixture(times).log_prob(x))

    expected, _ = ravel_pytree(gradient(uneven(small(solver=accurate))))
    got, _ = ravel_pytree(gradient(uneven(small(solver=backwards))))
    assert float(jnp.max(jnp.abs(expected))) > 0.05
    np.testing.assert_allclose(got, expected, atol=1e-3)


@jax.jit
def continuous(model: CPMM, x: Array) -> Array:
    return model.continuous_log_prob(x)


def value_and_gradient(function: Callable[[CPMM], Array], model: CPMM) -> tuple[Array, Array]:
    """Return log p(x) of every example and the gradient of their mean, of one program."""

    @jax.jit
    def both(model: CPMM) -> tuple[Array, CPMM]:
        values, pull = jax.vjp(function, model)
        return values, pull(jnp.full_like(values, 1.0 / values.size))[0]

    values, gradient = both(model)
    return values, ravel_pytree(gradient)[0]


def test_mixture_inside_the_solver_is_the_limit_of_many_components() -> None:
    solver = SolverConfig(solver=diffrax.Heun(), num_steps=128)
    model, x = uneven(small(solver=solver)), 2.0 * examples(30)
    sampled = model.extract(2000).log_prob(x)
    np.testing.assert_allclose(continuous(model, x), sampled, atol=1e-3)


def test_evolving_weights_inside_the_solver_and_gradients() -> None:
    solver = SolverConfig(solver=diffrax.Heun(), num_steps=128)
    model, x = uneven(small(solver=solver, evolve_weights=True)), examples(5)
    times = GridTimes()(None, 1000)
    got = value_and_gradient(lambda m: m.continuous_log_prob(x), model)
    expected = value_and_gradient(lambda m: m.mixture(times).log_prob(x), model)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-3)
    assert float(jnp.max(jnp.abs(expected[1]))) > 0.1
    np.testing.assert_allclose(got[1], expected[1], atol=1e-3)


def test_mixture_inside_the_solver_does_not_underflow() -> None:
    solver = SolverConfig(solver=diffrax.Heun(), num_steps=2000)
    settings = {"num_classes": 1, "num_trajectories": 2, "initial_noise": 1.0}
    model = small(dim=50, **settings, solver=solver, field_per_class=True)
    x = 4.0 * examples(6, dim=50)
    sampled = np.asarray(model.extract(2000).log_prob(x))
    assert sampled.max() < -200.0
    assert not np.any(np.exp(sampled))  # the densities are 0 in float32
    values, gradient = value_and_gradient(lambda m: m.continuous_log_prob(x), model)
    np.testing.assert_allclose(values, sampled, rtol=1e-5, atol=1e-3)
    assert bool(jnp.all(jnp.isfinite(gradient)))
    assert float(jnp.max(jnp.abs(gradient))) > 0.1


def test_model_is_a_plain_pytree() -> None:
    x, times = examples(4), GridTimes()(None, 3)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def value(model: CPMM, times: Array) -> Array:
        return model.mixture(times).log_prob(x)

    models = [small(seed) for seed in range(3)]
    assert len({jax.tree.structure(model) for model in models}) == 1
    one_by_one = [value(model, times) for model in models]  # traced once
    value(jax.tree.map(lambda leaf: 0.5 * leaf, models[0]), times)
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *models)
    many = jax.jit(jax.vmap(lambda model: model.mixture(times).log_prob(x)))(stacked)
    np.testing.assert_allclose(many, jnp.stack(one_by_one), rtol=1e-4)
    assert jax.tree.structure(small(solver=replace(QUICK, num_steps=4))) != jax.tree.structure(
        models[0]
    )
    np.testing.assert_allclose(value(models[1], times), models[1].extract(3).log_prob(x), rtol=1e-5)


def test_names_in_a_checkpoint_are_plain() -> None:
    model = small(evolve_weights=True)
    state = nnx.to_pure_dict(nnx.state(model))
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    assert {"/".join(str(key.key) for key in path) for path, _ in paths} == NAMES
    learned = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert set(state) - set(learned) == {"log_floor"}  # a setting, never trained


@pytest.mark.parametrize("settings", [{}, {"field_per_class": True, "evolve_weights": True}])
def test_same_seed_same_parameters(settings: dict[str, Any]) -> None:
    first, again, other = small(0, **settings), small(0, **settings), small(1, **settings)
    chex.assert_trees_all_equal(leaves(first), leaves(again))
    assert any(bool(jnp.any(a != b)) for a, b in zip(leaves(first), leaves(other), strict=True))


def test_parameters_in_float64(x64: None) -> None:
    model = small(param_dtype=jnp.float64, evolve_weights=True)
    assert all(leaf.dtype == jnp.float64 for leaf in leaves(model))
    mixture = model.extract(3)
    assert all(leaf.dtype == jnp.float64 for leaf in leaves(mixture))
    assert mixture.log_prob(examples(2)).dtype == jnp.float64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "`dim` must be at least 1; got 0"),
        ({"num_classes": 0}, "`num_classes` must be at least 1; got 0"),
        ({"num_trajectories": -1}, "`num_trajectories` must be at least 1; got -1"),
        ({"rank": 3}, "`rank` must lie between 0 and D = 2, the features; got 3"),
        ({"rank": -1}, "`rank` must lie between 0 and D = 2, the features; got -1"),
        ({"augmented": -1}, "`augmented` must be at least 0; got -1"),
        ({"initial_noise": 0.0}, "`initial_noise` must be a positive variance; got 0.0"),
        ({"initial_noise": np.nan}, "`initial_noise` must be a positive variance; got nan"),
        ({"noise_floor": 0.0}, "`noise_floor` must be positive, .* smallest 0.0"),
        ({"noise_floor": np.ones(3)}, r"`noise_floor` must .* \(2,\); got shape \(3,\)"),
        ({"noise_floor": np.ones(0)}, r"`noise_floor` must .* got shape \(0,\)"),
        (
            {"initial_means": np.zeros((3, 2))},
            r"`initial_means` must have shape \(C, S, D\) = \(2, 3, 2\); got \(3, 2\)",
        ),
        ({"widths": ()}, "`widths` must list at least one width"),
        ({"activation": "relu"}, "`activation` must be one of 'sin', 'tanh'; got 'relu'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        small(**settings)
    assert "\n" not in str(caught.value)


def test_extraction_of_no_times() -> None:
    with pytest.raises(ConfigError, match="`num_times` must be at least 1; got 0"):
        small().extract(0)


def test_failed_solves_are_named() -> None:
    exhausted = small(solver=EXHAUSTED)
    assert int(exhausted.read(jnp.ones(1)).result) == STEPS_EXHAUSTED
    with pytest.raises(SolverError, match="`max_steps`"):
        exhausted.extract(3)
    x = examples(2)
    wild = small(num_classes=1, solver=SolverConfig(solver=diffrax.Euler(), num_steps=2))
    wild.field.output.kernel[...] = jnp.full_like(wild.field.output.kernel[...], jnp.inf)
    reading = wild.read(jnp.ones(1))
    assert int(reading.result) == NOT_FINITE
    assert not bool(reading.ok)
    with pytest.raises(SolverError, match="infinite or NaN"):
        wild.extract(3)
    with pytest.raises(SolverError, match="infinite or NaN"):
        wild.continuous_log_prob(x)
    assert bool(jnp.all(jnp.isnan(continuous(wild, x))))  # no exception under jit
