from __future__ import annotations

import jax
import numpy as np
import pytest

from cpmm_jax.data.batches import batch_indices
from cpmm_jax.errors import ConfigError

KEY = jax.random.key(3)
batch = jax.jit(batch_indices, static_argnums=(2, 3))


@pytest.mark.parametrize(
    ("size", "n"), [(1, 1), (1, 7), (7, 7), (5, 20), (6, 20), (256, 1000), (3, 4)]
)
def test_epoch_has_no_repeats_and_stays_in_range(size: int, n: int) -> None:
    per_epoch = n // size
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        rows = np.concatenate([batch(KEY, step, size, n) for step in steps])
        assert len(np.unique(rows)) == per_epoch * size
        assert rows.min() >= 0
        assert rows.max() < n


def test_pure_function_of_key_and_step() -> None:
    there = [np.asarray(batch(KEY, s, 8, 50)) for s in range(12)]
    back = [np.asarray(batch(KEY, s, 8, 50)) for s in reversed(range(12))][::-1]
    np.testing.assert_array_equal(there, back)
    assert not np.array_equal(there[0], there[6])  # the same place in the next epoch
    assert not np.array_equal(there[0], np.asarray(batch(jax.random.key(4), 0, 8, 50)))


def test_works_far_into_a_run_and_on_many_rows() -> None:
    rows = np.asarray(batch(KEY, 2**31 - 1, 64, 2_000_000_000))
    assert len(np.unique(rows)) == 64
    assert rows.min() >= 0
    assert rows.max() < 2_000_000_000


def test_permutations_look_uniform() -> None:
    """Every row is equally likely at every place, and so is every row beside a given one."""
    n, draws = 6, 20_000
    orders = np.asarray(
        jax.jit(jax.vmap(lambda s: batch_indices(jax.random.fold_in(KEY, s), 0, n, n)))(
            np.arange(draws)
        )
    )
    expected = draws / n
    for place in range(n):
        counts = np.bincount(orders[:, place], minlength=n)
        assert np.square(counts - expected).sum() / expected < 25  # chi-squared, 5 degrees
    _, whole = np.unique(orders, axis=0, return_counts=True)
    assert len(whole) == 720
    assert np.square(whole - draws / 720).sum() / (draws / 720) < 900  # 719 degrees


@pytest.mark.parametrize(("size", "n"), [(0, 4), (5, 4)])
def test_refuses_a_batch_that_does_not_fit(size: int, n: int) -> None:
    with pytest.raises(ConfigError, match=r"`batch_size` must be in 1\.\.4"):
        batch_indices(KEY, 0, size, n)
