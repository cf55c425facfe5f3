"""The experiments of one file each: their tables, and, in `make torture`, their whole way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cpmm_jax.data import make
from experiments import ablation, curriculum, figure2, gaussians25, images, one_trajectory
from experiments.compare.cells import Cell, Settings, write


def test_a_curriculum_is_compared_over_the_same_seeds() -> None:
    values = {
        ("moons", "direct_none", 0): -2.0,
        ("moons", "direct_none", 1): -3.0,
        ("moons", "direct_matching", 1): -2.5,
        ("moons", "cpmm_interpolant", 0): -1.0,  # without its like
    }
    table, numbers = curriculum.tabulate("title", values, ["moons"], 2)
    assert numbers["moons/direct_none"] == [-2.0, -3.0]
    assert numbers["moons/direct_matching"] == [-2.5]
    assert numbers["moons/cpmm_interpolant"] == []
    text = str(table)
    assert "+0.500 (0.00)" in text
    assert "-2.500 ± 6.353 (0.50)" in text


def test_cells_name_model_and_curriculum() -> None:
    cell = Cell("moons", "cpmm_matching", 0, curriculum.Lengths("equal_steps", 0.0, 40, 4, 7, 9))
    assert curriculum.make_method(cell) == curriculum.Trained("cpmm", "matching", 7, 9)


def test_seconds_become_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = {"none": 0.01, "interpolant": 0.02, "matching": 0.004, "likelihood": 0.1}

    def pilots(cells: list[Cell], folder: Path, *_: object, **__: object) -> None:
        for cell in cells:
            per_step = cost[cell.method.split("_")[1]]
            record = {"config": cell.config, "status": "done", "metrics": {"per_step": per_step}}
            write(folder, cell, record)

    monkeypatch.setattr(curriculum, "run_cells", pilots)
    found = curriculum.lengths_within(10.0, ["moons"], tmp_path, None, 1)
    steps = {name: (n.steps, n.flow_steps) for (_, model, name), n in found.items() if model}
    assert steps == {
        "none": (1000, 0),
        "interpolant": (500, 0),
        "matching": (600, 1000),
        "likelihood": (600, 40),
    }


def test_a_step_is_timed_between_reports() -> None:
    steps = {5: 1.0, 20: 9.0, 40: 11.0}
    reports = [{"step": step, "seconds": seconds} for step, seconds in steps.items()]
    assert curriculum.per_step(reports) == 0.1


def test_the_25_gaussians_are_those_of_the_data() -> None:
    """The mean of log p over many points is the negative entropy."""
    x, _ = make("25gaussians", 20_000, 0)
    entropy = np.log(25) + np.log(2 * np.pi * np.e * 0.05**2)
    assert gaussians25.log_prob(x).mean() == pytest.approx(-entropy, abs=0.03)


@pytest.mark.slow
def test_the_curriculum_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--sets", "moons", "--seeds", "1", "--seconds", "2", "--steps", "60"]
    assert curriculum.main([*sizes, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "At equal seconds" in shown
    assert "At equal steps" in shown
    numbers = json.loads((tmp_path / "curriculum.json").read_text())["data"]
    for comparison in ("equal_seconds", "equal_steps"):
        assert all(len(values) == 1 for values in numbers[comparison].values())
        assert len(numbers[comparison]) == 8


@pytest.mark.slow
def test_the_ablation(tmp_path: Path) -> None:
    assert ablation.main(["--sets", "moons", "--seeds", "1", "--out", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "ablation.json").read_text())["data"]
    assert all(len(numbers[f"moons/{change}"]) == 1 for change in ablation.CHANGES)


@pytest.mark.slow
def test_the_experiment_on_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, y = np.random.default_rng(0), np.arange(160) % 2
    x = rng.integers(0, 40, (160, 16, 16)) + 150 * (np.arange(16) < 6 + 4 * y[:, None, None])
    np.savez(tmp_path / "stripes.npz", x=x.astype(np.uint8), y=y)
    monkeypatch.setitem(images.SIZES, "stripes", images.Size(1, 2, 1))
    data = images.image_set("stripes", 0, data_dir=tmp_path)
    for method in ("em", "direct", "cpmm_interpolant", "cpmm_classifier"):
        cell = Cell("stripes", method, 0, Settings("images", 0.0, steps=60))
        metrics = images.measure(cell, method, data)["metrics"]
        assert metrics["accuracy"] == 1.0 and 4 < metrics["bits_per_dimension"] < 8
        assert 0 <= metrics["js"] <= np.log(2)
    assert images.measure(cell, "pca_gmm", data)["metrics"]["accuracy"] == 1.0


@pytest.mark.slow
def test_one_trajectory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_trajectory, "CURRICULA", ("none", "interpolant"))
    monkeypatch.setattr(one_trajectory, "SECONDS", 0.1)
    sizes = ["--sets", "spirals", "--seeds", "1", "--steps", "60"]
    one_trajectory.main([*sizes, "--out", str(tmp_path)])
    numbers = json.loads((tmp_path / "one_trajectory.json").read_text())["data"]
    assert numbers["spirals: none, trained"] < numbers["spirals: none, polished"]
    assert len(numbers) == 5


@pytest.mark.slow
def test_figure_2(tmp_path: Path) -> None:
    figure2.main(["--curriculum", "interpolant", "--steps", "60", "--out", str(tmp_path)])
    assert (tmp_path / "curriculum.png").read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "curriculum.gif").read_bytes()[:3] == b"GIF"
