"""A fit that is stopped or killed, and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest

from cpmm_jax import artifact
from cpmm_jax.errors import RunError
from cpmm_jax.files import write_json
from cpmm_jax.run import Source
from cpmm_jax.run.fitting import Order
from cpmm_jax.run.folder import ORDER, part_of
from tests.cli.conftest import Cpmm

SETTINGS = ["--label", "kind", "--components", "4", "--rank", "1", "--batch-size", "16", "--quiet"]
LONG = [*SETTINGS, "--steps", "1200", "--save-every", "0.05"]


def begin(table: Path, out: Path, number: int) -> tuple[int, str]:
    """Begin a fit, send a signal when its first snapshot is there; return its code and stderr."""
    main = "import sys; from cpmm_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", main, "fit", str(table), "--out", str(out), *LONG]
    same = str(int(jax.config.read("jax_disable_most_optimizations")))  # programs as here
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": same}
    child = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
    folder = part_of(out) / "checkpoints" / "training" / "mixture"
    while child.poll() is None and not list(folder.glob("0*[0-9]")):
        time.sleep(0.01)
    child.send_signal(number)
    error = child.communicate()[1].decode()
    return child.returncode, error


def arrays(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "mixture.npz") as content:
        return dict(content)


@pytest.fixture(scope="module")
def whole(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the same fit, never stopped."""
    from cpmm_jax.cli import main

    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(["fit", str(table), "--out", str(out), *LONG]) == 0
    return out


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_fit_goes_on_to_the_same_run(
    number: signal.Signals, whole: Path, table: Path, cpmm: Cpmm, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, error = begin(table, out, number)
    if number == signal.SIGKILL:
        assert code == -number
    else:
        assert code == 128 + number
        assert f"go on with: cpmm fit --resume {out}" in error and number.name in error
    assert not out.exists()
    again = cpmm("fit", table, "--out", out, *LONG)
    assert again.code == 1 and "unfinished fit; go on with `cpmm fit --resume" in again.err
    answer = cpmm("fit", "--resume", out, "--quiet")
    assert (answer.code, answer.err) == (0, "")
    assert not part_of(out).exists()
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}
    assert not (out / "checkpoints" / "training").exists()
    first, second = arrays(whole), arrays(out)
    assert all(np.array_equal(first[name], second[name]) for name in first.keys() | second.keys())
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (whole, out)]
    assert [json.loads(line)["loss"] for line in lines[0]] == [
        json.loads(line)["loss"] for line in lines[1]
    ]
    answer = cpmm("fit", "--resume", out)
    assert answer.code == 1 and "an unfinished run to go on with; got a finished one" in answer.err


def test_other_settings_or_data_are_named(table: Path, cpmm: Cpmm, tmp_path: Path) -> None:
    out, own = tmp_path / "run", tmp_path / "own.csv"
    own.write_text(table.read_text())
    begin(own, out, signal.SIGTERM)
    answer = cpmm("fit", "--resume", out, "--steps", "1300", "--quiet")
    assert answer.code == 1
    assert "`steps` was 1200 and is 1300; leave them out, or add `--allow-changes`" in answer.err
    lines = own.read_text().splitlines()
    own.write_text("\n".join([*lines[:-1], "9,oak,9"]) + "\n")
    answer = cpmm("fit", "--resume", out, "--quiet")
    assert answer.code == 1 and "must belong to these settings and data" in answer.err
    assert "sha256" in answer.err
    assert part_of(out).is_dir()  # nothing is lost
    changed = ("--steps", "1300", "--allow-changes", "--quiet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpmm_jax.training.checkpoint.save_model", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cpmm("fit", "--resume", out, *changed)
    answer = cpmm("fit", "--resume", out, "--quiet")  # what was allowed once is remembered
    assert (answer.code, answer.err) == (0, "")
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"]["steps"] == 1300
    assert artifact.load(out / "mixture.npz").num_classes == 2


def unfinished(table: Path, out: Path) -> None:
    """Leave what a fit that was killed at once leaves."""
    part_of(out).mkdir()
    source = Source(str(table), labels=True, label_column="kind")
    write_json(part_of(out) / ORDER, asdict(Order(source, {"components": 4})))


def test_an_unfinished_fit_is_given_up_on_request(table: Path, cpmm: Cpmm, tmp_path: Path) -> None:
    out = tmp_path / "run"
    unfinished(table, out)
    assert cpmm("fit", table, "--out", out, *SETTINGS, "--steps", "20", "--overwrite").code == 0
    assert not part_of(out).exists()


def test_two_processes_do_not_share_a_run(table: Path, cpmm: Cpmm, tmp_path: Path) -> None:
    from cpmm_jax.run.folder import new_folder

    out = tmp_path / "run"
    with new_folder(out) as part:
        (part / "fit.json").write_text("{}")
        for command in (("--resume", out), (table, "--out", out), (table, "--out", out, "--ov")):
            answer = cpmm("fit", *command)
            assert answer.code == 1 and "one process at a time" in answer.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "required: DATA, --out"),
        (["data.csv"], "required: --out"),
        (["data.csv", "--out", "run", "--allow-changes"], "--allow-changes goes with --resume"),
        (["--resume", "run", "--out", "other"], "leave out --out"),
        (["--resume", "run", "--labels"], "leave out --labels"),
        (["--resume", "run", "--seed", "0"], "leave out --seed"),
    ],
)
def test_arguments_that_do_not_go_together(options: list[str], message: str, cpmm: Cpmm) -> None:
    answer = cpmm("fit", *options)
    assert answer.code == 2 and message in answer.err and "\n" not in answer.err.strip()


def test_there_must_be_something_to_resume(cpmm: Cpmm, tmp_path: Path) -> None:
    answer = cpmm("fit", "--resume", tmp_path / "run")
    assert answer.code == 1 and "unfinished run to go on with; got none" in answer.err
    part_of(tmp_path / "run").mkdir()
    (part_of(tmp_path / "run") / "fit.json").write_text("[1]")
    answer = cpmm("fit", "--resume", tmp_path / "run")
    assert answer.code == 1 and "must tell what was to be fitted" in answer.err


def test_results_that_could_not_be_written_are_written_later(
    whole: Path, table: Path, cpmm: Cpmm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full, or the process killed, when training is over: nothing of it is lost."""
    out = tmp_path / "run"

    def full(*_: object, **__: object) -> None:
        raise RunError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("cpmm_jax.training.checkpoint.save_model", full)
        answer = cpmm("fit", table, "--out", out, *LONG)
    assert answer.code == 1 and "no space" in answer.err
    part = part_of(out)
    (part / "checkpoints" / "model").mkdir()
    (part / ".mixture.npz.0.part").touch()
    (tmp_path / ".run.old").mkdir()
    answer = cpmm("fit", "--resume", out, "--quiet")
    assert (answer.code, answer.err) == (0, "")
    first, second = arrays(whole), arrays(out)
    assert all(np.array_equal(first[name], second[name]) for name in first.keys() | second.keys())
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


def test_what_has_come_meanwhile_is_not_replaced(table: Path, cpmm: Cpmm, tmp_path: Path) -> None:
    out = tmp_path / "run"
    unfinished(table, out)
    out.mkdir()
    (out / "mine").touch()
    answer = cpmm("fit", "--resume", out, "--quiet")
    assert answer.code == 1 and "must not exist yet" in answer.err
    assert (out / "mine").exists() and part_of(out).is_dir()
