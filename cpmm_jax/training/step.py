"""One training step, and a block of them compiled as one program."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from cpmm_jax.curriculum import Curriculum
from cpmm_jax.data.batches import batch_indices
from cpmm_jax.data.pixels import Pixels, dequantise
from cpmm_jax.dynamics.trajectory import GridTimes
from cpmm_jax.training.config import Schedule, TimeSampler
from cpmm_jax.training.objective import negative_log_likelihood
from cpmm_jax.training.state import BlockTotals, TrainState
from cpmm_jax.training.update import advance, repeat


class Plan(NamedTuple):
    """What a step is compiled for: everything static.

    Attributes:
        graphdef: the model without its arrays.
        optimizer: an optax transformation; only the `nnx.Param` leaves pass through it.
        time_sampler: how pseudotimes are drawn.
        num_times: T.
        batch_size: B.
        curriculum: a provider that draws anew in every step; else None.
        pixels: the map of recorded pixels, dequantised anew in every step; None for examples that
            are taken as they are.
    """

    graphdef: Any
    optimizer: optax.GradientTransformation
    time_sampler: TimeSampler
    num_times: int
    batch_size: int
    curriculum: Curriculum | None = None
    pixels: Pixels | None = None


class Examples(NamedTuple):
    """Examples on the device; N counts padding rows too.

    Attributes:
        x: shape (N, D); bytes where pixels are dequantised in the step.
        y: class codes, shape (N,), -1 where unknown; or None.
        weight: how much each counts, shape (N,), one on average; None where all count alike.
    """

    x: Float[Array, "N D"]
    y: Int[Array, " N"] | None
    weight: Float[Array, " N"] | None = None


class Settings(NamedTuple):
    """What a step takes besides state and data, all of it traced: other values compile nothing.

    Attributes:
        keys: four PRNG keys; batches are a function of the first and of the step, pseudotimes of
            the second, what a curriculum draws of the third, and the noise of pixels of the fourth.
        num_examples: rows of the training examples that are no padding.
        max_refused: refused steps in a row that are borne.
        schedule: learning rate by number of updates; None for an optimiser that has its own.
        position: v, where a curriculum draws.
        discriminative: see `negative_log_likelihood`.
    """

    keys: Array
    num_examples: Int[Array, ""]
    max_refused: Int[Array, ""]
    schedule: Schedule | None
    position: Float[Array, ""]
    discriminative: Float[Array, ""]


def make_keys(seed: int) -> Array:
    """Return the four keys of a run, see `Settings`."""
    key = jax.random.key(seed)
    return jnp.stack([*jax.random.split(key), *(jax.random.fold_in(key, i) for i in (2, 3))])


def training_step(
    plan: Plan, state: TrainState, fixed: Any, train: Examples, settings: Settings
) -> tuple[TrainState, BlockTotals]:
    """Do one step, or refuse it and leave parameters and optimiser state as they are.

    For when a step is refused see `training.update.advance`.

    Args:
        plan: what is static.
        state: the state before the step.
        fixed: the arrays of the model that are not trained.
        train: training examples.
        settings: what else is traced.

    Returns:
        The state after the step, and this step's totals (all zero if it was refused).
    """
    batch_key, times_key, noise_key, pixel_key = settings.keys
    rows = batch_indices(batch_key, state.step, plan.batch_size, settings.num_examples)
    batch: Examples = jax.tree.map(lambda leaf: leaf[rows], train)
    times = plan.time_sampler(jax.random.fold_in(times_key, state.step), plan.num_times)
    if plan.pixels is not None:
        pixel_key = jax.random.fold_in(pixel_key, state.step)
        dtype = jnp.result_type(*jax.tree.leaves(state.params))
        dequantised = dequantise(pixel_key, batch.x.astype(dtype))
        batch = batch._replace(x=plan.pixels.forward(dequantised))
    times = times.astype(batch.x.dtype)  # of the model
    if plan.curriculum is not None:
        noise_key = jax.random.fold_in(noise_key, state.step)
        batch = batch._replace(x=plan.curriculum.at(batch.x, settings.position, noise_key))

    def objective(params: Any) -> Any:
        model = nnx.merge(plan.graphdef, params, fixed)
        return negative_log_likelihood(model, times, *batch, discriminative=settings.discriminative)

    (loss, solve), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    return advance(plan.optimizer, settings.schedule, state, loss, solve, grads)


@partial(jax.jit, static_argnames="plan", donate_argnames="state")
def run_block(
    plan: Plan,
    state: TrainState,
    totals: BlockTotals,
    fixed: Any,
    train: Examples,
    settings: Settings,
    stop: Int[Array, ""],
) -> tuple[TrainState, BlockTotals]:
    """Train up to step `stop`, see `training.update.repeat`; `state` is donated."""

    def step(state: TrainState) -> tuple[TrainState, BlockTotals]:
        return training_step(plan, state, fixed, train, settings)

    return repeat(step, state, totals, stop, settings.max_refused)


@partial(jax.jit, static_argnames=("graphdef", "num_times"))
def validation_score(
    graphdef: Any,
    params: Any,
    fixed: Any,
    valid: Examples,
    num_times: int,
    discriminative: Float[Array, ""],
) -> Float[Array, ""]:
    """Compute the mean log-likelihood of the mixture on the uniform grid of T pseudotimes.

    Returns:
        Mean of log p(x, y), of log p(x) where y is unknown, in nats; NaN if the solve failed.
    """
    model = nnx.merge(graphdef, params, fixed)
    times = GridTimes()(None, num_times).astype(valid.x.dtype)
    loss, solve = negative_log_likelihood(model, times, *valid, discriminative=discriminative)
    return jnp.where(solve.ok, -loss, jnp.nan)
