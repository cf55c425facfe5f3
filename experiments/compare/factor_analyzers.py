"""Mixtures of factor analyzers: with free parameters by EM or by gradient, and the CPMM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

import cpmm_jax as cpmm
from cpmm_jax.mixture.em import fit_em
from cpmm_jax.mixture.initialise import kmeans_start, random_start
from cpmm_jax.models.direct import DirectMFA
from cpmm_jax.models.selection import broaden_by_validation
from cpmm_jax.pipeline import TAIL_NOISE, fit_mixture
from cpmm_jax.recipe import Recipe, recommend
from cpmm_jax.starts import EM_MOVES, EM_STARTS
from experiments.compare.methods import Rows, Size, component_counts
from experiments.compare.search import Axes, Budget, Choice, Density, Fitted, search

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
NOISE_FLOORS = (1e-5, 1e-4, 1e-3, 1e-2)  # of a column's variance
STARTS = 10  # of EM
TAIL_WEIGHT = 0.1  # as `recommend` sets it


@dataclass(frozen=True)
class EMMixture:
    """A mixture of factor analyzers by EM, the likeliest of ten starts at k-means centres."""

    size: Size | None = None
    moved: bool = False  # components too, and noise added while validation gains, as in the recipe

    def fit(self, data: Rows, seed: int, budget: Budget) -> Fitted:
        """Return the best candidate."""
        axes, start = _direct_axes(data, self.size)
        return search(axes, start, partial(self._fit, data, seed), data.x_valid, budget)

    def _fit(self, data: Rows, seed: int, choice: Choice) -> Density:
        found = fit_em(
            data.x_train,
            choice["components"],
            choice["rank"],
            start=kmeans_start,
            n_init=EM_STARTS if self.moved else STARTS,
            moves=EM_MOVES if self.moved else 0,
            noise_floor=choice["noise_floor"],
            seed=seed,
        )
        mixture = found.mixture
        if self.moved:
            mixture = broaden_by_validation(mixture, data.x_valid).mixture
        return _density(mixture, data, tails=self.size is None)


@dataclass(frozen=True)
class DirectMixture:
    """A mixture of factor analyzers with free parameters, by gradient."""

    size: Size | None = None
    steps: int | None = None
    random: bool = False  # start at random instead of at k-means centres

    def fit(self, data: Rows, seed: int, budget: Budget) -> Fitted:
        """Return the best candidate."""
        axes, start = _direct_axes(data, self.size)
        axes |= {"learning_rate": LEARNING_RATES}
        start |= {"learning_rate": 3e-3}
        return search(axes, start, partial(self._fit, data, seed), data.x_valid, budget)

    def _fit(self, data: Rows, seed: int, choice: Choice) -> Density:
        begin = (random_start if self.random else kmeans_start)(
            data.x_train,
            choice["components"],
            choice["rank"],
            noise_floor=choice["noise_floor"],
            seed=seed,
        )
        config = cpmm.TrainConfig(
            steps=self.steps or 3000,
            learning_rate=choice["learning_rate"],
            num_times=1,
            patience=10,
            seed=seed,
        )
        model = DirectMFA.from_mixture(begin, noise_floor=choice["noise_floor"])
        found = cpmm.fit(model, data.x_train, config=config, x_valid=data.x_valid, progress=False)
        return _density(found.model.extract(1), data, tails=self.size is None)


@dataclass(frozen=True)
class ContinuousMixture:
    """The CPMM by its recipe; then other sizes, trajectories and learning rates around it."""

    size: Size | None = None
    steps: int | None = None
    polished: bool = False  # by EM on the extracted mixture, as long as validation gains

    def fit(self, data: Rows, seed: int, budget: Budget) -> Fitted:
        """Return the best candidate."""
        fit = partial(self._fit, data, seed)
        return search(*self._axes(data), fit, data.x_valid, budget)

    def _axes(self, data: Rows) -> tuple[Axes, Choice]:
        n, dim = data.x_train.shape
        size = {} if self.size is None else self.size.within(dim)._asdict()
        first = recommend(n, dim, **size)
        trajectories = first.num_classes  # without labels, one in each
        components = trajectories * first.num_times
        start = {
            "rank": first.rank,
            "components": components,
            "trajectories": None if self.size is not None else trajectories,  # as the recipe has it
            "local_start": first.local_start,
            "learning_rate": first.learning_rate,
        }
        axes: Axes = {
            "rank": _around(first.rank, most=dim - 1),
            "components": _around(components, most=n),
            "trajectories": _around(trajectories, most=components),
            "local_start": (False, True),
            "learning_rate": LEARNING_RATES,
        }
        if self.size is not None:
            counts = [s for s in range(1, components + 1) if components % s == 0]
            free = [None if count == trajectories else count for count in counts]
            axes |= {"rank": (first.rank,), "components": (components,), "trajectories": free}
        return axes, start

    def _fit(self, data: Rows, seed: int, choice: Choice) -> Density:
        recipe = recommend(*data.x_train.shape, **choice, steps=self.steps, seed=seed)
        recipe = replace(recipe, polish=self.polished)
        return fit_recipe(data, recipe, tails=self.size is None)


def fit_recipe(data: Rows, recipe: Recipe, *, tails: bool) -> Density:
    """Fit a CPMM: tails where validation prefers them, and no second fit with validation rows."""
    recipe = replace(recipe, tails=0.0, refit=False)
    found = fit_mixture(data.x_train, None, data.x_valid, None, recipe, progress=False)
    density = _density(found.mixture, data, tails=tails)
    return density._replace(found={"times": found.recipe.num_times, **density.found})


def _direct_axes(data: Rows, size: Size | None) -> tuple[Axes, Choice]:
    """Return axes for a mixture with free parameters, and where on them to start."""
    n, dim = data.x_train.shape
    if size is not None:
        start = size.within(dim)._asdict()
        axes: Axes = {name: (value,) for name, value in start.items()}
    else:
        rank = recommend(n, dim).rank
        counts = component_counts(data)
        # Twenty rows for each vector of a component: its mean, its noise and its factors.
        likely = max(k for k in counts if k == 1 or 20 * k * (rank + 2) <= n)
        axes = {"components": counts, "rank": _around(rank, most=dim - 1)}
        start = {"components": likely, "rank": rank}
    return axes | {"noise_floor": NOISE_FLOORS}, start | {"noise_floor": 1e-4}


def _around(value: int, *, most: int) -> Sequence[int]:
    """Return half, the same and twice, those others above `most` being cut down to it."""
    return sorted({min(v, max(value, most)) for v in (max(1, value // 2), value, 2 * value)})


def _density(mixture: Any, data: Rows, *, tails: bool) -> Density:
    """Wrap an `MFA` or `HierarchicalMFA`; give it tails if allowed and if validation prefers them.

    scikit-learn's mixtures have `reg_covar` against the same danger, narrow components.
    """
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(mixture))
    if not tails:
        return Density(mixture.log_prob, num_parameters, {})
    forms: Mapping[float, Any] = {
        0.0: mixture,
        TAIL_WEIGHT: mixture.with_tails(TAIL_NOISE, TAIL_WEIGHT),
    }
    scores = {weight: float(form.log_prob(data.x_valid).mean()) for weight, form in forms.items()}
    best = max(forms, key=lambda weight: scores[weight])
    return Density(forms[best].log_prob, num_parameters, {"tails": best})
