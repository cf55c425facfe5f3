"""The flow: invertible, a density, the traces, the energies, several positions, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx
from jaxtyping import Array

from cpmm_jax.dynamics.fields import MLPField
from cpmm_jax.dynamics.flow import CNF
from cpmm_jax.dynamics.solve import SolverConfig
from cpmm_jax.dynamics.trace import ExactTrace, HutchinsonTrace, evaluate
from cpmm_jax.errors import ConfigError, DataError, SolverError

TIGHT = SolverConfig(solver=diffrax.ReversibleHeun(), num_steps=256)
X = jax.random.normal(jax.random.key(1), (6, 2), jnp.float32)
POSITIONS = jnp.array([0.0, 0.35, 0.8])


def build(eval_solver: SolverConfig | None = TIGHT) -> CNF:
    return CNF(2, widths=(8,), output_scale=1.0, eval_solver=eval_solver, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def flow() -> CNF:
    return build()


@pytest.fixture(scope="module")
def jacobian(flow: CNF) -> Callable[[Array, float], Array]:
    """Return d u_v / d x of every row, by automatic differentiation of the solve."""

    def of_row(row: Array, v: Array) -> Array:
        return jax.jacfwd(lambda row: flow.transform(row[None], v)[0])(row)

    of_rows = jax.jit(jax.vmap(of_row, in_axes=(0, None)))
    return lambda x, v: of_rows(x, jnp.float32(v))


def test_inverse_undoes_transform(flow: CNF) -> None:
    for v in (0.0, 0.4, 1.0):
        np.testing.assert_allclose(flow.inverse(flow.transform(X, v), v), X, atol=2e-5)
    assert float(jnp.abs(flow.transform(X, 1.0) - X).max()) > 0.3  # not by standing still


def test_adaptive_steps_agree_with_many_equal_ones(flow: CNF) -> None:
    adaptive = build(eval_solver=None)
    latent = adaptive.transform(X, 1.0)
    np.testing.assert_allclose(latent, flow.transform(X, 1.0), atol=1e-4)
    np.testing.assert_allclose(adaptive.inverse(latent), X, atol=2e-4)


def test_several_positions_from_one_solve(flow: CNF) -> None:
    together = flow.transform(X, POSITIONS)
    assert together.shape == (3, 6, 2)
    separate = [flow.transform(X, float(v)) for v in POSITIONS]
    np.testing.assert_allclose(together, jnp.stack(separate), atol=2e-5)
    np.testing.assert_array_equal(together[0], X)


def test_trace_is_the_log_determinant(flow: CNF, jacobian: Any) -> None:
    log_det = np.linalg.slogdet(np.asarray(jacobian(X, 1.0)))[1]
    latent = np.asarray(flow.transform(X, 1.0))
    normal = -0.5 * (latent**2).sum(axis=1) - np.log(2 * np.pi)
    np.testing.assert_allclose(flow.log_prob(X), normal + log_det, atol=5e-5)


def test_densities_of_all_positions_agree(flow: CNF, jacobian: Any) -> None:
    for v in (0.35, 0.8):
        log_det = np.linalg.slogdet(np.asarray(jacobian(X, v)))[1]
        there = flow.log_prob_at(flow.transform(X, v), v)
        np.testing.assert_allclose(flow.log_prob(X), there + log_det, atol=5e-5)
    normal = -0.5 * jnp.sum(X**2, axis=1) - float(np.log(2 * np.pi))
    np.testing.assert_allclose(flow.log_prob_at(X, 1.0), normal, atol=1e-6)


@pytest.mark.parametrize("v", [0.0, 0.5])
def test_density_integrates_to_one_in_blocks(flow: CNF, v: float) -> None:
    axis, step = np.linspace(-7, 7, 57, retstep=True)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    log_prob = flow.log_prob_at(grid, v, chunk_size=1000)
    assert np.exp(np.asarray(log_prob, np.float64)).sum() * step**2 == pytest.approx(1.0, abs=2e-3)
    rows = np.arange(1500, 1506)
    np.testing.assert_allclose(log_prob[rows], flow.log_prob_at(grid[rows], v), atol=1e-5)


def test_samples_are_latent_points_carried_back(flow: CNF) -> None:
    sample = flow.sample(jax.random.key(3), 6)
    latent = jax.random.normal(jax.random.key(3), (6, 2), jnp.float32)
    np.testing.assert_allclose(flow.transform(sample, 1.0), latent, atol=2e-5)


class LinearField(nnx.Module):
    """g(u) = A^T u, whose flow is a matrix exponential."""

    def __init__(self, matrix: Array) -> None:
        self.layers = nnx.List([])
        self.output = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
        self.output.kernel[...] = matrix

    def __call__(self, t: Array, u: Array) -> Array:
        return self.output(u)


def test_linear_flow_is_the_matrix_exponential() -> None:
    matrix = np.array([[0.3, -0.9], [0.5, -0.6]])
    flow = build()
    flow.field = LinearField(jnp.asarray(matrix, jnp.float32))  # type: ignore[assignment]
    reading = jax.jit(lambda flow: flow.read(X, POSITIONS, trace=ExactTrace(), energies=True))(flow)
    assert reading.log_det is not None and reading.jacobian is not None
    nodes, weights = np.polynomial.legendre.leggauss(8)  # on [-1, 1]
    for i, v in enumerate(np.asarray(POSITIONS, np.float64)):
        expected = np.asarray(X) @ scipy.linalg.expm(v * matrix)
        flows = [scipy.linalg.expm(v * (1 + node) / 2 * matrix) for node in nodes]
        squares = [((np.asarray(X) @ flow @ matrix) ** 2).sum(axis=1) for flow in flows]
        kinetic = v / 2 * weights @ np.array(squares)
        np.testing.assert_allclose(reading.states[i], expected, atol=1e-5)
        np.testing.assert_allclose(reading.log_det[i], v * np.trace(matrix), atol=1e-5)
        np.testing.assert_allclose(reading.jacobian[i], v * (matrix**2).sum(), atol=1e-5)
        np.testing.assert_allclose(reading.kinetic[i], kinetic, atol=1e-4)  # type: ignore[index]
    assert int(reading.num_evaluations) == 257


@pytest.mark.parametrize(
    ("widths", "activation"), [((8,), "sin"), ((8, 5), "tanh"), ((8, 5, 4), "sin")]
)
def test_trace_of_any_depth(widths: tuple[int, ...], activation: str) -> None:
    @jax.jit
    def derivatives(field: MLPField) -> Any:
        found = [ExactTrace()(field, 0.3, X, None, frobenius=wanted) for wanted in (False, True)]
        jacobians = jax.vmap(jax.jacrev(lambda u: field(0.3, u)))(X)
        return found, evaluate(field, 0.3, X), jacobians

    field = MLPField(2, widths=widths, activation=activation, rngs=nnx.Rngs(0))
    found, velocity, jacobians = derivatives(field)
    traces = np.trace(jacobians, axis1=1, axis2=2)
    for divergence in found:
        np.testing.assert_allclose(divergence.velocity, velocity, atol=1e-6)
        np.testing.assert_allclose(divergence.trace, traces, atol=1e-5)
    squares = (np.asarray(jacobians) ** 2).sum(axis=(1, 2))
    np.testing.assert_allclose(found[1].frobenius, squares, rtol=1e-5)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_estimates_are_unbiased(flow: CNF, distribution: Any) -> None:
    count = 20_000
    exact = ExactTrace()(flow.field, 0.3, X, None, frobenius=True)
    single = HutchinsonTrace(distribution=distribution)
    noise = single.draw(jax.random.key(0), (count, 2), jnp.float32)
    # One direction for each of many copies of a point.
    for row in range(2):
        copies = jnp.tile(X[row], (count, 1))
        estimate = single(flow.field, 0.3, copies, noise, frobenius=True)
        for name in ("trace", "frobenius"):
            values = np.asarray(getattr(estimate, name), np.float64)
            error = abs(values.mean() - float(getattr(exact, name)[row]))
            assert error < 4 * values.std() / np.sqrt(count), (name, row)


def test_estimated_log_prob_is_unbiased(flow: CNF) -> None:
    copies = jnp.tile(X, (500, 1))  # each with directions of its own
    estimates = flow.log_prob(copies, trace=HutchinsonTrace(), key=jax.random.key(0))
    estimates = estimates.reshape(500, len(X))
    error = jnp.abs(estimates.mean(axis=0) - flow.log_prob(X))
    assert bool(jnp.all(error < 4 * estimates.std(axis=0) / math.sqrt(500) + 1e-5))
    other = flow.log_prob(copies, trace=HutchinsonTrace(), key=jax.random.key(1))
    assert bool(jnp.any(other.reshape(500, len(X)) != estimates))


def test_jit_vmap_and_gradient(flow: CNF) -> None:
    value, gradient = jax.jit(jax.value_and_grad(lambda flow, x: flow.log_prob(x).sum()))(flow, X)
    np.testing.assert_allclose(value, flow.log_prob(X).sum(), rtol=1e-5)
    chex.assert_tree_all_finite(gradient)
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradient))
    mapped = jax.vmap(lambda v: flow.transform(X, v))(POSITIONS)
    np.testing.assert_allclose(mapped, flow.transform(X, POSITIONS), atol=2e-5)


def test_an_untrained_flow_is_the_identity() -> None:
    flow = CNF(2, widths=(8,), eval_solver=TIGHT, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(flow.transform(X, 1.0), X, rtol=1e-6)


@pytest.mark.nan  # states of a failed solve
def test_failed_solves_are_told() -> None:
    broken = build()
    broken.field.output.bias[...] = jnp.array([0.0, jnp.inf], jnp.float32)
    with pytest.raises(SolverError, match="infinite or NaN"):
        broken.log_prob(X)
    assert bool(jnp.all(jnp.isnan(jax.jit(lambda flow: flow.transform(X, 1.0))(broken))))


BAD = {
    "another D": (lambda f: f.transform(jnp.ones((3, 5)), 1.0), DataError, r"D = 2.*\(3, 5\)"),
    "one point": (lambda f: f.log_prob(jnp.ones(2)), DataError, r"\(N, D\).*\(2,\)"),
    "no rows": (lambda f: f.inverse(jnp.ones((0, 2))), DataError, r"N >= 1.*\(0, 2\)"),
    "NaN": (lambda f: f.log_prob([[0.0, 1.0], [0.0, np.nan]]), DataError, "nan in row 1, column 1"),
    "v above 1": (lambda f: f.transform(X, 1.5), ConfigError, "between 0.*1.5"),
    "v below 0": (lambda f: f.log_prob_at(X, -0.1), ConfigError, "between 0.*-0.1"),
    "v NaN": (lambda f: f.transform(X, np.nan), ConfigError, "between 0.*nan"),
    "v decreasing": (lambda f: f.transform(X, [0.5, 0.25]), ConfigError, r"increase.*0.5, 0.25"),
    "v a matrix": (lambda f: f.transform(X, np.ones((1, 1))), ConfigError, r"\(1, 1\)"),
    "v empty": (lambda f: f.transform(X, []), ConfigError, r"\(0,\)"),
    "v for inverse": (lambda f: f.inverse(X, [0.5, 1.0]), ConfigError, r"a number.*\(2,\)"),
    "no key": (lambda f: f.log_prob(X, trace=HutchinsonTrace()), ConfigError, "`key`.*None"),
    "no sample": (lambda f: f.sample(jax.random.key(0), 0), ConfigError, "`n`.*got 0"),
    "chunk": (lambda f: f.log_prob(X, chunk_size=0), ConfigError, "`chunk_size`.*got 0"),
    "energies": (lambda f: f.read(X, jnp.ones(1), energies=True), ConfigError, "`trace`.*None"),
    "dim": (lambda f: CNF(0, rngs=nnx.Rngs(0)), ConfigError, "`dim`.*got 0"),
    "directions": (lambda f: HutchinsonTrace(num_samples=0), ConfigError, "at least 1.*got 0"),
    "law": (
        lambda f: HutchinsonTrace(distribution="cauchy"),  # type: ignore[arg-type]
        ConfigError,
        "'rademacher', 'gaussian'.*'cauchy'",
    ),
}


@pytest.mark.nan  # in the input
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(flow: CNF, name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        call(flow)
    assert "\n" not in str(caught.value)
