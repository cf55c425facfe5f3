"""A block of training steps of a flow, compiled as one program."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from cpmm_jax.data.batches import batch_indices
from cpmm_jax.training.config import Schedule
from cpmm_jax.training.flow_objective import Batches, Objective
from cpmm_jax.training.state import BlockTotals, TrainState
from cpmm_jax.training.update import advance, repeat

ASSIGNED_STEPS = 32  # steps whose batches are joined to noise on the host at a time


class Plan(NamedTuple):
    """What a step is compiled for: the flow without its arrays, and everything else static."""

    graphdef: Any
    optimizer: optax.GradientTransformation
    objective: Objective
    batch_size: int


class FlowSettings(NamedTuple):
    """What a step takes besides state and data, all of it traced: other values compile nothing.

    Attributes:
        keys: two PRNG keys; batches are a function of the first and of the step, what the loss
            draws of the second.
        num_examples: N.
        max_refused: refused steps in a row that are borne.
        schedule: learning rate by number of updates.
    """

    keys: Array
    num_examples: Int[Array, ""]
    max_refused: Int[Array, ""]
    schedule: Schedule


class Pairing(NamedTuple):
    """Rows of the noise for M steps from `first` on, shape (M, B)."""

    first: Int[Array, ""]
    rows: Int[Array, "M B"]


def draw_batch(
    plan: Plan, x: Float[Array, "N D"], settings: FlowSettings, step: Int[Array, ""]
) -> tuple[Float[Array, "B D"], Any]:
    """Return the examples of a step and what its loss draws, a pure function of the step."""
    batch_key, noise_key = settings.keys
    batch = x[batch_indices(batch_key, step, plan.batch_size, settings.num_examples)]
    drawn = plan.objective.draw(jax.random.fold_in(noise_key, step), batch.shape, batch.dtype)
    return batch, drawn


@partial(jax.jit, static_argnames="plan", donate_argnames="state")
def run_block(
    plan: Plan,
    state: TrainState,
    totals: BlockTotals,
    fixed: Any,
    x: Float[Array, "N D"],
    settings: FlowSettings,
    stop: Int[Array, ""],
    pairing: Pairing | None,
) -> tuple[TrainState, BlockTotals]:
    """Train up to step `stop`, see `training.update.repeat`; `state` is donated."""

    def step(state: TrainState) -> tuple[TrainState, BlockTotals]:
        batch, drawn = draw_batch(plan, x, settings, state.step)
        if pairing is not None:
            drawn = drawn.joined(pairing.rows[state.step - pairing.first])

        def objective(params: Any) -> Any:
            return plan.objective.loss(nnx.merge(plan.graphdef, params, fixed), batch, drawn)

        (loss, solve), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        return advance(plan.optimizer, settings.schedule, state, loss, solve, grads)

    return repeat(step, state, totals, stop, settings.max_refused)


@partial(jax.jit, static_argnames="plan")
def draw_batches(
    plan: Plan, x: Array, settings: FlowSettings, first: Int[Array, ""]
) -> tuple[Float[Array, "M B D"], Any]:
    """Return what `draw_batch` does for `ASSIGNED_STEPS` steps from `first` on."""
    steps = first + jnp.arange(ASSIGNED_STEPS, dtype=first.dtype)
    return jax.lax.map(lambda step: draw_batch(plan, x, settings, step), steps)


@partial(jax.jit, static_argnames="plan")
def validation_loss(plan: Plan, params: Any, fixed: Any, x: Array, drawn: Any) -> Array:
    """Compute the objective's validation loss at float32 precision."""
    with jax.default_matmul_precision("float32"):
        return plan.objective.validation_loss(nnx.merge(plan.graphdef, params, fixed), x, drawn)


def pair(
    plan: Plan, x: Float[Array, "N D"], settings: FlowSettings, first: Int[Array, ""]
) -> Pairing | None:
    """Join examples and noise of the next steps, on the host; None where the coupling does not."""

    def batches() -> list[Batches]:
        examples, drawn = draw_batches(plan, x, settings, first)
        return list(zip(np.asarray(examples), np.asarray(drawn.noise), strict=True))

    rows = plan.objective.coupling.assign(batches)
    return None if rows is None else Pairing(first, jnp.asarray(rows))


def pair_fixed(plan: Plan, x: Float[Array, "N D"], drawn: Any) -> Any:
    """Join examples and what was drawn for them, batch by batch in their order."""
    rows = np.arange(len(x))
    for start in range(0, len(x), plan.batch_size):
        part = slice(start, start + plan.batch_size)
        found = plan.objective.coupling.assign(partial(_cut, x, drawn, part))
        if found is None:
            return drawn
        rows[part] = start + found[0]
    return drawn.joined(jnp.asarray(rows))


def _cut(x: Array, drawn: Any, part: slice) -> list[Batches]:
    return [(np.asarray(x[part]), np.asarray(drawn.noise[part]))]
