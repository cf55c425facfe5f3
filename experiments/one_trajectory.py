"""One trajectory through all of the data: does it get there, with a curriculum and without?

    python -m experiments.one_trajectory [--sets spirals,pinwheel,...] [--seeds 5] [--steps N]

A CPMM of one trajectory read at 64 times, by its recipe, which starts at an example and moves
across the data. Test log-likelihood in nats of the standardised points, as it is trained and as
`cpmm fit` leaves it, polished by EM as long as validation gains; beside it scikit-learn's mixture
of 64 full covariances, from k-means, its regularisation by validation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Report, Table
from cpmm_jax.pipeline import fit_mixture
from cpmm_jax.recipe import CURRICULA, recommend
from experiments.ablation import shown
from experiments.compare.gaussians import SklearnMixture
from experiments.compare.methods import Rows, Size
from experiments.compare.search import Budget
from experiments.density_sets import DensitySet, density_set

RESULTS = Path(__file__).parent / "results"
SETS = ("spirals", "pinwheel", "moons", "circles", "checkerboard", "8gaussians")
COMPONENTS = 64
SECONDS = 10.0  # in which scikit-learn's regularisation is chosen


def scores(data: DensitySet, seed: int, steps: int | None) -> dict[str, float]:
    """Return the test log-likelihoods of all fits to one set."""
    found = {}
    for curriculum in CURRICULA:
        sizes: Any = {"components": COMPONENTS, "trajectories": 1, "steps": steps}
        recipe = recommend(*data.x_train.shape, **sizes, curriculum=curriculum, seed=seed)
        fitted = fit_mixture(data.x_train, None, data.x_valid, None, recipe, progress=False)
        trained = fitted.result.model.extract(recipe.num_times)
        trained = trained.affine(fitted.standardizer.scale, fitted.standardizer.shift)
        for name, mixture in (("trained", trained), ("polished", fitted.mixture)):
            found[f"{curriculum}, {name}"] = float(np.mean(mixture.log_prob(data.x_test)))
    rows, size = Rows(data.x_train, data.x_valid), Size(COMPONENTS, 1)
    peer = SklearnMixture("full", size).fit(rows, seed, Budget(SECONDS))
    return {**found, "scikit-learn": float(np.mean(peer.log_prob(data.x_test)))}


def main(argv: Sequence[str] | None = None) -> None:
    """Fit all, print the table, keep the numbers."""
    parser = argparse.ArgumentParser(prog="python -m experiments.one_trajectory")
    parser.add_argument("--sets", default=",".join(SETS), help="built-in, separated by commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="by default the recipe's")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    numbers: dict[str, list[float]] = {}
    start = time.perf_counter()
    for name in given.sets.split(","):
        for seed in range(given.seeds):
            for key, score in scores(density_set(name, seed), seed, given.steps).items():
                numbers.setdefault(f"{name}: {key}", []).append(score)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    lines = []
    for key, values in numbers.items():
        peer = numbers[f"{key.split(':')[0]}: scikit-learn"]
        lines.append((key, shown(values, False), shown(np.subtract(values, peer).tolist(), True)))
    title = f"One trajectory of {COMPONENTS} components, {given.seeds} seeds, nats"
    table = Table(title, ("", "test log-likelihood", "beyond scikit-learn"), lines)
    print(f"\n{table}")
    Report("one_trajectory", [table], numbers).write(given.out)


if __name__ == "__main__":
    main()
