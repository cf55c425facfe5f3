"""Augmented trajectories: from pseudotimes to components.

The state h(t) of one trajectory is a pytree: the parameters of one component, held in an `MFA`
without its component axis, and augmented channels that only the field reads. Saved at T pseudotimes
the same pytree has a leading axis of length T, and *is* a mixture of T components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from cpmm_jax.dynamics.hidden_units import HiddenUnits, move_hidden_units
from cpmm_jax.dynamics.solve import Solution, SolverConfig, solve
from cpmm_jax.mixture.density import Components, reduce_log_prob
from cpmm_jax.mixture.mfa import MFA

FEW_ROWS = 64  # trajectories above which taps gain nothing, and would only take memory


@dataclass(frozen=True)
class StratifiedTimes:
    """One uniform draw in each of T equal cells of [0, 1]: unbiased, with low variance."""

    def __call__(self, key: Array, num_times: int) -> Float[Array, " T"]:
        """Draw increasing pseudotimes, shape (T,)."""
        cells = jnp.arange(num_times, dtype=float)
        return (cells + jax.random.uniform(key, (num_times,))) / num_times


@dataclass(frozen=True)
class UniformTimes:
    """T independent uniform draws from [0, 1], as in the paper (section 3.1)."""

    def __call__(self, key: Array, num_times: int) -> Float[Array, " T"]:
        """Draw pseudotimes, sorted, shape (T,)."""
        return jnp.sort(jax.random.uniform(key, (num_times,)))


@dataclass(frozen=True)
class GridTimes:
    """The midpoints of T equal cells of [0, 1]; what extraction and evaluation use."""

    def __call__(self, key: Array | None, num_times: int) -> Float[Array, " T"]:
        """Return the midpoints, shape (T,); `key` is not used."""
        return (jnp.arange(num_times, dtype=float) + 0.5) / num_times


@flax.struct.dataclass
class TrajectoryState:
    """h(t): the parameters of one component, and channels that the density never reads.

    Attributes:
        component: an `MFA` without component axis: means (D,), loadings (D, R), log_noise (D,);
            `logits` is a scalar when the weights evolve and None when they are constant.
        augmented: shape (A,).
    """

    component: MFA
    augmented: Float[Array, " A"]


def _move(t: Any, states: Any, field: Any, taps: Any = None) -> Any:
    """Apply one field to all trajectories; states and taps have leading axes (C, S)."""
    over_trajectories = jax.vmap(lambda state, tap: field(t, state, *tap))
    return jax.vmap(over_trajectories)(states, () if taps is None else (taps,))


def _move_by_class(t: Any, states: Any, fields: Any) -> Any:
    """Apply each class's own field; states (C, S, ...), fields stacked along C."""
    over_trajectories = jax.vmap(lambda field, state: field(t, state), in_axes=(None, 0))
    return jax.vmap(over_trajectories)(fields, states)


def integrate(
    field: Any,
    initial: TrajectoryState,
    times: Float[Array, " T"],
    config: SolverConfig,
    *,
    field_per_class: bool = False,
) -> Solution:
    """Integrate all trajectories together and read their components at `times`.

    Args:
        field: a field f(t, h) for one trajectory, whose state comes as one vector (the entries of
            a `TrajectoryState` in their order); with `field_per_class` a pytree of C fields stacked
            along a leading axis.
        initial: h(0) of every trajectory, leading axes (C, S).
        times: increasing pseudotimes in [0, 1], shape (T,).
        config: how to solve.
        field_per_class: whether every class has a field of its own.

    Returns:
        A `Solution` whose states are an `MFA` with leading axes (C, S * T): trajectory by
        trajectory, each in the order of time.
    """
    # One vector per trajectory, not a pytree: a step is many small operations on every leaf.
    unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0, 0], initial))[1]
    vectors = jax.vmap(jax.vmap(lambda state: ravel_pytree(state)[0]))(initial)
    rows = vectors.shape[:2]
    num_rows = math.prod(rows)
    moved, start = field, vectors
    move: Any = _move_by_class if field_per_class else _move
    narrow = config.is_written_out and not field_per_class
    if narrow and HiddenUnits.save_work(field, num_rows, vectors.shape[-1]):
        moved = HiddenUnits.of(field, vectors)
        start, move = moved.integrals, move_hidden_units
    few = not field_per_class and num_rows <= FEW_ROWS and hasattr(field, "taps")
    taps = (lambda lead: moved.taps((*lead, *rows))) if few else None
    solution = solve(move, start, times, config, args=moved, taps=taps)
    if isinstance(moved, HiddenUnits):
        solution = solution._replace(states=moved.states(times, solution.states))
    states = jax.vmap(jax.vmap(jax.vmap(unravel)))(jnp.moveaxis(solution.states, 0, 2))  # (C, S, T)
    components = jax.tree.map(lambda leaf: jax.lax.collapse(leaf, 1, 3), states.component)
    return solution._replace(states=components)


