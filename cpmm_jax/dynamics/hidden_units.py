"""Trajectories in the hidden units of their field, where these are fewer than entries of the state.

The field of a perceptron is g(t, h V + a) U + b: one matrix reads the state h, another moves it.
So h(t) = h(0) + z(t) U + t b, where z, the integral of the hidden units g, moves by

    dz/dt = g(t, h(0) V + a + t b V + z (U V)),    z(0) = 0:

the matrices as long as the state are used before the solve and after it, not in every evaluation of
the field. Runge-Kutta methods commute with affine maps (McLachlan, Modin, Munthe-Kaas and Verdier
2016, "B-series methods are exactly the affine equivariant methods"), and so does every method whose
stages are sums of states and slopes, the reversible Heun method among them: step by step the
numbers are those of the solve in h, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cpmm_jax.dynamics.deferred import Tap, open_taps, tapped_matmul
from cpmm_jax.dynamics.fields import MLPField

TOO_FEW_ROWS = 4


class HiddenUnits(NamedTuple):
    """What moves z along trajectories with leading axes (C, S).

    Shapes have H for the entries of a state, W for the units of the first hidden layer and L for
    those of the last.

    Attributes:
        field: the field of one trajectory.
        start: h(0), shape (C, S, H).
        origin: h(0) V + a, shape (C, S, W).
        kernel: U V, shape (L, W): from the last hidden layer on to the first.
        drift: b V, shape (W,).
    """

    field: MLPField
    start: Float[Array, "C S H"]
    origin: Float[Array, "C S W"]
    kernel: Float[Array, "L W"]
    drift: Float[Array, " W"]

    @staticmethod
    def save_work(field: Any, rows: int, size: int) -> bool:
        """Tell whether `rows` trajectories of `size` entries are cheaper to solve in these units.

        The product U V is to be had by fewer evaluations of the field than are made: measured on
        CPUs, from five trajectories on.
        """
        if not isinstance(field, MLPField) or rows <= TOO_FEW_ROWS:
            return False
        return max(field.layers[0].out_features, field.output.in_features) < size

    @classmethod
    def of(cls, field: MLPField, start: Float[Array, "C S H"]) -> HiddenUnits:
        """Prepare the solve from h(0) = `start`."""
        reading, moving = field.layers[0], field.output
        assert moving.bias is not None
        kernel, drift = (
            weights[...] @ reading.kernel[...] for weights in (moving.kernel, moving.bias)
        )
        return cls(field, start, reading(start), kernel, drift)

    @property
    def integrals(self) -> Float[Array, "C S L"]:
        """z(0)."""
        return jnp.zeros((*self.start.shape[:2], len(self.kernel)), self.start.dtype)

    def states(
        self, times: Float[Array, " T"], integrals: Float[Array, "T C S L"]
    ) -> Float[Array, "T C S H"]:
        """Return h at `times`, where z is `integrals`."""
        moving = self.field.output
        times = jnp.asarray(times, self.start.dtype)
        straight = jnp.outer(times, moving.bias[...])[:, None, None]  # type: ignore[index]
        return self.start[None] + straight + integrals @ moving.kernel[...]

    def taps(self, lead: tuple[int, ...]) -> list[Tap]:
        """Return taps for as many calls as `lead` has places: see `dynamics.deferred`."""
        between = [layer.kernel[...] for layer in list(self.field.layers)[1:]]
        return [open_taps(kernel, lead) for kernel in (self.kernel, *between)]


def move_hidden_units(
    t: Any,
    integrals: Float[Array, "C S L"],
    moved: HiddenUnits,
    taps: Sequence[Tap] | None = None,
) -> Float[Array, "C S L"]:
    """Return dz/dt at pseudotime t, the hidden units; the taps too have leading axes (C, S)."""

    def move(integral: Array, origin: Array, tap: Any) -> Array:
        first, *between = tap[0] if tap else [None] * len(moved.field.layers)
        if first is None:
            turned = integral @ moved.kernel
        else:
            turned = tapped_matmul(integral, moved.kernel, first)
        return moved.field.hidden(t, origin + t * moved.drift + turned, between)

    over_trajectories = jax.vmap(jax.vmap(move))
    return over_trajectories(integrals, moved.origin, () if taps is None else (taps,))
