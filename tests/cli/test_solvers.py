"""The trained model of a run, and `cpmm bench-solvers` on it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpmm_jax.dynamics.solve import SolverConfig
from cpmm_jax.models.cpmm import CPMM
from cpmm_jax.run import open_run
from cpmm_jax.solver_study import SolverMeasurement
from tests.cli.conftest import Cpmm

MEASURED = [
    SolverMeasurement(
        name=name,
        config=SolverConfig(),
        own=name == "slow",
        seconds_per_gradient=ms / 1e3,
        seconds_low=ms / 1e3,
        seconds_high=ms / 1e3,
        compile_seconds=1.0,
        num_steps=16,
        function_evaluations=calls,
        memory_bytes=2_500_000,
        trajectory_error=1e-3,
        gradient_error=1e-3,
    )
    for name, ms, calls in (("slow", 9.0, 17), ("quick", 3.0, None))
]
MEASURED += [SolverMeasurement(name=f"no{i}", config=SolverConfig(), result="No.") for i in "1234"]


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run, to draw figures into."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[CPMM, float]]:
    """Put made-up measurements in place of minutes of compiling; return what was to be measured."""
    seen: list[tuple[CPMM, float]] = []

    def compare_solvers(model: CPMM, *, seconds: float) -> list[SolverMeasurement]:
        seen.append((model, seconds))
        return MEASURED

    monkeypatch.setattr("cpmm_jax.solver_study.compare_solvers", compare_solvers)
    return seen


def test_the_model_of_a_run_is_that_of_its_mixture(run: Path) -> None:
    opened = open_run(run)
    model = opened.load_model()
    means = np.asarray(model.extract(2).components.means)
    mine = opened.mixture.means[:, : means.shape[1]]  # without twins, in the units of the data
    shift = mine - means * (mine.std(axis=(0, 1)) / means.std(axis=(0, 1)))
    np.testing.assert_allclose(shift - shift.mean(axis=(0, 1)), 0.0, atol=1e-3)


def test_bench_solvers_advises(
    own_run: Path, compared: list[Any], cpmm: Cpmm, tmp_path: Path
) -> None:
    out = tmp_path / "solvers.json"
    answer = cpmm("bench-solvers", own_run, "--out", out, "--seconds", 7)
    assert answer.code == 0, answer.err
    ((model, seconds),) = compared
    assert (model.dim, seconds) == (2, 7.0)
    head, first, second, failed, blank, advice, figure = answer.out.splitlines()
    assert len(head) == len(first) == len(second)
    assert first.split() == ["quick", "3.00", "1.0", "16", "-", "2.50", "1.0e-03", "1.0e-03"]
    assert second.startswith("slow *")
    assert failed == "no1; no2; no3 and 1 others: No."
    assert "cheapest is quick: 3 ms" in advice and "slow, take 9 ms" in advice and blank == ""
    assert Path(figure).read_bytes().startswith(b"\x89PNG")
    content = json.loads(out.read_text())
    assert content["recommended"] == "quick" and len(content["measurements"]) == 6
    assert "must not exist yet" in cpmm("bench-solvers", own_run, "--out", out).err
    assert len(compared) == 1  # refused before the measuring


def test_without_matplotlib_there_is_no_figure_but_a_table(
    own_run: Path, compared: list[Any], cpmm: Cpmm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    answer = cpmm("bench-solvers", own_run)
    assert answer.code == 0 and "cheapest is quick" in answer.out
    assert "no figure: figures need matplotlib" in answer.err


def test_bad_runs_and_names_get_one_line(own_run: Path, cpmm: Cpmm, tmp_path: Path) -> None:
    assert "must end in .json" in cpmm("bench-solvers", own_run, "--out", tmp_path / "a.csv").err
    assert cpmm("bench-solvers", own_run, "--seconds", 0).code == 2
    shutil.rmtree(own_run / "checkpoints")
    answer = cpmm("bench-solvers", own_run)
    assert answer.code == 1 and answer.err.count("\n") == 1
    assert "must be the folder of a trained model" in answer.err
