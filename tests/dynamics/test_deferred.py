"""Gradients formed after the loop, or of a loop over hidden units, are those of the plain field."""

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
from cpmm_jax.dynamics.hidden_units import HiddenUnits
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


@pytest.mark.parametrize(
    ("solver", "widths"), [*zip(SOLVERS, [(4, 3), (3,), (4, 3)], strict=True), (SOLVERS[0], (8, 3))]
)
def test_gradients_of_a_solve(
    solver: diffrax.AbstractSolver,
    widths: tuple[int, ...],
    x64: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where hidden units are fewer than entries of the state, 5, the solve is one of theirs."""
    shapes = {"means": (2, 3, 1), "loadings": (2, 3, 1, 1), "log_noise": (2, 3, 1)}
    values = {n: jnp.cos(jnp.arange(6.0).reshape(shape)) for n, shape in shapes.items()}
    initial = TrajectoryState(MFA(logits=None, **values), jnp.ones((2, 3, 2)))  # type: ignore[arg-type]
    field = MLPField(5, widths=widths, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    config = SolverConfig(solver=solver, num_steps=3)

    def value(field: MLPField, initial: TrajectoryState) -> Array:
        states = integrate(field, initial, jnp.array([0.2, 0.9]), config).states
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(states))  # type: ignore[return-value]

    def gradient() -> Any:
        return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(field, initial)

    tapped = gradient()
    assert HiddenUnits.save_work(field, 6, 5) == (max(widths) < 5)
    assert not HiddenUnits.save_work(field, 4, 5)
    monkeypatch.setattr(trajectory, "FEW_ROWS", 5)  # there are six
    untapped = gradient()
    monkeypatch.setattr(HiddenUnits, "save_work", lambda field, rows, size: False)
    for found in (tapped, untapped):
        for got, expected in zip(*map(jax.tree.leaves, (found, gradient())), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)
