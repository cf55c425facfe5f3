"""From pseudotimes to components: samplers, exact solutions, order, Eq. 6 inside the solver."""

from __future__ import annotations

from typing import Any

import diffrax
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx
from jaxtyping import Array

from cpmm_jax.dynamics.fields import MLPField
from cpmm_jax.dynamics.solve import SolverConfig
from cpmm_jax.dynamics.trajectory import (
    GridTimes,
    StratifiedTimes,
    TrajectoryState,
    UniformTimes,
    integrate,
)
from cpmm_jax.mixture.mfa import MFA

SAMPLERS = [StratifiedTimes(), UniformTimes(), GridTimes()]
CLASSES, TRAJECTORIES, DIM, RANK, AUGMENTED = 2, 3, 2, 1, 4
TIMES = jnp.array([0.1, 0.35, 0.8, 1.0], jnp.float32)
FIXED = SolverConfig(solver=diffrax.Heun(), num_steps=8)
solved = jax.jit(integrate, static_argnames=("config", "field_per_class"))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_times", [1, 7, 100])
def test_times_are_sorted_in_the_unit_interval(sampler: Any, num_times: int) -> None:
    for seed in range(5):
        times = sampler(jax.random.key(seed), num_times)
        assert times.shape == (num_times,)
        assert times.dtype == jnp.result_type(float)
        assert bool(jnp.all((times >= 0) & (times <= 1)))
        assert bool(jnp.all(jnp.diff(times) >= 0))


def test_stratified_times_have_one_draw_in_each_cell() -> None:
    for seed in range(20):
        times = StratifiedTimes()(jax.random.key(seed), 50)
        np.testing.assert_array_equal(np.floor(np.asarray(times) * 50 + 1e-5), np.arange(50))


def test_grid_is_the_midpoints() -> None:
    np.testing.assert_allclose(GridTimes()(None, 4), [0.125, 0.375, 0.625, 0.875], rtol=1e-6)


def test_draws_are_unbiased_and_stratified_ones_vary_less() -> None:
    keys = jax.random.split(jax.random.key(0), 4000)
    spread = {}
    for sampler in (StratifiedTimes(), UniformTimes()):
        times = jax.vmap(lambda key, draw=sampler: draw(key, 8))(keys)
        means = np.asarray(jnp.mean(jnp.exp(2.0 * times), axis=1), np.float64)
        spread[type(sampler)] = means.std()
        standard_error = means.std() / np.sqrt(len(means))
        assert abs(means.mean() - (np.exp(2.0) - 1.0) / 2.0) < 4.0 * standard_error
    assert spread[StratifiedTimes] < 0.2 * spread[UniformTimes]


def test_strategies_compare_by_value_and_hash() -> None:
    assert StratifiedTimes() == StratifiedTimes() != UniformTimes()
    assert len({StratifiedTimes(), StratifiedTimes(), UniformTimes(), GridTimes()}) == 3


@flax.struct.dataclass
class Rotation:
    """Means and augmented channels move linearly together; the rest stays."""

    matrix: Array  # (D + A, D + A)

    def __call__(self, t: Any, state: Array) -> Array:
        first = state.shape[0] - (RANK + 2) * DIM - AUGMENTED  # 1 where weights evolve
        means, augmented = slice(first, first + DIM), slice(-AUGMENTED, None)
        slope = self.matrix @ jnp.concatenate([state[means], state[augmented]])
        still = jnp.zeros_like(state)
        return still.at[means].set(slope[:DIM]).at[augmented].set(slope[DIM:])


def initial(seed: int = 0, *, weights: bool = False) -> TrajectoryState:
    keys = jax.random.split(jax.random.key(seed), 4)
    lead = (CLASSES, TRAJECTORIES)
    component = MFA(
        jnp.zeros(lead, jnp.float32) if weights else None,  # type: ignore[arg-type]
        jax.random.normal(keys[0], (*lead, DIM), jnp.float32),
        jax.random.normal(keys[1], (*lead, DIM, RANK), jnp.float32),
        jax.random.normal(keys[2], (*lead, DIM), jnp.float32),
    )
    augmented = jax.random.normal(keys[3], (*lead, AUGMENTED), jnp.float32)
    return TrajectoryState(component, augmented)


