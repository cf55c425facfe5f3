"""What training minimises, and the score by which parameters are chosen."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cpmm_jax.dynamics.solve import SUCCESS
from cpmm_jax.models.reading import Reading


class Trainable(Protocol):
    """What `fit` asks of a model, a `flax.nnx.Module` besides.

    Attributes:
        dim: D, number of features.
        num_classes: C.
        num_trajectories: S, trajectories per class; each step's mixture has C S T components.
    """

    dim: int
    num_classes: int
    num_trajectories: int

    def read(self, times: Float[Array, " T"]) -> Reading:
        """Return the mixture at pseudotimes in [0, 1]; differentiable, raises nothing traced."""


class Diagnostics(NamedTuple):
    """What a solve tells besides the mixture.

    Attributes:
        num_steps: steps that the solver took.
        result: 0 for success, else a code of `dynamics.solve.check_result`.
    """

    num_steps: Int[Array, ""]
    result: Int[Array, ""]

    @property
    def ok(self) -> Bool[Array, ""]:
        """Whether the solve succeeded."""
        return self.result == SUCCESS


def negative_log_likelihood(
    model: Trainable,
    times: Float[Array, " T"],
    x: Float[Array, "N D"],
    y: Int[Array, " N"] | None = None,
    weight: Float[Array, " N"] | None = None,
    discriminative: Float[Array, ""] | float = 0.0,
) -> tuple[Float[Array, ""], Diagnostics]:
    """Compute the mean of -log p(x, y), or of -log p(x) where there is no label.

    With labels, `discriminative` takes away that share of log p(x): the more of it, the less the
    mixture describes the examples and the more it tells their classes apart. At 1 what remains is
    log p(y | x), the objective of a classifier.

    Args:
        model: answers `read(times)`.
        times: pseudotimes in [0, 1], shape (T,).
        x: examples, shape (N, D).
        y: class codes, shape (N,), -1 where the class is not known; None where none is.
        weight: how much each example counts, shape (N,), one on average over all data; None for
            all alike.
        discriminative: lambda in [0, 1], of log p(x, y) - lambda log p(x); 0 without labels.

    Returns:
        The loss in nats per example, and the diagnostics of the solve.

    Source: CPMM paper, Eq. 5 (without labels) and section 3.2 (with labels; those not known
    are summed out); Bouchard and Triggs, "The tradeoff between generative and discriminative
    classifiers" (2004), for what lies between.
    """
    reading = model.read(times)
    if y is None:
        log_prob = reading.mixture.log_prob(x)
    else:
        joint = reading.mixture.class_log_prob(x)
        known = jnp.take_along_axis(joint, jnp.maximum(y, 0)[:, None], axis=1)[:, 0]
        total = jax.nn.logsumexp(joint, axis=1)
        share = jnp.asarray(discriminative, total.dtype)
        log_prob = jnp.where(y < 0, total, known) - share * total
    if weight is not None:
        log_prob = weight * log_prob
    return -jnp.mean(log_prob), Diagnostics(reading.num_steps, reading.result)
