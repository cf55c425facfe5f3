"""The two-dimensional sets against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from cpmm_jax.data import PLANAR_NAMES, make
from cpmm_jax.data.builtin import load_builtin
from cpmm_jax.errors import ConfigError, DataError

CLASSES = {
    "moons": 2,
    "pinwheel": 5,
    "spirals": 2,
    "circles": 2,
    "8gaussians": 8,
    "25gaussians": 25,
    "checkerboard": None,
}


@pytest.mark.parametrize("name", PLANAR_NAMES)
def test_draws_are_deterministic_and_balanced(name: str) -> None:
    x, y = make(name, 1000, 3)
    again, _ = make(name, 1000, 3)
    other, _ = make(name, 1000, 4)
    assert x.dtype == np.float32 and x.shape == (1000, 2) and np.isfinite(x).all()
    np.testing.assert_array_equal(x, again)
    assert not np.array_equal(x, other)
    if CLASSES[name] is None:
        assert y is None
    else:
        counts = np.bincount(y)
        assert len(counts) == CLASSES[name] and np.ptp(counts) <= 1
        assert np.abs(np.diff(y)).any(), "the order of the rows tells the class"
    assert make(name, 1, 0)[0].shape == (1, 2)


def test_gaussians_have_the_stated_modes() -> None:
    x, y = make("25gaussians", 20_000, 0)
    for mode in range(25):
        part = x[y == mode]
        np.testing.assert_allclose(part.mean(0), [mode // 5 - 2, mode % 5 - 2], atol=0.01)
        np.testing.assert_allclose(part.std(0), 0.05, rtol=0.15)
    x, y = make("8gaussians", 20_000, 0)
    means = np.array([x[y == mode].mean(0) for mode in range(8)])
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 4 / np.sqrt(2), atol=0.05)
    np.testing.assert_allclose((x - means[y]).std(0), 0.5 / np.sqrt(2), rtol=0.05)


def test_circles_and_moons_have_the_stated_radii() -> None:
    x, y = make("circles", 20_000, 0)
    radius = np.linalg.norm(x, axis=1)
    np.testing.assert_allclose([radius[y == 0].mean(), radius[y == 1].mean()], [1, 0.5], atol=0.01)
    x, y = make("moons", 20_000, 0)
    upper = np.linalg.norm(x[y == 0], axis=1)
    lower = np.linalg.norm(x[y == 1] - [1.0, 0.5], axis=1)
    np.testing.assert_allclose([upper.mean(), lower.mean()], 1.0, atol=0.02)
    assert x[y == 0, 1].mean() > 0.5 and x[y == 1, 1].mean() < 0


def test_spirals_mirror_each_other_and_pinwheel_arms_turn() -> None:
    x, y = make("spirals", 40_000, 0)
    np.testing.assert_allclose(x[y == 0].mean(0), -x[y == 1].mean(0), atol=0.05)
    assert 3.0 < np.linalg.norm(x, axis=1).max() < 4.2  # 3 pi / 3, and noise
    x, y = make("pinwheel", 40_000, 0)
    turn = -2 * np.pi / 5
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    np.testing.assert_allclose(rotation @ x[y == 0].mean(0), x[y == 1].mean(0), atol=0.03)


def test_checkerboard_fills_the_fields_of_one_colour_evenly() -> None:
    x, _ = make("checkerboard", 16_000, 0)
    column, row = np.floor(x / 2).astype(int).T
    assert ((column + row) % 2 == 0).all() and np.abs(x).max() <= 4
    _, counts = np.unique(4 * (row + 2) + column + 2, return_counts=True)
    assert counts.tolist() == [2000] * 8


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: make("moon", 10, 0), DataError, ["'moon'", "pinwheel"]),
        (lambda: make("digits", 10, 0), DataError, ["'digits'", "two-dimensional"]),
        (lambda: make("moons", 0, 0), ConfigError, ["`n`", "0"]),
        (lambda: make("moons", 10, -1), ConfigError, ["`seed`", "-1"]),
        (lambda: load_builtin("moon"), DataError, ["'moon'"]),
        (lambda: load_builtin("digits", seed=0.5), ConfigError, ["`seed`", "0.5"]),
    ],
)
def test_bad_input_gets_one_clear_line(call, kind, words) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
