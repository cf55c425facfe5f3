"""Minibatches as a pure function of the training step, so that a run can be resumed exactly.

Examples are drawn without replacement, epoch by epoch: every example is seen equally often, and
the batches of an epoch partition the data, which makes the gradient noise smaller than that of
independent draws. The usual way, a shuffled list of N indices, would have to be kept or sorted anew
in every step. Here a *swap-or-not* network answers "which example stands at position i of epoch e"
for any N with a few integer operations per example, no memory and no dependence on earlier steps.

Source: Hoang, Morris and Rogaway, "An Enciphering Scheme Based on a Card Shuffle" (2012).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from cpmm_jax.errors import ConfigError

# Each round moves a position to a random place with probability 1/2, so what remains of the
# original order of one example, or of a pair, fades as 2**-rounds.
_ROUNDS = 32


def batch_indices(
    key: Array,
    step: Int[Array, ""] | int,
    batch_size: int,
    num_examples: Int[Array, ""] | int,
) -> Int[Array, " B"]:
    """Return the examples of the batch of one step, shape (batch_size,), without repeats.

    An epoch is `num_examples // batch_size` batches; the examples left over differ from epoch to
    epoch. Usable under `jit`, with `step` and `num_examples` traced.

    Args:
        key: PRNG key of the whole run; the same in every step.
        step: number of the step, >= 0.
        batch_size: B, at most `num_examples`.
        num_examples: N.

    Returns:
        Indices in 0..N-1, int32.

    Raises:
        ConfigError: `batch_size` is not in 1..N (not checked where N is traced).

    Example:
        >>> import jax, numpy as np
        >>> epoch = [batch_indices(jax.random.key(0), step, 5, 20) for step in range(4)]
        >>> np.sort(np.concatenate(epoch)).tolist() == list(range(20))
        True
    """
    if not isinstance(num_examples, jax.core.Tracer) and not 1 <= batch_size <= num_examples:
        raise ConfigError(
            f"`batch_size` must be in 1..{num_examples}, the number of examples; "
            f"got {batch_size}; use a smaller batch."
        )
    epoch, batch = jnp.divmod(jnp.asarray(step, jnp.int32), num_examples // batch_size)
    positions = batch * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    return _permute(jax.random.fold_in(key, epoch), positions, num_examples)


def _permute(
    key: Array, positions: Int[Array, " B"], size: Int[Array, ""] | int
) -> Int[Array, " B"]:
    """Map positions in 0..size-1 by a random permutation of them that depends on `key` alone."""
    pivots, salts = jax.random.bits(key, (2, _ROUNDS), jnp.uint32)
    pivots = (pivots % jnp.asarray(size, jnp.uint32)).astype(jnp.int32)

    def swap_or_not(index: int, here: Int[Array, " B"]) -> Int[Array, " B"]:
        # The partner of the partner is the position itself, and both see the same coin, so that a
        # round is a bijection whatever the coin says.
        there = pivots[index] - here
        there = jnp.where(there < 0, there + size, there)
        coin = _hash(jnp.maximum(here, there).astype(jnp.uint32) ^ salts[index])
        return jnp.where(coin >> 31 == 1, there, here)

    return jax.lax.fori_loop(0, _ROUNDS, swap_or_not, positions)


def _hash(value: UInt32[Array, " B"]) -> UInt32[Array, " B"]:
    """Scramble 32-bit integers (the finaliser of MurmurHash3)."""
    value = (value ^ (value >> 16)) * jnp.uint32(0x85EBCA6B)
    value = (value ^ (value >> 13)) * jnp.uint32(0xC2B2AE35)
    return value ^ (value >> 16)
