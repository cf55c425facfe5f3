"""A small model of two classes and three trajectories, and densities without JAX."""

from __future__ import annotations

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from cpmm_jax.artifact import Mixture
from cpmm_jax.dynamics.solve import SolverConfig
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.models.cpmm import CPMM

QUICK = SolverConfig(num_steps=8)


def small(seed: int = 0, **settings: Any) -> CPMM:
    """Return D = 2, R = 1, C = 2, S = 3."""
    sizes = {"dim": 2, "rank": 1, "num_classes": 2, "num_trajectories": 3}
    cheap = {"augmented": 4, "widths": (8,), "solver": QUICK}
    return CPMM(**(sizes | cheap | settings), rngs=nnx.Rngs(seed))


def uneven(model: CPMM) -> CPMM:
    """Give the classes and trajectories weights of their own."""
    lead = model.trajectory_logits[...].shape
    count = jnp.arange(np.prod(lead), dtype=jnp.float32)
    model.trajectory_logits[...] = jnp.cos(count).reshape(lead)
    model.class_logits[...] = jnp.linspace(-0.5, 0.5, lead[0], dtype=jnp.float32)
    return model


def wild() -> CPMM:
    """Return a model whose field is infinite."""
    model = small(solver=SolverConfig(solver=diffrax.Euler(), num_steps=2))
    model.field.output.kernel[...] = jnp.full_like(model.field.output.kernel[...], jnp.inf)
    return model


def examples(n: int, dim: int = 2, seed: int = 7) -> Array:
    return jax.random.normal(jax.random.key(seed), (n, dim), jnp.float32)


def leaves(tree: Any) -> list[Array]:
    return jax.tree.leaves(tree)


def log_prob(mixture: HierarchicalMFA, x: Any) -> np.ndarray:
    """Evaluate log p(x) in NumPy: nothing to compile."""
    return Mixture(*(np.asarray(leaf) for leaf in leaves(mixture))).log_prob(x)
