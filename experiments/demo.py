"""The main job: fit the handwritten digits, print a table, write figures.

    make demo

Fits a labelled hierarchical CPMM to the 1,797 digits that come with scikit-learn (stratified 75/25
split) and compares it with one scikit-learn GaussianMixture per class; then fits the pinwheel with
one trajectory and with three, the picture of the paper's Figure 1.

    .venv/bin/python -m experiments.demo --seeds 5

repeats the comparison alone over five splits and writes experiments/results/digits.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import provenance
from cpmm_jax.data import Dataset, Standardizer, load, split
from cpmm_jax.errors import DataWarning
from cpmm_jax.plotting import plot_components, plot_run, save_figure
from cpmm_jax.run import Source, fit_run, open_run

OUT = Path("demo_output")
RESULTS = Path(__file__).parent / "results"
NUM_COMPONENTS = (1, 2, 3, 4, 6, 8)
REGULARISATION = (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


class PerClassGaussians:
    """One scikit-learn GaussianMixture for each class, and Bayes' rule.

    Components and regularisation (in standardised units, 0.1 being a tenth of a column's variance)
    are the best on a fifth of the training part by log p(x, y); the mixtures are then fitted again
    on all of it.
    """

    def __init__(self, covariance: str, data: Dataset, seed: int) -> None:
        self.covariance, self.seed = covariance, seed
        self.scaler = Standardizer.fit(data.x_train)
        self.log_jacobian = -float(np.log(self.scaler.scale).sum())
        inner = split(data, seed=seed, valid_fraction=0.2, test_fraction=0.0)
        candidates = [(k, reg) for k in NUM_COMPONENTS for reg in REGULARISATION]
        scores = []
        for candidate in candidates:
            self._fit(inner.x_train, inner.y_train, *candidate)
            joint = self.class_log_prob(inner.x_valid)
            scores.append(joint[np.arange(len(joint)), inner.y_valid].mean())
        self.num_components, self.regularisation = candidates[int(np.argmax(scores))]
        self._fit(data.x_train, data.y_train, self.num_components, self.regularisation)

    def _fit(self, x: Any, y: Any, num_components: int, regularisation: float) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        z = self.scaler.transform(x).astype(np.float64)
        self.log_weights = np.log(np.bincount(y) / len(y))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.mixtures = [
                GaussianMixture(
                    num_components,
                    covariance_type=self.covariance,
                    reg_covar=regularisation,
                    random_state=self.seed,
                ).fit(z[y == c])
                for c in range(len(self.log_weights))
            ]

    def class_log_prob(self, x: Any) -> Any:
        """Return log p(x, c) in the units of x, (N, C)."""
        z = self.scaler.transform(x).astype(np.float64)
        by_class = np.stack([mixture.score_samples(z) for mixture in self.mixtures], axis=1)
        return by_class + self.log_weights + self.log_jacobian

    @property
    def num_parameters(self) -> int:
        """Numbers that the mixtures and the class weights hold."""
        dim = len(self.scaler.scale)
        covariance = dim * (dim + 1) // 2 if self.covariance == "full" else dim
        return len(self.mixtures) * (self.num_components * (1 + dim + covariance) + 1)


def score_gaussians(covariance: str, data: Dataset, seed: int) -> dict[str, Any]:
    """Fit and score one GaussianMixture per class."""
    start = time.perf_counter()
    model = PerClassGaussians(covariance, data, seed)
    joint = model.class_log_prob(data.x_test)
    return {
        "test_log_likelihood": float(np.logaddexp.reduce(joint, axis=1).mean()),
        "accuracy": float((joint.argmax(axis=1) == data.y_test).mean()),
        "num_parameters": model.num_parameters,
        "seconds": time.perf_counter() - start,
        "num_components": model.num_components,
        "regularisation": model.regularisation,
    }


def compare(run: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Fit the digits with all three methods; leave the CPMM's run in `run`."""
    cpmm = fit_run(Source("digits", labels=True, seed=seed), run, overwrite=True, progress=True)
    data = load("digits", labels=True, seed=seed)
    return {
        "CPMM": cpmm,
        "GaussianMixture per class, full": score_gaussians("full", data, seed),
        "GaussianMixture per class, diagonal": score_gaussians("diag", data, seed),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of the methods."""
    head = ("method", "test log-likelihood (nats)", "accuracy", "parameters", "seconds")
    cells = [
        (
            name,
            f"{row['test_log_likelihood']:.2f}",
            f"{100 * row['accuracy']:.2f} %",
            f"{row['num_parameters']:,}",
            f"{row['seconds']:.0f}",
        )
        for name, row in rows.items()
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = []
    for row in (head, *cells):
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w)
                        for i, (cell, w) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        lines.append("| " + " | ".join([first, *rest]) + " |")
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"  # fmt: skip  # noqa: E501
    return "\n".join([lines[0], rule, *lines[1:]])


def figure_1(folder: Path) -> list[Path]:
    """Fit the pinwheel with one trajectory and with three; draw the components over the data."""
    x = load("pinwheel").x_train
    paths = []
    for trajectories, word in ((1, "one"), (3, "three")):
        run = folder / f"pinwheel_{word}"
        fit_run(
            Source("pinwheel"),
            run,
            overwrite=True,
            progress=True,
            trajectories=trajectories,
            components=48,
            rank=1,
            steps=5000,
        )
        ax = plot_components(open_run(run).mixture, x)
        ax.set_title(f"{word} trajector{'y' if trajectories == 1 else 'ies'}")
        paths.append(save_figure(ax, folder / "figures" / f"pinwheel_{word}.png"))
    return paths


def repeat(num_seeds: int) -> None:
    """Compare over several splits, and keep the result."""
    cells = []
    for seed in range(num_seeds):
        cells.append({"seed": seed, **compare(OUT / "digits", seed)})
        print(f"seed {seed}\n{table({k: v for k, v in cells[-1].items() if k != 'seed'})}\n")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "digits.json"
    path.write_text(json.dumps({"provenance": provenance(), "cells": cells}, indent=1) + "\n")
    print(f"written: {path}")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, metavar="N", help="only compare, over N splits")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DataWarning)  # the digits have three blank columns
    if arguments.seeds:
        repeat(arguments.seeds)
        return
    start = time.perf_counter()
    print("Fitting the digits: a CPMM, then one scikit-learn GaussianMixture per class ...")
    run = OUT / "digits"
    rows = compare(run, seed=0)
    print(f"\n{table(rows)}\n")
    digits = open_run(run)
    figures = plot_run(digits.mixture, digits.history(), run / "figures")
    print("Fitting the pinwheel with one trajectory, then with three ...")
    figures += figure_1(OUT)
    print(f"\nFigures (after {time.perf_counter() - start:.0f} s):")
    for path in figures:
        print(f"  {path}")
    command = Path(sys.executable).with_name("cpmm")
    with_relative = (
        command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command
    )
    print(
        f"\nGo on with:\n  {with_relative} evaluate {run} digits\n"
        f"  {with_relative} sample {run} -n 100 --out samples.csv\n"
        f"  {with_relative} fit pinwheel --out runs/pinwheel && "
        f"{with_relative} plot runs/pinwheel\n  {with_relative} fit --help"
    )


if __name__ == "__main__":
    main()
