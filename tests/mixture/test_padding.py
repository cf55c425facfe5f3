"""Rows of padding."""

from __future__ import annotations

from cpmm_jax.mixture.padding import padded_size_of_few


def test_work_on_padding_is_bounded_and_sizes_are_few() -> None:
    assert [padded_size_of_few(n) for n in (1, 256, 257, 2048)] == [256, 256, 512, 2048]
    counts = range(2049, 20_000, 7)
    assert all(n <= padded_size_of_few(n) < n * 9 / 8 for n in counts)
    assert len({padded_size_of_few(n) for n in counts}) <= 32
    assert padded_size_of_few(2**20 + 1) == 2**20 + 1