class DensityIntegral(NamedTuple):
    """Logs of two integrals over pseudotime along each trajectory.

    Attributes:
        log_joint: log of the integral of w(t) N(x; h(t)) dt, shape (N, C, S).
        log_mass: log of the integral of w(t) dt, shape (C, S); 0 when the weights are constant.
    """

    log_joint: Float[Array, "N C S"]
    log_mass: Float[Array, "C S"]


class _Integrand(NamedTuple):
    field: Any
    x: Array  # (N, D)
    reference: DensityIntegral
    log_floor: Array  # (D,)


def _accumulate(t: Any, state: tuple[TrajectoryState, Array], args: _Integrand, move: Any) -> Any:
    """Right-hand side of Eq. 6: the trajectories, w(t) N(x; h(t)) and w(t), by the reference."""
    trajectories, _ = state
    component = trajectories.component
    shape = component.means.shape[:2]
    flat = jax.tree.map(lambda leaf: jax.lax.collapse(leaf, 0, 2), component)
    log_weights = jnp.zeros(flat.means.shape[0], flat.means.dtype)
    if flat.logits is not None:
        log_weights = flat.logits
    noise = jnp.logaddexp(flat.log_noise, args.log_floor[None, :])
    values = reduce_log_prob(
        lambda log_prob: log_prob,
        args.x,
        Components(log_weights, flat.means, flat.loadings, noise),
    )
    rates = DensityIntegral(
        jnp.exp(values.reshape(-1, *shape) - args.reference.log_joint),
        jnp.exp(log_weights.reshape(shape) - args.reference.log_mass),
    )
    return move(t, trajectories, args.field), rates


def _accumulate_shared(t: Any, state: Any, args: _Integrand) -> Any:
    return _accumulate(t, state, args, _move)


def _accumulate_by_class(t: Any, state: Any, args: _Integrand) -> Any:
    return _accumulate(t, state, args, _move_by_class)


def integrate_density(
    field: Any,
    initial: TrajectoryState,
    x: Float[Array, "N D"],
    reference: DensityIntegral,
    log_floor: Float[Array, " D"],
    config: SolverConfig,
    *,
    field_per_class: bool = False,
) -> Solution:
    """Integrate w(t) N(x; h(t)) over pseudotime inside the solver (paper, Eq. 6), in log space.

    As it stands the equation's extra state underflows: densities of tens of features are far below
    the smallest float. Since its right-hand side does not depend on p itself, every example can be
    integrated relative to a reference of its own, p = exp(reference) q with
    dq/dt = exp(log w N - reference); with the reference near the largest value along the
    trajectory q stays near one. The reference cancels, so it is a constant to derivatives. The
    weights themselves are integrated along, for the normaliser of weights that evolve.

    Args:
        field: as for `integrate`.
        initial: as for `integrate`.
        x: examples, shape (N, D).
        reference: values near the largest of log w(t) N(x; h(t)) and of log w(t) along each
            trajectory.
        log_floor: log of the noise floor, shape (D,).
        config: how to solve; the examples share the steps with the trajectories.
        field_per_class: as for `integrate`.

    Returns:
        A `Solution` whose states are a `DensityIntegral`.
    """
    reference = jax.lax.stop_gradient(reference)
    start = (initial, jax.tree.map(jnp.zeros_like, reference))
    right_hand_side = _accumulate_by_class if field_per_class else _accumulate_shared
    args = _Integrand(field, x, reference, log_floor)
    solution = solve(right_hand_side, start, jnp.ones((1,), x.dtype), config, args=args)

    def restore(log_scale: Array, ratio: Array) -> Array:
        tiny = jnp.finfo(ratio.dtype).tiny  # a solver that steps over a narrow peak may end at 0
        return log_scale + jnp.log(jnp.maximum(ratio[0], tiny))

    return solution._replace(states=jax.tree.map(restore, reference, solution.states[1]))
