"""scikit-learn's Gaussian mixtures."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from experiments.compare.methods import Rows, Size, component_counts
from experiments.compare.search import Axes, Budget, Choice, Density, Fitted, search

REGULARISATION = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass(frozen=True)
class SklearnMixture:
    """scikit-learn's GaussianMixture: components from few to many, and the regularisation."""

    covariance: str
    size: Size | None = None

    def fit(self, data: Rows, seed: int, budget: Budget) -> Fitted:
        """Return the best candidate."""
        counts = component_counts(data) if self.size is None else (self.size.components,)
        axes: Axes = {"components": counts, "reg_covar": REGULARISATION}
        start = {"components": counts[0], "reg_covar": 1e-3}
        fit = partial(self._fit, data.x_train.astype(np.float64), seed)
        return search(axes, start, fit, data.x_valid, budget)

    def _fit(self, x: npt.NDArray[np.float64], seed: int, choice: Choice) -> Density:
        model = GaussianMixture(
            choice["components"],
            covariance_type=self.covariance,
            reg_covar=choice["reg_covar"],
            max_iter=200,
            random_state=seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x)
        dim = x.shape[1]
        covariances = {
            "full": model.n_components * dim * (dim + 1) // 2,
            "tied": dim * (dim + 1) // 2,
            "diag": model.n_components * dim,
        }
        num_parameters = model.n_components * (1 + dim) + covariances[self.covariance]
        return Density(model.score_samples, num_parameters, {})
