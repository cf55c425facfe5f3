"""How cost grows: exponents of the time of the density and of the training step.

    .venv/bin/python -m benchmarks.scaling [--full]

One size is doubled at a time where its work dominates the others', and the exponent is the slope of
log time on log size by least squares. Theory: linear in N, K, D and R for the density (R squared
only in the set-up, once per component), linear in C and in the solver's steps, at most quadratic in
the hidden width, for the gradient of the training loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import cpmm_jax as cpmm
from benchmarks.density import Size, prepare_case
from benchmarks.report import Report, Table, main
from cpmm_jax.dynamics.trajectory import GridTimes
from cpmm_jax.solver_study.timing import interleave
from cpmm_jax.training.objective import negative_log_likelihood

DENSITY = Size(N=4096, K=128, D=128, R=8)
MODEL = {"C": 16, "width": 256, "steps": 16}
SIZES = {
    "N": (2048, 4096, 8192, 16384),
    "K": (64, 128, 256, 512),
    "D": (64, 128, 256, 512),
    "R": (4, 8, 16, 32),
    "C": (8, 16, 32, 64),
    "width": (256, 512, 1024, 2048),
    "steps": (16, 32, 64, 128),
}
THEORY = {"N": 1, "K": 1, "D": 1, "R": 1, "C": 1, "width": 2, "steps": 1}
ALLOWANCE = 0.15


@partial(jax.jit, static_argnums=0)
def _gradient(graphdef: Any, params: Any, x: jax.Array, y: jax.Array) -> Any:
    def loss(params: Any) -> jax.Array:
        times = GridTimes()(None, 4)
        return negative_log_likelihood(nnx.merge(graphdef, params), times, x, y)[0]

    return jax.grad(loss)(params)


def _training_case(C: int, width: int, steps: int) -> Callable[[], Any]:
    solver = cpmm.SolverConfig(num_steps=steps)
    model = cpmm.CPMM(64, 4, C, widths=(width, width), solver=solver, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(256, 64)), jnp.float32), jnp.arange(256) % C
    graphdef, params = nnx.split(model)
    return lambda: _gradient(graphdef, params, x, y)


def _cases(name: str, direction: str, sizes: Sequence[int]) -> dict[str, Callable[[], Any]]:
    if name in MODEL:
        return {str(size): _training_case(**{**MODEL, name: size}) for size in sizes}
    return {
        str(size): prepare_case("ours", direction, *map(str, DENSITY._replace(**{name: size})))
        for size in sizes
    }


def measure(full: bool) -> Report:
    """Fit the exponents."""
    rows, data, beyond = [], {}, []
    for name, theory in THEORY.items():
        sizes = SIZES[name] if full else SIZES[name][0:3:2]
        directions = ("training step",) if name in MODEL else ("forward", "forward + backward")
        for direction in directions:
            timings = interleave(_cases(name, direction, sizes), seconds=1.5 if full else 0.3)
            seconds = [timing.median for timing in timings.values()]
            slope = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
            data[f"{direction}, {name}"] = {"sizes": sizes, "seconds": seconds, "slope": slope}
            if slope > theory + ALLOWANCE:
                beyond.append(f"{direction} over {name}")
            rows.append(
                (
                    direction,
                    f"{name} = {', '.join(map(str, sizes))}",
                    ", ".join(f"{1e3 * s:.3g}" for s in seconds) + " ms",
                    f"{slope:.2f}",
                    f"<= {theory}",
                )
            )
    verdict = (
        f"More than {ALLOWANCE} above theory: {', '.join(beyond)}."
        if beyond
        else f"No exponent is more than {ALLOWANCE} above theory."
    )
    notes = (
        f"Density at {DENSITY} but for the size that varies; training step (gradient of the loss, "
        f"batch 256, D = 64, R = 4, 4 pseudotimes) at {MODEL}.",
        verdict,
    )
    columns = ("what", "sizes", "times", "exponent", "theory")
    return Report("scaling", [Table("How cost grows", columns, rows, notes)], data)


if __name__ == "__main__":
    main("scaling", measure)
