"""Vector fields: neural networks f(t, h) that see the time explicitly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.nn.initializers import zeros
from jaxtyping import Array, Float, PyTree

from cpmm_jax.dynamics.activations import ACTIVATIONS
from cpmm_jax.dynamics.deferred import Tap, open_taps, tapped_matmul
from cpmm_jax.dynamics.draws import draw_arrays
from cpmm_jax.errors import ConfigError

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
        >>> field(0.5, {"a": jnp.float32([0.0, 0.0]), "b": jnp.float32(1.0)})["a"].shape
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
        check_network(widths, activation)
        self.activation = activation
        sizes = [size, *widths, size]
        shapes = [*pairwise(sizes), *((1, width) for width in widths)]
        kernels = draw_arrays(jax.random.normal, rngs.params(), shapes, param_dtype)
        phases = draw_arrays(
            jax.random.uniform, rngs.params(), [(width,) for width in widths], param_dtype
        )
        make = partial(
            nnx.Linear, kernel_init=zeros, bias_init=zeros, param_dtype=param_dtype, rngs=rngs
        )
        self.layers = nnx.List([make(*shape) for shape in pairwise(sizes[:-1])])
        self.times = nnx.List([make(1, width, use_bias=False) for width in widths])
        self.output = make(*shapes[len(widths)])
        scales = [1.0] * len(widths) + [math.sqrt(2.0) * output_scale]
        for layer, kernel, scale in zip((*self.layers, self.output), kernels, scales, strict=False):
            layer.kernel[...] = kernel * (scale / math.sqrt(len(kernel)))
        for layer, kernel in zip(self.times, kernels[len(widths) + 1 :], strict=True):
            layer.kernel[...] = TIME_SCALE * kernel
        if activation == "sin":
            for layer, phase in zip(self.layers, phases, strict=True):
                layer.bias[...] = 2.0 * math.pi * phase  # type: ignore[index]

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
        vector, unravel = ravel_pytree(state)
        first, *inner = taps or [None] * (len(self.layers) + 1)  # type: ignore[list-item]
        entering = _affine(self.layers[0], vector, first)
        return unravel(_affine(self.output, self.hidden(t, entering, inner[:-1]), inner[-1]))

    def hidden(
        self, t: Float[Array, ""] | float, entering: Array, taps: Sequence[Tap | None]
    ) -> Array:
        """Return the units of the last hidden layer, shape (widths[-1],).

        Args:
            t: pseudotime in [0, 1].
            entering: what comes into the first hidden layer from the state, W h + b, shape
                (widths[0],).
            taps: those of the other hidden layers, as in a call.
        """
        clock = jnp.asarray(t, entering.dtype).reshape(1)
        activation, (first, *more) = ACTIVATIONS[self.activation], self.times
        units = activation(entering + first(clock))
        for layer, time, tap in zip(list(self.layers)[1:], more, taps, strict=True):
            units = activation(_affine(layer, units, tap) + time(clock))
        return units


def check_network(widths: Sequence[int], activation: str) -> None:
    """Raise ConfigError unless there is a hidden layer and an activation that is known."""
    if not widths or min(widths) < 1:
        raise ConfigError(f"`widths` must list at least one width, each >= 1; got {widths}.")
    if activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ConfigError(f"`activation` must be one of {names}; got {activation!r}.")


def _affine(layer: nnx.Linear, x: Float[Array, " I"], tap: Tap | None) -> Float[Array, " O"]:
    if tap is None:
        return layer(x)
    return tapped_matmul(x, layer.kernel[...], tap) + layer.bias[...]  # type: ignore[index]
