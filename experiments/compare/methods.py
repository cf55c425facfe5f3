"""The methods under comparison: each fits training rows, and chooses its settings by validation."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from experiments.compare.cells import Cell
from experiments.compare.search import Budget, Fitted

SKLEARN = ("sklearn_full", "sklearn_tied", "sklearn_diag")
FREE = ("em_mfa", "em_moves", "direct_kmeans", "direct_random")  # factor analyzers, no field
DIRECT = (*SKLEARN, "sklearn_best", *FREE)
SIZED = ("sklearn_full", *FREE, "cpmm", "cpmm_polish")
METHODS = (*SKLEARN, *FREE, "cpmm", "cpmm_polish", "flow")
PACKAGES = {name: "sklearn" for name in SKLEARN} | {"flow": "flowjax"}
COMPONENTS = (1, 2, 5, 10, 20, 40, 80, 160, 320)


class Rows(NamedTuple):
    """What a method gets to see: standardised float32 examples, (N, D); no test rows."""

    x_train: npt.NDArray[np.float32]
    x_valid: npt.NDArray[np.float32]


class Size(NamedTuple):
    """Components and factors that a mixture must have."""

    components: int
    rank: int

    def within(self, dim: int) -> Size:
        """Return it with at most D - 1 factors: as many describe any covariance."""
        return self._replace(rank=min(self.rank, dim - 1))


class Method(Protocol):
    """Fits a density, on whose settings validation rows decide within the budget."""

    def fit(self, data: Rows, seed: int, budget: Budget) -> Fitted:
        """Return the best candidate."""


def make_method(cell: Cell) -> Method:
    """Return the method that a cell names, under the cell's settings.

    Raises:
        ValueError: an unknown name.
    """
    settings = cell.settings
    size = None
    if settings.components is not None and settings.rank is not None:
        size = Size(settings.components, settings.rank)
    # Each file loads its libraries when it is asked for, before the clock of a fit starts.
    match cell.method:
        case "sklearn_full" | "sklearn_tied" | "sklearn_diag":
            from experiments.compare.gaussians import SklearnMixture

            return SklearnMixture(cell.method.removeprefix("sklearn_"), size)
        case "em_mfa" | "em_moves":
            from experiments.compare.factor_analyzers import EMMixture

            return EMMixture(size, moved=cell.method == "em_moves")
        case "direct_kmeans" | "direct_random":
            from experiments.compare.factor_analyzers import DirectMixture

            return DirectMixture(size, settings.steps, random=cell.method == "direct_random")
        case "cpmm" | "cpmm_polish":
            from experiments.compare.factor_analyzers import ContinuousMixture

            return ContinuousMixture(size, settings.steps, polished=cell.method == "cpmm_polish")
        case "flow":
            from experiments.compare.flow import SplineFlow

            return SplineFlow(settings.steps)
    raise ValueError(f"`method` must be one of {', '.join(METHODS)}; got {cell.method!r}")


def missing_packages(methods: Sequence[str]) -> dict[str, str]:
    """Map the methods that cannot run here to the package that each lacks."""
    needed = {name: PACKAGES[name] for name in methods if name in PACKAGES}
    return {name: package for name, package in needed.items() if find_spec(package) is None}


def component_counts(data: Rows) -> tuple[int, ...]:
    """Return the numbers of components to try: at least two rows for each."""
    return tuple(k for k in COMPONENTS if k == 1 or 2 * k <= len(data.x_train))
