"""Two spirals by one trajectory: does it go through all of them, with a curriculum and without?

    python -m experiments.spirals [--seeds 5] [--steps N]

A CPMM of one trajectory read at 64 times, by its recipe, which starts at an example and moves
across the data. Test log-likelihood in nats of the standardised points, as it is trained and as
`cpmm fit` leaves it, polished by EM as long as validation gains; beside it scikit-learn's mixture
of 64 full covariances, k-means and regularisation by validation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import provenance
from benchmarks.report import Table
from cpmm_jax.pipeline import fit_mixture
from cpmm_jax.recipe import CURRICULA, recommend
from experiments.ablation import shown
from experiments.compare.gaussians import SklearnMixture
from experiments.compare.methods import Rows, Size
from experiments.compare.search import Budget
from experiments.density_sets import density_set

RESULT = Path(__file__).parent / "results" / "spirals.json"
COMPONENTS = 64
SECONDS = 10.0  # in which scikit-learn's regularisation is chosen


def main(argv: Sequence[str] | None = None) -> None:
    """Fit all, print the table, keep the numbers."""
    parser = argparse.ArgumentParser(prog="python -m experiments.spirals")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="by default the recipe's")
    given = parser.parse_args(argv)
    found: dict[str, list[float]] = {}
    start = time.perf_counter()
    for seed in range(given.seeds):
        data = density_set("spirals", seed)
        for curriculum in CURRICULA:
            sizes: Any = {"components": COMPONENTS, "trajectories": 1, "steps": given.steps}
            recipe = recommend(*data.x_train.shape, **sizes, curriculum=curriculum, seed=seed)
            fitted = fit_mixture(data.x_train, None, data.x_valid, None, recipe, progress=False)
            trained = fitted.result.model.extract(recipe.num_times)
            trained = trained.affine(fitted.standardizer.scale, fitted.standardizer.shift)
            for name, mixture in (("trained", trained), ("polished", fitted.mixture)):
                score = float(np.mean(mixture.log_prob(data.x_test)))
                found.setdefault(f"{curriculum}, {name}", []).append(score)
        rows = Rows(data.x_train, data.x_valid)
        peer = SklearnMixture("full", Size(COMPONENTS, 1)).fit(rows, seed, Budget(SECONDS))
        found.setdefault("scikit-learn", []).append(float(np.mean(peer.log_prob(data.x_test))))
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    best = found["scikit-learn"]
    lines = [
        (name, shown(values, False), shown(np.subtract(values, best).tolist(), True))
        for name, values in found.items()
    ]
    title = f"Two spirals, one trajectory of {COMPONENTS} components, {given.seeds} seeds, nats"
    print(f"\n{Table(title, ('curriculum', 'test', 'beyond scikit-learn'), lines)}")
    result = {"provenance": provenance(), "steps": given.steps, "test_log_likelihood": found}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
