"""From a table to a fitted mixture in its units: default settings, and the whole path.

Data are standardised, the model's size follows from the data where it is not given, the
trajectories start at examples or at components fitted by EM, EM goes on from the extracted mixture
as long as validation gains, and the result is carried back to the units of the data.
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

from cpmm_jax.data.checks import check_enough_rows
from cpmm_jax.data.dataset import Dataset, split
from cpmm_jax.data.standardise import Standardizer
from cpmm_jax.errors import ConfigError
from cpmm_jax.mixture.em import fit_em, polish
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.models.cpmm import CPMM
from cpmm_jax.models.selection import polish_by_validation
from cpmm_jax.training.config import TrainConfig
from cpmm_jax.training.loop import FitResult, fit

TAIL_NOISE = 0.1  # of a column's variance, which is 1 in the units of the model
EM_ROUNDS = 50  # at the start
SHORT_SCALE, LONG_SCALE = 0.1, 0.3  # of the field's output where the start is local
REFIT_BELOW = 5000  # rows under which a validation part is too much to leave out of the fit


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of one fit.

    Attributes:
        num_classes: classes of the hierarchy, C; without labels every trajectory is one.
        num_trajectories: trajectories of each class, S.
        num_times: pseudotimes at which each trajectory is extracted, T.
        train_times: pseudotimes drawn in a training step; fewer where rows are scarce, as a
            regulariser.
        rank: factors of a component, R.
        local_start: whether trajectories start as the components of a mixture fitted by EM, one
            for each, and move little at first; else at examples, and move across the data.
        polish: whether EM goes on from the extracted mixture, as long as validation gains.
        tails: probability of the broad twin that every component is given after training (see
            `MFA.with_tails`); 0 for none.
        widths: hidden units of the field.
        steps: training steps.
        batch_size: examples in a step.
        learning_rate: highest learning rate.
        patience: reports without improvement before training stops.
        refit: whether to train anew on training and validation rows together, for as many steps as
            the validation found best.
        seed: seed of everything random.
    """

    num_classes: int
    num_trajectories: int
    num_times: int
    train_times: int
    rank: int
    local_start: bool
    polish: bool
    tails: float
    widths: tuple[int, ...]
    steps: int
    batch_size: int
    learning_rate: float
    patience: int | None
    refit: bool
    seed: int

    @property
    def num_components(self) -> int:
        """Components of the extracted mixture: C S T, and as many twins where it has tails."""
        read = self.num_classes * self.num_trajectories * self.num_times
        return 2 * read if self.tails else read


