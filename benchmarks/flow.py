"""Training a continuous normalizing flow: a step by likelihood, and how soon matching is as good.

    .venv/bin/python -m benchmarks.flow [--full]

The step is value and gradient of the mean of -log p(x) over a batch, with the exact trace: ours,
the same flow written by hand as a batched solve of diffrax (same weights, same solver, the trace
from D derivatives at every point; loss and gradient are compared before times are), and zuko's CNF,
whose solver is adaptive, at its own tolerances and beside ours at those. Then both ways to train
the same flow: the seconds, compiling left out, in which flow matching reaches the validation
likelihood that training by likelihood ends at; on the pinwheel, and on the part of MINIBOONE where
`CPMM_DATA_DIR` has it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import cpmm_jax as cpmm
from benchmarks.peers import find, missing
from benchmarks.report import Report, Table, main
from cpmm_jax.data import Standardizer, load
from cpmm_jax.dynamics.solve import SolverConfig
from cpmm_jax.solver_study.timing import interleave

BATCH, WIDTHS, NUM_STEPS = 256, (128, 128), 16
HEUN = SolverConfig(solver=diffrax.Heun(), num_steps=NUM_STEPS)
ADAPTIVE = SolverConfig(solver=diffrax.Dopri5(), num_steps=None, rtol=1e-5, atol=1e-6)
LIKELIHOOD_STEPS = {"pinwheel": 1000, "miniboone": 500}
MATCHING_STEPS = (250, 500, 1000, 2000, 4000, 8000, 16000)
OURS, BARE, ZUKO = "ours, Heun", "diffrax by hand, Heun", "zuko, adaptive"

Case = Callable[[], Any]


def miniboone() -> Path | None:
    """Return the file of the part of MINIBOONE; None where it is not there."""
    folder = Path(os.environ.get("CPMM_DATA_DIR", "missing"))
    return next(folder.rglob("miniboone_partial.npz"), None)


SETS: dict[str, Callable[[], Any]] = {"pinwheel": lambda: "pinwheel", "miniboone": miniboone}


def untrained(dim: int, solver: SolverConfig | None = None) -> cpmm.CNF:
    """Return a flow that moves already."""
    return cpmm.CNF(dim, widths=WIDTHS, output_scale=0.3, solver=solver, rngs=nnx.Rngs(0))


def by_hand(params: Any, x: jax.Array) -> jax.Array:
    """The mean of -log p(x), as a batched CNF is usually written with diffrax."""

    def velocity(v: jax.Array, u: jax.Array, params: Any) -> jax.Array:
        *hidden, (last, last_bias) = params
        for kernel, time, bias in hidden:
            u = jnp.sin(u @ kernel + time[0] * v + bias)
        return u @ last + last_bias

    def move(v: jax.Array, state: Any, params: Any) -> Any:
        u, _ = state
        jacobian = jax.vmap(jax.jacfwd(velocity, argnums=1), (None, 0, None))(v, u, params)
        value = jax.vmap(velocity, (None, 0, None))(v, u, params)
        return value, jnp.trace(jacobian, axis1=1, axis2=2)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(move),
        diffrax.Heun(),
        0.0,
        1.0,
        1.0 / NUM_STEPS,
        (x, jnp.zeros(len(x))),
        params,
        max_steps=NUM_STEPS,
        stepsize_controller=diffrax.ConstantStepSize(),
    )
    latent, log_det = (leaf[-1] for leaf in solution.ys)
    square = jnp.sum(latent**2, axis=1) + x.shape[1] * jnp.log(2 * jnp.pi)
    return jnp.mean(0.5 * square - log_det)


def weights(flow: cpmm.CNF) -> Any:
    """Return the weights of the field in the form of `by_hand`."""
    field = flow.field
    hidden = [
        (layer.kernel[...], time.kernel[...], layer.bias[...])
        for layer, time in zip(field.layers, field.times, strict=True)
    ]
    return [*hidden, (field.output.kernel[...], field.output.bias[...])]


def our_case(flow: cpmm.CNF, x: jax.Array) -> Case:
    """Return loss and gradient of our objective."""
    graphdef, params, fixed = nnx.split(flow, nnx.Param, ...)
    objective = cpmm.MaximumLikelihood()

    def loss(params: Any) -> Any:
        return objective.loss(nnx.merge(graphdef, params, fixed), x, jax.random.key(0))[0]

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    return lambda: compiled(params)


def zuko_case(dim: int, x: np.ndarray) -> Case | None:
    """Return the same step of zuko's flow of that size; None where it is not installed."""
    zuko, torch = find("zuko"), find("torch")
    if zuko is None or torch is None:
        return None
    flow = zuko.flows.CNF(features=dim, hidden_features=WIDTHS)
    data, leaves = torch.tensor(x), list(flow.parameters())
    return lambda: torch.autograd.grad(-flow().log_prob(data).mean(), leaves, allow_unused=True)


