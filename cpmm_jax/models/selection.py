"""What is chosen after training: the number of components, and how far EM goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from cpmm_jax.errors import ConfigError
from cpmm_jax.mixture.em import polish
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.mixture.mfa import MFA
from cpmm_jax.mixture.padding import pad_rows, padded_size_of_few
from cpmm_jax.models.cpmm import CPMM

NUM_TIMES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
ROUNDS = (0, 3, 10, 30, 100, 300)  # of EM
NOISE = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # variances


class Selection(NamedTuple):
    """Mixtures of one trained model, compared by validation.

    Attributes:
        num_times: the best number of pseudotimes.
        mixture: the mixture extracted with it.
        scores: mean validation log-likelihood in nats of every number tried.
    """

    num_times: int
    mixture: HierarchicalMFA
    scores: dict[int, float]


def choose_num_times(
    model: CPMM,
    x_valid: Float[ArrayLike, "N D"],
    y_valid: Int[ArrayLike, " N"] | None = None,
    *,
    candidates: Sequence[int] = NUM_TIMES,
) -> Selection:
    """Extract one trained CPMM at several numbers of pseudotimes, and take the best by validation.

    The mixture has C S T components at T pseudotimes: their number is a choice at extraction, for
    which a direct mixture would have to be fitted anew.

    Args:
        model: a trained CPMM.
        x_valid: validation examples in the units of the model, shape (N, D).
        y_valid: class codes, shape (N,), to compare by log p(x, y); None for log p(x).
        candidates: numbers of pseudotimes, T.

    Returns:
        A `Selection`; of equal scores the smaller mixture.

    Raises:
        ConfigError: no candidates, or one below 1.
        SolverError: the ODE could not be solved.
    """
    if not candidates:
        raise ConfigError("`candidates` must list at least one number of pseudotimes; got none.")
    scores: dict[int, float] = {}
    best: Selection | None = None
    for num_times in sorted(candidates):
        mixture = model.extract(num_times)
        scores[num_times] = _score(mixture, x_valid, y_valid)
        if best is None or scores[num_times] > scores[best.num_times]:
            best = Selection(num_times, mixture, scores)
    assert best is not None
    return best


Mixture = TypeVar("Mixture", MFA, HierarchicalMFA)


def _score(mixture: MFA | HierarchicalMFA, x: Any, y: Any, weight: Any = None) -> float:
    """Return the weighted mean of log p(x, y), or of log p(x) where y is not known."""
    rows = np.asarray(x)
    padded = pad_rows(rows, padded_size_of_few(len(rows)))
    if y is None or isinstance(mixture, MFA):
        log_prob = np.asarray(mixture.log_prob(padded))[: len(rows)]
        return float(np.average(log_prob, weights=weight))
    joint, labels = np.asarray(mixture.class_log_prob(padded))[: len(rows)], np.asarray(y)
    known = np.take_along_axis(joint, np.maximum(labels, 0)[:, None], axis=1)[:, 0]
    log_prob = np.where(labels < 0, np.logaddexp.reduce(joint, axis=1), known)
    return float(np.average(log_prob, weights=weight))


class Polished(NamedTuple):
    """A mixture after as much EM as validation found good.

    Attributes:
        mixture: an `MFA` or a `HierarchicalMFA`.
        rounds: iterations of EM, 0 for none.
        scores: mean validation log-likelihood in nats of every number tried.
    """

    mixture: Any
    rounds: int
    scores: dict[int, float]


def polish_by_validation(
    mixture: Mixture,
    x: Float[ArrayLike, "N D"],
    y: Int[ArrayLike, " N"] | None = None,
    *,
    x_valid: Float[ArrayLike, "M D"],
    y_valid: Int[ArrayLike, " M"] | None = None,
    sample_weight: Float[ArrayLike, " N"] | None = None,
    weight_valid: Float[ArrayLike, " M"] | None = None,
    rounds: Sequence[int] = ROUNDS,
) -> Polished:
    """Polish an extracted mixture by EM, and stop where validation is best.

    The shared field of a CPMM keeps its components from fitting single examples; EM lets go of
    that, and fits what the field could not. How much of it pays depends on the data.

    Args:
        mixture: where to begin, an extracted CPMM say.
        x: training examples in its units, shape (N, D).
        y: class codes, or None; see `polish`.
        x_valid: validation examples, shape (M, D).
        y_valid: their class codes, given where `y` is.
        sample_weight: how much each training example counts, shape (N,).
        weight_valid: the same of the validation examples, (M,).
        rounds: numbers of iterations to try, from few to many, as long as the score rises.

    Returns:
        The best mixture, the number of iterations, and all scores.

    Raises:
        ConfigError: no number of iterations to try, or a negative one.
    """
    if not rounds or min(rounds) < 0:
        raise ConfigError(f"`rounds` must list numbers of iterations, each >= 0; got {rounds}.")
    scores: dict[int, float] = {}
    best: Polished | None = None
    done = 0
    for count in sorted(rounds):
        if count > done:
            more: Any = {"max_iter": count - done, "tol": 0.0, "sample_weight": sample_weight}
            mixture = polish(mixture, x, y, **more)
        done = count
        scores[count] = _score(mixture, x_valid, y_valid, weight_valid)
        if best is not None and scores[count] <= scores[best.rounds]:
            break
        best = Polished(mixture, count, scores)
    assert best is not None
    return best


class Broadened(NamedTuple):
    """A mixture with as much noise added as validation found good.

    Attributes:
        mixture: an `MFA` or a `HierarchicalMFA`.
        noise: variance added to every feature, 0 for none.
        scores: mean validation log-likelihood in nats of every variance tried.
    """

    mixture: Any
    noise: float
    scores: dict[float, float]


def broaden_by_validation(
    mixture: Mixture,
    x_valid: Float[ArrayLike, "M D"],
    y_valid: Int[ArrayLike, " M"] | None = None,
    *,
    weight_valid: Float[ArrayLike, " M"] | None = None,
    noise: Sequence[float] = NOISE,
) -> Broadened:
    """Add noise to a fitted mixture, the same to every feature, as long as validation gains.

    Components that are narrower than the distance between examples describe these better than
    new ones, and those far from all worst. How wide they should be is the choice of a kernel's
    bandwidth, made in the same way.

    Args:
        mixture: a mixture of standardised features.
        x_valid: validation examples, shape (M, D).
        y_valid: class codes, shape (M,), to compare by log p(x, y); None for log p(x).
        weight_valid: how much each of them counts, shape (M,).
        noise: variances to try, from small to large, as long as the score rises.

    Returns:
        The best mixture, the variance added, and all scores.

    Raises:
        ConfigError: a variance that is not positive.

    Source: Parzen, "On estimation of a probability density function and mode" (1962).
    """
    start = _score(mixture, x_valid, y_valid, weight_valid)
    best = Broadened(mixture, 0.0, {0.0: start})
    for variance in sorted(noise):
        broad = mixture.with_noise(variance)
        best.scores[variance] = _score(broad, x_valid, y_valid, weight_valid)
        if best.scores[variance] <= best.scores[best.noise]:
            break
        best = best._replace(mixture=broad, noise=variance)
    return best


def prune(mixture: Mixture, min_weight: float = 1e-4) -> Mixture:
    """Leave out components of negligible weight; the weights of the others are scaled up.

    Args:
        mixture: an `MFA`, or a `HierarchicalMFA`, all of whose classes keep as many components as
            the class that needs most, their heaviest.
        min_weight: smallest weight that is kept, of the whole mixture or within a class.

    Returns:
        A mixture of the same kind; the heaviest component is always kept.

    Raises:
        ConfigError: `min_weight` is not in [0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> mix = MFA(jnp.log(jnp.array([0.7, 1e-6, 0.3])), jnp.zeros((3, 1)),
        ...           jnp.zeros((3, 1, 0)), jnp.zeros((3, 1)))
        >>> prune(mix).num_components
        2
    """
    if not 0 <= min_weight < 1:
        raise ConfigError(f"`min_weight` must lie in [0, 1); got {min_weight}.")
    if isinstance(mixture, MFA):
        weights = np.asarray(jax.nn.softmax(mixture.logits))
        kept = np.flatnonzero((weights >= min_weight) | (weights == weights.max()))
        return jax.tree.map(lambda leaf: leaf[kept], mixture)
    weights = np.asarray(jax.nn.softmax(mixture.components.logits))
    count = max(1, int((weights >= min_weight).sum(axis=1).max()))
    order = np.sort(np.argsort(-weights, axis=1, kind="stable")[:, :count], axis=1)

    def take(leaf: Any) -> Any:
        return jnp.take_along_axis(leaf, order.reshape(*order.shape, *[1] * (leaf.ndim - 2)), 1)

    return HierarchicalMFA(mixture.class_logits, jax.tree.map(take, mixture.components))
