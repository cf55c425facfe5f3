"""The convolutional field: what it computes, against SciPy; bad arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads
from scipy.signal import correlate2d

from cpmm_jax.dynamics.image_field import ConvField, convolve
from cpmm_jax.errors import ConfigError

HEIGHT, WIDTH, CHANNELS, RANK, AUGMENTED = 5, 4, 2, 1, 3
SIZE = HEIGHT * WIDTH * (CHANNELS * (RANK + 2) + AUGMENTED)


def field(seed: int = 0, **settings: Any) -> ConvField:
    own = {"widths": (6, 8), "rngs": nnx.Rngs(seed)} | settings
    return ConvField((HEIGHT, WIDTH, CHANNELS), RANK, AUGMENTED, **own)


call = jax.jit(lambda field, t, state: field(t, state))


def convolved(image: np.ndarray, layer: Any) -> np.ndarray:
    """Return what a layer computes, by SciPy, in float64."""
    kernel, bias = np.asarray(layer.kernel, np.float64), np.asarray(layer.bias, np.float64)
    full = [
        sum(
            correlate2d(image[..., i], kernel[..., i, o], mode="same")
            for i in range(image.shape[-1])
        )
        for o in range(kernel.shape[-1])
    ]
    return np.stack(full, axis=-1) + bias


def halved(image: np.ndarray) -> np.ndarray:
    """Return means of the one to four pixels of every place of half the resolution."""
    rows, columns = (range(0, side, 2) for side in image.shape[:2])
    return np.array([[image[i : i + 2, j : j + 2].mean((0, 1)) for j in columns] for i in rows])


def with_time(image: np.ndarray, t: float) -> np.ndarray:
    return np.concatenate([image, np.full((*image.shape[:2], 1), t)], axis=-1)


def by_scipy(made: ConvField, t: float, state: np.ndarray) -> np.ndarray:
    pixels = HEIGHT * WIDTH
    sizes = [CHANNELS, CHANNELS * RANK, CHANNELS, AUGMENTED]
    parts = np.split(state.astype(np.float64), np.cumsum([pixels * size for size in sizes])[:-1])
    rows, columns = np.linspace(-1, 1, HEIGHT), np.linspace(-1, 1, WIDTH)
    image = np.concatenate([part.reshape(HEIGHT, WIDTH, -1) for part in parts], axis=-1)
    place = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)
    hidden = np.concatenate([image, place], axis=-1)
    for layer in made.layers:
        hidden = np.sin(convolved(with_time(hidden, t), layer))
    seen = []
    for layer in made.down:
        seen.append(hidden)
        hidden = np.sin(convolved(with_time(halved(hidden), t), layer))
    for layer in made.up:
        fine = seen.pop()
        finer = hidden.repeat(2, 0).repeat(2, 1)[: fine.shape[0], : fine.shape[1]]
        hidden = np.sin(convolved(with_time(np.concatenate([finer, fine], -1), t), layer))
    groups = np.split(hidden, [2, 4, 6], axis=-1)  # of 8 channels, 2 for each kind
    slopes = [convolved(group, head) for group, head in zip(groups, made.heads, strict=True)]
    return np.concatenate([slope.ravel() for slope in slopes])


@pytest.mark.parametrize("coarse", [(), (5,), (5, 7)])
def test_is_the_network_it_says(coarse: tuple[int, ...]) -> None:
    made = field(coarse_widths=coarse)
    state = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
    found = call(made, 0.7, state)
    np.testing.assert_allclose(found, by_scipy(made, 0.7, state), rtol=1e-3, atol=2e-5)


def test_the_derivative_of_a_convolution(x64: None) -> None:
    rng = np.random.default_rng(0)
    image, kernel = rng.normal(size=(5, 4, 3)), rng.normal(size=(3, 3, 3, 2))
    check_grads(convolve, (image, kernel), order=1, modes=["rev"])


def test_every_kind_of_parameter_has_channels_of_its_own() -> None:
    """What makes the means does not see the channels that make the noise."""
    made = field()
    slope = call(made, 0.2, np.ones(SIZE, np.float32))
    made.layers[-1].kernel[...] = made.layers[-1].kernel.at[..., 4:6].set(0.0)
    made.layers[-1].bias[...] = made.layers[-1].bias.at[4:6].set(0.0)
    changed = np.asarray(call(made, 0.2, np.ones(SIZE, np.float32)) != slope)
    noise = np.zeros(SIZE, bool)
    noise[HEIGHT * WIDTH * CHANNELS * 2 : HEIGHT * WIDTH * CHANNELS * 3] = True
    assert not changed[~noise].any() and changed[noise].all()


@pytest.mark.parametrize("activation", ["sin", "tanh"])
def test_untrained_output_has_the_promised_size(activation: str) -> None:
    @jax.jit
    def output(key: Any) -> Any:
        rngs = nnx.Rngs(key)
        made = ConvField((6, 6, 1), 2, 4, widths=(32, 32), activation=activation, rngs=rngs)
        state = jax.random.normal(key, (5, 36 * 8))
        return jax.vmap(made, in_axes=(None, 0))(0.5, state)

    sizes = [np.abs(output(jax.random.key(seed))) for seed in range(5)]
    assert 0.5 < np.median(sizes) < 1.2  # nearer 1 where tanh saturates


def test_sees_time_and_place() -> None:
    state = np.zeros(SIZE, np.float32)
    early, late = (np.asarray(call(field(), t, state)) for t in (0.0, 1.0))
    assert np.mean(np.abs(early - late)) > 0.1
    large = np.zeros(7 * 7 * 4, np.float32)
    for coordinates in (True, False):  # away from the border, where zeros are padded
        made = ConvField((7, 7, 1), 0, 2, coordinates=coordinates, rngs=nnx.Rngs(0))
        inner = np.asarray(call(made, 0.0, large))[:49].reshape(7, 7)[2:5, 2:5]  # of the means
        assert bool(np.ptp(inner) > 0.05) is coordinates


def test_rests_and_can_learn_where_its_output_is_zero() -> None:
    resting = field(output_scale=0.0)
    assert not np.any(call(resting, 0.5, np.ones(SIZE, np.float32)))
    gradient = jax.jit(jax.grad(lambda f: jnp.sum(f(0.5, jnp.ones(SIZE)))))(resting)
    assert all(np.any(head.kernel[...]) for head in gradient.heads)


def test_computes_in_half_precision_between_float32() -> None:
    state = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
    whole = call(field(), 0.5, state)
    half = call(field(compute_dtype=jnp.bfloat16), 0.5, state)
    assert half.dtype == jnp.float32
    error = np.abs(np.asarray(half - whole))
    assert 0 < error.max() < 0.3 and error.mean() < 0.03


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((4,), {}, r"`event_shape` must be \(H, W, channels\), or \(H, W\), .*; got \(4,\)"),
        ((0, 4, 1), {}, r"`event_shape` must be .* got \(0, 4, 1\)"),
        ((4, 4, 1), {"widths": ()}, "`widths` must list at least one width"),
        ((4, 4, 1), {"widths": (3,)}, "a channel for each of 4 kinds of parameters .*; got 3"),
        ((4, 4, 1), {"activation": "relu"}, "`activation` must be one of"),
        (
            (4, 9, 1),
            {"coarse_widths": (2, 2, 2)},
            r"`coarse_widths` must list .* at most 2 halvings of 4 x 9 pixels; got \(2, 2, 2\)",
        ),
    ],
)
def test_bad_arguments(shape: tuple[int, ...], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConvField(shape, 1, 2, **{"widths": (8,)} | settings, rngs=nnx.Rngs(0))
