"""The trace of the Jacobian of a vector field: exact, or estimated by random directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cpmm_jax.dynamics.activations import ACTIVATIONS
from cpmm_jax.dynamics.fields import MLPField
from cpmm_jax.errors import ConfigError

Field = Callable[[Any, Float[Array, " D"]], Float[Array, " D"]]  # g(v, u) of one point
DRAWS = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}


class Divergence(NamedTuple):
    """A field and the first derivatives that a flow needs, at N points.

    Attributes:
        velocity: g(u), shape (N, D).
        trace: tr(dg/du), or an estimate of it, shape (N,).
        frobenius: squared Frobenius norm of dg/du, or an estimate of it, shape (N,); None where
            not asked for.
    """

    velocity: Float[Array, "N D"]
    trace: Float[Array, " N"]
    frobenius: Float[Array, " N"] | None


class Trace(Protocol):
    """How the trace of dg/du is computed; hashable, since programs are compiled for it."""

    def num_directions(self, field: Field, dim: int, frobenius: bool) -> int:
        """Return the directional derivatives per point; they decide about the memory."""

    def draw(
        self, key: Array | None, shape: tuple[int, ...], dtype: jnp.dtype
    ) -> Float[Array, "N S D"] | None:
        """Draw what is random, once for a whole solve, for N = shape[0] points of D features."""

    def __call__(
        self,
        field: Field,
        v: Any,
        u: Float[Array, "N D"],
        noise: Float[Array, "N S D"] | None,
        *,
        frobenius: bool = False,
    ) -> Divergence:
        """Evaluate the field and its derivatives at position v and points u, shape (N, D)."""


@dataclass(frozen=True)
class ExactTrace:
    """The trace itself.

    That of an `MLPField` of one or two hidden layers has a closed form, which costs no more than
    the field: with the slopes s_1 and s_2 of its activations J = V^T diag(s_2) W^T diag(s_1) U^T,
    so that tr J = s_1^T (W * (V U)^T) s_2, where * is the product entry by entry. Of any other
    field, and for the Frobenius norm, D directional derivatives are taken at every point: for
    small D.

    Example:
        >>> import jax.numpy as jnp
        >>> ExactTrace()(lambda v, u: 3.0 * u, 0.0, jnp.ones((1, 2)), None).trace.tolist()
        [6.0]
    """

    def num_directions(self, field: Field, dim: int, frobenius: bool) -> int:
        """Return D, or 1 for the closed form."""
        return 1 if has_closed_trace(field) and not frobenius else dim

    def draw(self, key: Array | None, shape: tuple[int, ...], dtype: jnp.dtype) -> None:
        """Return None: nothing is random, and `key` is not used."""

    def __call__(
        self,
        field: Field,
        v: Any,
        u: Float[Array, "N D"],
        noise: Array | None,
        *,
        frobenius: bool = False,
    ) -> Divergence:
        """Evaluate g and tr(dg/du) at u, shape (N, D), and the squared Frobenius norm if wanted."""
        if isinstance(field, MLPField) and has_closed_trace(field) and not frobenius:
            return _closed_form(field, v, u)
        basis = jnp.eye(u.shape[1], dtype=u.dtype)
        directions = jnp.broadcast_to(basis, (len(u), *basis.shape))
        value, columns = _derivatives(field, v, u, directions)
        norm = jnp.sum(columns**2, axis=(0, 2)) if frobenius else None
        return Divergence(value, jnp.trace(columns, axis1=0, axis2=2), norm)


@dataclass(frozen=True)
class HutchinsonTrace:
    """Unbiased estimates from S random directions e: tr J = E[e . J e], |J|_F^2 = E[|J e|^2].

    The directions of a point stay the same along the whole solve, so that the ODE has one
    deterministic right-hand side and the estimate of the integral is unbiased as well.

    Attributes:
        num_samples: S.
        distribution: "rademacher" (signs: the lower variance) or "gaussian".

    Raises:
        ConfigError: no sample, or an unknown distribution.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> trace, u = HutchinsonTrace(), jnp.ones((1, 2))
        >>> noise = trace.draw(jax.random.key(0), u.shape, u.dtype)
        >>> trace(lambda v, u: 3.0 * u, 0.0, u, noise).trace.tolist()  # exact for a diagonal J
        [6.0]

    Source: Hutchinson (1990); Grathwohl et al. (2019), "FFJORD", Eq. 7.
    """

    num_samples: int = 1
    distribution: Literal["rademacher", "gaussian"] = "rademacher"

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ConfigError(
                f"`num_samples` must be at least 1 (random directions); got {self.num_samples}."
            )
        if self.distribution not in DRAWS:
            names = ", ".join(repr(name) for name in DRAWS)
            raise ConfigError(f"`distribution` must be one of {names}; got {self.distribution!r}.")

    def num_directions(self, field: Field, dim: int, frobenius: bool) -> int:
        """Return S."""
        return self.num_samples

    def draw(
        self, key: Array | None, shape: tuple[int, ...], dtype: jnp.dtype
    ) -> Float[Array, "N S D"]:
        """Draw the directions, shape (N, S, D).

        Raises:
            ConfigError: no key.
        """
        if key is None:
            raise ConfigError(
                "`key` must be given where the trace is estimated at random; got None; "
                "pass `key=jax.random.key(0)`, say, or take ExactTrace()."
            )
        return DRAWS[self.distribution](key, (shape[0], self.num_samples, shape[1]), dtype)

    def __call__(
        self,
        field: Field,
        v: Any,
        u: Float[Array, "N D"],
        noise: Float[Array, "N S D"] | None,
        *,
        frobenius: bool = False,
    ) -> Divergence:
        """Evaluate g, and estimate trace and squared Frobenius norm, at u, shape (N, D)."""
        assert noise is not None
        value, products = _derivatives(field, v, u, noise)
        directions = jnp.moveaxis(noise, 1, 0)
        trace = jnp.mean(jnp.sum(directions * products, axis=2), axis=0)
        norm = jnp.mean(jnp.sum(products**2, axis=2), axis=0) if frobenius else None
        return Divergence(value, trace, norm)


def has_closed_trace(field: Field) -> bool:
    """Tell whether the trace of the field's Jacobian costs no more than the field."""
    return isinstance(field, MLPField) and len(field.layers) <= 2


