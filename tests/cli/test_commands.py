"""The command line on good input: what it prints, what it writes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from cpmm_jax import __version__, artifact
from cpmm_jax.cli import compilation_cache
from cpmm_jax.dynamics.flow import CNF
from cpmm_jax.recipe import Recipe
from cpmm_jax.run import open_run, read_examples
from cpmm_jax.training.checkpoint import load_model
from tests.cli.conftest import SETTINGS, Cpmm, write_table


def test_fit_leaves_a_run(run: Path) -> None:
    files = sorted(path.name for path in run.iterdir())
    assert files == ["checkpoints", "config.json", "metrics.json", "metrics.jsonl", "mixture.npz"]
    assert [path.name for path in run.parent.iterdir()] == ["trees"]  # no leftovers
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"test_log_likelihood", "accuracy", "seconds"} <= set(metrics)
    assert metrics["rows_train"] + metrics["rows_valid"] + metrics["rows_test"] == 120
    config = json.loads((run / "config.json").read_text())
    assert config["source"]["label_column"] == "kind"
    assert config["recipe"]["num_times"] == 2
    assert config["versions"]["cpmm_jax"] == __version__
    mixture = artifact.load(run / "mixture.npz")
    assert (mixture.class_names, mixture.feature_names) == (("elm", "oak"), ("left", "right"))
    assert mixture.extra["num_times"] == 2
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_curriculum_leaves_its_flow_for_the_next_run(
    table: Path, cpmm: Cpmm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpmm_jax.pipeline.FLOW_STEPS", 5)
    fit = ("fit", table, "--label", "kind", *SETTINGS)
    assert cpmm(*fit, "--out", tmp_path / "first", "--curriculum", "flow").code == 0
    again = cpmm(*fit, "--out", tmp_path / "again", "--flow", tmp_path / "first")
    assert (again.code, again.err) == (0, "")
    folders = [tmp_path / name / "checkpoints" / "flow" for name in ("first", "again")]
    pairs = zip(*(jax.tree.leaves(load_model(folder, CNF)) for folder in folders), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["recipe"]["curriculum"] == "flow"
    positions = [report["v"] for report in open_run(tmp_path / "again").history()]
    assert positions == sorted(positions, reverse=True) and positions[-1] == 0


def test_images_have_a_field_of_their_own(cpmm: Cpmm, tmp_path: Path) -> None:
    """Recorded pixels are dequantised, and scored in bits; another reading sees the same noise."""
    rng, y = np.random.default_rng(0), np.arange(120) % 2
    x = rng.integers(0, 30, (120, 16, 17)) + 200 * (np.arange(17) < 8 + y[:, None, None])
    np.savez(tmp_path / "images.npz", x=x.astype(np.uint8), y=y)
    sizes = ("--components", 2, "--rank", 1, "--steps", 8, "--quiet")
    out = tmp_path / "run"
    assert cpmm("fit", tmp_path / "images.npz", "--labels", *sizes, "--out", out).code == 0
    run = open_run(out)
    recipe = run.config["recipe"]
    assert (recipe["event_shape"], recipe["dequantise"]) == ([16, 17, 1], True)
    assert run.load_model().event_shape == (16, 17, 1)
    assert run.mixture.event_shape == (16, 17) and run.mixture.dim == 272
    metrics = json.loads((out / "metrics.json").read_text())
    assert 4 < metrics["test_bits_per_dimension"] < 8 and metrics["accuracy"] == 1.0
    shown = cpmm("evaluate", out, tmp_path / "images.npz").out
    assert f"{metrics['test_bits_per_dimension']:.4f}" in shown


def test_clusters_are_found_without_labels(table: Path, cpmm: Cpmm, tmp_path: Path) -> None:
    data = np.genfromtxt(table, delimiter=",", skip_header=1, usecols=(0, 2))
    np.savez(tmp_path / "x.npz", x=data, y=np.arange(len(data)) % 2)
    settings = [*SETTINGS, "--clusters", "2", "--out", tmp_path / "run"]
    answer = cpmm("fit", tmp_path / "x.npz", *settings)
    assert (answer.code, answer.err) == (0, "")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["nmi"] > 0.9 and "accuracy" not in metrics
    assert artifact.load(tmp_path / "run" / "mixture.npz").num_classes == 2


def test_a_share_of_the_objective_is_kept_with_the_run(
    table: Path, cpmm: Cpmm, tmp_path: Path
) -> None:
    settings = [*SETTINGS, "--label", "kind", "--discriminative", "0.9"]
    assert cpmm("fit", table, *settings, "--out", tmp_path / "run").code == 0
    recipe = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]
    assert (recipe["discriminative"], recipe["least_noise"]) == (0.9, 0.1)
    noise = np.exp(artifact.load(tmp_path / "run" / "mixture.npz").log_noise)
    spread = np.genfromtxt(table, delimiter=",", skip_header=1, usecols=(0, 2)).var(axis=0)
    assert (noise.reshape(-1, 2).min(axis=0) > 0.08 * spread).all()


def test_a_run_tells_how_its_components_were_divided_in_the_end(
    cpmm: Cpmm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(120, 2)))

    def settle(data: object, floor: object, recipe: Recipe) -> Recipe:
        assert recipe.num_times != 1
        return replace(recipe, num_classes=4, num_times=1, train_times=1)

    monkeypatch.setattr("cpmm_jax.pipeline.divide", settle)
    assert cpmm("fit", tmp_path / "x.npy", "--out", tmp_path / "run", *SETTINGS).code == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["recipe"]["num_classes"], config["recipe"]["num_times"]) == (4, 1)
    assert artifact.load(tmp_path / "run" / "mixture.npz").extra["num_times"] == 1


def test_scores_are_in_the_units_of_the_data(run: Path, table: Path) -> None:
    opened = open_run(run)
    examples = read_examples(opened, str(table))
    assert examples.part == "test part" and len(examples.x) == 24
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test_log_likelihood"] == pytest.approx(
        opened.mixture.log_prob(examples.x).mean()
    )
    # the second column is ten times as wide as the first: the Jacobian is included
    assert opened.mixture.means[..., 1].std() > 3 * opened.mixture.means[..., 0].std()


def test_evaluate_reads_the_test_part_or_all(
    run: Path, table: Path, cpmm: Cpmm, tmp_path: Path
) -> None:
    answer = cpmm("evaluate", run, table)
    assert answer.code == 0 and answer.err == ""
    assert "24 (test part)" in answer.out and "accuracy" in answer.out
    other = write_table(tmp_path / "other.csv", rows=30)
    assert "30 (all rows)" in cpmm("evaluate", run, other).out  # the label column is found
    bare = tmp_path / "bare.csv"
    bare.write_text("1,2\n3,4\n")
    answer = cpmm("evaluate", run, bare)
    assert answer.code == 0 and "accuracy" not in answer.out


def test_labels_of_another_order_are_recoded(run: Path, cpmm: Cpmm, tmp_path: Path) -> None:
    path = tmp_path / "oaks.csv"
    path.write_text("left,kind,right\n" + "0.1,oak,-0.3\n" * 5)
    examples = read_examples(open_run(run), str(path))
    assert examples.y is not None and examples.y.tolist() == [1] * 5


def test_predict_writes_a_table(run: Path, table: Path, cpmm: Cpmm, tmp_path: Path) -> None:
    answer = cpmm("predict", run, table, "--out", tmp_path / "p.csv")
    assert answer.code == 0 and "24 predictions" in answer.out
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    opened = open_run(run)
    x = read_examples(opened, str(table)).x
    assert [row["prediction"] for row in rows] == opened.mixture.predict(x).tolist()
    shares = np.array([[float(row["p(elm)"]), float(row["p(oak)"])] for row in rows])
    np.testing.assert_allclose(shares, opened.mixture.predict_proba(x), rtol=1e-12)
    assert cpmm("predict", run, table, "--out", tmp_path / "p.npz").code == 0
    with np.load(tmp_path / "p.npz") as arrays:
        np.testing.assert_allclose(arrays["log_prob"], opened.mixture.log_prob(x))


def test_sample_and_export(run: Path, cpmm: Cpmm, tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        assert cpmm("sample", run, "-n", 7, "--seed", 3, "--out", tmp_path / name).code == 0
    a, b = (np.load(tmp_path / name)["x"] for name in ("a.npz", "b.npz"))
    assert a.shape == (7, 2)
    np.testing.assert_array_equal(a, b)
    assert cpmm("sample", run, "--out", tmp_path / "s.csv").code == 0
    assert (tmp_path / "s.csv").read_text().splitlines()[0] == "left,right"
    assert cpmm("export", run, tmp_path / "m.npz").code == 0
    assert (tmp_path / "m.npz").read_bytes() == (run / "mixture.npz").read_bytes()


def test_plot_writes_figures(run: Path, cpmm: Cpmm) -> None:
    answer = cpmm("plot", run)
    assert answer.code == 0, answer.err
    paths = [Path(line) for line in answer.out.splitlines()]
    assert {path.name for path in paths} == {"training.png", "components.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_overwrite_replaces_run_and_file(
    run: Path, table: Path, cpmm: Cpmm, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    for extra in ([], ["--overwrite"]):
        answer = cpmm("fit", table, "--label", "kind", "--out", folder, *SETTINGS, *extra)
        assert answer.code == 0
    # same seed, same machine: identical
    assert (folder / "mixture.npz").read_bytes() == (run / "mixture.npz").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    out = tmp_path / "s.csv"
    for extra in ([], ["--overwrite"]):
        assert cpmm("sample", run, "--out", out, *extra).code == 0


def test_reading_a_run_imports_no_jax(run: Path, table: Path) -> None:
    code = (
        "import sys; from cpmm_jax.cli import main; "
        f"code = main(['evaluate', {str(run)!r}, {str(table)!r}]); "
        "sys.exit(code or ('jax' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help(cpmm: Cpmm) -> None:
    assert "fit" in cpmm("--help").out
    text = cpmm("fit", "--help").out
    for option in ("--out", "--labels", "--components", "--trajectories", "--rank", "--overwrite"):
        assert option in text
    assert "pinwheel" in text
    assert __version__ in cpmm("--version").out


def test_compiled_programs_are_kept_by_the_command_line_alone(cpmm: Cpmm, monkeypatch) -> None:
    for name in compilation_cache():
        monkeypatch.delenv(name)
    code = "import jax, cpmm_jax; assert jax.config.jax_compilation_cache_dir is None"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    cpmm("evaluate", "nowhere", "moons")
    assert Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).name == "cpmm_jax"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "of the user")
    cpmm("evaluate", "nowhere", "moons")
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "of the user"
