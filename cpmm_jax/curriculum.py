"""The curriculum: train on data carried towards a Gaussian, M_v(x), while v falls from 1 to 0.

A *provider* answers what the data look like at position v, `at(x, v, key)`: v = 0 are the data,
v = 1 a standard normal. Its *stages* say at which positions the mixture is trained, for how long.
Earlier positions are not remembered: the last stage is v = 0, with a share of the steps of its own
and the whole decay of the learning rate.

Source: CPMM paper, section 3.3 and Algorithm 1.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from cpmm_jax.dynamics.flow import CNF
from cpmm_jax.errors import ConfigError, DataError

logger = logging.getLogger("cpmm_jax")

MOST_BYTES = 2**29  # of a training set carried to all stages at once


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Positions from 1 down to 0, and how the training steps are divided among them.

    The last position, 0, has `last_share` of the steps. The others have equal parts of the rest;
    with a `tolerance`, as much of their part as they need: a stage is left as soon as the mixture
    has caught up, and the steps saved go to the last.

    The constructor stores; `check` refuses what is out of range.

    Attributes:
        positions: v of each stage, falling, the last one 0.
        last_share: part of the training steps at v = 0, in (0, 1].
        tolerance: nats of validation log-likelihood within which the mixture has caught up with
            what the provider knows to be reached there (a flow's own density); where it knows none,
            the gain since the last report below which it has. None for stages of equal length.
        least_steps: fewest steps of a stage that is left early.

    Example:
        >>> Stages.geometric(4, smallest=0.1).positions
        (1.0, 0.316, 0.1, 0.0)
    """

    positions: tuple[float, ...]
    last_share: float = 0.4
    tolerance: float | None = None
    least_steps: int = 20

    @classmethod
    def linear(cls, count: int = 20, *, first: float = 1.0, **settings: Any) -> Stages:
        """Return `count` positions at equal distances, from `first` to 0."""
        return cls(positions=_rounded(np.linspace(first, 0.0, count)), **settings)

    @classmethod
    def geometric(
        cls, count: int = 20, *, first: float = 1.0, smallest: float = 0.01, **settings: Any
    ) -> Stages:
        """Return `count` positions at equal ratios from `first` to `smallest`, then 0."""
        return cls(positions=(*_rounded(np.geomspace(first, smallest, count - 1)), 0.0), **settings)

    def check(self) -> None:
        """Raise ConfigError if a setting is out of its range."""
        v = self.positions
        if not v or not all(math.isfinite(p) and 0 <= p <= 1 for p in v):
            raise ConfigError(
                f"`positions` must lie in [0, 1], from 1 (latent) to 0 (data); got {v}."
            )
        if v[-1] != 0:
            raise ConfigError(
                f"`positions` must end at 0, the data; got {v[-1]} as the last; add a 0."
            )
        if any(later >= earlier for earlier, later in pairwise(v)):
            raise ConfigError(f"`positions` must fall from stage to stage; got {v}; sort them.")
        if not 0 < self.last_share <= 1:
            raise ConfigError(
                f"`last_share` must be in (0, 1], a part of the steps; got {self.last_share}."
            )
        if self.tolerance is not None and not self.tolerance > 0:
            raise ConfigError(
                f"`tolerance` must be positive (nats), or None; got {self.tolerance}."
            )
        if self.least_steps < 1:
            raise ConfigError(f"`least_steps` must be at least 1; got {self.least_steps}.")

    def ends(self, steps: int) -> list[int]:
        """Return the step at which each stage ends at the latest, of `steps` in all."""
        before = max(len(self.positions) - 1, 0)
        rest = steps - max(1, round(self.last_share * steps))
        return [round(rest * (i + 1) / before) for i in range(before)] + [steps]


