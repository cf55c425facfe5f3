"""Continuously parameterized mixture models in JAX.

The public names are loaded when first used, so that `from cpmm_jax import artifact` needs NumPy
alone and `import cpmm_jax` does not wait for what a program never touches.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cpmm_jax.artifact import load_mixture, save_mixture
    from cpmm_jax.curriculum import (
        Curriculum,
        CustomCurriculum,
        FlowCurriculum,
        InterpolantCurriculum,
        NoCurriculum,
        Stages,
    )
    from cpmm_jax.data.pixels import AffinePixels, LogitPixels
    from cpmm_jax.dynamics.flow import CNF
    from cpmm_jax.dynamics.solve import SolverConfig
    from cpmm_jax.dynamics.trace import ExactTrace, HutchinsonTrace
    from cpmm_jax.dynamics.trajectory import GridTimes, StratifiedTimes, UniformTimes
    from cpmm_jax.estimators import (
        CPMMClassifier,
        CPMMCluster,
        CPMMDensity,
        MFAClassifier,
        MFACluster,
        MFADensity,
    )
    from cpmm_jax.mixture.em import fit_em, fit_em_stream, polish
    from cpmm_jax.mixture.em_loops import EMResult
    from cpmm_jax.mixture.em_steps import Constraints
    from cpmm_jax.mixture.hierarchy import HierarchicalMFA
    from cpmm_jax.mixture.initialise import kmeans_start, random_start
    from cpmm_jax.mixture.mfa import MFA
    from cpmm_jax.models.cpmm import CPMM
    from cpmm_jax.models.direct import DirectMFA
    from cpmm_jax.models.selection import (
        broaden_by_validation,
        choose_num_times,
        polish_by_validation,
        prune,
    )
    from cpmm_jax.training.config import TrainConfig
    from cpmm_jax.training.flow import FlowResult, fit_flow
    from cpmm_jax.training.flow_objective import (
        FlowMatching,
        IndependentCoupling,
        MaximumLikelihood,
        OptimalTransportCoupling,
    )
    from cpmm_jax.training.loop import FitResult, fit
    from cpmm_jax.training.snapshots import Checkpoints

_HOME = {
    "AffinePixels": "cpmm_jax.data.pixels",
    "CNF": "cpmm_jax.dynamics.flow",
    "CPMM": "cpmm_jax.models.cpmm",
    "CPMMClassifier": "cpmm_jax.estimators",
    "CPMMCluster": "cpmm_jax.estimators",
    "CPMMDensity": "cpmm_jax.estimators",
    "Checkpoints": "cpmm_jax.training.snapshots",
    "Constraints": "cpmm_jax.mixture.em_steps",
    "Curriculum": "cpmm_jax.curriculum",
    "CustomCurriculum": "cpmm_jax.curriculum",
    "DirectMFA": "cpmm_jax.models.direct",
    "EMResult": "cpmm_jax.mixture.em_loops",
    "ExactTrace": "cpmm_jax.dynamics.trace",
    "FitResult": "cpmm_jax.training.loop",
    "FlowCurriculum": "cpmm_jax.curriculum",
    "FlowMatching": "cpmm_jax.training.flow_objective",
    "FlowResult": "cpmm_jax.training.flow",
    "GridTimes": "cpmm_jax.dynamics.trajectory",
    "HierarchicalMFA": "cpmm_jax.mixture.hierarchy",
    "HutchinsonTrace": "cpmm_jax.dynamics.trace",
    "IndependentCoupling": "cpmm_jax.training.flow_objective",
    "InterpolantCurriculum": "cpmm_jax.curriculum",
    "LogitPixels": "cpmm_jax.data.pixels",
    "MFA": "cpmm_jax.mixture.mfa",
    "MFAClassifier": "cpmm_jax.estimators",
    "MFACluster": "cpmm_jax.estimators",
    "MFADensity": "cpmm_jax.estimators",
    "MaximumLikelihood": "cpmm_jax.training.flow_objective",
    "NoCurriculum": "cpmm_jax.curriculum",
    "OptimalTransportCoupling": "cpmm_jax.training.flow_objective",
    "SolverConfig": "cpmm_jax.dynamics.solve",
    "Stages": "cpmm_jax.curriculum",
    "StratifiedTimes": "cpmm_jax.dynamics.trajectory",
    "TrainConfig": "cpmm_jax.training.config",
    "UniformTimes": "cpmm_jax.dynamics.trajectory",
    "broaden_by_validation": "cpmm_jax.models.selection",
    "choose_num_times": "cpmm_jax.models.selection",
    "fit": "cpmm_jax.training.loop",
    "fit_em": "cpmm_jax.mixture.em",
    "fit_em_stream": "cpmm_jax.mixture.em",
    "fit_flow": "cpmm_jax.training.flow",
    "kmeans_start": "cpmm_jax.mixture.initialise",
    "load_mixture": "cpmm_jax.artifact",
    "polish": "cpmm_jax.mixture.em",
    "polish_by_validation": "cpmm_jax.models.selection",
    "prune": "cpmm_jax.models.selection",
    "random_start": "cpmm_jax.mixture.initialise",
    "save_mixture": "cpmm_jax.artifact",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
