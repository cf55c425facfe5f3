"""The gradient of a weight that a loop uses many times, formed once after the loop.

Where x_i @ W is computed for i = 1 ... I in a `lax.scan`, reverse mode adds x_i^T g_i to a
W-shaped sum in every round: for the few rows of a CPMM's state that is a pass over the memory of
all weights per evaluation of the field. Here the loop hands out x_i and g_i instead, as the
"cotangents" of an additional argument, its `Tap`; their product over all rounds is one matrix
product, of many rows.

    taps = open_taps(W, (I,))        # outside; scanned over
    y = tapped_matmul(x, W, tap)     # in round i
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Tap(NamedTuple):
    """Zeros in the shape of what a product takes and gives: (..., I) and (..., O)."""

    inputs: Float[Array, "*lead I"]
    outputs: Float[Array, "*lead O"]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def open_taps(kernel: Float[Array, "I O"], lead: tuple[int, ...]) -> Tap:
    """Return taps with leading axes `lead`, one for each use of `kernel` in `tapped_matmul`.

    Reverse mode only. Each tap must be used once: two uses would add up their inputs.
    """
    return _zeros(kernel, lead)


def _zeros(kernel: Array, lead: tuple[int, ...]) -> Tap:
    return Tap(*(jnp.zeros((*lead, size), kernel.dtype) for size in kernel.shape))


def _open(kernel: Array, lead: tuple[int, ...]) -> tuple[Tap, None]:
    return _zeros(kernel, lead), None


def _collect(lead: tuple[int, ...], _: None, flown: Tap) -> tuple[Array]:
    axes = tuple(range(len(lead)))
    return (jnp.tensordot(flown.inputs, flown.outputs, axes=(axes, axes)),)


open_taps.defvjp(_open, _collect)


@jax.custom_vjp
def tapped_matmul(x: Float[Array, "*n I"], kernel: Float[Array, "I O"], tap: Tap) -> Array:
    """Return x @ kernel; the gradient of `kernel` leaves by `tap`, whose axes are those of x."""
    return x @ kernel


def _forward(x: Array, kernel: Array, tap: Tap) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _backward(saved: tuple[Array, Array], cotangent: Array) -> Any:
    x, kernel = saved
    return cotangent @ kernel.T, None, Tap(x, cotangent)


tapped_matmul.defvjp(_forward, _backward)
