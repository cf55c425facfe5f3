"""Pixels: the maps against autodiff, quadrature and the published formula for bits per pixel."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from cpmm_jax.data import (
    AffinePixels,
    LogitPixels,
    Pixels,
    bits_per_dimension,
    check_pixels,
    dequantise,
)
from cpmm_jax.errors import ConfigError, DataError

MAPS: dict[str, Pixels] = {
    "affine": AffinePixels(),
    "affine of given moments": AffinePixels(centre=33.3, scale=78.6),
    "logit": LogitPixels(),
    "logit close to the ends": LogitPixels(alpha=1e-6),
}
every_map = pytest.mark.parametrize("name", MAPS)
IMAGES = np.array([[0, 1, 127, 128], [254, 255, 0, 255]], np.uint8)


def dequantised(rng: np.random.Generator, shape: tuple[int, ...] = (50, 6)) -> np.ndarray:
    y = rng.uniform(0, 256, shape)
    y[0, :2] = 2.0**-16, 256 - 2.0**-16  # the noise comes no closer to black and white
    return y


@every_map
def test_inverse_undoes_forward(name: str, rng: np.random.Generator) -> None:
    pixels, y = MAPS[name], dequantised(rng)
    z = pixels.forward(y)
    assert z.dtype == np.float64 and np.isfinite(z).all()
    np.testing.assert_allclose(pixels.inverse(z), y, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(pixels.forward(pixels.inverse(z)), z, rtol=1e-8)


@every_map
def test_log_det_is_that_of_the_jacobian(name: str, rng: np.random.Generator, x64: None) -> None:
    pixels, y = MAPS[name], dequantised(rng)
    jacobians = jax.vmap(jax.jacobian(pixels.forward))(jnp.asarray(y))
    expected = np.linalg.slogdet(np.asarray(jacobians))[1]
    np.testing.assert_allclose(pixels.log_det(y), expected, rtol=1e-12)
    assert pixels.log_slope(y).shape == y.shape and pixels.log_det(y[0]).shape == ()


@every_map
def test_numpy_and_jax_agree_at_the_ends_too(name: str, rng: np.random.Generator) -> None:
    pixels, y = MAPS[name], dequantised(rng).astype(np.float32)
    forward, log_det = jax.jit(lambda y: (pixels.forward(y), pixels.log_det(y)))(y)
    assert isinstance(forward, jax.Array) and forward.dtype == jnp.float32
    np.testing.assert_allclose(forward, pixels.forward(y.astype(np.float64)), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(log_det, pixels.log_det(y.astype(np.float64)), rtol=2e-6)
    np.testing.assert_allclose(jax.jit(pixels.inverse)(forward), y, atol=1e-3)


@every_map
def test_uniform_pixels_stay_a_density_in_model_space(name: str) -> None:
    pixels = MAPS[name]

    def density(z: float) -> float:
        at = pixels.inverse(np.array([z]))
        return float(np.exp(-np.log(256.0) - pixels.log_det(at)))

    low, high = pixels.forward(np.array([0.0, 256.0]))
    total, _ = scipy.integrate.quad(density, low, high, epsabs=1e-10, limit=200)
    assert total == pytest.approx(1.0, abs=1e-6)


def test_logit_is_that_of_the_paper() -> None:
    y = np.linspace(0.1, 255.9, 9)
    for alpha in (1e-6, 0.05):
        expected = scipy.special.logit(alpha + (1 - 2 * alpha) * y / 256)
        np.testing.assert_allclose(LogitPixels(alpha).forward(y), expected, rtol=1e-9)


def test_bits_are_those_of_the_published_formula(rng: np.random.Generator) -> None:
    """Papamakarios et al. (2017), appendix E.2, from the log-density in model space."""
    pixels, y = LogitPixels(alpha=0.05), dequantised(rng)
    z, dim = pixels.forward(y), y.shape[1]
    log_prob = scipy.stats.norm.logpdf(z).sum(axis=1)
    sigmoid = scipy.special.expit(z)
    published = -log_prob / (dim * np.log(2)) - np.log2(1 - 2 * 0.05) + 8
    published += (np.log2(sigmoid) + np.log2(1 - sigmoid)).mean(axis=1)
    found = bits_per_dimension(log_prob + pixels.log_det(y), dim)
    np.testing.assert_allclose(found, published, rtol=1e-10)


def test_the_uniform_density_has_eight_bits() -> None:
    for dim in (1, 784, 3072):
        assert bits_per_dimension(-dim * np.log(256.0), dim) == pytest.approx(8.0, rel=1e-15)
    assert bits_per_dimension(0.0, 5) == 0.0


KEYS: dict[str, Callable[[int], Any]] = {"jax": jax.random.key, "numpy": np.random.default_rng}


@pytest.mark.parametrize("kind", KEYS)
def test_noise_is_uniform_within_each_pixel_and_follows_from_its_key(kind: str) -> None:
    make = KEYS[kind]
    x = np.tile(np.array([0, 7, 255], np.uint8), (20000, 1))
    y = dequantise(make(0), x)
    assert y.dtype == (np.float64 if kind == "numpy" else jnp.float32)
    np.testing.assert_array_equal(np.floor(y), x)
    u = np.asarray(y, np.float64) - x
    assert u.min() > 0 and u.max() < 1
    assert scipy.stats.kstest(u.ravel(), "uniform").pvalue > 0.01
    np.testing.assert_array_equal(y, dequantise(make(0), x))
    assert not np.array_equal(y, dequantise(make(1), x))


def test_a_compiled_step_draws_new_noise_for_each_step() -> None:
    pixels, key, traces = LogitPixels(), jax.random.key(0), []

    @jax.jit
    def step(number: jax.Array, x: jax.Array) -> jax.Array:
        traces.append(1)
        return pixels.forward(dequantise(jax.random.fold_in(key, number), x))

    x = IMAGES.astype(np.float32)
    first, second, again = step(0, x), step(1, x), step(0, x)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second) and len(traces) == 1
    at_once = pixels.forward(dequantise(jax.random.fold_in(key, 0), IMAGES))
    np.testing.assert_allclose(first, at_once, rtol=1e-6, atol=1e-6)


def test_maps_are_static_arguments() -> None:
    forward = jax.jit(lambda pixels, y: pixels.forward(y), static_argnums=0)
    for pixels in MAPS.values():
        np.testing.assert_allclose(
            forward(pixels, jnp.full(2, 9.0)), pixels.forward(np.full(2, 9.0)), rtol=1e-5
        )
    assert LogitPixels(0.05) == LogitPixels() != LogitPixels(0.1)


BAD: dict[str, tuple[Any, list[str]]] = {
    "scaled": (IMAGES / 255, ["whole numbers 0..255", "0.00392157 at (0, 1)", "4 such", "255 * x"]),
    "too large": (np.array([[3, 256]]), ["256 at (0, 1)", "1 such"]),
    "negative": (np.array([[3.0, -1.0]]), ["-1 at (0, 1)"]),
    "NaN": (np.array([[np.nan, 3.0]]), ["nan at (0, 0)"]),
    "infinite": (np.array([[3.0], [np.inf]]), ["inf at (1, 0)"]),
    "text": (np.array([["3"]]), ["integers or floats", "<U1"]),
    "complex": (np.array([[3j]]), ["complex128"]),
    "objects": (np.array([[None]]), ["dtype object"]),
    "yes and no": (np.array([[True]]), ["dtype bool", "uint8"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pixels_get_one_clear_line(case: str) -> None:
    x, words = BAD[case]
    for call in (check_pixels, lambda x: dequantise(np.random.default_rng(0), x)):
        with pytest.raises(DataError) as caught:
            call(x)
        message = str(caught.value)
        assert "\n" not in message and message.startswith("`x` must") and ";" in message
        for word in words:
            assert word in message, message
    with pytest.raises(DataError):
        dequantise(jax.random.key(0), x)


def test_good_pixels_pass_as_they_are() -> None:
    for x in (IMAGES, IMAGES.astype(np.int64), IMAGES.astype(np.float32).reshape(2, 2, 2)):
        assert check_pixels(x) is x


@pytest.mark.parametrize(
    "make",
    [
        lambda: LogitPixels(0.0),
        lambda: LogitPixels(0.5),
        lambda: LogitPixels(float("nan")),
        lambda: AffinePixels(scale=0.0),
        lambda: AffinePixels(scale=float("inf")),
        lambda: AffinePixels(centre=float("nan")),
    ],
)
def test_bad_settings(make: Callable[[], Pixels]) -> None:
    with pytest.raises(ConfigError, match=r"must be .*; got .*; use"):
        make()


def test_the_numpy_path_needs_no_jax() -> None:
    code = (
        "import sys; sys.modules['jax'] = None\n"
        "import numpy as np\n"
        "from cpmm_jax.data import LogitPixels, dequantise\n"
        "y = dequantise(np.random.default_rng(0), np.zeros((2, 3)))\n"
        "print(LogitPixels().log_det(y).shape)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "(2,)"
