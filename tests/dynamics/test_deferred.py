"""Gradients formed after the loop are those of the plain field."""

from __future__ import annotations

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from cpmm_jax.dynamics import trajectory
from cpmm_jax.dynamics.deferred import open_taps, tapped_matmul
from cpmm_jax.dynamics.fields import MLPField
from cpmm_jax.dynamics.solve import SolverConfig
from cpmm_jax.dynamics.trajectory import TrajectoryState, integrate
from cpmm_jax.mixture.mfa import MFA

# One evaluation a step; a new first stage; a first stage that is kept, the last being the step.
SOLVERS = [diffrax.ReversibleHeun(), diffrax.Heun(), diffrax.Bosh3()]


def test_one_product_collects_what_a_loop_sums(x64: None) -> None:
    kernel, xs = jnp.array([[1.0, -2.0, 0.5], [0.3, 0.2, 0.1]]), jnp.arange(8.0).reshape(4, 2)

    def total(kernel: Array, tapped: bool) -> Array:
        def body(carry: Array, row: Any) -> Any:
            x, tap = row
            y = tapped_matmul(x * carry, kernel, tap) if tapped else (x * carry) @ kernel
            return jnp.sin(jnp.sum(y)), None

        taps = open_taps(kernel, (4,))
        return jax.lax.scan(body, jnp.ones(()), (xs, taps))[0]

    for derivative in (jax.grad, jax.hessian):
        got, expected = (derivative(total)(kernel, tapped) for tapped in (True, False))
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(got, expected, rtol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_gradients_of_a_solve(
    solver: diffrax.AbstractSolver, x64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"means": (2, 2, 1), "loadings": (2, 2, 1, 1), "log_noise": (2, 2, 1)}
    values = {n: jnp.cos(jnp.arange(4.0).reshape(shape)) for n, shape in shapes.items()}
    initial = TrajectoryState(MFA(logits=None, **values), jnp.ones((2, 2, 2)))  # type: ignore[arg-type]
    field = MLPField(5, widths=(4, 3), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    config = SolverConfig(solver=solver, num_steps=3)

    def value(field: MLPField, initial: TrajectoryState) -> Array:
        states = integrate(field, initial, jnp.array([0.2, 0.9]), config).states
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(states))  # type: ignore[return-value]

    def gradient() -> Any:
        return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(field, initial)

    tapped = gradient()
    monkeypatch.setattr(trajectory, "FEW_ROWS", 3)  # there are four
    for got, expected in zip(*map(jax.tree.leaves, (tapped, gradient())), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)
