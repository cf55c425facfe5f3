"""A data set and methods for the comparison that are small, importable by name, and misbehave."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.compare.cells import Cell, Settings
from experiments.compare.methods import Rows
from experiments.compare.runner import run_cells
from experiments.compare.search import Budget, Density, Fitted, search
from experiments.density_sets import DensitySet

SETTINGS = Settings("stand-in", budget=0.0)


def density_set(name: str, seed: int) -> DensitySet:
    x = np.random.default_rng(seed).normal(size=(120, 1)).astype(np.float32)
    return DensitySet(name, x[:60], x[60:90], x[90:], notes="")


def log_standard_normal(x: np.ndarray) -> np.ndarray:
    return -0.5 * (x**2 + np.log(2 * np.pi)).sum(axis=1)


@dataclass(frozen=True)
class Misbehaving:
    """The standard normal density, after doing what the method's name says."""

    cell: Cell
    journal: Path  # a line for each fit begun

    def fit(self, data: Rows, seed: int, budget: Budget) -> Fitted:
        with self.journal.open("a") as file:
            file.write(f"{self.cell}\n")
        healed = self.journal.with_name("healed").exists()
        match self.cell.method:
            case "slow":
                time.sleep(0.3)
            case "raises" if not healed:
                raise ValueError("not today\nand a second line")
            case "dies" if not healed:
                os.kill(os.getpid(), signal.SIGKILL)
        return search({}, {}, self._density, data.x_valid, budget)

    def _density(self, choice: dict[str, Any]) -> Density:
        return Density(log_standard_normal, 0, {})


def misbehaving(cell: Cell, *, journal: Path) -> Misbehaving:
    return Misbehaving(cell, journal)


def slow_cells(count: int) -> list[Cell]:
    return [Cell("line", "slow", seed, SETTINGS) for seed in range(count)]


def run(cells: list[Cell], folder: Path, journal: Path, *, jobs: int = 1) -> None:
    run_cells(cells, folder, partial(misbehaving, journal=journal), density_set, jobs=jobs)


def done(cell: Cell, test: float, valid: float = 0.0, seconds: float = 1.0) -> dict[str, Any]:
    metrics = {
        "test_log_likelihood": test,
        "valid_log_likelihood": valid,
        "seconds": seconds,
        "num_parameters": 3,
    }
    return {"config": cell.config, "status": "done", "metrics": metrics}
