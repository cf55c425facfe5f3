"""Random arrays for untrained models, drawn so that little has to be compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Draw = Callable[[Array, tuple[int, ...], jnp.dtype], Array]  # such as `jax.random.normal`


def draw_arrays(
    draw: Draw, key: Array, shapes: Sequence[tuple[int, ...]], dtype: jnp.dtype = jnp.float32
) -> list[Array]:
    """Draw arrays of several shapes as one vector, whose length is a power of two.

    JAX compiles a generator anew for every shape, which takes a CPU up to a second; so that many
    models share few programs.

    Args:
        draw: draws independent numbers: `jax.random.normal`, `jax.random.uniform`.
        key: PRNG key.
        shapes: of the arrays.
        dtype: of the arrays.

    Example:
        >>> import jax
        >>> first, second = draw_arrays(jax.random.normal, jax.random.key(0), [(2, 3), (4,)])
        >>> first.shape, second.shape
        ((2, 3), (4,))
    """
    sizes = [math.prod(shape) for shape in shapes]
    total = sum(sizes)
    vector = draw(key, (1 << max(total - 1, 0).bit_length(),), dtype)[:total]
    parts = jnp.split(vector, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
