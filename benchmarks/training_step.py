"""What a training step costs, and the gradient through the ODE in it.

    .venv/bin/python -m benchmarks.training_step [--full]

The whole step (forward, backward, Adam) of a labelled CPMM on the digits, beside the same model in
PyTorch and torchdiffeq (`benchmarks.torch_cpmm`): loss and gradient of the first step are compared
before anything is timed. Then the gradient through the ODE alone (`benchmarks.ode_gradient`).
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

import cpmm_jax as cpmm
from benchmarks.ode_gradient import (
    DEFAULT,
    FULL_SOLVES,
    HEUN,
    SHORT_SOLVES,
    measure_gradients,
    of_timing,
    relative_error,
)
from benchmarks.peers import find, missing
from benchmarks.report import Report, Table, main
from cpmm_jax.data import Standardizer, load
from cpmm_jax.data.batches import batch_indices
from cpmm_jax.dynamics.solve import SolverConfig
from cpmm_jax.errors import DataWarning
from cpmm_jax.solver_study.timing import Timing, interleave
from cpmm_jax.training.config import TrainConfig, default_optimizer, learning_rate_schedule
from cpmm_jax.training.inputs import take_apart
from cpmm_jax.training.state import BlockTotals, empty_totals, initial_state
from cpmm_jax.training.step import Examples, Plan, Settings, make_keys, run_block

DIM, CLASSES, WIDTHS, BATCH = 64, 10, (256, 256), 256
BLOCK = 10  # steps in one call of `run_block`
DRAWS = 3  # steps whose batches and pseudotimes PyTorch repeats
TRAINED = 200  # steps after which a field is called trained
STILL = TrainConfig(learning_rate=1e-7, warmup_steps=0, steps=10**6)  # times at fixed parameters
ADAM_DECAY = 0.9  # of the mean gradient, which after one step is (1 - decay) times the gradient

TOLERANCES = {"rtol": 1e-3, "atol": 1e-6}


class Size(NamedTuple):
    """Rank R and pseudotimes T of a step."""

    name: str
    rank: int
    num_times: int


DEMO, EIGHT = Size("the demo's", 12, 3), Size("eight pseudotimes", 4, 8)


class Scheme(NamedTuple):
    """One ODE scheme on both sides, and how well loss and gradient must agree (relative)."""

    name: str
    ours: SolverConfig
    torch: Mapping[str, Any]
    loss_tolerance: float
    gradient_tolerance: float


FIXED = Scheme(
    "Heun, 16 steps", HEUN, {"method": "heun2", "options": {"step_size": 1 / 16}}, 1e-4, 1e-3
)
ADAPTIVE = Scheme(
    "Dopri5, rtol 1e-3",
    SolverConfig(solver=diffrax.Dopri5(), num_steps=None, **TOLERANCES),
    {"method": "dopri5", **TOLERANCES},
    1e-3,
    1e-2,
)


@dataclass(frozen=True)
class StepTimes:
    """Stratified draws among the ends of 16 steps, where no library has to interpolate."""

    num_steps: int = 16

    def __call__(self, key: jax.Array, num_times: int) -> jax.Array:
        """Draw increasing pseudotimes inside (0, 1), shape (T,)."""
        edges = -(-self.num_steps * np.arange(num_times + 1) // num_times)
        low, high = jnp.maximum(edges[:-1], 1), jnp.asarray(edges[1:])
        return jax.random.randint(key, (num_times,), low, high) / self.num_steps


class Digits(NamedTuple):
    """Standardised training digits, x (N, D) and y (N,), and the noise floor (D,)."""

    x: np.ndarray
    y: np.ndarray
    noise_floor: np.ndarray

    @classmethod
    def read(cls) -> Digits:
        data = load("digits", labels=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)  # some pixels are constant
            scaler = Standardizer.fit(data.x_train)
        return cls(scaler.transform(data.x_train), data.y_train, scaler.noise_floor())


def make_model(size: Size, data: Digits, solver: SolverConfig | None) -> cpmm.CPMM:
    return cpmm.CPMM(
        DIM,
        size.rank,
        CLASSES,
        widths=WIDTHS,
        noise_floor=data.noise_floor,
        solver=solver,
        rngs=nnx.Rngs(0),
    )


class Training:
    """Our training under way, by the compiled blocks of steps that `cpmm.fit` runs.

    Attributes:
        model: the model at the start.
        compile_seconds: time to trace and compile the block.
    """

    def __init__(self, size: Size, data: Digits, solver: SolverConfig | None) -> None:
        self.size, self.data, self.model = size, data, make_model(size, data, solver)
        self.parts = take_apart(self.model)
        self.examples = Examples(jnp.asarray(data.x), jnp.asarray(data.y, jnp.int32))
        optimizer = default_optimizer(STILL)
        self.plan = Plan(self.parts.graphdef, optimizer, StepTimes(), size.num_times, BATCH)
        self.restart(STILL)
        start = time.perf_counter()
        self.run(0)
        self.compile_seconds = time.perf_counter() - start

    def restart(self, config: TrainConfig) -> None:
        """Go back to the start, with the learning rates of `config`."""
        self.settings = Settings(
            keys=make_keys(0),
            num_examples=jnp.int32(len(self.examples.x)),
            max_refused=jnp.int32(config.max_refused),
            schedule=learning_rate_schedule(config),
            position=jnp.float32(0),
            discriminative=jnp.float32(0),
        )
        self.state = initial_state(self.plan.optimizer, self.parts.params)
        self.done = 0

    def run(self, steps: int = BLOCK) -> BlockTotals:
        self.done += steps
        self.state, totals = run_block(
            self.plan,
            self.state,
            empty_totals(),
            self.parts.fixed,
            self.examples,
            self.settings,
            jnp.int32(self.done),
        )
        return jax.block_until_ready(totals)

    def merged(self, params: Any) -> cpmm.CPMM:
        """Return the model with other parameters, or with a gradient in their place."""
        return nnx.merge(self.parts.graphdef, params, self.parts.fixed)

    def first_step(self) -> tuple[float, cpmm.CPMM]:
        """Do the first step; return its loss and its clipped gradient."""
        loss = float(self.run(1).loss)
        mean = optax.tree.get(self.state.opt_state, "mu")  # one vector: the state is flattened
        unravel = ravel_pytree(self.parts.params)[1]
        return loss, self.merged(unravel(mean / (1 - ADAM_DECAY)))

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the pseudotimes, examples and labels of a step."""
        drawn = draw(self.plan, self.examples, self.settings, jnp.int32(step))
        return tuple(map(np.asarray, drawn))


