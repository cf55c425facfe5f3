"""From a table to a mixture with free parameters: the path of `pipeline`, without a field."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cpmm_jax.data.dataset import Dataset, split
from cpmm_jax.data.standardise import Standardizer
from cpmm_jax.errors import ConfigError
from cpmm_jax.mixture.em import fit_em, polish
from cpmm_jax.mixture.em_loops import EMResult
from cpmm_jax.mixture.grouping import spread_labels
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.mixture.initialise import kmeans_start
from cpmm_jax.mixture.mfa import MFA
from cpmm_jax.models.direct import DirectMFA
from cpmm_jax.models.selection import broaden_by_validation
from cpmm_jax.recipe import default_rank
from cpmm_jax.starts import EM_MOVES
from cpmm_jax.training.config import TrainConfig
from cpmm_jax.training.loop import fit

FEW = 20  # rows of a class under which nothing is chosen by validation
COMPONENTS = (1, 2, 5, 10, 20, 40, 80)  # of a class, among which validation chooses
METHODS = ("em", "gradient")


@dataclass(frozen=True, kw_only=True)
class DirectSettings:
    """How to fit a mixture with free parameters.

    Attributes:
        components: of each class; None for a number that validation chooses.
        rank: factors, R, at most D.
        method: "em", or "gradient".
        max_iter: most iterations of EM, or training steps; None for 200 and for 3,000.
        tol: gain in nats below which EM stops.
        n_init: starts of EM, of which the likeliest is taken.
        valid_fraction: part of the rows by which the number of components, and how much noise to
            add, are chosen; 0 to choose nothing.
        seed: of starts and parts.
    """

    components: int | None = None
    rank: int = 4
    method: str = "em"
    max_iter: int | None = None
    tol: float = 1e-4
    n_init: int = 3
    valid_fraction: float = 0.15
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DirectFit:
    """A mixture of factor analyzers fitted to a table.

    Attributes:
        standardized: the mixture, in standardised units.
        standardizer: from the units of the data to those.
        iterations: of EM, the most of any class; of the gradient, steps.
        converged: whether more of them would have gained nothing.
    """

    standardized: HierarchicalMFA
    standardizer: Standardizer
    iterations: int
    converged: bool


def fit_direct(
    x: np.ndarray,
    y: np.ndarray | None,
    num_classes: int,
    settings: DirectSettings,
    *,
    weight: np.ndarray | None = None,
    clusters: bool = False,
    begin: DirectFit | None = None,
) -> DirectFit:
    """Standardise, and fit an `MFA` to each class, or one to all examples.

    Where there is a choice to make, a part of the rows makes it, and all rows are fitted then.

    Args:
        x: training examples, shape (N, D).
        y: class codes, shape (N,), -1 where not known; None for none.
        num_classes: C; 1 for a density.
        settings: see `DirectSettings`.
        weight: for how many rows each example stands, shape (N,); None for one.
        clusters: whether the classes are clusters to find, a component in each.
        begin: an earlier fit to go on from; None to begin anew.

    Raises:
        ConfigError: an unknown method.
        DataError: see `fit_em`.
    """
    if settings.method not in METHODS:
        raise ConfigError(f"`method` must be one of {', '.join(METHODS)}; got {settings.method!r}.")
    standardizer = Standardizer.fit(x, weight=weight) if begin is None else begin.standardizer
    data = Dataset("z", standardizer.transform(x), y, weight_train=weight)
    if clusters:
        settings = replace(settings, components=num_classes)
    own = _Path(1 if clusters else num_classes, 2 * standardizer.noise_floor(), settings)
    if begin is not None:
        flat = begin.standardized.flatten()
        start = _apart(flat, 1) if clusters else begin.standardized
        fitted, noise = own.fit(data, 1, start), 0.0
    else:
        count, noise = own.choose(data)
        fitted = own.fit(data, count)
    mixture = fitted.mixture.with_noise(noise) if noise else fitted.mixture
    return DirectFit(
        standardized=_apart(mixture.flatten(), num_classes) if clusters else mixture,
        standardizer=standardizer,
        iterations=fitted.iterations,
        converged=fitted.converged,
    )


class _Fitted(NamedTuple):
    mixture: HierarchicalMFA
    iterations: int
    converged: bool


@dataclass(frozen=True)
class _Path:
    """What is the same for every fit to one table."""

    num_classes: int
    noise_floor: np.ndarray
    settings: DirectSettings

    def choose(self, data: Dataset) -> tuple[int, float]:
        """Return the number of components that validation prefers, and the noise to add."""
        given, cut = self.settings.components, self.settings.valid_fraction
        if not cut or len(data.x_train) < FEW * self.num_classes:
            return given or 1, 0.0
        parts = split(data, seed=self.settings.seed, valid_fraction=cut, test_fraction=0.0)
        valid: Any = (parts.x_valid, parts.y_valid)
        y = parts.y_train
        fewest = len(parts.x_train) if y is None else np.bincount(y[y >= 0]).min()
        counts = COMPONENTS if given is None else (given,)
        best, found = -np.inf, (given or 1, 0.0)
        for count in (k for k in counts if k in (1, given) or 4 * k <= fewest):
            mixture = self.fit(parts, count, thorough=False).mixture
            broad = broaden_by_validation(mixture, *valid, weight_valid=parts.weight_valid)
            if broad.scores[broad.noise] <= best:
                break
            best, found = broad.scores[broad.noise], (count, broad.noise)
        return found

    def fit(
        self,
        data: Dataset,
        count: int,
        start: HierarchicalMFA | None = None,
        *,
        thorough: bool = True,
    ) -> _Fitted:
        """Fit by EM, or by gradient from where k-means starts; if not thorough from one start."""
        by_gradient = self.settings.method == "gradient"
        iterations = 0 if by_gradient else self.settings.max_iter or 200
        y, partly = data.y_train, data.y_train is not None and data.y_train.min() < 0
        if y is not None and partly:
            y = spread_labels(data.x_train, y, self.num_classes, weight=data.weight_train)
        classes = []
        for c in range(self.num_classes):
            rows = np.arange(len(data.x_train)) if y is None else np.flatnonzero(y == c)
            weight = None if data.weight_train is None else data.weight_train[rows]
            begin = None if start is None else start.class_mixture(c)
            em: Any = {"weight": weight, "start": begin, "thorough": thorough}
            classes.append(self._em(data.x_train[rows], count, iterations, **em))
        components = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(result.mixture for result in classes)
        )
        shares = _class_weights(data, self.num_classes)
        log_shares = jnp.log(jnp.asarray(shares, components.means.dtype))
        mixture = HierarchicalMFA(log_shares, components)
        if by_gradient:
            return self._train(mixture, data)
        if partly:
            more: Any = {"max_iter": iterations, "sample_weight": data.weight_train}
            mixture = polish(mixture, data.x_train, data.y_train, **more)
        return _Fitted(
            mixture,
            max(result.iterations for result in classes),
            all(result.converged for result in classes),
        )

    def _em(
        self,
        z: np.ndarray,
        count: int,
        max_iter: int,
        *,
        weight: np.ndarray | None,
        start: MFA | None,
        thorough: bool,
    ) -> EMResult:
        settings: Any = {
            "start": kmeans_start if start is None else start,
            "n_init": self.settings.n_init if thorough else 1,
            "moves": EM_MOVES if thorough and max_iter else 0,
            "max_iter": max_iter,
            "tol": self.settings.tol,
            "noise_floor": self.noise_floor,
            "sample_weight": weight,
            "seed": self.settings.seed,
        }
        return fit_em(z, count, self.settings.rank, **settings)

    def _train(self, start: HierarchicalMFA, data: Dataset) -> _Fitted:
        cut = self.settings.valid_fraction
        config = TrainConfig(
            steps=self.settings.max_iter or 3000,
            num_times=1,
            valid_fraction=cut,
            patience=10 if cut else None,
            seed=self.settings.seed,
        )
        model = DirectMFA.from_mixture(start, noise_floor=self.noise_floor)
        result = fit(
            model,
            data.x_train,
            data.y_train,
            config=config,
            sample_weight=data.weight_train,
            progress=False,
        )
        return _Fitted(result.model.extract(), result.steps, result.converged)


def _apart(flat: MFA, num_classes: int) -> HierarchicalMFA:
    """Return a mixture as classes of equally many of its components."""
    lead = (num_classes, flat.num_components // num_classes)
    parts = jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), flat)
    return HierarchicalMFA(jax.nn.logsumexp(parts.logits, axis=1), parts)


def count_clusters(
    x: np.ndarray, *, weight: np.ndarray | None = None, most: int = 30, seed: int = 0
) -> int:
    """Return the number of components, one for a cluster, that the BIC prefers.

    Args:
        x: examples, shape (N, D), in any units.
        weight: for how many rows each stands, shape (N,).
        most: components tried; the search ends where three in a row are no better.
        seed: of the starts.

    Source: Schwarz, "Estimating the dimension of a model" (1978).
    """
    standardizer = Standardizer.fit(x, weight=weight)
    z, dim = standardizer.transform(x), x.shape[1]
    total = len(x) if weight is None else float(weight.sum())
    rank = default_rank(total, dim)
    best, found = np.inf, 1
    for count in range(1, min(most, len(x)) + 1):
        settings: Any = {"n_init": 3, "moves": EM_MOVES, "sample_weight": weight, "seed": seed}
        fitted = fit_em(z, count, rank, noise_floor=2 * standardizer.noise_floor(), **settings)
        numbers = count * (1 + 2 * dim + dim * rank - rank * (rank - 1) // 2) - 1
        score = numbers * np.log(total) - 2.0 * total * fitted.log_likelihood
        if score < best:
            best, found = score, count
        if count >= found + 3:
            break
    return found


def _class_weights(data: Dataset, num_classes: int) -> np.ndarray:
    """Return the part of the labelled examples that each class has, by their weights."""
    if data.y_train is None:
        return np.ones(1)
    known = data.y_train >= 0
    weight = None if data.weight_train is None else data.weight_train[known]
    counts = np.bincount(data.y_train[known], weight, num_classes)
    return counts / counts.sum()  # type: ignore[no-any-return]
