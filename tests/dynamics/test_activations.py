"""Sine and cosine against NumPy's in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmm_jax.dynamics.activations import cos, sin


@pytest.mark.parametrize("largest", [2.0, 100.0, 1e4])
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_values(name: str, largest: float) -> None:
    x = np.linspace(-largest, largest, 100_001).astype(np.float32)
    got = jax.jit({"sin": sin, "cos": cos}[name])(x)
    assert got.dtype == np.float32
    expected = getattr(np, name)(x.astype(np.float64))
    assert np.abs(np.asarray(got, np.float64) - expected).max() < 2e-7


def test_derivatives(x64: None) -> None:
    x = jnp.linspace(-9.0, 9.0, 101, dtype=jnp.float32)
    derivatives = [sin]
    for expected in (np.sin, np.cos, lambda x: -np.sin(x), lambda x: -np.cos(x)):
        np.testing.assert_allclose(jax.vmap(derivatives[-1])(x), expected(x), atol=3e-7)
        derivatives.append(jax.grad(derivatives[-1]))
    wide = x.astype(jnp.float64)
    np.testing.assert_allclose(jax.vmap(jax.grad(sin))(wide), np.cos(wide), atol=1e-15)


@pytest.mark.nan
def test_far_out_it_stays_bounded_and_shows_what_is_not_finite() -> None:
    far = sin(jnp.float32([1e6, -1e20, 3e38]))
    assert np.all(np.abs(far) <= 1)
    assert np.all(np.isnan(sin(jnp.float32([jnp.inf, -jnp.inf, jnp.nan]))))