def measure_step(dim: int) -> tuple[Table, dict[str, Any]]:
    """Time one step of each, at D features."""
    x = np.random.default_rng(0).normal(size=(BATCH, dim)).astype(np.float32)
    flow = untrained(dim, HEUN)
    params, rows = weights(flow), jnp.asarray(x)
    compiled = jax.jit(jax.value_and_grad(by_hand)).lower(params, rows).compile()
    cases: dict[str, Case] = {
        OURS: our_case(flow, rows),
        BARE: lambda: compiled(params, rows),
        "ours, default": our_case(untrained(dim), rows),
        "ours, adaptive": our_case(untrained(dim, ADAPTIVE), rows),
    }
    (own, gradient), (other, other_gradient) = cases[OURS](), cases[BARE]()
    np.testing.assert_allclose(own, other, rtol=1e-4)
    norms = [
        float(np.sqrt(sum(np.sum(np.asarray(g) ** 2) for g in jax.tree.leaves(tree))))
        for tree in (gradient, other_gradient)
    ]
    np.testing.assert_allclose(*norms, rtol=1e-3)
    peer = zuko_case(dim, x)
    if peer is not None:
        cases[ZUKO] = peer
    timings = interleave(cases, seconds=2.0)
    base = timings[OURS].median
    table_rows = [(name, str(t), f"{t.median / base:.2f}") for name, t in timings.items()]
    if peer is None:
        table_rows.append((ZUKO, missing("zuko"), ""))
    title = f"A step by likelihood, D = {dim}, batch {BATCH}, widths {WIDTHS}, exact trace"
    data = {name: timing.median for name, timing in timings.items()}
    return Table(title, ("", "time (quartiles)", "times ours"), table_rows), data


def trained(name: str, objective: Any, steps: int) -> tuple[float, float]:
    """Train a flow on a data set; return seconds without compiling, and validation nats."""
    data = load(SETS[name]())
    scaler = Standardizer.fit(data.x_train)
    x, valid = scaler.transform(data.x_train), scaler.transform(data.x_valid)
    flow = cpmm.CNF(x.shape[1], widths=WIDTHS, rngs=nnx.Rngs(0))
    config = cpmm.TrainConfig(steps=steps, report_every=max(1, steps // 5))
    parts = {"objective": objective, "config": config, "progress": False}
    found = cpmm.fit_flow(flow, x, x_valid=valid, **parts)
    first, last = found.history[0], found.history[-1]
    per_step = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    assert found.valid_log_likelihood is not None
    return per_step * steps, found.valid_log_likelihood


def measure_training(names: Sequence[str]) -> tuple[Table, dict[str, Any]]:
    """Find how many steps of flow matching reach what likelihood does."""
    rows, data = [], {}
    for name in names:
        seconds, target = trained(name, cpmm.MaximumLikelihood(), LIKELIHOOD_STEPS[name])
        tried = []
        for steps in MATCHING_STEPS:
            tried.append((steps, *trained(name, cpmm.FlowMatching(), steps)))
            if tried[-1][2] >= target:
                break
        steps, spent, reached = tried[-1]
        rows.append(
            (
                name,
                f"{target:.3f} in {seconds:.1f} s ({LIKELIHOOD_STEPS[name]} steps)",
                f"{reached:.3f} in {spent:.1f} s ({steps} steps)",
                f"{spent / seconds:.2f}",
            )
        )
        data[name] = {"likelihood": (seconds, target), "matching": tried}
    title = "Validation nats, and the seconds of training to them"
    head = ("data set", "by likelihood", "by matching, the first as good", "part of the time")
    return Table(title, head, rows), data


def measure(full: bool) -> Report:
    """Measure steps; in full more sizes, and the training."""
    tables, data = [], {}
    for dim in (2, 16, 43) if full else (2,):
        table, data[f"D = {dim}"] = measure_step(dim)
        tables.append(table)
    if full:
        names = [name for name, source in SETS.items() if source() is not None]
        table, data["training"] = measure_training(names)
        tables.append(table)
    return Report("flow", tables, data)


if __name__ == "__main__":
    main("flow", measure)
