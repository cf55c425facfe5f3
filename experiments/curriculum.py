"""Does a curriculum pay? {direct, CPMM} x {none, flow by likelihood, by matching, interpolant}.

    python -m experiments.curriculum [--sets A,B] [--seeds 5] [--jobs 2] [--data-dir DIR]

Every mixture has 40 components of rank 4 (D - 1 at most) and starts at random: the direct one at
random examples, the trajectories of the CPMM at examples. Two tables: at equal seconds, those of
the flow's training included, and at equal steps of the mixture's training. Seconds are counted from
a pilot's seconds per step; compiling is left out on all sides. Each gives the test log-likelihood
in nats of the standardised data without a curriculum, and what each curriculum adds, over the same
seeds; then the spread over the seeds. Cells that are done are not run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

import cpmm_jax as cpmm
from benchmarks.report import Report, Table
from cpmm_jax.curriculum import Curriculum
from cpmm_jax.mixture.initialise import random_start
from cpmm_jax.models.direct import DirectMFA
from cpmm_jax.recipe import recommend
from cpmm_jax.starts import build_model
from experiments.ablation import shown
from experiments.compare.cells import Cell, Settings, is_done, read
from experiments.compare.methods import Rows, Size
from experiments.compare.runner import run_cells
from experiments.compare.search import Budget, Density, Fitted, search
from experiments.density_sets import density_set, names

OUTPUT = Path("bench_output") / "curriculum"
SIZE = Size(40, 4)
MODELS = ("direct", "cpmm")
CURRICULA = ("none", "likelihood", "matching", "interpolant")
SECONDS, STEPS = 30.0, 4000  # of one fit
FLOW_SHARE = 0.4  # of the seconds
FLOW_STEPS = {"likelihood": 600, "matching": 4000}  # where the mixture's steps are equal
PILOT = {"steps": 40, "report_every": 20}
FLOOR = 1e-4  # of a column's variance: the least noise variance
STAGES = {
    "flow": cpmm.Stages.linear(24, last_share=0.5),
    "interpolant": cpmm.Stages.linear(24, first=0.6, last_share=0.5),  # noise drowns what is above
}
OBJECTIVES: dict[str, Callable[[], Any]] = {
    "likelihood": cpmm.MaximumLikelihood,
    "matching": cpmm.FlowMatching,
}


@dataclass(frozen=True)
class Trained:
    """A mixture trained from a random start along a curriculum.

    Attributes:
        model: one of `MODELS`.
        curriculum: one of `CURRICULA`.
        seconds: of the whole fit; None for `STEPS` of the mixture's training.
        steps: of the mixture's training, where `seconds` is None.
    """

    model: str
    curriculum: str
    seconds: float | None
    steps: int = STEPS

    def fit(self, data: Rows, seed: int, budget: Budget) -> Fitted:
        """Fit once; there is nothing to choose."""
        return search({}, {}, partial(self._fit, data, seed), data.x_valid, budget)

    def _fit(self, data: Rows, seed: int, _: Any) -> Density:
        curriculum, left = self._curriculum(data, seed)
        build, num_times = self._start(data, seed)
        parts = {"curriculum": curriculum, "x_valid": data.x_valid, "progress": False}
        settings: dict[str, Any] = {"num_times": num_times, "seed": seed}
        steps = self.steps
        if left is not None:
            pilot = cpmm.fit(
                build(), data.x_train, config=cpmm.TrainConfig(**PILOT, **settings), **parts
            )
            steps = max(PILOT["steps"], round(left / per_step(pilot.history)))
        config = cpmm.TrainConfig(steps=steps, **settings)
        found = cpmm.fit(build(), data.x_train, config=config, **parts)
        mixture = found.model.extract(num_times)
        numbers = sum(leaf.size for leaf in (mixture.class_logits, *_leaves(mixture.components)))
        return Density(mixture.log_prob, numbers, {"steps": steps})

    def _start(self, data: Rows, seed: int) -> tuple[Callable[[], Any], int]:
        n, dim = data.x_train.shape
        size = SIZE.within(dim)
        floor = np.full(dim, FLOOR)
        if self.model == "direct":
            start = random_start(data.x_train, *size, noise_floor=floor, seed=seed)
            return partial(DirectMFA.from_mixture, start, noise_floor=FLOOR), 1
        # Under a curriculum trajectories start at examples; without one they do so here too.
        recipe = recommend(n, dim, **size._asdict(), seed=seed, curriculum="interpolant")
        return partial(build_model, data.x_train, None, floor, recipe), recipe.num_times

    def _curriculum(self, data: Rows, seed: int) -> tuple[Curriculum, float | None]:
        """Return it, and the seconds that are left for the mixture."""
        if self.curriculum == "none":
            return cpmm.NoCurriculum(), self.seconds
        if self.curriculum == "interpolant":
            return cpmm.InterpolantCurriculum(stages=STAGES["interpolant"]), self.seconds
        untrained = cpmm.CNF(data.x_train.shape[1], rngs=nnx.Rngs(seed))
        parts: dict[str, Any] = {
            "objective": OBJECTIVES[self.curriculum](),
            "x_valid": data.x_valid,
            "progress": False,
        }
        steps = FLOW_STEPS[self.curriculum]
        if self.seconds is not None:
            config = cpmm.TrainConfig(**PILOT, seed=seed)
            pilot = cpmm.fit_flow(untrained, data.x_train, config=config, **parts)
            share = FLOW_SHARE * self.seconds
            steps = max(PILOT["steps"], round(share / per_step(pilot.history)))
        config = cpmm.TrainConfig(steps=steps, seed=seed)
        flow = cpmm.fit_flow(untrained, data.x_train, config=config, **parts).flow
        left = None if self.seconds is None else (1 - FLOW_SHARE) * self.seconds
        return cpmm.FlowCurriculum(flow, stages=STAGES["flow"]), left


def per_step(history: Sequence[dict[str, Any]]) -> float:
    """Return the seconds of a step, from the first report to the last: compiling is before."""
    first, last = history[0], history[-1]
    return float((last["seconds"] - first["seconds"]) / (last["step"] - first["step"]))


def _leaves(components: cpmm.MFA) -> list[Any]:
    return [components.logits, components.means, components.loadings, components.log_noise]


def make_method(cell: Cell) -> Trained:
    """Return the method of a cell, named model_curriculum."""
    model, curriculum = cell.method.split("_")
    seconds = cell.settings.budget if cell.settings.preset == "equal_seconds" else None
    return Trained(model, curriculum, seconds, cell.settings.steps or STEPS)


def tabulate(
    title: str, values: dict[tuple[str, str, int], float], sets: Sequence[str], seeds: int
) -> tuple[Table, dict[str, Any]]:
    """Return the table of one comparison, and the numbers behind it."""
    rows, numbers = [], {}
    for dataset in sets:
        for model in MODELS:
            entries = []
            for curriculum in CURRICULA:
                pairs = [
                    (values[own], values[base])
                    for seed in range(seeds)
                    if (own := (dataset, f"{model}_{curriculum}", seed)) in values
                    and (base := (dataset, f"{model}_none", seed)) in values
                ]
                signed = curriculum != "none"
                found = [own - base if signed else own for own, base in pairs]
                spread = f" ({np.std([own for own, _ in pairs]):.2f})" if pairs else ""
                entries.append(shown(found, signed) + spread)
                numbers[f"{dataset}/{model}_{curriculum}"] = [own for own, _ in pairs]
            rows.append((dataset, model, *entries))
    return Table(title, ("data set", "model", *CURRICULA), rows), numbers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cells that are not done and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m experiments.curriculum")
    parser.add_argument("--sets", help="data sets, separated by commas; default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of one fit")
    parser.add_argument("--steps", type=int, default=STEPS, help="of one fit")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=OUTPUT)
    given = parser.parse_args(argv)
    sets = given.sets.split(",") if given.sets else names(given.data_dir)
    comparisons = {
        "equal_seconds": Settings("equal_seconds", given.seconds, *SIZE),
        "equal_steps": Settings("equal_steps", 0.0, *SIZE, given.steps),
    }
    tables, numbers = [], {}
    for name, settings in comparisons.items():
        cells = [
            Cell(dataset, f"{model}_{curriculum}", seed, settings)
            for seed in range(given.seeds)
            for dataset in sets
            for model in MODELS
            for curriculum in CURRICULA
        ]
        folder = given.out / name
        load = partial(density_set, data_dir=given.data_dir)
        run_cells(cells, folder, make_method, load, jobs=given.jobs)
        values = {}
        for cell in cells:
            record = read(folder, cell)
            if record is not None and is_done(record):
                key = cell.dataset, cell.method, cell.seed
                values[key] = record["metrics"]["test_log_likelihood"]
        title = (
            f"At {name.replace('_', ' ')}: test log-likelihood, and what a curriculum adds, "
            "mean ± 95 % interval (standard deviation over seeds), nats"
        )
        table, numbers[name] = tabulate(title, values, sets, given.seeds)
        tables.append(table)
        print(f"\n{table}")
    Report("curriculum", tables, numbers).write(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
