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
import numpy as np
from flax import nnx

from cpmm_jax.curriculum import Curriculum, FlowCurriculum, InterpolantCurriculum, NoCurriculum
from cpmm_jax.data.dataset import Dataset, Part, split
from cpmm_jax.data.pixels import AffinePixels, noise_of
from cpmm_jax.data.standardise import Standardizer
from cpmm_jax.dynamics.flow import CNF
from cpmm_jax.mixture.em import polish
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.models.cpmm import CPMM
from cpmm_jax.models.selection import broaden_by_validation, polish_by_validation
from cpmm_jax.recipe import Recipe
from cpmm_jax.starts import build_model, complete, divide, with_clusters
from cpmm_jax.training.config import TrainConfig
from cpmm_jax.training.flow import fit_flow
from cpmm_jax.training.flow_objective import FlowMatching
from cpmm_jax.training.loop import FitResult, fit
from cpmm_jax.training.snapshots import Checkpoints

TAIL_NOISE = 0.1  # of a column's variance, which is 1 in the units of the model
FLOW_STEPS = 4000
OF_THE_MODEL = (  # settings that stay where training goes on from an earlier fit
    "num_classes",
    "num_trajectories",
    "num_times",
    "train_times",
    "event_shape",
    "dequantise",
)


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
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
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
        checkpoints: where to save the trainings of flow and mixture, each in a folder of its own.
        resume: whether to go on from there; what comes before and after is done anew, and the same.

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
    if begin is None and recipe.event_shape is not None:
        standardizer = Standardizer.fit_images(x_train, recorded=recipe.dequantise)
    elif begin is None:
        standardizer = Standardizer.fit(x_train, names=feature_names, weight=weight)
    else:
        standardizer = begin.standardizer
        recipe = replace(recipe, **{name: getattr(begin.recipe, name) for name in OF_THE_MODEL})
        # Along a curriculum the training would forget what it goes on from.
        recipe = replace(recipe, divisions=(), refit=False, curriculum="none")
    floor = np.maximum(standardizer.noise_floor(), recipe.least_noise)
    data = Dataset("x", x_train, y_train, weight_train=weight)
    if x_valid is None:  # the rows that `fit` would take
        read = recipe.num_classes * recipe.num_trajectories * recipe.num_times
        if len(x_train) * (1 - config.valid_fraction) - 1 < read:  # none to spare
            config = replace(config, valid_fraction=0.0, patience=None)
        cut = config.valid_fraction
        data = split(data, seed=recipe.seed, valid_fraction=cut, test_fraction=0.0)
    else:
        data = replace(data, x_valid=x_valid, y_valid=y_valid, weight_valid=weight_valid)
    pixels, recorded = None, (data.x_train, data.x_valid)
    if recipe.dequantise:
        pixels = AffinePixels(float(standardizer.shift[0]), float(standardizer.scale[0]))
    data = _standardized(data, standardizer, pixels, recipe.seed)
    if recipe.clusters:
        before = None if begin is None else begin.standardized
        data = with_clusters(data, recipe, standardizer.scale, before)
    keep: Any = partial(_keep, checkpoints, resume)
    quiet: Any = {"progress": progress}
    curriculum = build_curriculum(data.x_train, data.x_valid, recipe, flow, **quiet, **keep("flow"))
    recipe = divide(data, floor, recipe)
    untrained = begin and begin.model
    if untrained is None:
        classes = complete(data.x_train, data.y_train, recipe, weight=data.weight_train)
        untrained = build_model(
            data.x_train, classes, floor, recipe, curriculum, weight=data.weight_train
        )
    if pixels is not None and not (recipe.polish or recipe.refit):  # a copy too many, of images
        data = replace(data, x_train=recorded[0], x_valid=recorded[1])
    train = (data.x_train, data.y_train)
    valid: Any = {key: getattr(data, key) for key in ("x_valid", "y_valid", "weight_valid")}
    given: Any = {} if pixels is None else {"pixels": pixels, "x_valid": recorded[1]}
    result = fit(
        untrained,
        data.x_train if pixels is None else recorded[0],
        data.y_train,
        config=replace(config, num_times=recipe.train_times, valid_times=recipe.num_times),
        curriculum=curriculum,
        sample_weight=data.weight_train,
        **(valid | given),
        metrics_path=metrics_path,
        **quiet,
        **keep("mixture"),
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
        own: Any = {"curriculum": curriculum, "sample_weight": weight, **quiet, **keep("refit")}
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


def _standardized(
    data: Dataset, standardizer: Standardizer, pixels: AffinePixels | None, seed: int
) -> Dataset:
    """Return examples in standardised units; of recorded pixels with noise drawn once."""

    def carried(part: Part) -> np.ndarray | None:
        x = data.part(part)[0]
        if x is None or pixels is None:
            return None if x is None else standardizer.transform(x)
        return pixels.carry(noise_of(seed, part), x, name=f"x_{part}")

    x_train = carried("train")
    assert x_train is not None
    return replace(data, name="z", x_train=x_train, x_valid=carried("valid"))


def _keep(checkpoints: Checkpoints | None, resume: bool, name: str) -> dict[str, Any]:
    """Return where one of the trainings is saved, and whether it goes on from there."""
    if checkpoints is None:
        return {}
    folder = Path(checkpoints.folder, name)
    return {
        "checkpoints": replace(checkpoints, folder=folder),
        "resume": resume and folder.is_dir(),
    }


def build_curriculum(
    z: np.ndarray,
    z_valid: np.ndarray | None,
    recipe: Recipe,
    flow: CNF | None = None,
    **training: Any,
) -> Curriculum:
    """Return the curriculum that the recipe names; a flow that is not given is trained.

    Args:
        z: standardised training examples, shape (N, D).
        z_valid: standardised validation examples, or None.
        recipe: names the curriculum; its seed.
        flow: one trained before.
        **training: `progress`, `checkpoints` and `resume`, as for `fit`.
    """
    if recipe.curriculum == "none":
        return NoCurriculum()
    if recipe.curriculum == "interpolant":
        return InterpolantCurriculum()
    if flow is None:
        untrained = CNF(z.shape[1], rngs=nnx.Rngs(recipe.seed))
        config = TrainConfig(steps=FLOW_STEPS, seed=recipe.seed)
        settings: Any = {"objective": FlowMatching(), "config": config, **training}
        flow = fit_flow(untrained, z, x_valid=z_valid, **settings).flow
    return FlowCurriculum(flow)
