"""Vector fields: neural networks f(t, h) that see the time explicitly."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from cpmm_jax.dynamics.deferred import Tap, open_taps, tapped_matmul
from cpmm_jax.errors import ConfigError

ACTIVATIONS = {"sin": jnp.sin, "tanh": jnp.tanh}

TIME_SCALE = (
    3.0  # standard deviation of the weights of t, so that t in [0, 1] matters from the start
)


class MLPField(nnx.Module):
    """A multilayer perceptron f(t, h) over the flattened state of one trajectory.

    The hidden layers are `activation(W h + w t + b)`. Weights are scaled so that each entry of an
    untrained f(t, h) is about 0.7 `output_scale` for a state of unit size: the trajectory then
    already moves across standardised data, and does not have to learn to.

    Args:
        size: number of entries of the state of one trajectory.
        widths: units of the hidden layers.
        activation: "sin" (less prone to stiffness) or "tanh".
        output_scale: scale of the untrained output; 0 for a field that starts at rest.
        param_dtype: dtype of the weights.
        rngs: a flax `nnx.Rngs`, used here and not kept.

    Raises:
        ConfigError: no hidden layer, a width below 1, or an unknown activation.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> field = MLPField(3, widths=(8,), rngs=nnx.Rngs(0))
        >>> field(0.5, {"a": jnp.zeros(2), "b": jnp.ones(())})["a"].shape
        (2,)

    Source: CPMM paper, sections 2.2 and 3.1.
    """

    def __init__(
        self,
        size: int,
        *,
        widths: Sequence[int] = (128, 128),
        activation: str = "sin",
        output_scale: float = 1.0,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if not widths or min(widths) < 1:
            raise ConfigError(f"`widths` must list at least one width, each >= 1; got {widths}.")
        if activation not in ACTIVATIONS:
            names = ", ".join(repr(name) for name in ACTIVATIONS)
            raise ConfigError(f"`activation` must be one of {names}; got {activation!r}.")
        self.activation = activation
        unit = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        last = jax.nn.initializers.variance_scaling(2.0 * output_scale**2, "fan_in", "normal")
        if output_scale == 0:
            last = jax.nn.initializers.zeros
        spread = jax.nn.initializers.uniform(2.0 * jnp.pi)
        sizes = [size, *widths]
        self.layers = nnx.List(
            [
                nnx.Linear(
                    fan_in,
                    fan_out,
                    kernel_init=unit,
                    bias_init=spread if activation == "sin" else jax.nn.initializers.zeros,
                    param_dtype=param_dtype,
                    rngs=rngs,
                )
                for fan_in, fan_out in pairwise(sizes)
            ]
        )
        self.times = nnx.List(
            [
                nnx.Linear(
                    1,
                    width,
                    use_bias=False,
                    kernel_init=jax.nn.initializers.normal(TIME_SCALE),
                    param_dtype=param_dtype,
                    rngs=rngs,
                )
                for width in widths
            ]
        )
        self.output = nnx.Linear(
            widths[-1], size, kernel_init=last, param_dtype=param_dtype, rngs=rngs
        )

    def taps(self, lead: tuple[int, ...]) -> list[Tap]:
        """Return taps for as many calls as `lead` has places: see `dynamics.deferred`."""
        return [open_taps(layer.kernel[...], lead) for layer in (*self.layers, self.output)]

    def __call__(
        self, t: Float[Array, ""] | float, state: PyTree, taps: Sequence[Tap] | None = None
    ) -> PyTree:
        """Evaluate dh/dt at pseudotime t for one trajectory.

        Args:
            t: pseudotime in [0, 1].
            state: a pytree of arrays with `size` entries in total.
            taps: those of this call, by which the gradients of the kernels leave; None where they
                are taken as usual.

        Returns:
            A pytree like `state`.
        """
        hidden, unravel = ravel_pytree(state)
        clock = jnp.asarray(t, hidden.dtype).reshape(1)
        *inner, last = taps or [None] * (len(self.layers) + 1)  # type: ignore[list-item]
        for layer, time, tap in zip(self.layers, self.times, inner, strict=True):
            hidden = ACTIVATIONS[self.activation](_affine(layer, hidden, tap) + time(clock))
        return unravel(_affine(self.output, hidden, last))


def _affine(layer: nnx.Linear, x: Float[Array, " I"], tap: Tap | None) -> Float[Array, " O"]:
    if tap is None:
        return layer(x)
    return tapped_matmul(x, layer.kernel[...], tap) + layer.bias[...]  # type: ignore[index]
