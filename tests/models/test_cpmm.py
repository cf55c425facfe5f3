"""The model: what is learned, what is read, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from cpmm_jax.dynamics.solve import NOT_FINITE, SolverConfig
from cpmm_jax.dynamics.trajectory import GridTimes
from cpmm_jax.errors import ConfigError, SolverError
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.models.cpmm import CPMM, _read
from cpmm_jax.models.reading import Reading
from tests.models.small import QUICK, examples, leaves, log_prob, small, uneven, wild

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


ENDS = np.array([0.0, 1.0], np.float32)  # most tests read here, by one compiled program


@jax.jit
def read(model: CPMM, times: Array) -> Reading:
    return model.read(times)


@pytest.mark.parametrize(("dim", "rank", "num_times"), [(1, 1, 4), (3, 0, 1), (3, 3, 5)])
def test_shapes(dim: int, rank: int, num_times: int) -> None:
    model = CPMM(dim, rank, 2, 2, widths=(8,), solver=QUICK, rngs=nnx.Rngs(0))
    mixture = model.extract(num_times)
    lead = (2, 2 * num_times)
    assert mixture.class_logits.shape == (2,)
    assert mixture.components.logits.shape == lead
    assert mixture.components.means.shape == (*lead, dim)
    assert mixture.components.loadings.shape == (*lead, dim, rank)
    assert mixture.components.log_noise.shape == (*lead, dim)
    chex.assert_tree_all_finite(mixture)
    assert model.augmented[...].shape == (2, 2, 2 * (rank + 2) * dim)
    assert np.isfinite(log_prob(mixture, np.zeros((3, dim)))).all()


def test_reading_reports_steps_and_success() -> None:
    reading = read(small(), ENDS)
    assert int(reading.num_steps) == 8
    assert bool(reading.ok)


def test_extraction_has_any_number_of_times() -> None:
    """The trajectory does not depend on where it is read."""
    model = small()
    few, many = model.extract(3), model.extract(243)
    assert (few.num_components, many.num_components) == (9, 729)

    def thinned(every: int) -> HierarchicalMFA:
        """Keep the midpoints of fewer cells; they are among those of 243."""
        kept = np.arange(729).reshape(3, 243)[:, every // 2 :: every].ravel()
        components = jax.tree.map(lambda leaf: np.asarray(leaf)[:, kept], many.components)
        return HierarchicalMFA(many.class_logits, components)

    for a, b in zip(leaves(few), leaves(thinned(81)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # More times are a finer rule for the same integral.
    x = examples(20)
    fine = log_prob(many, x)
    errors = [np.abs(log_prob(mixture, x) - fine).max() for mixture in (few, thinned(27))]
    assert errors[1] < 0.3 * errors[0]
    assert errors[1] < 0.05


@pytest.mark.parametrize("dim", [2, 64])
def test_untrained_trajectories_cross_standardised_data(dim: int) -> None:
    @jax.jit
    def mean_path(key: Array) -> Array:
        model = CPMM(dim, 2, rngs=nnx.Rngs(key))
        return model.mixture(GridTimes()(None, 33)).components.means[0]

    paths = np.stack([mean_path(jax.random.key(seed)) for seed in range(4)])
    travelled = np.mean(paths.max(axis=1) - paths.min(axis=1), axis=1)
    assert 0.2 < np.mean(travelled) < 3.0
    assert min(travelled) > 0.1


def test_zero_output_starts_at_rest() -> None:
    for leaf in leaves(read(small(output_scale=0.0), ENDS).mixture.components):
        np.testing.assert_allclose(leaf[:, ::2], leaf[:, 1::2], rtol=1e-5)
    moving = read(small(), ENDS).mixture.components.means
    assert float(np.min(np.abs(moving[:, ::2] - moving[:, 1::2]))) > 1e-4


def test_starts_at_given_means_with_given_noise() -> None:
    centres = np.arange(12.0).reshape(2, 3, 2) - 5.0
    model = small(initial_means=centres, initial_noise=0.04, noise_floor=1e-6)
    components = read(model, ENDS).mixture.components
    np.testing.assert_allclose(components.means[:, ::2], centres, rtol=1e-5)
    noise = np.exp(components.log_noise[:, ::2])
    np.testing.assert_allclose(noise, np.full((2, 3, 2), 0.04 + 1e-6), rtol=1e-5)


@pytest.mark.parametrize("floor", [1e-2, np.array([1e-3, 4.0])])
def test_noise_floor_bounds_every_variance(floor: Any) -> None:
    model = small(noise_floor=floor, initial_noise=1e-8)
    noise = np.exp(read(model, ENDS).mixture.components.log_noise)
    assert (noise >= 0.999 * np.broadcast_to(floor, (1, 1, 2))).all()
    assert noise[..., 0].min() < 2e-2


def test_weights_are_constant_along_a_trajectory_unless_they_evolve() -> None:
    constant, evolving = uneven(small()), uneven(small(evolve_weights=True))
    assert constant.logits is None
    times = jnp.linspace(0.0, 1.0, 6)
    start = np.asarray(constant.trajectory_logits[...])
    logits = read(constant, times).mixture.components.logits.reshape(2, 3, 6)
    np.testing.assert_array_equal(logits, np.repeat(start[..., None], 6, axis=2))
    moving = read(evolving, times).mixture.components.logits.reshape(2, 3, 6)
    np.testing.assert_allclose(moving[..., 0], start, atol=1e-6)
    assert float(np.min(np.std(moving, axis=2))) > 0.01


def test_augmented_channels_matter_but_are_no_part_of_the_mixture() -> None:
    model, other = small(), small()
    assert model.augmented[...].shape == (2, 3, 4)
    other.augmented[...] = model.augmented[...] + 1.0
    one, two = (read(each, ENDS).mixture.components.means for each in (model, other))
    np.testing.assert_array_equal(one[:, ::2], two[:, ::2])
    assert float(np.min(np.abs(one - two)[:, 1::2])) > 1e-4
    none = small(augmented=0)
    assert none.augmented[...].shape == (2, 3, 0)
    chex.assert_tree_all_finite(read(none, ENDS))


LEARNED = ("field", "means", "loadings", "log_noise", "augmented", "trajectory_logits")


def test_classes_have_fields_of_their_own() -> None:
    """Every number of class 1 moves the components of class 1 and leaves class 0 alone."""
    model = small(field_per_class=True)
    assert all(leaf.shape[0] == 2 for leaf in leaves(model.field))
    kernel = model.field.output.kernel[...]
    assert bool(jnp.all(kernel[0] != kernel[1]))
    for name in LEARNED:
        for number in range(len(leaves(getattr(model, name)))):
            assert _moves(model, name, number, 1) == [False, True], (name, number)


def test_classes_share_a_field_by_default() -> None:
    model = small()
    for number in range(len(leaves(model.field))):
        assert _moves(model, "field", number, slice(None)) == [True, True]
    for name in LEARNED[1:]:
        assert _moves(model, name, 0, 1) == [False, True], name


def _moves(model: CPMM, name: str, number: int, part: Any) -> list[bool]:
    """Say of each class whether changing a part of one array changes its components."""
    other = jax.tree.map(lambda leaf: leaf, model)
    arrays = jax.tree.leaves(getattr(other, name), is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    changed = np.array(arrays[number][...])
    changed[part] += 0.5
    arrays[number][...] = jnp.asarray(changed)
    mixtures = (read(each, ENDS).mixture for each in (model, other))
    pairs = list(zip(*(leaves(mixture.components) for mixture in mixtures), strict=True))
    return [any(not np.array_equal(a[c], b[c]) for a, b in pairs) for c in range(2)]


def test_model_is_a_plain_pytree() -> None:
    times = GridTimes()(None, 3)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def mixture(model: CPMM) -> HierarchicalMFA:
        return model.mixture(times)

    models = [small(seed) for seed in range(3)]
    assert len({jax.tree.structure(model) for model in models}) == 1
    one_by_one = [mixture(model) for model in models]  # traced once
    mixture(jax.tree.map(lambda leaf: 0.5 * leaf, models[0]))
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *models)
    many = jax.jit(jax.vmap(lambda model: model.mixture(times)))(stacked)
    expected = jax.tree.map(lambda *parts: np.stack(parts), *one_by_one)
    chex.assert_trees_all_close(many, expected, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(small(solver=replace(QUICK, num_steps=4))) != jax.tree.structure(
        models[0]
    )
    chex.assert_trees_all_close(one_by_one[1], models[1].extract(3), rtol=1e-5, atol=1e-6)


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
    def build_and_read() -> Any:
        model = small(param_dtype=jnp.float64, evolve_weights=True)
        mixture = model.mixture(GridTimes()(None, 3))
        return model, mixture, mixture.log_prob(examples(2))

    assert all(leaf.dtype == jnp.float64 for leaf in leaves(jax.eval_shape(build_and_read)))


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
        ({"dim": None}, "`dim` must be the number of features, .*; got None and None"),
        ({"event_shape": (2, 2)}, r"`dim` must be .* of an `event_shape`.*; got 2 and \(2, 2, 1\)"),
        ({"event_shape": (2,)}, r"`event_shape` must be \(H, W, channels\)"),
        (
            {"coarse_widths": (4,)},
            r"`event_shape` must be given with .*; got `coarse_widths` \(4,\)",
        ),
        (
            {"event_shape": (1, 2), "evolve_weights": True},
            "`evolve_weights` must be False with an `event_shape`",
        ),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        small(**settings)
    assert "\n" not in str(caught.value)


def test_images_keep_their_shape_in_the_state_alone() -> None:
    """The trajectories are those of the field, channel by channel; the mixture is flat."""
    images = {"dim": None, "event_shape": (3, 2, 2), "widths": (8,), "augmented": 2}
    model = small(**images, solver=SolverConfig(solver=diffrax.Euler(), num_steps=1))
    components = read(model, ENDS).mixture.components
    assert (model.dim, model.augmented.shape) == (12, (2, 3, 3 * 2 * 2))
    assert components.means.shape == (2, 6, 12) and components.loadings.shape == (2, 6, 12, 1)
    start = jax.tree.map(lambda leaf: leaf[1, 2], model.initial_state())
    moved = start.component.means + model.field(0.0, start).component.means
    np.testing.assert_allclose(components.means[1, 5], moved, rtol=1e-5, atol=1e-6)


def test_extraction_at_other_numbers_of_times_is_one_program() -> None:
    model = small()
    model.extract(5)
    before = _read._cache_size()  # type: ignore[attr-defined]
    for num_times in (6, 7, 8):
        extracted = model.extract(num_times)
        assert extracted.components.means.shape == (2, 3 * num_times, 2)
        expected = model.mixture(GridTimes()(None, num_times))
        chex.assert_trees_all_close(extracted, expected, rtol=1e-5, atol=1e-6)
    assert _read._cache_size() == before  # type: ignore[attr-defined]


def test_extraction_of_no_times() -> None:
    with pytest.raises(ConfigError, match="`num_times` must be at least 1; got 0"):
        small().extract(0)


@pytest.mark.nan  # states of a failed solve
def test_failed_solves_are_named() -> None:
    with pytest.raises(SolverError, match="used up `max_steps`"):
        small(solver=EXHAUSTED).extract(3)
    reading = read(wild(), jnp.ones(1))
    assert int(reading.result) == NOT_FINITE
    assert not bool(reading.ok)
    with pytest.raises(SolverError, match="infinite or NaN"):
        wild().extract(1)
