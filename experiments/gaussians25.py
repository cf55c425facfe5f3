"""The 25 Gaussians from random points: who finds all modes, and what does a curriculum do for it?

    python -m experiments.gaussians25 [--seeds 10] [--steps 6000]

A 5 x 5 grid at spacing 1, standard deviation 0.05; 2,000 training points, 5,000 test points, 25
components of rank 0, starts at random training points, never k-means. The Kullback-Leibler
divergence on the test points, in nats, for EM, for the mixture with free parameters by gradient,
and for a CPMM of 25 trajectories, without and with the interpolant curriculum; each as it is, and
after `fit_em(start=..., moves=100)`. 25 free Gaussians cannot be expected below 0.03: half their
number of parameters over that of the points. One missing mode costs about 0.1.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import cpmm_jax as cpmm
from benchmarks.provenance import provenance
from benchmarks.report import Table
from cpmm_jax.data import make
from cpmm_jax.mixture.initialise import random_start
from cpmm_jax.models.direct import DirectMFA
from cpmm_jax.recipe import recommend
from cpmm_jax.starts import build_model

RESULT = Path(__file__).parent / "results" / "gaussians25.json"
TRAIN, TEST, COMPONENTS, DEVIATION = 2000, 5000, 25, 0.05
MOVES, FLOOR = 100, 1e-4
STAGES = cpmm.Stages.linear(40, first=0.6, last_share=0.3)
CURRICULA = {"none": cpmm.NoCurriculum(), "interpolant": cpmm.InterpolantCurriculum(stages=STAGES)}
Fit = Callable[[np.ndarray, int, int], Any]  # examples, seed, steps -> mixture


def log_prob(x: np.ndarray) -> np.ndarray:
    """Return the true log-density, (N,), of points (N, 2)."""
    centres = np.stack(np.meshgrid(np.arange(5), np.arange(5)), axis=-1).reshape(-1, 2) - 2.0
    squares = np.sum((x.astype(np.float64)[:, None] - centres) ** 2, axis=-1)
    scale = np.log(COMPONENTS * 2 * np.pi * DEVIATION**2)
    return np.asarray(jax.nn.logsumexp(-0.5 * squares / DEVIATION**2, axis=1)) - scale


def by_em(x: np.ndarray, seed: int, _: int) -> cpmm.MFA:
    """Fit by EM from random points."""
    settings = {"start": random_start, "noise_floor": FLOOR, "seed": seed}
    return cpmm.fit_em(x, COMPONENTS, 0, **settings).mixture


def by_gradient(model: str, curriculum: str) -> Fit:
    """Return what trains the direct mixture, or a CPMM of as many trajectories, by gradient."""

    def fit(x: np.ndarray, seed: int, steps: int) -> Any:
        start: Any
        if model == "direct":
            begin = random_start(x, COMPONENTS, 0, seed=seed)
            start = DirectMFA.from_mixture(begin, noise_floor=FLOOR)
        else:
            sizes = {"components": COMPONENTS, "trajectories": COMPONENTS, "rank": 0}
            recipe = recommend(*x.shape, **sizes, curriculum="interpolant", seed=seed)
            start = build_model(x, None, np.full(2, FLOOR), recipe)
        config = cpmm.TrainConfig(steps=steps, batch_size=512, num_times=1, seed=seed)
        parts = {"config": config, "curriculum": CURRICULA[curriculum], "progress": False}
        return cpmm.fit(start, x, **parts).last_model.extract(1)

    return fit


METHODS: dict[str, Fit] = {
    "EM": by_em,
    **{f"{m}, {c}": by_gradient(m, c) for m in ("direct", "CPMM") for c in CURRICULA},
}


def main() -> None:
    """Fit all, print the table, keep the numbers."""
    parser = argparse.ArgumentParser(prog="python -m experiments.gaussians25")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=6000, help="by gradient")
    given = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    start = time.perf_counter()
    for name, fit in METHODS.items():
        plain, moved = [], []
        for seed in range(given.seeds):
            x, test = make("25gaussians", TRAIN, seed)[0], make("25gaussians", TEST, 1000 + seed)[0]
            mixture = fit(x, seed, given.steps)
            flat = mixture if isinstance(mixture, cpmm.MFA) else mixture.flatten()
            better = cpmm.fit_em(x, start=flat, noise_floor=FLOOR, moves=MOVES, seed=seed).mixture
            for values, one in ((plain, mixture), (moved, better)):
                values.append(float(np.mean(log_prob(test) - one.log_prob(jnp.asarray(test)))))
        found[name] = {"as it is": plain, "after EM with moves": moved}
        print(f"{name}: {np.mean(plain):.3f}, then {np.mean(moved):.4f}", flush=True)
    rows = [
        (name, *(f"{np.mean(v):.3f} ({min(v):.3f}..{max(v):.3f})" for v in both.values()))
        for name, both in found.items()
    ]
    head = ("trained by", "as it is", "after EM with moves")
    title = f"Divergence from the 25 Gaussians, mean (range) over {given.seeds} seeds, nats"
    print(f"\n{Table(title, head, rows)}\n{time.perf_counter() - start:.0f} s")
    result = {"provenance": provenance(), "steps": given.steps, "divergence": found}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