@partial(jax.jit, static_argnums=0)
def draw(plan: Plan, examples: Examples, settings: Settings, step: jax.Array) -> Any:
    """Draw pseudotimes, examples and labels as `cpmm_jax.training.step` does."""
    batch_key, times_key, *_ = settings.keys
    rows = batch_indices(batch_key, step, plan.batch_size, settings.num_examples)
    times = plan.time_sampler(jax.random.fold_in(times_key, step), plan.num_times)
    return times, examples.x[rows], examples.y[rows]


def peer_of(ours: Training, scheme: Scheme) -> tuple[Any, dict[str, float]]:
    """Return PyTorch's training, and how far its first step was from ours.

    Raises:
        AssertionError: loss or gradient differ by more than the scheme allows.
    """
    from benchmarks import torch_cpmm

    loss, gradient = ours.first_step()
    model = torch_cpmm.TorchCPMM(ours.model, scheme.torch)
    draws = [ours.draw(step) for step in range(DRAWS)]
    peer = torch_cpmm.TorchTraining(model, draws, STILL.learning_rate)
    loss_error = abs(peer.run() / loss - 1)
    gradient_error = relative_error(peer.gradient(), torch_cpmm.parameters_of(gradient))
    if not (loss_error < scheme.loss_tolerance and gradient_error < scheme.gradient_tolerance):
        raise AssertionError(
            f"{scheme.name}: PyTorch's loss is off by {loss_error:.1e} and its gradient by "
            f"{gradient_error:.1e}; they are not the same model, and no times are compared."
        )
    peer.choose_threads()
    return peer, {
        "threads": peer.threads,
        "loss_difference": loss_error,
        "gradient_difference": gradient_error,
    }


