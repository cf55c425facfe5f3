"""The training step of images: its time, the part of its ODE, and the memory of its program.

    .venv/bin/python -m benchmarks.images [--full]

The labelled model of MNIST (10 classes of 50 components of rank 6) and one of 32 x 32 x 3 pixels,
both with the recipe's convolutional field and batches of 256 images that are dequantised in the
step. The ODE's part is the gradient of a sum over what `read` gives. Memory is the compiled
program's own account: what it holds besides arguments and results. There is no peer here yet.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import cpmm_jax as cpmm
from benchmarks.report import Report, Table, main
from cpmm_jax.data import AffinePixels
from cpmm_jax.recipe import IMAGES
from cpmm_jax.training.config import TrainConfig, default_optimizer, learning_rate_schedule
from cpmm_jax.training.inputs import take_apart
from cpmm_jax.training.state import empty_totals, initial_state
from cpmm_jax.training.step import Examples, Plan, Settings, make_keys, run_block

CLASSES, RANK, BATCH, ROWS = 10, 6, 256, 2048


class Size(NamedTuple):
    """Image shape, trajectories of each class, and times of each."""

    shape: tuple[int, int, int]
    trajectories: int
    times: int


SIZES = (Size((28, 28, 1), 1, 50), Size((28, 28, 1), 5, 10), Size((32, 32, 3), 2, 5))


class Training:
    """A compiled block of steps, and what it is called with."""

    def __init__(self, size: Size) -> None:
        self.model = cpmm.CPMM(
            rank=RANK,
            event_shape=size.shape,
            num_classes=CLASSES,
            num_trajectories=size.trajectories,
            widths=IMAGES["widths"],
            coarse_widths=IMAGES["coarse_widths"],
            solver=cpmm.SolverConfig(num_steps=IMAGES["ode_steps"]),
            rngs=nnx.Rngs(0),
        )
        parts, config = take_apart(self.model), TrainConfig(num_times=size.times)
        rule = default_optimizer(config)
        plan = Plan(
            parts.graphdef, rule, config.time_sampler, size.times, BATCH, None, AffinePixels()
        )
        pixels = jax.random.bits(jax.random.key(1), (ROWS, math.prod(size.shape)), jnp.uint8)
        examples = Examples(pixels, jnp.arange(ROWS, dtype=jnp.int32) % CLASSES)
        settings = Settings(
            keys=make_keys(0),
            num_examples=jnp.int32(ROWS),
            max_refused=jnp.int32(config.max_refused),
            schedule=learning_rate_schedule(config),
            position=jnp.float32(0),
            discriminative=jnp.float32(0),
        )
        self.state, self.fixed = initial_state(rule, parts.params), parts.fixed
        self.rest = (parts.fixed, examples, settings)
        start = time.perf_counter()
        lowered = run_block.lower(plan, self.state, empty_totals(), *self.rest, jnp.int32(0))
        self.program = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        self.ode = ode_gradient(self.model, size.times)

    def step(self) -> None:
        """Do one training step."""
        stop = jnp.int32(int(self.state.step) + 1)
        self.state, totals = self.program(self.state, empty_totals(), *self.rest, stop)
        jax.block_until_ready(totals)

    @property
    def megabytes(self) -> float:
        """Memory of the program besides arguments and results, as the compiler has it."""
        return float(self.program.memory_analysis().temp_size_in_bytes) / 2**20


def ode_gradient(model: cpmm.CPMM, num_times: int) -> Callable[[], Any]:
    """Return a call that solves the ODE and takes a gradient through it."""
    graphdef, params, fixed = take_apart(model)
    times = (jnp.arange(num_times, dtype=jnp.float32) + 0.5) / num_times

    @jax.jit
    def gradient(params: Any) -> Any:
        def total(params: Any) -> Any:
            leaves = jax.tree.leaves(nnx.merge(graphdef, params, fixed).read(times).mixture)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves)

        # In a loop, as in training: a CPU runs convolutions otherwise outside of one.
        return jax.lax.fori_loop(0, 1, lambda _, p: jax.grad(total)(p), params)

    jax.block_until_ready(gradient(params))
    return lambda: jax.block_until_ready(gradient(params))


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(full: bool) -> Report:
    """Time step and ODE by turns."""
    turns, rows, numbers = 10 if full else 3, [], {}
    for size in SIZES:
        training = Training(size)
        training.step()
        pairs = [(timed(training.step), timed(training.ode)) for _ in range(turns)]
        step, ode = (statistics.median(column) for column in zip(*pairs, strict=True))
        name = f"{'x'.join(map(str, size.shape))}, {size.trajectories} x {size.times} components"
        numbers[name] = {"step": step, "ode": ode, "megabytes": training.megabytes}
        rows.append(
            (
                f"{name} a class",
                f"{1e3 * step:.0f} ms",
                f"{100 * min(1.0, ode / step):.0f} %",
                f"{training.megabytes:.0f} MB",
                f"{training.compile_seconds:.1f} s",
            )
        )
    columns = ("model", "step", "of it the ODE", "memory", "compile")
    return Report("images", [Table("Training steps of images", columns, rows)], numbers)


if __name__ == "__main__":
    main("images", measure)
