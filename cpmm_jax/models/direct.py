"""The mixture that a CPMM is compared with: the same parameters, free."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from cpmm_jax.dynamics.draws import draw_arrays
from cpmm_jax.mixture.checks import check_noise, check_noise_floor, check_sizes
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.mixture.mfa import MFA
from cpmm_jax.models.reading import Reading


class DirectMFA(nnx.Module):
    """A mixture of factor analyzers with free parameters, flat (C = 1) or with classes.

    It has the face of a CPMM, so that `fit` trains it by the same steps; the pseudotimes make no
    difference. It starts at random; start a good fit with `from_mixture`.

    Attributes:
        num_trajectories: components of each class, K: every one is a trajectory of its own.

    Args:
        dim: features, D.
        rank: factors, R.
        num_components: components of each class, K.
        num_classes: C.
        initial_noise: noise variance at the start.
        noise_floor: smallest noise variance, a number or shape (D,).
        param_dtype: dtype of the parameters.
        rngs: a flax `nnx.Rngs`, used here and not kept.

    Raises:
        ConfigError: a size out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = DirectMFA(2, 1, num_components=5, rngs=nnx.Rngs(0))
        >>> model.mixture(jnp.zeros(1)).components.means.shape
        (1, 5, 2)

    Source: CPMM paper, section 2.1.1.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        num_components: int,
        num_classes: int = 1,
        *,
        initial_noise: float = 0.5,
        noise_floor: Float[ArrayLike, "*D"] = 1e-4,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_sizes(dim, rank, num_components=num_components, num_classes=num_classes)
        check_noise(initial_noise)
        floor = check_noise_floor(noise_floor, dim)
        self.dim, self.rank = dim, rank
        self.num_classes, self.num_trajectories = num_classes, num_components
        lead = (num_classes, num_components)
        shapes = [(*lead, dim), (*lead, dim, rank)]
        means, loadings = draw_arrays(jax.random.normal, rngs.params(), shapes, param_dtype)
        self.means = nnx.Param(means)
        self.loadings = nnx.Param(loadings * math.sqrt(0.5 / max(rank, 1)))
        self.log_noise = nnx.Param(jnp.full((*lead, dim), math.log(initial_noise), param_dtype))
        self.logits = nnx.Param(jnp.zeros(lead, param_dtype))
        self.class_logits = nnx.Param(jnp.zeros((num_classes,), param_dtype))
        self.log_floor = nnx.Variable(jnp.log(jnp.asarray(floor, param_dtype)))

    @classmethod
    def from_mixture(
        cls, mixture: MFA | HierarchicalMFA, *, noise_floor: Float[ArrayLike, "*D"] = 1e-4
    ) -> DirectMFA:
        """Start at a mixture: `kmeans_start`, a fit by EM, or an extracted CPMM.

        Args:
            mixture: an `MFA` of K components, or a `HierarchicalMFA` of K in each of C classes.
            noise_floor: smallest noise variance; a component below it starts just above.
        """
        if isinstance(mixture, MFA):
            components = jax.tree.map(lambda leaf: leaf[None], mixture)
            mixture = HierarchicalMFA(jnp.zeros(1, mixture.means.dtype), components)
        components = mixture.components
        num_classes, num_components, dim, rank = components.loadings.shape
        dtype = components.means.dtype
        model = cls(
            dim,
            rank,
            num_components,
            num_classes,
            noise_floor=noise_floor,
            param_dtype=dtype,
            rngs=nnx.Rngs(0),
        )
        floor = np.exp(np.asarray(model.log_floor[...]))
        noise = np.exp(np.asarray(components.log_noise))
        free = np.maximum(noise - floor, 1e-2 * floor)  # what the floor is added to
        model.means = nnx.Param(components.means)
        model.loadings = nnx.Param(components.loadings)
        model.log_noise = nnx.Param(jnp.log(jnp.asarray(free, dtype)))
        model.logits = nnx.Param(components.logits)
        model.class_logits = nnx.Param(mixture.class_logits)
        return model

    def read(self, times: Float[Array, " T"]) -> Reading:
        """Return the mixture; `times` make no difference."""
        zero = jnp.zeros((), jnp.int32)
        noise = jnp.logaddexp(self.log_noise[...], self.log_floor[...][None, None, :])
        parameters = (self.logits[...], self.means[...], self.loadings[...], noise)
        return Reading(HierarchicalMFA(self.class_logits[...], MFA(*parameters)), zero, zero)

    def mixture(self, times: Float[Array, " T"]) -> HierarchicalMFA:
        """Return the mixture, differentiable; `times` make no difference."""
        return self.read(times).mixture

    def extract(self, num_times: int = 1) -> HierarchicalMFA:
        """Return the mixture; `num_times` makes no difference."""
        return self.read(jnp.zeros(1)).mixture
