"""One training step, and a block of them compiled as one program."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from cpmm_jax.data.batches import batch_indices
from cpmm_jax.dynamics.trajectory import GridTimes
from cpmm_jax.training.config import Schedule, TimeSampler
from cpmm_jax.training.objective import negative_log_likelihood
from cpmm_jax.training.state import CAUSES, BlockTotals, TrainState, empty_totals


class Plan(NamedTuple):
    """What a step is compiled for: everything static.

    Attributes:
        graphdef: the model without its arrays.
        optimizer: an optax transformation; only the `nnx.Param` leaves pass through it.
        time_sampler: how pseudotimes are drawn.
        num_times: T.
        batch_size: B.
    """

    graphdef: Any
    optimizer: optax.GradientTransformation
    time_sampler: TimeSampler
    num_times: int
    batch_size: int


class Examples(NamedTuple):
    """Examples on the device: x (N, D), and y (N,) int32 or None; N counts padding rows too."""

    x: Float[Array, "N D"]
    y: Int[Array, " N"] | None


class Settings(NamedTuple):
    """What a step takes besides state and data, all of it traced: other values compile nothing.

    Attributes:
        keys: two PRNG keys; batches are a function of the first and of the step, pseudotimes of
            the second.
        num_examples: rows of the training examples that are no padding.
        max_refused: refused steps in a row that are borne.
        schedule: learning rate by number of updates; None for an optimiser that has its own.
    """

    keys: Array
    num_examples: Int[Array, ""]
    max_refused: Int[Array, ""]
    schedule: Schedule | None


def training_step(
    plan: Plan, state: TrainState, fixed: Any, train: Examples, settings: Settings
) -> tuple[TrainState, BlockTotals]:
    """Do one step, or refuse it and leave parameters and optimiser state as they are.

    A step is refused where the solve failed, or where loss, gradient or new parameters are not
    finite (an overflow of the gradient's norm counts, since the optimiser would square it).

    Args:
        plan: what is static.
        state: the state before the step.
        fixed: the arrays of the model that are not trained.
        train: training examples.
        settings: what else is traced.

    Returns:
        The state after the step, and this step's totals (all zero if it was refused).
    """
    batch_key, times_key = settings.keys
    rows = batch_indices(batch_key, state.step, plan.batch_size, settings.num_examples)
    batch = jax.tree.map(lambda leaf: leaf[rows], train)
    times = plan.time_sampler(jax.random.fold_in(times_key, state.step), plan.num_times)

    def objective(params: Any) -> Any:
        model = nnx.merge(plan.graphdef, params, fixed)
        return negative_log_likelihood(model, times, batch.x, batch.y)

    (loss, solve), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    grad_norm = optax.tree.norm(grads)
    optimizer = optax.with_extra_args_support(plan.optimizer)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=loss)
    if settings.schedule is not None:
        rate = settings.schedule(state.step - state.refused.sum())
        updates = jax.tree.map(lambda update: -rate.astype(update.dtype) * update, updates)
    params = optax.apply_updates(state.params, updates)

    finite = jnp.isfinite(ravel_pytree(params)[0]).all()
    checks = jnp.stack([solve.ok, jnp.isfinite(loss), jnp.isfinite(grad_norm), finite])
    accepted = checks.all()
    cause = jnp.argmin(checks)  # the first check that fails
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(accepted, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        refused=state.refused + (~accepted & (jnp.arange(len(CAUSES)) == cause)),
        refused_in_a_row=jnp.where(accepted, 0, state.refused_in_a_row + 1),
        last_failure=jnp.where(solve.ok, state.last_failure, solve.result),
    )
    totals = BlockTotals(
        loss=jnp.where(accepted, loss, 0.0).astype(jnp.float32),
        grad_norm=jnp.where(accepted, grad_norm, 0.0).astype(jnp.float32),
        ode_steps=jnp.where(accepted, solve.num_steps, 0).astype(jnp.float32),
        accepted=accepted.astype(jnp.int32),
    )
    return new_state, totals


@partial(jax.jit, static_argnames="plan", donate_argnames="state")
def run_block(
    plan: Plan,
    state: TrainState,
    fixed: Any,
    train: Examples,
    settings: Settings,
    stop: Int[Array, ""],
) -> tuple[TrainState, BlockTotals]:
    """Train until `stop` steps are done, or more than `max_refused` in a row have been refused.

    `stop` is traced, so that a shorter last block is the same program. `state` is donated.
    """

    def goes_on(carry: tuple[TrainState, BlockTotals]) -> Array:
        state, _ = carry
        return (state.step < stop) & (state.refused_in_a_row <= settings.max_refused)

    def body(carry: tuple[TrainState, BlockTotals]) -> tuple[TrainState, BlockTotals]:
        state, totals = carry
        state, more = training_step(plan, state, fixed, train, settings)
        return state, jax.tree.map(jnp.add, totals, more)

    return jax.lax.while_loop(goes_on, body, (state, empty_totals()))


@partial(jax.jit, static_argnames=("graphdef", "num_times"))
def validation_score(
    graphdef: Any, params: Any, fixed: Any, valid: Examples, num_times: int
) -> Float[Array, ""]:
    """Compute the mean log-likelihood of the mixture on the uniform grid of T pseudotimes.

    Returns:
        Mean of log p(x, y), without labels of log p(x), in nats; NaN if the solve failed.
    """
    model = nnx.merge(graphdef, params, fixed)
    times = GridTimes()(jax.random.key(0), num_times)
    loss, solve = negative_log_likelihood(model, times, valid.x, valid.y)
    return jnp.where(solve.ok, -loss, jnp.nan)
