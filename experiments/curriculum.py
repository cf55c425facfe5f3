"""Does a curriculum pay? {direct, CPMM} x {none, flow by likelihood, by matching, interpolant}.

    python -m experiments.curriculum [--sets A,B] [--seeds 5] [--at seconds] [--jobs 2]

Every mixture has 40 components of rank 4 (D - 1 at most) and starts at random: the direct one at
random examples, the trajectories of the CPMM at examples. Two tables: at equal seconds, those of
the flow's training included, and at equal steps of the mixture's training. Seconds become steps by
pilots, which are run first and want a quiet machine; compiling is left out on all sides. Each table
gives the test log-likelihood in nats of the standardised data without a curriculum, and what each
curriculum adds, over the same seeds; then the spread over the seeds. Cells that are done are not
run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
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
FLOW_STEPS = {"likelihood": 100, "matching": 2000}  # where the mixture's steps are equal
PILOT, PILOTS = {"steps": 200}, 3  # of each mixture; the quickest counts, others were disturbed
FLOOR = 1e-4  # of a column's variance: the least noise variance
STAGES = cpmm.Stages.linear(24, last_share=0.5)
INTERPOLANT = cpmm.InterpolantCurriculum(  # above .6 noise drowns what there is
    stages=cpmm.Stages.linear(24, first=0.6, last_share=0.5)
)
OBJECTIVES: dict[str, Callable[[], Any]] = {
    "likelihood": cpmm.MaximumLikelihood,
    "matching": cpmm.FlowMatching,
}


@dataclass(frozen=True)
class Lengths(Settings):
    """Settings with the number of steps of the flow's training.

    Attributes:
        flow_steps: where the curriculum is a flow.
    """

    flow_steps: int = 0


@dataclass(frozen=True)
class Trained:
    """A mixture trained from a random start along a curriculum.

    Attributes:
        model: one of `MODELS`.
        curriculum: one of `CURRICULA`.
        steps: of the mixture's training.
        flow_steps: of the flow's training before it.
    """

    model: str
    curriculum: str
    steps: int
    flow_steps: int

    def fit(self, data: Rows, seed: int, budget: Budget) -> Fitted:
        """Fit once; there is nothing to choose."""
        return search({}, {}, partial(self._fit, data, seed), data.x_valid, budget)

    def _fit(self, data: Rows, seed: int, _: Any) -> Density:
        curriculum = self._curriculum(data, seed)
        found, num_times = self.train(data, seed, curriculum, steps=self.steps)
        mixture = found.model.extract(num_times)
        numbers = sum(leaf.size for leaf in (mixture.class_logits, *_leaves(mixture.components)))
        return Density(mixture.log_prob, numbers, {})

    def train(
        self, data: Rows, seed: int, curriculum: Curriculum, **settings: Any
    ) -> tuple[cpmm.FitResult, int]:
        """Train the mixture; return the result, and the number of its pseudotimes."""
        model, num_times = self._start(data, seed)
        found = cpmm.fit(
            model,
            data.x_train,
            config=cpmm.TrainConfig(num_times=num_times, seed=seed, **settings),
            curriculum=curriculum,
            x_valid=data.x_valid,
            progress=False,
        )
        return found, num_times

    def train_flow(self, data: Rows, seed: int, **settings: Any) -> cpmm.FlowResult:
        """Train the flow of the curriculum."""
        return cpmm.fit_flow(
            cpmm.CNF(data.x_train.shape[1], rngs=nnx.Rngs(seed)),
            data.x_train,
            objective=OBJECTIVES[self.curriculum](),
            config=cpmm.TrainConfig(seed=seed, **settings),
            x_valid=data.x_valid,
            progress=False,
        )

    def _start(self, data: Rows, seed: int) -> tuple[Any, int]:
        n, dim = data.x_train.shape
        size = SIZE.within(dim)
        floor = np.full(dim, FLOOR)
        if self.model == "direct":
            start = random_start(data.x_train, *size, noise_floor=floor, seed=seed)
            return DirectMFA.from_mixture(start, noise_floor=FLOOR), 1
        # Under a curriculum trajectories start at examples; without one they do so here too.
        recipe = recommend(n, dim, **size._asdict(), seed=seed, curriculum="interpolant")
        return build_model(data.x_train, None, floor, recipe), recipe.num_times

    def _curriculum(self, data: Rows, seed: int) -> Curriculum:
        if self.curriculum == "none":
            return cpmm.NoCurriculum()
        if self.curriculum == "interpolant":
            return INTERPOLANT
        flow = self.train_flow(data, seed, steps=self.flow_steps).flow
        return cpmm.FlowCurriculum(flow, stages=STAGES)


def per_step(history: Sequence[dict[str, Any]]) -> float:
    """Return the seconds of a step in the second half of a training, at the data themselves."""
    last = history[-1]
    first = next(report for report in history if report["step"] >= last["step"] / 2)
    return float((last["seconds"] - first["seconds"]) / (last["step"] - first["step"]))


def _leaves(components: cpmm.MFA) -> list[Any]:
    return [components.logits, components.means, components.loadings, components.log_noise]


def make_method(cell: Cell) -> Trained:
    """Return the method of a cell, named model_curriculum."""
    settings = cell.settings
    assert isinstance(settings, Lengths)
    assert settings.steps is not None
    model, curriculum = cell.method.split("_")
    return Trained(model, curriculum, settings.steps, settings.flow_steps)


def make_pilot(cell: Cell) -> Trained:
    """Return what a pilot times: the training of a model, or of a flow with any model."""
    model, curriculum = cell.method.split("_")
    return Trained(model, curriculum, 0, 0)


def measure_pilot(cell: Cell, method: Trained, data: Any) -> dict[str, Any]:
    """Time the steps of a training on the rows of a data set."""
    rows = Rows(data.x_train, data.x_valid)
    if method.curriculum in OBJECTIVES:
        history = method.train_flow(rows, cell.seed, **PILOT).history
    else:
        curriculum = cpmm.NoCurriculum() if method.curriculum == "none" else INTERPOLANT
        history = method.train(rows, cell.seed, curriculum, **PILOT)[0].history
    metrics = {"per_step": per_step(history), "seconds": history[-1]["seconds"]}
    return {"config": cell.config, "status": "done", "metrics": metrics}


def lengths_within(
    seconds: float, sets: Sequence[str], folder: Path, load: Any, jobs: int
) -> dict[tuple[str, str, str], Lengths]:
    """Return how many steps fit into so many seconds, by data set, model and curriculum.

    Run in as many processes as the cells will be, so that a step takes as long.
    """
    pilot = Settings("pilot", seconds, *SIZE)
    timed = [f"{m}_{c}" for m in MODELS for c in ("none", "interpolant")]
    timed += [f"direct_{c}" for c in OBJECTIVES]
    cells = [
        Cell(dataset, method, i, pilot)
        for dataset in sets
        for method in timed
        for i in range(1 if method.split("_")[1] in OBJECTIVES else PILOTS)
    ]
    run_cells(cells, folder, make_pilot, load, jobs=jobs, measure=measure_pilot)
    costs: dict[tuple[str, str], float] = {}
    for cell in cells:
        record = read(folder, cell)
        if record is None or not is_done(record):
            raise SystemExit(f"{cell}: the pilot failed; run again.")
        key, cost = (cell.dataset, cell.method), record["metrics"]["per_step"]
        costs[key] = min(cost, costs.get(key, cost))
    lengths = {}
    for dataset, model, curriculum in product(sets, MODELS, CURRICULA):
        flows = curriculum in OBJECTIVES
        own = costs[dataset, f"{model}_{'none' if flows else curriculum}"]
        share = FLOW_SHARE if flows else 0.0
        steps = round((1 - share) * seconds / own)
        flow_steps = round(share * seconds / costs[dataset, f"direct_{curriculum}"]) if flows else 0
        lengths[dataset, model, curriculum] = Lengths(
            "equal_seconds", seconds, *SIZE, steps, flow_steps
        )
    return lengths


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
    parser.add_argument(
        "--at", choices=("seconds", "steps"), help="of which equally many; default: both in turn"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=OUTPUT)
    given = parser.parse_args(argv)
    sets = given.sets.split(",") if given.sets else names(given.data_dir)
    load = partial(density_set, data_dir=given.data_dir)
    keys = list(product(sets, MODELS, CURRICULA))
    comparisons = {}
    if given.at != "steps":
        pilots = given.out / "pilots"
        comparisons["equal_seconds"] = lengths_within(given.seconds, sets, pilots, load, given.jobs)
    if given.at != "seconds":
        comparisons["equal_steps"] = {
            key: Lengths("equal_steps", 0.0, *SIZE, given.steps, FLOW_STEPS.get(key[2], 0))
            for key in keys
        }
    tables, numbers = [], {}
    for name, lengths in comparisons.items():
        cells = [
            Cell(dataset, f"{model}_{curriculum}", seed, lengths[dataset, model, curriculum])
            for seed in range(given.seeds)
            for dataset, model, curriculum in keys
        ]
        folder = given.out / name
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
