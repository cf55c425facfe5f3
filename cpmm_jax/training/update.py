"""From a gradient to the next state, the optimiser's step or its refusal; and many of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from cpmm_jax.training.config import Schedule
from cpmm_jax.training.objective import Diagnostics
from cpmm_jax.training.state import CAUSES, BlockTotals, TrainState

Step = Callable[[TrainState], tuple[TrainState, BlockTotals]]


def advance(
    optimizer: optax.GradientTransformation,
    schedule: Schedule | None,
    state: TrainState,
    loss: Float[Array, ""],
    solve: Diagnostics,
    grads: Any,
) -> tuple[TrainState, BlockTotals]:
    """Apply a gradient, or refuse it and leave parameters and optimiser state as they are.

    A step is refused where the solve failed, or where loss, gradient or new parameters are not
    finite (an overflow of the gradient's norm counts, since the optimiser would square it).

    Args:
        optimizer: an optax transformation.
        schedule: learning rate by number of updates; None for an optimiser that has its own.
        state: the state before the step.
        loss: this step's loss.
        solve: how its solve went.
        grads: the gradient of the loss, a pytree like `state.params`.

    Returns:
        The state after the step, and this step's totals (all zero if it was refused).
    """
    grad_norm = optax.tree.norm(grads)
    extended = optax.with_extra_args_support(optimizer)
    # Optimisers raise decays to the power of their counters: a promotion that JAX may refuse.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = extended.update(grads, state.opt_state, state.params, value=loss)
    if schedule is not None:
        rate = schedule(state.step - state.refused.sum(dtype=state.step.dtype))
        updates = jax.tree.map(lambda update: -rate.astype(update.dtype) * update, updates)
    params = optax.apply_updates(state.params, updates)

    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
    checks = jnp.stack([solve.ok, jnp.isfinite(loss), jnp.isfinite(grad_norm), finite])
    accepted = checks.all()
    cause = jnp.argmin(checks)  # the first check that fails
    told = ~accepted & (jnp.arange(len(CAUSES)) == cause)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(accepted, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        refused=state.refused + told.astype(state.refused.dtype),
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


def repeat(
    step: Step,
    state: TrainState,
    totals: BlockTotals,
    stop: Int[Array, ""],
    max_refused: Int[Array, ""],
) -> tuple[TrainState, BlockTotals]:
    """Train until `stop` steps are done, or more than `max_refused` in a row have been refused.

    Args:
        step: does one step, as `advance` does.
        state: the state before them.
        totals: sums to add to, so that a block in parts has the sums of the whole.
        stop: number of the step to stop at; traced, so that a shorter block is the same program.
        max_refused: refused steps in a row that are borne.

    Returns:
        The state after them, and the sums with theirs added.
    """

    def goes_on(carry: tuple[TrainState, BlockTotals]) -> Array:
        state, _ = carry
        return (state.step < stop) & (state.refused_in_a_row <= max_refused)

    def body(carry: tuple[TrainState, BlockTotals]) -> tuple[TrainState, BlockTotals]:
        state, totals = carry
        state, more = step(state)
        return state, jax.tree.map(jnp.add, totals, more)

    return jax.lax.while_loop(goes_on, body, (state, totals))
