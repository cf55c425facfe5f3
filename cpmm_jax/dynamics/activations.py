"""What bends a field: sine and hyperbolic tangent."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

# pi in three parts, the first two short, so that multiples of them are exact (Cody and Waite 1980,
# Software manual for the elementary functions, chapter 8).
_PI = (3.140625, 9.67502593994140625e-4, 1.509957990978376432e-7)
# Taylor's series but for their leading term, which comes last, so that one rounding is left of it.
# The remainder at pi / 2 is below half a unit in the last place.
_SIN = (-1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800)
_COS = (-1 / 2, 1 / 24, -1 / 720, 1 / 40320, -1 / 3628800, 1 / 479001600)


@jax.custom_jvp
def sin(x: Array) -> Array:
    """Return the sine, in float32 to 2e-7 where |x| < 1e4.

    In float32 by a polynomial, which XLA fuses with what is around it: its own sine takes six times
    as long on CPUs. Other dtypes get XLA's.
    """
    if x.dtype != jnp.float32:
        return jnp.sin(x)
    sign, rest = _reduce(x)
    square = rest * rest
    return sign * (rest + rest * square * _horner(_SIN, square))


@jax.custom_jvp
def cos(x: Array) -> Array:
    """Return the cosine; see `sin`."""
    if x.dtype != jnp.float32:
        return jnp.cos(x)
    sign, rest = _reduce(x)
    square = rest * rest
    return sign * (1 + square * _horner(_COS, square))


sin.defjvps(lambda tangent, _, x: tangent * cos(x))
cos.defjvps(lambda tangent, _, x: -tangent * sin(x))


def _reduce(x: Array) -> tuple[Array, Array]:
    """Return (-1)^n and x - n pi, in [-pi / 2, pi / 2] but for the rounding of n, at most 0.03."""
    turns = jnp.round(x * (1 / math.pi))
    rest = ((x - turns * _PI[0]) - turns * _PI[1]) - turns * _PI[2]
    return 1 - 2 * (turns - 2 * jnp.floor(turns / 2)), jnp.clip(rest, -1.6, 1.6)


def _horner(coefficients: tuple[float, ...], x: Array) -> Array:
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"sin": sin, "tanh": jnp.tanh}