def network(seed: int = 0, *, weights: bool = False) -> MLPField:
    size = (RANK + 2) * DIM + AUGMENTED + weights
    return MLPField(size, widths=(8,), rngs=nnx.Rngs(seed))


def test_a_linear_field_is_solved_exactly() -> None:
    shape = (DIM + AUGMENTED, DIM + AUGMENTED)
    matrix = jax.random.normal(jax.random.key(1), shape, jnp.float32) / 2
    start = initial()
    config = SolverConfig(solver=diffrax.Tsit5(), num_steps=64)
    solution = solved(Rotation(matrix), start, TIMES, config)
    means = solution.states.means.reshape(CLASSES, TRAJECTORIES, len(TIMES), DIM)
    state = np.concatenate([start.component.means, start.augmented], axis=-1)
    for k, t in enumerate(np.asarray(TIMES)):
        propagator = scipy.linalg.expm(np.asarray(matrix, np.float64) * t)
        expected = (state @ propagator.T)[..., :DIM]
        np.testing.assert_allclose(means[:, :, k], expected, rtol=1e-5, atol=1e-5)


def test_components_are_trajectory_by_trajectory_in_order_of_time() -> None:
    start = initial(weights=True)
    solution = solved(Rotation(jnp.eye(DIM + AUGMENTED, dtype=jnp.float32)), start, TIMES, FIXED)
    states = solution.states
    lead = (CLASSES, TRAJECTORIES * len(TIMES))
    assert states.logits.shape == lead
    assert states.means.shape == (*lead, DIM)
    assert states.loadings.shape == (*lead, DIM, RANK)
    assert states.log_noise.shape == (*lead, DIM)
    # Every mean grows as exp(t): the ratio to its start names the time and the trajectory.
    expected = start.component.means[:, :, None] * jnp.exp(TIMES)[None, None, :, None]
    np.testing.assert_allclose(states.means, expected.reshape(*lead, DIM), rtol=2e-2)
    # What the field leaves alone stays with its trajectory.
    kept = jnp.repeat(start.component.loadings, len(TIMES), axis=1)
    np.testing.assert_allclose(states.loadings, kept, rtol=1e-6)


@pytest.mark.parametrize("field_per_class", [False, True])
def test_together_equals_each_alone(*, field_per_class: bool) -> None:
    start = initial(weights=True)
    fields = [network(seed, weights=True) for seed in range(CLASSES)]
    shared = fields[0]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *fields)
    together = solved(
        stacked if field_per_class else shared,
        start,
        TIMES,
        FIXED,
        field_per_class=field_per_class,
    ).states

    for c in range(CLASSES):
        for s in range(TRAJECTORIES):
            one = jax.tree.map(lambda leaf, c=c, s=s: np.asarray(leaf)[c, s][None, None], start)
            single = solved(fields[c] if field_per_class else shared, one, TIMES, FIXED).states
            rows = slice(s * len(TIMES), (s + 1) * len(TIMES))
            for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(single), strict=True):
                np.testing.assert_allclose(a[c, rows], b[0], rtol=1e-5, atol=1e-6)


def test_augmented_channels_matter_but_are_not_read() -> None:
    start, times = initial(weights=True), jnp.array([0.0, 0.5, 0.7, 1.0])
    other = start.replace(augmented=start.augmented + 1.0)
    field = network(weights=True)
    one, two = (solved(field, state, times, FIXED).states for state in (start, other))
    assert isinstance(one, MFA)  # nothing of the augmented channels is left
    at_zero = slice(0, None, len(times))
    np.testing.assert_array_equal(one.means[:, at_zero], two.means[:, at_zero])
    assert float(jnp.min(jnp.abs(one.means - two.means)[:, 1 :: len(times)])) > 1e-4
