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
    from cpmm_jax.dynamics.solve import SolverConfig
    from cpmm_jax.dynamics.trajectory import GridTimes, StratifiedTimes, UniformTimes
    from cpmm_jax.mixture.hierarchy import HierarchicalMFA
    from cpmm_jax.mixture.mfa import MFA
    from cpmm_jax.models.cpmm import CPMM
    from cpmm_jax.training.config import TrainConfig
    from cpmm_jax.training.loop import FitResult, fit

_HOME = {
    "CPMM": "cpmm_jax.models.cpmm",
    "FitResult": "cpmm_jax.training.loop",
    "GridTimes": "cpmm_jax.dynamics.trajectory",
    "HierarchicalMFA": "cpmm_jax.mixture.hierarchy",
    "MFA": "cpmm_jax.mixture.mfa",
    "SolverConfig": "cpmm_jax.dynamics.solve",
    "StratifiedTimes": "cpmm_jax.dynamics.trajectory",
    "TrainConfig": "cpmm_jax.training.config",
    "UniformTimes": "cpmm_jax.dynamics.trajectory",
    "fit": "cpmm_jax.training.loop",
    "load_mixture": "cpmm_jax.artifact",
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