def measure_steps(base: Training, schemes: list[Scheme], **effort: Any) -> tuple[Table, Any]:
    """Time whole training steps of one size; `base` has our default solver."""
    absent = next((name for name in ("torch", "torchdiffeq") if find(name) is None), None)
    ours, peers, numbers = {f"ours, {DEFAULT}": base}, {}, {}
    for scheme in schemes:
        ours[f"ours, {scheme.name}"] = same = Training(base.size, base.data, scheme.ours)
        if absent is None:
            name = f"PyTorch, {scheme.name}"
            peers[name], numbers[name] = peer_of(same, scheme)
    timings = interleave({name: case.run for name, case in (ours | peers).items()}, **effort)
    for name, training in ours.items():
        timings[name] = Timing(*(value / BLOCK for value in asdict(timings[name]).values()))
        numbers[name] = {"compile_seconds": training.compile_seconds}
    numbers = {name: numbers[name] | of_timing(timings, name) for name in timings}
    rows = [step_row(name, timings[name], row) for name, row in numbers.items()]
    rows += [[f"PyTorch, {s.name}", missing(absent), "-", "-", "-"] for s in schemes if absent]
    size = base.size
    table = Table(
        f"One training step, {size.name} (D = {DIM}, C = {CLASSES}, T = {size.num_times}, "
        f"rank {size.rank}, widths {WIDTHS}, batch {BATCH}, float32)",
        ["", "time", "ratio", "compile (s)", "loss, gradient off ours"],
        rows,
        [
            f"Median (quartiles); ratios to the first row. Ours: a {BLOCK}th of a compiled block "
            f"of {BLOCK} steps, as `fit` runs them, batches and pseudotimes drawn within. PyTorch "
            "is handed both and runs eagerly, with one thread or with one per core, whichever was "
            "faster. The last column compares the first step with ours by the same solver, "
            "relative, before times are taken."
        ],
    )
    return table, numbers


def step_row(name: str, timing: Timing, row: Mapping[str, Any]) -> list[str]:
    compiling, off = row.get("compile_seconds"), row.get("loss_difference")
    return [
        name,
        str(timing),
        f"{row['ratio']:.2f}",
        "-" if compiling is None else f"{compiling:.1f}",
        "-" if off is None else f"{off:.0e}, {row['gradient_difference']:.0e}",
    ]


def measure(full: bool) -> Report:
    """Measure whole steps, then gradients; in full also the demo's size and a trained field."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else PyTorch's idle threads spin
    jax.config.update("jax_default_matmul_precision", "float32")  # on both sides
    effort = {"seconds": 1.5, "least": 5} if full else {"seconds": 0.5, "least": 3}
    digits, tables, data = Digits.read(), [], {}
    if full:
        demo = Training(DEMO, digits, None)
        table, data[DEMO.name] = measure_steps(demo, [FIXED, ADAPTIVE], **effort)
        tables.append(table)
    eight = Training(EIGHT, digits, None)
    table, data[EIGHT.name] = measure_steps(eight, [FIXED], **effort)
    tables.append(table)
    models = {"untrained": eight.model}
    if full:
        eight.restart(TrainConfig(steps=TRAINED))
        eight.run(TRAINED)
        models["trained"] = eight.merged(eight.state.params)
    solves = FULL_SOLVES if full else SHORT_SOLVES
    more, data["gradient"] = measure_gradients(models, solves, **effort)
    return Report("training_step", [*tables, *more], data)


if __name__ == "__main__":
    main("training_step", measure)
