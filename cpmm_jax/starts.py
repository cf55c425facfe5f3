"""Where a training begins: how long its trajectories are, in which class each row, and where."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cpmm_jax.curriculum import Curriculum, NoCurriculum
from cpmm_jax.data.dataset import Dataset
from cpmm_jax.dynamics.solve import SolverConfig
from cpmm_jax.mixture.em import fit_em
from cpmm_jax.mixture.grouping import group_examples, spread_labels
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.mixture.mfa import MFA
from cpmm_jax.models.cpmm import CPMM
from cpmm_jax.models.selection import broaden_by_validation
from cpmm_jax.recipe import Recipe

EM_STARTS, EM_MOVES, EM_ROUNDS = 3, 20, 200  # before the training
SCALES = {1: 0.03, 2: 0.1}  # of the field's output by T, where the start is local
LONG_SCALE = 0.3  # for more
SAME_UNITS = 10.0  # largest standard deviation by the median one, of features in the same units
SURE = 0.99  # probability of a cluster, where training goes on from one


def divide(data: Dataset, noise_floor: np.ndarray, recipe: Recipe) -> Recipe:
    """Settle how components divide into trajectories and times, where the recipe leaves it open.

    A trajectory of T times takes the place of T components, and starts as one. Fewer of these are
    better where rows are too few for each, so mixtures of K / T components, each from one start of
    EM and with as much noise added as is good for it, are compared by validation.

    Args:
        data: standardised training and validation examples; without the latter the recipe stays.
        noise_floor: smallest noise variance of each feature, shape (D,).
        recipe: with `divisions`.

    Returns:
        The recipe with its T.
    """
    best, highest = recipe, -np.inf
    if data.x_valid is None:
        return best
    total = recipe.num_classes * recipe.num_times
    for times in recipe.divisions:
        count = total // times
        tried = replace(recipe, num_classes=count, num_times=times, train_times=times)
        quick: Any = {"weight": data.weight_train, "starts": 1, "moves": 0}
        start = fit_start(data.x_train, None, noise_floor, tried, **quick)[0]
        broad = broaden_by_validation(start, data.x_valid, weight_valid=data.weight_valid)
        if broad.scores[broad.noise] > highest:
            best, highest = tried, broad.scores[broad.noise]
    return best


def with_clusters(
    data: Dataset, recipe: Recipe, scale: np.ndarray, found: HierarchicalMFA | None = None
) -> Dataset:
    """Return training examples with the cluster of each; of validation examples it is not known.

    Clusters are groups of near neighbours (see `mixture.grouping`), in standardised units or, where
    those of the data may be the same for all features, in these, whichever falls apart better.

    Args:
        data: standardised examples, without labels.
        recipe: the number of clusters and the seed.
        scale: standard deviations of the features, shape (D,).
        found: a clustering to keep, of which the rows that it is sure of are known; None to begin.
    """
    if recipe.num_classes == 1:
        return data
    if found is None:
        scales: list[Any] = [1.0]
        if scale.min() < scale.max() <= SAME_UNITS * np.median(scale):
            scales.append(scale / scale.max())
        settings: Any = {"weight": data.weight_train, "seed": recipe.seed}
        y = group_examples(data.x_train, recipe.num_classes, scales=scales, **settings)
    else:
        proba = np.asarray(found.predict_proba(data.x_train))
        group, sure = proba.argmax(axis=1), proba.max(axis=1) > SURE
        any_sure = np.bincount(group[sure], minlength=recipe.num_classes) > 0
        y = np.where(sure | ~any_sure[group], group, -1)
    y_valid = None if data.x_valid is None else np.full(len(data.x_valid), -1)
    return replace(data, y_train=y, y_valid=y_valid)


def complete(
    z: np.ndarray, y: np.ndarray | None, recipe: Recipe, *, weight: np.ndarray | None = None
) -> np.ndarray | None:
    """Return the class in which each example starts: its own, or that of its neighbours.

    Args:
        z: standardised training examples, shape (N, D).
        y: class codes, shape (N,), -1 where not known; None for a density.
        recipe: the number of classes.
        weight: how much each example counts, shape (N,), or None.
    """
    if y is None or y.min() >= 0:
        return y
    return spread_labels(z, y, recipe.num_classes, weight=weight)


def fit_start(
    z: np.ndarray,
    y: np.ndarray | None,
    noise_floor: np.ndarray,
    recipe: Recipe,
    *,
    weight: np.ndarray | None = None,
    starts: int = EM_STARTS,
    moves: int = EM_MOVES,
) -> list[MFA]:
    """Fit by EM where trajectories start: a mixture of each class, or one of all classes.

    Args:
        z: standardised training examples, shape (N, D).
        y: class codes, or None, where every trajectory is a class.
        noise_floor: smallest noise variance of each feature, shape (D,).
        recipe: sizes and seed.
        weight: how much each example counts, shape (N,), or None.
        starts: of EM, of which the likeliest is taken.
        moves: of components, see `fit_em`.
    """
    parts, count = [np.arange(len(z))], recipe.num_classes
    if y is not None:
        parts = [np.flatnonzero(y == c) for c in range(recipe.num_classes)]
        count = recipe.num_trajectories
    settings: Any = {
        "n_init": starts,
        "moves": moves,
        "max_iter": EM_ROUNDS,
        "noise_floor": 2 * noise_floor,
        "seed": recipe.seed,
    }
    found = []
    for rows in parts:
        if len(rows) < count:  # as few rows of a rare class as there are stand for more
            rows = np.resize(rows, count)
        own = None if weight is None else weight[rows]
        found.append(fit_em(z[rows], count, recipe.rank, sample_weight=own, **settings).mixture)
    return found


def build_model(
    z: np.ndarray,
    y: np.ndarray | None,
    noise_floor: np.ndarray,
    recipe: Recipe,
    curriculum: Curriculum = NoCurriculum(),  # noqa: B008
    *,
    weight: np.ndarray | None = None,
) -> CPMM:
    """Build an untrained CPMM whose trajectories start at examples, or at components fitted by EM.

    Args:
        z: standardised training examples, shape (N, D).
        y: class codes, or None.
        noise_floor: smallest noise variance of each feature, shape (D,).
        recipe: sizes and seed.
        curriculum: the examples are taken where it begins.
        weight: how much each example counts, shape (N,), or None.
    """
    make = partial(
        CPMM,
        z.shape[1],
        recipe.rank,
        recipe.num_classes,
        recipe.num_trajectories,
        event_shape=recipe.event_shape,
        widths=recipe.widths,
        coarse_widths=recipe.coarse_widths,
        solver=SolverConfig(num_steps=recipe.ode_steps),
        noise_floor=noise_floor,
        rngs=nnx.Rngs(recipe.seed),
    )
    if not recipe.local_start:
        first = curriculum.stages.positions[0]
        if first > 0:
            z = np.asarray(curriculum.at(jnp.asarray(z), first, jax.random.key(recipe.seed)))
        rng, count = np.random.default_rng(recipe.seed), recipe.num_trajectories
        by_class = [z if y is None else z[y == c] for c in range(recipe.num_classes)]
        starts = [rows[rng.choice(len(rows), count)] for rows in by_class]
        return make(initial_means=np.stack(starts))
    quick: Any = {"starts": 1, "moves": 0} if recipe.event_shape else {}  # of many features
    local = fit_start(z, y, noise_floor, recipe, weight=weight, **quick)
    lead = (recipe.num_classes, recipe.num_trajectories)
    logits, means, loadings, log_noise = (
        jnp.stack(leaves).reshape(*lead, *leaves[0].shape[1:]).astype(jnp.float32)
        for leaves in zip(*map(jax.tree.leaves, local), strict=True)
    )
    model = make(initial_means=means, output_scale=SCALES.get(recipe.num_times, LONG_SCALE))
    model.loadings = nnx.Param(loadings)
    added = jnp.asarray(noise_floor, log_noise.dtype)[None, None, :]  # by the model
    model.log_noise = nnx.Param(jnp.log(jnp.exp(log_noise) - added))
    weights = model.trajectory_logits if y is not None else model.class_logits
    weights[...] = logits.reshape(weights.shape)
    if recipe.clusters and y is not None:
        counts = np.bincount(y, weight, recipe.num_classes)
        model.class_logits[...] = jnp.log(jnp.asarray(counts / counts.sum(), jnp.float32))
    return model
