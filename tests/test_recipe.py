"""Default settings, and the path from a table to a mixture in its units."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmm_jax.data.dataset import Dataset
from cpmm_jax.mixture.em import fit_em
from cpmm_jax.pipeline import fit_mixture
from cpmm_jax.recipe import recommend
from cpmm_jax.starts import build_model, divide, fit_start, with_clusters


@pytest.mark.parametrize(
    ("rows", "components", "tails"), [(400, None, True), (400, 8, False), (40_000, None, False)]
)
def test_tails_where_rows_are_few_and_nobody_set_the_components(
    rows: int, components: int | None, *, tails: bool
) -> None:
    recipe = recommend(rows, 16, 4, labelled=True, components=components)
    assert bool(recipe.tails) is tails
    read = recipe.num_classes * recipe.num_trajectories * recipe.num_times
    assert recipe.num_components == read * (2 if tails else 1)
    assert components is None or recipe.num_components == components


@pytest.mark.parametrize("tails", [0.0, 0.25])
def test_the_mixture_is_the_one_that_the_recipe_says(rng, tails: float) -> None:
    x = rng.normal(size=(40, 2)) * [1.0, 100.0] + [5.0, -300.0]
    recipe = recommend(40, 2, components=4, trajectories=2, rank=1, steps=3, batch_size=16)
    recipe = replace(recipe, tails=tails, refit=False, polish=False)
    fitted = fit_mixture(x[:32], None, x[32:], None, recipe, progress=False)
    mixture = fitted.mixture
    assert mixture.num_classes * mixture.num_components == recipe.num_components
    assert fitted.num_parameters == 2 + 4 * (1 + 2 + 2 + 2)  # with or without twins
    in_model = fitted.model.extract(recipe.num_times)
    if tails:
        noise = np.exp(mixture.components.log_noise)
        read, twins = noise[:, : noise.shape[1] // 2], noise[:, noise.shape[1] // 2 :]
        added = np.broadcast_to(0.1 * fitted.standardizer.scale**2, read.shape)
        np.testing.assert_allclose(twins - read, added, rtol=1e-3)
        weights = jax.nn.softmax(mixture.components.logits)[:, noise.shape[1] // 2 :]
        np.testing.assert_allclose(weights.sum(axis=1), tails, rtol=1e-5)
        in_model = in_model.with_tails(0.1, tails)
    expected = in_model.log_prob(fitted.standardizer.transform(x))
    expected -= np.log(fitted.standardizer.scale).sum()
    np.testing.assert_allclose(mixture.log_prob(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "times"), [(20_000, 1), (8_000, 2), (1_500, 8)])
def test_the_fewer_rows_a_component_has_the_more_share_a_trajectory(rows: int, times: int) -> None:
    recipe = recommend(rows, 13, components=40, rank=4)
    assert (recipe.num_classes, recipe.num_times) == (40 // times, times)


def test_validation_settles_how_long_trajectories_are(rng: np.random.Generator) -> None:
    """Two groups of few rows want two starts; four each would follow single rows."""
    z = rng.normal(size=(500, 2)).astype(np.float32) * 0.1 + 4 * rng.integers(0, 2, (500, 1))
    floor = np.full(2, 1e-3)
    recipe = recommend(250, 2, components=8, rank=1)
    assert recipe.divisions == (1, 2, 4, 8)
    settled = divide(Dataset("z", z[:250], x_valid=z[250:]), floor, recipe)
    scores = {
        times: fit_start(
            z[:250], None, floor, replace(recipe, num_classes=8 // times), starts=1, moves=0
        )[0]
        .log_prob(z[250:])
        .mean()
        for times in recipe.divisions
    }
    assert settled.num_times == max(scores, key=lambda times: scores[times]) == 4
    assert settled.num_classes == 2
    assert divide(Dataset("z", z[:250]), floor, recipe) == recipe
    assert recommend(250, 2, components=8, trajectories=4, rank=1).divisions == ()
    assert recommend(250, 2, 2, labelled=True, components=8, rank=1).divisions == ()


def test_a_long_trajectory_starts_at_an_example() -> None:
    """The Gaussian of all data is an optimum that a single trajectory would not leave."""
    assert not recommend(3000, 2, components=64, trajectories=1).local_start
    assert recommend(3000, 2, components=64, trajectories=8).local_start


def test_a_local_start_is_the_mixture_that_em_has_fitted(rng: np.random.Generator) -> None:
    z = rng.normal(size=(400, 2)).astype(np.float32) + 4 * rng.integers(0, 2, (400, 1))
    floor = np.array([0.1, 0.2])
    recipe = recommend(400, 2, components=2, trajectories=2, rank=1)
    assert recipe.local_start
    mixture = build_model(z, None, floor, recipe).read(jnp.zeros(1)).mixture
    settings = {"n_init": 3, "moves": 20, "noise_floor": 2 * floor, "seed": recipe.seed}
    fitted = fit_em(z, 2, 1, **settings).mixture
    np.testing.assert_allclose(mixture.log_prob(z), fitted.log_prob(z), atol=1e-3)


@pytest.mark.parametrize(
    ("rows", "labelled", "local"),
    [(1500, False, True), (200, False, False), (1500, True, True), (500, True, False)],
)
def test_short_of_rows_trajectories_start_at_examples(
    rows: int, *, labelled: bool, local: bool
) -> None:
    """20 rows for every feature are few, with labels 100."""
    recipe = recommend(rows, 13, labelled=labelled, components=40, rank=4)
    assert recipe.local_start is local
    assert recipe.polish is (local or not labelled)
    if labelled:  # what is trained to tell classes apart is not made a description again
        assert not recommend(rows, 13, labelled=True, discriminative=0.9).polish
    assert recommend(rows, 13, labelled=labelled, local_start=not local).local_start is not local


@pytest.mark.parametrize(("rows", "size"), [(10_000, 256), (300, 128), (200, 128), (20, 16)])
def test_the_batch_of_few_rows_is_the_same_with_a_validation_part(rows: int, size: int) -> None:
    assert recommend(rows, 2).batch_size == size <= 0.85 * rows


def test_a_trajectory_that_must_cross_the_data_has_a_curriculum() -> None:
    long = {"components": 64, "trajectories": 1}
    assert recommend(2000, 2, **long).curriculum == "interpolant"
    assert recommend(2000, 2, **long, curriculum="none").curriculum == "none"
    assert recommend(2000, 2, 2, labelled=True, components=128, trajectories=1).curriculum == "none"
    for other in (recommend(2000, 2), recommend(2000, 2, components=16, trajectories=1)):
        assert other.curriculum == "none"
    assert recommend(3000, 256, event_shape=(16, 16), **long).curriculum == "none"


def test_images_of_a_size_get_a_convolutional_field() -> None:
    small = recommend(3000, 64, 10, labelled=True, event_shape=(8, 8), dequantise=True)
    assert small == recommend(3000, 64, 10, labelled=True)
    for shape in ((16, 20), (16, 20, 1)):
        recipe = recommend(3000, 320, 10, labelled=True, event_shape=shape, dequantise=True)
        assert recipe.event_shape == (16, 20, 1) and recipe.dequantise
        assert recipe.num_components == 10 * recipe.num_times and recipe.train_times > 3
    images: dict[str, Any] = {"labelled": True, "event_shape": (16, 20)}
    assert recipe.local_start and recommend(3000, 320, 10, local_start=True, **images).local_start
    telling = recommend(3000, 320, 10, discriminative=0.99, **images)  # classes apart
    assert (telling.num_trajectories, telling.num_times, telling.rank) == (2, 2, 20)
    assert recommend(3000, 320, 10, discriminative=0.99, rank=3, **images).rank == 3
    assert (telling.ode_steps, telling.steps, telling.least_noise) == (2, 300, 0.25)
    assert recommend(60_000, 320, 10, discriminative=0.99, **images).num_trajectories == 40
    assert recommend(3000, 320, 10, discriminative=0.99, steps=7, **images).steps == 7
    few = recommend(2000, 320, 10, discriminative=0.99, **images)  # no rows for two of them
    given = recommend(3000, 320, 10, discriminative=0.99, trajectories=2, **images)
    for other in (few, given):
        assert (other.ode_steps, other.steps, other.least_noise) == (8, 1500, 0.1)
    along = recommend(3000, 320, 10, curriculum="interpolant", **images)
    apart = recommend(3000, 320, 10, local_start=False, **images)
    assert not along.local_start and not apart.local_start
    assert recommend(16, 960, event_shape=(16, 20, 3)).num_classes == 2  # few rows
    density = recommend(3000, 960, event_shape=(16, 20, 3))
    assert (density.event_shape, density.dequantise) == ((16, 20, 3), False)
    assert density.num_classes == 10 and density.tails == 0


def test_a_rare_class_starts_as_many_trajectories(rng: np.random.Generator) -> None:
    z = rng.normal(size=(400, 2)).astype(np.float32)
    y = (np.arange(400) >= 397).astype(int)  # three rows
    recipe = recommend(400, 2, 2, labelled=True, components=16, trajectories=8, rank=1)
    starts = fit_start(z, y, np.full(2, 0.01), recipe, starts=1, moves=0)
    assert [start.num_components for start in starts] == [8, 8]


def test_a_feature_in_other_units_does_not_make_the_clusters(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the data's units only the sixth feature is seen, along which any cut cuts few edges."""
    y = np.arange(300) % 2
    x = rng.normal(size=(300, 6)) + 2.0 * y[:, None]
    x[:, 5] = 1000.0 * rng.uniform(size=300)
    scale = x.std(axis=0)
    z = ((x - x.mean(axis=0)) / scale).astype(np.float32)
    recipe = recommend(300, 6, clusters=2)

    def agreement() -> float:
        found = with_clusters(Dataset("z", z, None), recipe, scale).y_train
        assert found is not None
        return float(abs(np.corrcoef(found, y)[0, 1]))

    assert agreement() > 0.95
    monkeypatch.setattr("cpmm_jax.starts.SAME_UNITS", np.inf)
    assert agreement() < 0.5
