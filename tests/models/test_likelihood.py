"""The likelihood of a model: its gradient, sampled and integrated inside the solver (Eq. 6)."""

from __future__ import annotations

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from cpmm_jax.dynamics.solve import SolverConfig
from cpmm_jax.dynamics.trajectory import GridTimes
from cpmm_jax.errors import SolverError
from cpmm_jax.models.cpmm import CPMM
from tests.models.small import examples, log_prob, small, uneven, wild


def value_and_gradient(values: Array, pull: Any) -> tuple[Array, Array]:
    """Return log p(x) of every example and the gradient of their mean."""
    return values, ravel_pytree(pull(jnp.full_like(values, 1.0 / values.size))[0])[0]


@jax.jit
def sampled(model: CPMM, x: Array) -> tuple[Array, Array]:
    times = GridTimes()(None, 1000)
    return value_and_gradient(*jax.vjp(lambda model: model.mixture(times).log_prob(x), model))


@jax.jit
def integrated(model: CPMM, x: Array) -> tuple[Array, Array]:
    def log_prob(model: CPMM) -> Array:
        return model.continuous_log_prob(x, reference_times=256)

    return value_and_gradient(*jax.vjp(log_prob, model))


@jax.jit
def integrated_values(model: CPMM, x: Array) -> Array:
    return model.continuous_log_prob(x)


FINE = SolverConfig(num_steps=512)


@pytest.fixture(scope="module")
def reference() -> tuple[CPMM, Array, Array, Array]:
    """Return a model of evolving weights, examples, and the sampled form's values and gradient."""
    model, x = uneven(small(solver=FINE, evolve_weights=True)), examples(10)
    return model, x, *sampled(model, x)


def test_gradient_of_the_likelihood_matches_finite_differences(reference: Any) -> None:
    model, x, _, gradient = reference
    point, unravel = ravel_pytree(model)
    direction = np.sin(np.arange(point.size)).astype(np.float32)
    ends = [sampled(unravel(point + step * direction), x)[0] for step in (0.01, -0.01)]
    slope = np.mean(ends[0] - ends[1]) / 0.02
    assert abs(slope) > 0.1
    np.testing.assert_allclose(gradient @ direction, slope, rtol=5e-3)


@pytest.mark.slow
def test_backsolve_gives_the_gradient_of_the_likelihood(reference: Any) -> None:
    model, x, values, gradient = reference
    backwards = SolverConfig(
        solver=diffrax.Heun(), num_steps=64, adjoint=diffrax.BacksolveAdjoint()
    )
    other = small(solver=backwards, evolve_weights=True)
    got = sampled(nnx.merge(nnx.graphdef(other), nnx.state(model)), x)
    np.testing.assert_allclose(got[0], values, atol=1e-3)
    assert float(jnp.max(jnp.abs(gradient))) > 0.05
    np.testing.assert_allclose(got[1], gradient, atol=1e-3)


@pytest.mark.parametrize("field_per_class", [False, True])
def test_mixture_inside_the_solver_is_the_limit_of_many_components(
    *, field_per_class: bool
) -> None:
    model, x = uneven(small(solver=FINE, field_per_class=field_per_class)), 2.0 * examples(30)
    many = log_prob(model.extract(2000), x)
    np.testing.assert_allclose(integrated_values(model, x), many, atol=1e-3)


@pytest.mark.slow
def test_evolving_weights_inside_the_solver_and_gradients(reference: Any) -> None:
    model, x, values, gradient = reference
    got = integrated(model, x)
    np.testing.assert_allclose(got[0], values, atol=1e-3)
    assert float(np.max(np.abs(gradient))) > 0.1
    np.testing.assert_allclose(got[1], gradient, atol=1e-3)


def test_mixture_inside_the_solver_does_not_underflow(reference: Any) -> None:
    """Far away, where the densities are 0 in float32."""
    model, x, *_ = reference
    far = 75.0 * x / np.linalg.norm(x, axis=1, keepdims=True)
    got, expected = integrated(model, far), sampled(model, far)
    assert float(np.max(expected[0])) < -200.0
    assert not np.any(np.exp(np.asarray(expected[0])))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-3)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-3 * np.abs(expected[1]).max())


@pytest.mark.nan  # the density of a failed solve
@pytest.mark.slow
def test_a_failed_solve_inside_is_named(reference: Any) -> None:
    model, x, *_ = reference
    broken = jax.tree.map(lambda leaf: leaf, model)
    broken.means[...] = jnp.full_like(broken.means[...], jnp.inf)
    assert np.isnan(integrated(broken, x)[0]).all()  # no exception under jit
    with pytest.raises(SolverError, match="infinite or NaN"):
        wild().continuous_log_prob(examples(2))