def _closed_form(field: MLPField, v: Any, u: Float[Array, "N D"]) -> Divergence:
    """Evaluate the layers of an `MLPField` and the formula of `ExactTrace`."""
    clock = jnp.asarray(v, u.dtype).reshape(1, 1)
    activation, slopes, hidden = ACTIVATIONS[field.activation], [], u
    for layer, time in zip(field.layers, field.times, strict=True):
        inputs = layer(hidden) + jnp.broadcast_to(time(clock), (len(u), layer.out_features))
        hidden, slope = jax.jvp(activation, (inputs,), (jnp.ones_like(inputs),))
        slopes.append(slope)
    around = (field.output.kernel[...] @ field.layers[0].kernel[...]).T  # from s_2 on to s_1
    if len(slopes) == 1:
        trace = slopes[0] @ jnp.diagonal(around)
    else:
        trace = jnp.sum((slopes[0] @ (field.layers[1].kernel[...] * around)) * slopes[1], axis=1)
    return Divergence(field.output(hidden), trace, None)


def _derivatives(
    field: Field, v: Any, u: Float[Array, "N D"], directions: Float[Array, "N S D"]
) -> tuple[Float[Array, "N D"], Float[Array, "S N D"]]:
    """Return g(v, u) and, for every direction of a point, J e."""

    def along(direction: Float[Array, "N D"]) -> tuple[Array, Array]:
        return jax.jvp(lambda u: evaluate(field, v, u), (u,), (direction,))

    return jax.vmap(along, in_axes=1, out_axes=(None, 0))(directions)


def evaluate(field: Field, v: Any, u: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Evaluate the field at one position and many points, shape (N, D)."""
    return jax.vmap(field, in_axes=(None, 0))(v, u)
