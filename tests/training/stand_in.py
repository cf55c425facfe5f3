"""A model without an ODE: free parameters, answered whatever the times."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from cpmm_jax.dynamics.solve import NOT_FINITE, SUCCESS
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.mixture.mfa import MFA
from cpmm_jax.models.reading import Reading
from cpmm_jax.training.config import TrainConfig


class FreeMixture(nnx.Module):
    """C classes of S components of diagonal covariance, T equal copies of each.

    The solve "fails" where the first mean exceeds `fails_above`, as if the field had become too
    stiff, and where the last pseudotime is below `fails_before`, as if by bad luck. A little of the
    root of `cusp` adds to a logit: at zero its derivative is infinite, the likelihood is not.
    `traces` counts how often `read` is traced, over all instances.
    """

    traces = 0

    def __init__(
        self,
        means: Any,
        *,
        log_noise: float = 0.0,
        floor: float = 1e-3,
        fails_above: float = np.inf,
        fails_before: float = 0.0,
        cusp: float = 1e3,
    ) -> None:
        means = jnp.asarray(means, jnp.float32)
        self.num_classes, self.num_trajectories, self.dim = means.shape
        self.rank = 1
        self.means = nnx.Param(means)
        self.log_noise = nnx.Param(jnp.full(means.shape, log_noise, jnp.float32))
        self.class_logits = nnx.Param(jnp.zeros(self.num_classes, jnp.float32))
        self.cusp = nnx.Param(jnp.float32(cusp))
        self.floor = nnx.Variable(jnp.full((self.dim,), floor, jnp.float32))
        # As arrays, so that all of these models are trained by one compiled program.
        self.fails_above = nnx.Variable(jnp.float32(fails_above))
        self.fails_before = nnx.Variable(jnp.float32(fails_before))

    def read(self, times: Array) -> Reading:
        type(self).traces += 1
        noise = jnp.log(jnp.exp(self.log_noise[...]) + self.floor[...][None, None, :])
        count = times.shape[0]
        means = jnp.repeat(self.means[...], count, axis=1)
        components = MFA(
            logits=jnp.zeros(means.shape[:2], means.dtype),
            means=means,
            loadings=jnp.zeros((*means.shape, 1), means.dtype),
            log_noise=jnp.repeat(noise, count, axis=1),
        )
        ok = self.means[...].ravel()[0] <= self.fails_above[...]
        ok &= jnp.asarray(times[-1], jnp.float32) >= self.fails_before[...]
        return Reading(
            HierarchicalMFA(
                self.class_logits[...].at[0].add(1e-3 * jnp.sqrt(self.cusp[...])), components
            ),
            num_steps=jnp.int32(7),
            result=jnp.where(ok, jnp.int32(SUCCESS), NOT_FINITE),
        )


# The settings and shapes that most tests share, so that they share compiled programs too.
QUICK = TrainConfig(
    steps=250, num_times=2, batch_size=128, learning_rate=0.05, warmup_steps=5, report_every=60
)
CENTRES = np.array([[[-2.0, 0.0], [0.0, 2.0]], [[3.0, -1.0], [1.0, 1.0]]])  # (C, S, D)
SIGMA = 0.5


def planted(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw from the mixture at CENTRES with equal weights and standard deviation SIGMA."""
    rng = np.random.default_rng(seed)
    labels, which = rng.integers(0, 2, n), rng.integers(0, 2, n)
    x = CENTRES[labels, which] + SIGMA * rng.normal(size=(n, 2))
    return x, labels


def planted_log_prob(x: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """Evaluate log p(x, y), or log p(x), of the planted mixture in float64."""
    square = ((x[:, None, None] - CENTRES) ** 2).sum(-1) / SIGMA**2
    joint = np.exp(-0.5 * square).sum(-1) / (4 * 2 * np.pi * SIGMA**2)  # (N, C)
    return np.log(joint.sum(1) if y is None else joint[np.arange(len(x)), y])


def start(seed: int = 1, spread: float = 0.5, **settings: Any) -> FreeMixture:
    """Return an untrained model whose means stand near the planted ones."""
    noise = np.random.default_rng(seed).normal(size=CENTRES.shape)
    return FreeMixture(CENTRES + spread * noise, **settings)