def _rounded(positions: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    return tuple(float(f"{position:.3g}") for position in positions)


@dataclass(frozen=True)
class Curriculum:
    """A provider of M_v: one method, `at`; the examples of a stage are computed once.

    Attributes:
        stages: where the mixture is trained, and for how long.
        is_random: whether `at` draws anew in every training step: it is then part of the compiled
            step, and the provider must be hashable.
    """

    stages: Stages = field(default_factory=Stages.geometric, kw_only=True, compare=False)
    is_random: ClassVar[bool] = False

    def at(self, x: Float[Array, "N D"], v: Any, key: Array) -> Float[Array, "N D"]:
        """Return the examples at position v, shape (N, D)."""
        raise NotImplementedError

    def target(self, u: Float[Array, "N D"], v: float) -> float | None:
        """Return the mean log-density to be reached at v, of points there; None if not known."""
        return None

    def course(self, x: Float[Array, "N D"]) -> Callable[[float], Float[Array, "N D"]]:
        """Return a function of v that gives the examples there."""
        return lambda v: self.at(x, v, jax.random.key(0))


@dataclass(frozen=True)
class NoCurriculum(Curriculum):
    """Train on the data alone."""

    stages: Stages = field(default=Stages(positions=(0.0,), last_share=1.0), init=False)

    def at(self, x: Float[Array, "N D"], v: Any, key: Array) -> Float[Array, "N D"]:
        """Return the examples as they are."""
        return x


@dataclass(frozen=True)
class InterpolantCurriculum(Curriculum):
    """M_v(x) = (1 - v) x + v e with fresh normal e: no network is needed.

    These are the marginals of a flow trained by flow matching with straight paths, whose density
    is not known in closed form. The data should be standardised.

    Attributes:
        stages: see `Stages`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> curriculum = InterpolantCurriculum()
        >>> curriculum.at(jnp.ones((1, 2)), 0.0, jax.random.key(0)).tolist()
        [[1.0, 1.0]]

    Source: Lipman et al. (2023), "Flow matching for generative modeling".
    """

    is_random: ClassVar[bool] = True

    def at(self, x: Float[Array, "N D"], v: Any, key: Array) -> Float[Array, "N D"]:
        """Return (1 - v) x + v e."""
        v = jnp.asarray(v, x.dtype)
        return (1 - v) * x + v * jax.random.normal(key, x.shape, x.dtype)


@dataclass(frozen=True, eq=False)
class FlowCurriculum(Curriculum):
    """M_v of a trained flow, which keeps the identity of every example.

    Attributes:
        flow: a `CNF`, trained by likelihood or by flow matching; see `fit_flow`.
        stages: see `Stages`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> curriculum = FlowCurriculum(CNF(2, rngs=nnx.Rngs(0)))
        >>> curriculum.at(jnp.ones((1, 2)), 1.0, jax.random.key(0)).tolist()  # untrained
        [[1.0, 1.0]]
    """

    flow: CNF

    def at(self, x: Float[Array, "N D"], v: Any, key: Array) -> Float[Array, "N D"]:
        """Carry the examples to position v."""
        return self.flow.transform(x, v)

    def target(self, u: Float[Array, "N D"], v: float) -> float | None:
        """Return the flow's own mean log-density of points at v."""
        return float(jnp.mean(self.flow.log_prob_at(u, v)))

    def course(self, x: Float[Array, "N D"]) -> Callable[[float], Float[Array, "N D"]]:
        """Carry the examples to all stages by one solve; stage by stage where memory is short."""
        positions = self.stages.positions
        if x.size * x.dtype.itemsize * len(positions) > MOST_BYTES:
            logger.info("the flow carries %d examples stage by stage", len(x))
            return super().course(x)
        logger.info("the flow carries %d examples to %d stages at once", len(x), len(positions))
        carried = self.flow.transform(x, jnp.asarray(positions[::-1]))
        return dict(zip(positions, carried[::-1], strict=True)).__getitem__


@dataclass(frozen=True, eq=False)
class CustomCurriculum(Curriculum):
    """A map of the user's own: whitening by degrees, an affine map, principal components first.

    Attributes:
        function: `(x, v) -> (N, D)`, with function(x, 0) = x.
        stages: see `Stages`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> shrink = CustomCurriculum(lambda x, v: x / (1 + v), stages=Stages.linear(3))
        >>> shrink.at(jnp.ones((1, 2)), 1.0, jax.random.key(0)).tolist()
        [[0.5, 0.5]]
    """

    function: Callable[[Array, float], ArrayLike]

    def at(self, x: Float[Array, "N D"], v: Any, key: Array) -> Float[Array, "N D"]:
        """Return function(x, v)."""
        return jnp.asarray(self.function(x, v), x.dtype)


def check_carried(
    x: Float[Array, "N D"], moved: Float[Array, "N D"], v: float
) -> Float[Array, "N D"]:
    """Return what a provider made of `x` at position v.

    Raises:
        DataError: it has another shape, or values that are not finite.
    """
    if moved.shape != x.shape:
        raise DataError(
            f"`curriculum` must return the shape that it is given, {x.shape}; got {moved.shape} "
            f"at v = {v}; return one row for each example."
        )
    bad = int((~jnp.isfinite(moved)).any(axis=1).sum())
    if bad:
        raise DataError(
            f"`curriculum` must return finite values; got {bad} of {len(x)} rows with others at "
            f"v = {v}; train the flow further, or standardise the data."
        )
    return moved


def check_curriculum(curriculum: Any, dim: int) -> None:
    """Raise ConfigError if it is no `Curriculum`, or one of other data, or its stages are wrong."""
    if not isinstance(curriculum, Curriculum):
        raise ConfigError(
            "`curriculum` must be a Curriculum, such as FlowCurriculum(flow); got "
            f"{type(curriculum).__name__}; wrap a function in CustomCurriculum."
        )
    if isinstance(curriculum, FlowCurriculum) and curriculum.flow.dim != dim:
        raise ConfigError(
            f"`curriculum` must have a flow of D = {dim} features, as the data; "
            f"got {curriculum.flow.dim}; train a flow on these data."
        )
    curriculum.stages.check()


def describe_curriculum(curriculum: Curriculum) -> dict[str, Any]:
    """Return what JSON holds of a curriculum: its kind, its stages, and its flow's parameters."""
    stages = asdict(curriculum.stages)
    described = {
        "kind": type(curriculum).__name__,
        **stages,
        "positions": list(stages["positions"]),
    }
    if isinstance(curriculum, CustomCurriculum):
        described["function"] = getattr(curriculum.function, "__qualname__", "")
    if isinstance(curriculum, FlowCurriculum):
        total = hashlib.sha256()
        for leaf in jax.tree.leaves(curriculum.flow):
            total.update(np.asarray(leaf).tobytes())
        described["flow"] = total.hexdigest()[:16]
    return described