def recommend(
    num_examples: int,
    dim: int,
    num_classes: int = 1,
    *,
    labelled: bool = False,
    components: int | None = None,
    trajectories: int | None = None,
    rank: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
) -> Recipe:
    """Choose the settings that are not given from N, D and the number of classes.

    Where rows are plentiful for the number of features, many short trajectories fit best, that
    start at the components of a mixture fitted by EM; where they are scarce, few long ones with
    more factors do, since the shared field keeps them from overfitting; unless `components` sets
    how many there are, each is given a broad twin then.

    Args:
        num_examples: training rows, N.
        dim: features, D.
        num_classes: classes of the labels, C (used when `labelled`).
        labelled: whether labels are trained on.
        components: components of the extracted mixture in total.
        trajectories: trajectories per class; without labels, in all.
        rank: factors, R.
        steps: training steps.
        batch_size: examples in a step.
        learning_rate: highest learning rate.
        seed: seed of everything random.

    Returns:
        A complete `Recipe`.

    Raises:
        ConfigError: a setting out of range, or components that do not divide into trajectories.
        DataError: fewer rows than components.

    Example:
        >>> recommend(1000, 2).num_components
        64
    """
    for name, value, least in (
        ("components", components, 1),
        ("trajectories", trajectories, 1),
        ("rank", rank, 0),
    ):
        if value is not None and value < least:
            raise ConfigError(f"`{name}` must be at least {least}; got {value}.")
    if rank is not None and rank > dim:
        raise ConfigError(
            f"`rank` must be at most D = {dim}, the number of features; got {rank}. "
            f"Ranks near {min(4, dim)} are a good start."
        )
    classes = num_classes if labelled else 1
    rows = num_examples / classes  # of one class
    tails = 0.1 if components is None and _few(rows, dim) else 0.0
    if trajectories is None:
        trajectories = _default_trajectories(rows, dim, components, classes)
    if components is None:
        times = _default_times(rows, dim, trajectories)
    elif components % (classes * trajectories):
        raise ConfigError(
            f"`components` must be a multiple of classes x trajectories = {classes} x "
            f"{trajectories}, for equally many in each; got {components}."
        )
    else:
        times = components // (classes * trajectories)
    check_enough_rows(num_examples, classes * trajectories * times)
    return Recipe(
        num_classes=classes if labelled else trajectories,
        num_trajectories=trajectories if labelled else 1,
        num_times=times,
        train_times=_default_train_times(rows, dim, times),
        rank=_default_rank(rows, dim) if rank is None else rank,
        local_start=_ample(rows, dim),
        polish=_ample(rows, dim),
        tails=tails,
        widths=(128, 128) if dim < 16 else (256, 256),
        steps=(1500 if _few(rows, dim) else 3000) if steps is None else steps,
        batch_size=256 if batch_size is None else batch_size,
        learning_rate=3e-3 if learning_rate is None else learning_rate,
        patience=10,
        refit=num_examples < REFIT_BELOW,
        seed=seed,
    )


