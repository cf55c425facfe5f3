"""The training step of images: its time, the part of its ODE, and the memory of its program.

    .venv/bin/python -m benchmarks.images [--full]

The labelled model of MNIST (10 classes of 50 components of rank 6) and one of 32 x 32 x 3 pixels,
both with the recipe's convolutional field and batches of 256 images that are dequantised in the
step. The ODE's part is the gradient of a sum over what `read` gives. Memory is the compiled
program's own account: what it holds besides arguments and results. The same model of MNIST in
PyTorch and torchdiffeq (`benchmarks.torch_cpmm`) runs beside ours; before that, loss and gradient
are compared at the ends of its steps, where no solver interpolates.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import cpmm_jax as cpmm
from benchmarks.ode_gradient import of_timing, relative_error
from benchmarks.peers import find, missing
from benchmarks.report import Report, Table, main
from cpmm_jax.data import AffinePixels
from cpmm_jax.recipe import IMAGES
from cpmm_jax.solver_study.timing import interleave
from cpmm_jax.training.config import TrainConfig, default_optimizer, learning_rate_schedule
from cpmm_jax.training.inputs import take_apart
from cpmm_jax.training.objective import negative_log_likelihood
from cpmm_jax.training.state import empty_totals, initial_state
from cpmm_jax.training.step import Examples, Plan, Settings, make_keys, run_block

CLASSES, RANK, BATCH, ROWS = 10, 6, 256, 2048
DEFAULT = cpmm.SolverConfig(num_steps=IMAGES["ode_steps"])
HEUN = cpmm.SolverConfig(solver=diffrax.Heun(), num_steps=IMAGES["ode_steps"])


class Size(NamedTuple):
    """Image shape, trajectories of each class, and times of each."""

    shape: tuple[int, int, int]
    trajectories: int
    times: int


SIZES = (Size((28, 28, 1), 1, 50), Size((28, 28, 1), 5, 10), Size((32, 32, 3), 2, 5))


def make_model(size: Size, solver: cpmm.SolverConfig) -> cpmm.CPMM:
    return cpmm.CPMM(
        rank=RANK,
        event_shape=size.shape,
        num_classes=CLASSES,
        num_trajectories=size.trajectories,
        widths=IMAGES["widths"],
        coarse_widths=IMAGES["coarse_widths"],
        solver=solver,
        rngs=nnx.Rngs(0),
    )


class Training:
    """A compiled block of steps, and what it is called with."""

    def __init__(self, size: Size, solver: cpmm.SolverConfig) -> None:
        self.model = make_model(size, solver)
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


def peer_of(size: Size) -> tuple[Any, float, float]:
    """Return PyTorch's training of one trajectory a class, and how far loss and gradient were off.

    Raises:
        AssertionError: they are not those of the same model.
    """
    from benchmarks import torch_cpmm

    model, rng = make_model(size, HEUN), np.random.default_rng(0)
    scheme = {"method": "heun2", "options": {"step_size": 1 / IMAGES["ode_steps"]}}
    peer = torch_cpmm.TorchCPMM(model, scheme)
    x = AffinePixels().forward(rng.uniform(0, 256, (BATCH, model.dim)).astype(np.float32))
    y = rng.integers(0, CLASSES, BATCH)
    ends = np.arange(1, IMAGES["ode_steps"], dtype=np.float32) / IMAGES["ode_steps"]
    graphdef, params, fixed = take_apart(model)

    @jax.jit
    def objective(params: Any) -> Any:
        return negative_log_likelihood(nnx.merge(graphdef, params, fixed), ends, x, y)[0]

    loss, gradient = jax.value_and_grad(objective)(params)
    found = peer(*map(torch_cpmm.tensor, (ends, np.asarray(x), y)))
    found.backward()
    theirs = torch_cpmm.gradient_of(peer)
    ours = torch_cpmm.parameters_of(nnx.merge(graphdef, gradient, fixed))
    off = abs(found.item() / float(loss) - 1), relative_error(theirs, ours)
    if not (off[0] < 1e-4 and off[1] < 1e-3):
        raise AssertionError(
            f"PyTorch's loss is off by {off[0]:.1e} and its gradient by {off[1]:.1e}; "
            "they are not the same model, and no times are compared."
        )
    times = (np.arange(size.times, dtype=np.float32) + 0.5) / size.times
    training = torch_cpmm.TorchTraining(peer, [(times, np.asarray(x), y)], 1e-7)
    training.choose_threads(1)
    return training, *off


def beside_torch(defaults: Training, effort: Mapping[str, Any]) -> tuple[Table, Any]:
    """Time whole steps of the first size beside PyTorch's."""
    absent = next((name for name in ("torch", "torchdiffeq") if find(name) is None), None)
    size, steps = SIZES[0], IMAGES["ode_steps"]
    heun = f"Heun, {steps} steps"
    calls = {
        f"ours, default: ReversibleHeun, {steps} steps": defaults.step,
        f"ours, {heun}": Training(size, HEUN).step,
    }
    off: dict[str, str] = {}
    if absent is None:
        peer, loss_error, gradient_error = peer_of(size)
        calls[f"PyTorch, {heun}"] = peer.run
        off[f"PyTorch, {heun}"] = f"{loss_error:.0e}, {gradient_error:.0e}"
    timings = interleave(calls, **effort)
    numbers = {name: of_timing(timings, name) for name in timings}
    rows = [
        [name, str(timings[name]), f"{row['ratio']:.2f}", off.get(name, "-")]
        for name, row in numbers.items()
    ]
    if absent:
        rows.append([f"PyTorch, {heun}", missing(absent), "-", "-"])
    title = f"One training step, {named(size)}, batch {BATCH}, beside PyTorch"
    return Table(title, ["", "time", "ratio", "loss, gradient off ours"], rows), numbers


def named(size: Size) -> str:
    shape = "x".join(map(str, size.shape))
    return f"{shape}, {CLASSES} classes of {size.trajectories} x {size.times} components"


def measure(full: bool) -> Report:
    """Time step and ODE by turns, then beside PyTorch."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else PyTorch's idle threads spin
    jax.config.update("jax_default_matmul_precision", "float32")  # on both sides
    turns, rows, numbers = 10 if full else 3, [], {}
    trainings = [Training(size, DEFAULT) for size in SIZES]
    for size, training in zip(SIZES, trainings, strict=True):
        calls = {"step": training.step, "ode": ode_gradient(training.model, size.times)}
        timings = interleave(calls, seconds=0, least=turns)
        step, ode = (timings[name].median for name in calls)
        numbers[named(size)] = {"step": step, "ode": ode, "megabytes": training.megabytes}
        rows.append(
            (
                named(size),
                f"{1e3 * step:.0f} ms",
                f"{100 * min(1.0, ode / step):.0f} %",
                f"{training.megabytes:.0f} MB",
                f"{training.compile_seconds:.1f} s",
            )
        )
    columns = ("model", "step", "of it the ODE", "memory", "compile")
    table, numbers["beside PyTorch"] = beside_torch(trainings[0], {"seconds": 0, "least": turns})
    return Report("images", [Table("Training steps of images", columns, rows), table], numbers)


if __name__ == "__main__":
    main("images", measure)
