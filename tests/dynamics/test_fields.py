"""The multilayer perceptron as a vector field: shapes, explicit time, scale, bad arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from cpmm_jax.dynamics.fields import ACTIVATIONS, MLPField
from cpmm_jax.errors import ConfigError


def field(size: int = 5, seed: int = 0, **settings: Any) -> MLPField:
    return MLPField(size, **{"widths": (16, 8), "rngs": nnx.Rngs(seed)} | settings)


call = jax.jit(lambda field, t, state: field(t, state))


def test_answers_in_the_shape_of_the_state() -> None:
    shapes = {"means": (2,), "loadings": (1, 2), "logits": ()}
    state = {name: jnp.full(shape, 0.5, jnp.float32) for name, shape in shapes.items()}
    slope = call(field(), 0.3, state)
    assert jax.tree.structure(slope) == jax.tree.structure(state)
    assert jax.tree.map(jnp.shape, slope) == jax.tree.map(jnp.shape, state)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(slope))


@pytest.mark.parametrize("widths", [(3,), (7, 4), (6, 5, 4, 3)])
def test_depth_and_widths(widths: tuple[int, ...]) -> None:
    made = jax.eval_shape(lambda: field(5, widths=widths))
    assert [layer.kernel.shape for layer in made.layers] == list(
        zip((5, *widths[:-1]), widths, strict=True)
    )
    assert [time.kernel.shape for time in made.times] == [(1, width) for width in widths]
    assert made.output.kernel.shape == (widths[-1], 5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_is_the_network_it_says(activation: str) -> None:
    made = field(3, activation=activation)
    state, t = np.array([0.2, -1.0, 0.5], np.float32), 0.7
    hidden = state
    for layer, time in zip(made.layers, made.times, strict=True):
        kernel, bias, clock = (np.asarray(v) for v in (layer.kernel, layer.bias, time.kernel))
        hidden = getattr(np, activation)(hidden @ kernel + bias + t * clock[0])
    expected = hidden @ np.asarray(made.output.kernel) + np.asarray(made.output.bias)
    np.testing.assert_allclose(call(made, t, state), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sees_the_time(activation: str) -> None:
    made = field(activation=activation)
    state = np.ones(5, np.float32)
    early, late = np.asarray(call(made, 0.0, state)), np.asarray(call(made, 1.0, state))
    assert np.mean(np.abs(early - late)) > 0.1


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [4, 400])
def test_untrained_output_has_the_promised_size(activation: str, size: int) -> None:
    @jax.jit
    def output(key: Array) -> Array:
        made = MLPField(size, widths=(64, 64), activation=activation, rngs=nnx.Rngs(key))
        state = jax.random.normal(key, (20, size), jnp.float32)
        return jax.vmap(made, in_axes=(None, 0))(0.5, state)

    sizes = [np.abs(output(jax.random.key(seed))) for seed in range(10)]
    assert 0.5 < np.median(sizes) < 1.2  # nearer 1 where tanh saturates


def test_output_scale() -> None:
    state = np.arange(5, dtype=np.float32)
    unit, quarter, none = (call(field(output_scale=s), 0.5, state) for s in (1.0, 0.25, 0.0))
    np.testing.assert_allclose(quarter, 0.25 * np.asarray(unit), rtol=1e-5)
    np.testing.assert_array_equal(none, np.zeros(5))


def test_zero_output_can_learn() -> None:
    resting = field(output_scale=0.0)
    gradient = jax.jit(jax.grad(lambda f: jnp.sum(f(0.5, jnp.ones(5, jnp.float32)))))(resting)
    assert np.any(gradient.output.kernel[...])


def test_same_seed_same_weights() -> None:
    first, again, other = (jax.tree.leaves(field(seed=seed)) for seed in (3, 3, 1))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_computes_in_float64(x64: None) -> None:
    def made_and_called() -> Any:
        made = field(param_dtype=jnp.float64)
        return made, made(0.5, jnp.ones(5))

    found = jax.eval_shape(made_and_called)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": ()}, r"`widths` must list at least one width, each >= 1; got \(\)"),
        ({"widths": (8, 0)}, r"`widths` must list .* got \(8, 0\)"),
        ({"activation": "relu"}, "`activation` must be one of 'sin', 'tanh'; got 'relu'"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        field(**settings)
