"""From a table to a fitted mixture in its units: the whole path.

Data are standardised, the trajectories start at examples or at components fitted by EM, train along
a curriculum if asked to, EM goes on from the extracted mixture as long as validation gains, and the
result is carried back to the units of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cpmm_jax.curriculum import Curriculum, FlowCurriculum, InterpolantCurriculum, NoCurriculum
from cpmm_jax.data.dataset import Dataset, split
from cpmm_jax.data.standardise import Standardizer
from cpmm_jax.dynamics.flow import CNF
from cpmm_jax.mixture.em import fit_em, polish
from cpmm_jax.mixture.grouping import group_examples, spread_labels
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.mixture.mfa import MFA
from cpmm_jax.models.cpmm import CPMM
from cpmm_jax.models.selection import broaden_by_validation, polish_by_validation
from cpmm_jax.recipe import Recipe
from cpmm_jax.training.config import TrainConfig
from cpmm_jax.training.flow import fit_flow
from cpmm_jax.training.flow_objective import FlowMatching
from cpmm_jax.training.loop import FitResult, fit

TAIL_NOISE = 0.1  # of a column's variance, which is 1 in the units of the model
EM_STARTS, EM_MOVES, EM_ROUNDS = 3, 20, 200  # before the training
SCALES = {1: 0.03, 2: 0.1}  # of the field's output by T, where the start is local
LONG_SCALE = 0.3  # for more
FLOW_STEPS = 4000
SURE = 0.99  # probability of a cluster, where training goes on from one


@dataclass(frozen=True, kw_only=True)
class FittedMixture:
    """A mixture fitted to a table.

    Attributes:
        mixture: the extracted components, in the units of the data as given.
        standardized: the same in standardised units.
        model: the trained model, in standardised units.
        standardizer: from the units of the data to those of the model.
        recipe: the settings used.
        result: what `fit` returned (before a refit: with the validation scores).
        flow: the flow of the curriculum, in standardised units; None where there is none.
    """

    mixture: HierarchicalMFA
    standardized: HierarchicalMFA
    model: CPMM
    standardizer: Standardizer
    recipe: Recipe
    result: FitResult
    flow: CNF | None

    @property
    def num_parameters(self) -> int:
        """Numbers that make up the mixture: neither the network, nor twins, which follow."""
        components = sum(leaf.size for leaf in jax.tree.leaves(self.mixture.components))
        twins = 2 if self.recipe.tails else 1
        return int(self.mixture.class_logits.size + components // twins)


def fit_mixture(
    x_train: np.ndarray,
    y_train: np.ndarray | None,
    x_valid: np.ndarray | None,
    y_valid: np.ndarray | None,
    recipe: Recipe,
    *,
    weight: np.ndarray | None = None,
    weight_valid: np.ndarray | None = None,
    begin: FittedMixture | None = None,
    flow: CNF | None = None,
    feature_names: Sequence[str] | None = None,
    metrics_path: str | Path | None = None,
    progress: bool | None = None,
) -> FittedMixture:
    """Standardise, fit a CPMM, extract its components, and return to the units of the data.

    Args:
        x_train: training examples, shape (N, D).
        y_train: class codes, shape (N,), -1 where not known; None for a density or for clusters.
        x_valid: validation examples; None to cut them from the training rows.
        y_valid: their class codes.
        recipe: see `recommend`.
        weight: for how many rows each training example stands, positive, shape (N,); None for one.
        weight_valid: the same of the validation examples.
        begin: an earlier fit, from whose model training goes on, in its units and sizes; None to
            begin anew.
        flow: one trained on these data before, in standardised units, for the curriculum "flow";
            None to train one.
        feature_names: D names, for the warnings.
        metrics_path: as for `fit`.
        progress: as for `fit`.

    Returns:
        A `FittedMixture`, whose log-densities include the Jacobian of the standardisation.
    """
    config = TrainConfig(
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        patience=recipe.patience,
        discriminative=recipe.discriminative,
        seed=recipe.seed,
    )
    if begin is None:
        standardizer = Standardizer.fit(x_train, names=feature_names, weight=weight)
    else:
        standardizer = begin.standardizer
        sizes = ("num_classes", "num_trajectories", "num_times", "train_times")
        recipe = replace(recipe, **{size: getattr(begin.recipe, size) for size in sizes})
        recipe = replace(recipe, divisions=(), refit=False)
    floor = np.maximum(standardizer.noise_floor(), recipe.least_noise)
    data = Dataset("z", standardizer.transform(x_train), y_train, weight_train=weight)
    if x_valid is None:  # the rows that `fit` would take
        read = recipe.num_classes * recipe.num_trajectories * recipe.num_times
        if len(x_train) * (1 - config.valid_fraction) - 1 < read:  # none to spare
            config = replace(config, valid_fraction=0.0, patience=None)
        cut = config.valid_fraction
        data = split(data, seed=recipe.seed, valid_fraction=cut, test_fraction=0.0)
    else:
        z_valid = standardizer.transform(x_valid)
        data = replace(data, x_valid=z_valid, y_valid=y_valid, weight_valid=weight_valid)
    if recipe.clusters:
        before = None if begin is None else begin.standardized
        data = with_clusters(data, recipe, standardizer.scale, before)
    train = (data.x_train, data.y_train)
    valid: Any = {key: getattr(data, key) for key in ("x_valid", "y_valid", "weight_valid")}
    curriculum = build_curriculum(data.x_train, data.x_valid, recipe, flow, progress=progress)
    recipe = divide(data, floor, recipe)
    untrained = begin and begin.model
    if untrained is None:
        classes = complete(*train, recipe, weight=data.weight_train)
        untrained = build_model(
            data.x_train, classes, floor, recipe, curriculum, weight=data.weight_train
        )
    result = fit(
        untrained,
        *train,
        config=replace(config, num_times=recipe.train_times, valid_times=recipe.num_times),
        curriculum=curriculum,
        sample_weight=data.weight_train,
        **valid,
        metrics_path=metrics_path,
        progress=progress,
    )
    model = result.model
    extracted: Any = model.extract(recipe.num_times)
    rounds, noise = 0, 0.0
    if recipe.polish and data.x_valid is not None:
        polished = polish_by_validation(extracted, *train, sample_weight=data.weight_train, **valid)
        broad = broaden_by_validation(polished.mixture, **valid)
        extracted, rounds, noise = broad.mixture, polished.rounds, broad.noise
    if recipe.refit and result.best_step > 0 and data.x_valid is not None:
        z, y, weight = (
            None if first is None or last is None else np.concatenate([first, last])
            for first, last in zip((*train, data.weight_train), valid.values(), strict=True)
        )
        assert z is not None
        classes = complete(z, y, recipe, weight=weight)
        final = replace(
            config,
            steps=result.best_step,
            num_times=recipe.train_times,
            valid_fraction=0.0,
            patience=None,
        )
        start = build_model(z, classes, floor, recipe, curriculum, weight=weight)
        own: Any = {"curriculum": curriculum, "sample_weight": weight, "progress": progress}
        model = fit(start, z, y, config=final, **own).model
        again: Any = {"max_iter": rounds, "tol": 0.0, "sample_weight": weight}
        extracted = polish(model.extract(recipe.num_times), z, y, **again)
        extracted = extracted.with_noise(noise) if noise else extracted
    if recipe.tails:
        extracted = extracted.with_tails(TAIL_NOISE, recipe.tails)
    return FittedMixture(
        mixture=extracted.affine(standardizer.scale, standardizer.shift),
        standardized=extracted,
        model=model,
        standardizer=standardizer,
        recipe=recipe,
        result=result,
        flow=curriculum.flow if isinstance(curriculum, FlowCurriculum) else None,
    )


def build_curriculum(
    z: np.ndarray,
    z_valid: np.ndarray | None,
    recipe: Recipe,
    flow: CNF | None = None,
    *,
    progress: bool | None = None,
) -> Curriculum:
    """Return the curriculum that the recipe names; a flow that is not given is trained.

    Args:
        z: standardised training examples, shape (N, D).
        z_valid: standardised validation examples, or None.
        recipe: names the curriculum; its seed.
        flow: one trained before.
        progress: as for `fit`.
    """
    if recipe.curriculum == "none":
        return NoCurriculum()
    if recipe.curriculum == "interpolant":
        return InterpolantCurriculum()
    if flow is None:
        untrained = CNF(z.shape[1], rngs=nnx.Rngs(recipe.seed))
        config = TrainConfig(steps=FLOW_STEPS, seed=recipe.seed)
        settings: Any = {"objective": FlowMatching(), "config": config, "progress": progress}
        flow = fit_flow(untrained, z, x_valid=z_valid, **settings).flow
    return FlowCurriculum(flow)


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
    """Return training examples with the cluster of those that lie within one; others are not known.

    Args:
        data: standardised examples, without labels.
        recipe: the number of clusters and the seed.
        scale: standard deviations of the features, shape (D,): neighbours may be nearer in the
            units of the data, where these are the same for all.
        found: a clustering to keep, of which the rows that it is sure of are known; None to begin.
    """
    if recipe.num_classes == 1:
        return data
    if found is None:
        settings: Any = {"weight": data.weight_train, "seed": recipe.seed}
        group, within = group_examples(
            data.x_train, recipe.num_classes, scales=(1.0, scale / scale.max()), **settings
        )
    else:
        proba = np.asarray(found.predict_proba(data.x_train))
        group, within = proba.argmax(axis=1), proba.max(axis=1) > SURE
    inner = np.bincount(group[within], minlength=recipe.num_classes)
    known = within | (inner == 0)[group]  # a group that is all border
    y = np.where(known, group, -1)
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
        widths=recipe.widths,
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
    local = fit_start(z, y, noise_floor, recipe, weight=weight)
    lead = (recipe.num_classes, recipe.num_trajectories)
    logits, means, loadings, log_noise = (
        jnp.stack(leaves).reshape(*lead, *leaves[0].shape[1:])
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