def _default_trajectories(rows: float, dim: int, components: int | None, classes: int) -> int:
    wanted = 8 if rows > 60 * dim else 2 if rows > 20 * dim else 1
    if dim > 3 and rows > 200 * dim:
        wanted = 40
    if components is None:
        return max(1, min(wanted, int(rows) // 8))
    if components % classes:
        raise ConfigError(
            f"`components` must be a multiple of the {classes} classes; got {components}."
        )
    per_class = components // classes
    if not _few(rows, dim):  # two times each, or eight where a component has few rows
        wanted = per_class // (2 if rows >= 4 * dim * per_class else 8)
    return max(s for s in range(1, max(1, wanted) + 1) if per_class % s == 0)


def _few(rows: float, dim: int) -> bool:
    """Whether a class has few rows for its features: regularisation is then what counts."""
    return rows <= 20 * dim


def _ample(rows: float, dim: int) -> bool:
    """Whether components can be as narrow as the data ask without following single rows."""
    return rows > 100 * dim


def _default_times(rows: float, dim: int, trajectories: int) -> int:
    times = 2 if trajectories >= 40 else 16 if _few(rows, dim) else 8
    return max(1, min(times, int(rows) // (2 * trajectories)))


def _default_train_times(rows: float, dim: int, times: int) -> int:
    return min(times, max(3, times // 5)) if _few(rows, dim) else times


def _default_rank(rows: float, dim: int) -> int:
    return max(0, min(dim - 1, 4 if rows > 100 * dim or dim <= 16 else 12))


@dataclass(frozen=True, kw_only=True)
class FittedMixture:
    """A mixture fitted to a table.

    Attributes:
        mixture: the extracted components, in the units of the data as given.
        model: the trained model, in standardised units.
        standardizer: from the units of the data to those of the model.
        recipe: the settings used.
        result: what `fit` returned (before a refit: with the validation scores).
    """

    mixture: HierarchicalMFA
    model: CPMM
    standardizer: Standardizer
    recipe: Recipe
    result: FitResult

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
    feature_names: Sequence[str] | None = None,
    metrics_path: str | Path | None = None,
    progress: bool | None = None,
) -> FittedMixture:
    """Standardise, fit a CPMM, extract its components, and return to the units of the data.

    Args:
        x_train: training examples, shape (N, D).
        y_train: class codes, shape (N,), or None.
        x_valid: validation examples; None to cut them from the training rows.
        y_valid: their class codes.
        recipe: see `recommend`.
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
        num_times=recipe.train_times,
        valid_times=recipe.num_times,
        patience=recipe.patience,
        seed=recipe.seed,
    )
    standardizer = Standardizer.fit(x_train, names=feature_names)
    floor = standardizer.noise_floor()
    z, y = standardizer.transform(x_train), y_train
    if x_valid is None:  # the rows that `fit` would take
        cut = config.valid_fraction
        parts = split(Dataset("z", z, y), seed=recipe.seed, valid_fraction=cut, test_fraction=0.0)
        z, y, z_valid, y_valid = parts.x_train, parts.y_train, parts.x_valid, parts.y_valid
    else:
        z_valid = standardizer.transform(x_valid)
    result = fit(
        build_model(z, y, floor, recipe),
        z,
        y,
        config=config,
        x_valid=z_valid,
        y_valid=y_valid,
        metrics_path=metrics_path,
        progress=progress,
    )
    model = result.model
    extracted: Any = model.extract(recipe.num_times)
    rounds = 0
    if recipe.polish and z_valid is not None:
        polished = polish_by_validation(extracted, z, y, x_valid=z_valid, y_valid=y_valid)
        extracted, rounds = polished.mixture, polished.rounds
    if recipe.refit and result.best_step > 0 and z_valid is not None:
        z = np.concatenate([z, z_valid])
        y = None if y is None or y_valid is None else np.concatenate([y, y_valid])
        final = replace(config, steps=result.best_step, valid_fraction=0.0, patience=None)
        model = fit(build_model(z, y, floor, recipe), z, y, config=final, progress=progress).model
        extracted = polish(model.extract(recipe.num_times), z, y, max_iter=rounds, tol=0.0)
    if recipe.tails:
        extracted = extracted.with_tails(TAIL_NOISE, recipe.tails)
    return FittedMixture(
        mixture=extracted.affine(standardizer.scale, standardizer.shift),
        model=model,
        standardizer=standardizer,
        recipe=recipe,
        result=result,
    )


def build_model(
    z: np.ndarray, y: np.ndarray | None, noise_floor: np.ndarray, recipe: Recipe
) -> CPMM:
    """Build an untrained CPMM whose trajectories start at examples, or at components fitted by EM.

    Args:
        z: standardised training examples, shape (N, D).
        y: class codes, or None.
        noise_floor: smallest noise variance of each feature, shape (D,).
        recipe: sizes and seed.
    """
    rng = np.random.default_rng(recipe.seed)
    by_class = [z if y is None else z[y == c] for c in range(recipe.num_classes)]
    short = recipe.num_times <= 2
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
        count = recipe.num_trajectories
        starts = [rows[rng.choice(len(rows), count)] for rows in by_class]
        return make(initial_means=np.stack(starts))
    count = recipe.num_trajectories
    if y is None:  # every trajectory is a class
        by_class, count = [z], recipe.num_classes
    settings: Any = {"noise_floor": 2 * noise_floor, "max_iter": EM_ROUNDS, "seed": recipe.seed}
    local = [fit_em(rows, count, recipe.rank, **settings).mixture for rows in by_class]
    lead = (recipe.num_classes, recipe.num_trajectories)
    logits, means, loadings, log_noise = (
        jnp.stack(leaves).reshape(*lead, *leaves[0].shape[1:])
        for leaves in zip(*map(jax.tree.leaves, local), strict=True)
    )
    model = make(initial_means=means, output_scale=SHORT_SCALE if short else LONG_SCALE)
    model.loadings = nnx.Param(loadings)
    model.log_noise = nnx.Param(jnp.log(jnp.exp(log_noise) - noise_floor.astype(log_noise.dtype)))
    weights = model.trajectory_logits if y is not None else model.class_logits
    weights[...] = logits.reshape(weights.shape)
    return model
