"""The vector field of image-shaped states: a convolutional network that sees the time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.nn.initializers import zeros
from jaxtyping import Array, Float, PyTree

from cpmm_jax.dynamics.activations import ACTIVATIONS
from cpmm_jax.dynamics.draws import draw_arrays
from cpmm_jax.dynamics.fields import TIME_SCALE, check_network
from cpmm_jax.errors import ConfigError

SIDE = 3  # of the kernels


class ConvField(nnx.Module):
    """A convolutional network f(t, h) over the state of one trajectory, laid out as an image.

    The parameters of a component keep the shape of the image: mean, factors, log-noise and
    augmented channels are (R + 2) channels for each of the image's, and A more. A layer is
    `activation(K * (h, t) + b)`, where the time is a channel of its own. Hidden layers at full
    resolution come first; each of `coarse_widths` is a layer at half the resolution of the one
    before, and on the way back a layer at each resolution sees what was there on the way down. The
    channels of the last hidden layer form a group for each kind of parameter, which alone makes it.

    Weights are scaled as those of `MLPField`.

    Args:
        event_shape: (H, W, channels) of the image.
        rank: number of factors, R.
        augmented: augmented channels of the image, A.
        widths: channels of the hidden layers at full resolution.
        coarse_widths: channels at each halving of the resolution.
        coordinates: whether the first layer sees where a pixel lies: two channels in [-1, 1].
        activation: "sin" or "tanh".
        output_scale: scale of the untrained output; 0 for a field that starts at rest.
        compute_dtype: dtype in which the network computes, such as bfloat16 on an accelerator;
            None for that of the weights. A slope has that of the state.
        param_dtype: dtype of the weights.
        rngs: a flax `nnx.Rngs`, used here and not kept.

    Raises:
        ConfigError: no image's shape, one too small to be halved so often, too few channels for a
            group of each kind, or see `MLPField`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> field = ConvField((4, 4, 1), 2, 3, widths=(8,), coarse_widths=(8,), rngs=nnx.Rngs(0))
        >>> field(0.5, jnp.ones(4 * 4 * (2 + 2 + 3))).shape
        (112,)

    Source: CPMM paper, section 3.1, last paragraph.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        rank: int,
        augmented: int,
        *,
        widths: Sequence[int] = (32,),
        coarse_widths: Sequence[int] = (),
        coordinates: bool = True,
        activation: str = "sin",
        output_scale: float = 1.0,
        compute_dtype: Any = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        height, width, channels = check_image(event_shape)
        check_network(widths, activation)
        _check_coarse(coarse_widths, height, width)
        self.shape = (height, width, channels)
        self.groups = tuple(
            size for size in (channels, channels * rank, channels, augmented) if size
        )
        if widths[-1] < len(self.groups):
            raise ConfigError(
                f"`widths` must end with a channel for each of {len(self.groups)} kinds of "
                f"parameters at least; got {widths[-1]}."
            )
        self.coordinates, self.activation = coordinates, activation

        inner = [sum(self.groups) + 2 * coordinates, *widths]
        down = [widths[-1], *coarse_widths]
        up = [
            (below + skipped, skipped)
            for skipped, below in reversed(list(pairwise(down)))  # as wide as on the way down
        ]
        sizes = [*pairwise(inner), *pairwise(down), *up]
        shapes = [(SIDE, SIDE, taken + 1, given) for taken, given in sizes]
        bounds = _cuts(widths[-1], len(self.groups))
        heads = [
            (SIDE, SIDE, last - first, group)
            for (first, last), group in zip(pairwise(bounds), self.groups, strict=True)
        ]
        kernels = draw_arrays(jax.random.normal, rngs.params(), [*shapes, *heads], param_dtype)
        phases = draw_arrays(
            jax.random.uniform, rngs.params(), [shape[-1:] for shape in shapes], param_dtype
        )

        def make(shape: Sequence[int]) -> nnx.Conv:
            return nnx.Conv(
                shape[2],
                shape[3],
                (SIDE, SIDE),
                kernel_init=zeros,
                bias_init=zeros,
                dtype=compute_dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        layers = [make(shape) for shape in shapes]
        for layer, kernel, phase in zip(layers, kernels, phases, strict=False):
            scale = np.full(kernel.shape[2], 1 / math.sqrt(SIDE**2 * (kernel.shape[2] - 1)))
            scale[-1] = TIME_SCALE / SIDE  # the same time comes in by every weight of a kernel
            layer.kernel[...] = kernel * jnp.asarray(scale, param_dtype)[None, None, :, None]
            if activation == "sin":
                layer.bias[...] = 2.0 * math.pi * phase  # type: ignore[index]
        self.layers = nnx.List(layers[: len(widths)])
        self.down = nnx.List(layers[len(widths) : len(widths) + len(coarse_widths)])
        self.up = nnx.List(layers[len(widths) + len(coarse_widths) :])
        self.heads = nnx.List([make(shape) for shape in heads])
        for head, kernel in zip(self.heads, kernels[len(shapes) :], strict=True):
            head.kernel[...] = kernel * (output_scale * math.sqrt(2 / math.prod(kernel.shape[:3])))

    def __call__(self, t: Float[Array, ""] | float, state: PyTree) -> PyTree:
        """Evaluate dh/dt at pseudotime t for one trajectory.

        Args:
            t: pseudotime in [0, 1].
            state: a pytree whose entries, in their order, are those of a `TrajectoryState`: means
                (D,), loadings (D, R), log_noise (D,) and augmented, (A H W,).

        Returns:
            A pytree like `state`.
        """
        vector, unravel = ravel_pytree(state)
        activate = ACTIVATIONS[self.activation]
        hidden = self._image(vector)
        for layer in self.layers:
            hidden = activate(_convolved(layer, _with_time(hidden, t)))
        seen = []
        for layer in self.down:
            seen.append(hidden)
            hidden = activate(_convolved(layer, _with_time(_halved(hidden), t)))
        for layer in self.up:
            skipped = seen.pop()
            height, width = skipped.shape[:2]
            finer = hidden.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
            joint = jnp.concatenate([finer, skipped], axis=-1)
            hidden = activate(_convolved(layer, _with_time(joint, t)))
        bounds = _cuts(hidden.shape[-1], len(self.heads))
        slopes = [
            _convolved(head, hidden[..., first:last]).ravel()
            for head, (first, last) in zip(self.heads, pairwise(bounds), strict=True)
        ]
        return unravel(jnp.concatenate(slopes).astype(vector.dtype))

    def _image(self, vector: Float[Array, " J"]) -> Float[Array, "H W J"]:
        height, width, _ = self.shape
        ends = np.cumsum([height * width * size for size in self.groups])[:-1]
        parts = [part.reshape(height, width, -1) for part in jnp.split(vector, ends)]
        if self.coordinates:
            sides = [jnp.linspace(-1, 1, side, dtype=vector.dtype) for side in (height, width)]
            parts.append(jnp.stack(jnp.meshgrid(*sides, indexing="ij"), axis=-1))
        return jnp.concatenate(parts, axis=-1)


def _convolved(layer: nnx.Conv, image: Float[Array, "H W I"]) -> Float[Array, "H W O"]:
    dtype = layer.dtype or layer.kernel.dtype
    assert layer.bias is not None
    kernel, bias = layer.kernel[...].astype(dtype), layer.bias[...].astype(dtype)
    return convolve(image.astype(dtype), kernel) + bias[None, None]


def convolve(
    image: Float[Array, "H W I"], kernel: Float[Array, "k k I O"]
) -> Float[Array, "H W O"]:
    """Correlate an image with a kernel of an odd side, zeros around it; reverse mode only on CPUs.

    On a CPU the derivative is written out, since XLA's own forms of it run seven times slower where
    they are inside a loop, as all of a training is: that of the image is a convolution again, that
    of the kernel a matrix product for each of its places.
    """
    found: Array = jax.lax.platform_dependent(
        image, kernel, cpu=_convolve_written_out, default=_convolve
    )
    return found


def _convolve(image: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(
        image[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]


_convolve_written_out = jax.custom_vjp(_convolve)


def _convolve_forward(image: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(image, kernel), (image, kernel)


def _convolve_backward(saved: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    image, kernel = saved
    height, width, given = slope.shape
    side = kernel.shape[0]
    border = side // 2
    padded = jnp.pad(image, [(border, border), (border, border), (0, 0)])
    flat = slope.reshape(height * width, given)
    places = [
        padded[i : i + height, j : j + width].reshape(height * width, -1).T @ flat
        for i in range(side)
        for j in range(side)
    ]
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    return _convolve(slope, turned), jnp.stack(places).reshape(kernel.shape)


_convolve_written_out.defvjp(_convolve_forward, _convolve_backward)


def _halved(image: Float[Array, "H W I"]) -> Float[Array, "h w I"]:
    """Return means of 2 x 2 pixels; at an odd end of those that are left."""
    height, width, channels = image.shape
    even = jnp.pad(image, [(0, height % 2), (0, width % 2), (0, 0)], mode="edge")
    return even.reshape(-(-height // 2), 2, -(-width // 2), 2, channels).mean(axis=(1, 3))


def _with_time(image: Float[Array, "H W I"], t: Any) -> Float[Array, "H W I+1"]:
    clock = jnp.broadcast_to(jnp.asarray(t, image.dtype), (*image.shape[:2], 1))
    return jnp.concatenate([image, clock], axis=-1)


def _cuts(width: int, groups: int) -> list[int]:
    """Return where `width` channels are cut into groups of about the same size."""
    return [width * i // groups for i in range(groups + 1)]


def check_image(event_shape: Sequence[int]) -> tuple[int, int, int]:
    """Return (H, W, channels) of an image of that shape; of one without channels, one.

    Raises:
        ConfigError: neither (H, W) nor (H, W, channels).
    """
    shape = tuple(event_shape)
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ConfigError(
            f"`event_shape` must be (H, W, channels), or (H, W), each at least 1; got {shape}."
        )
    height, width, channels = (*shape, 1)[:3]
    return int(height), int(width), int(channels)


def _check_coarse(widths: Sequence[int], height: int, width: int) -> None:
    most = int(math.log2(min(height, width)))
    if len(widths) > most or any(one < 1 for one in widths):
        raise ConfigError(
            f"`coarse_widths` must list widths, each at least 1, for at most {most} halvings of "
            f"{height} x {width} pixels; got {tuple(widths)}."
        )
