"""The comparison harness: cells that survive anything, and test rows that nobody sees early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.compare import cells as cell_files
from experiments.compare.__main__ import main
from experiments.compare.cells import Cell, is_done, read, write
from experiments.compare.methods import Rows
from experiments.compare.runner import environment, measure_density, thread_limits
from experiments.compare.search import Budget, Fitted
from experiments.density_sets import DensitySet
from tests.experiments import stand_ins
from tests.experiments.stand_ins import (
    SETTINGS,
    density_set,
    done,
    log_standard_normal,
    slow_cells,
)

ROOT = Path(__file__).resolve().parents[2]


# Cells


def test_a_cell_is_read_back_only_under_its_settings(tmp_path: Path) -> None:
    cell = Cell("line", "cpmm", 0, SETTINGS)
    assert read(tmp_path, cell) is None
    write(tmp_path, cell, done(cell, -1.5))
    assert is_done(read(tmp_path, cell))
    assert read(tmp_path, replace(cell, seed=1)) is None
    assert read(tmp_path, replace(cell, settings=replace(SETTINGS, budget=9.0))) is None


@pytest.mark.parametrize("broken", ["dump", "fsync"])
def test_an_interrupted_write_leaves_the_old_cell(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **settings: Any) -> None:
        if broken == "dump":
            arguments[1].write('{"half": ')
        raise KeyboardInterrupt

    cell = Cell("line", "cpmm", 0, SETTINGS)
    write(tmp_path, cell, cell.failed("before"))
    before = cell.path(tmp_path).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(cell_files.json if broken == "dump" else cell_files.os, broken, interrupted)
        for target in (cell, replace(cell, seed=1)):
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path, target, done(target, -1.0))
    assert cell.path(tmp_path).read_bytes() == before
    assert read(tmp_path, replace(cell, seed=1)) is None
    write(tmp_path, cell, done(cell, -1.0))
    assert is_done(read(tmp_path, cell))


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_run_cut_off_goes_on_where_it_was(blow: signal.Signals, tmp_path: Path) -> None:
    journal, cells = tmp_path / "journal", slow_cells(12)
    code = (
        "import signal; from pathlib import Path; "
        "from tests.experiments.stand_ins import run, slow_cells; "
        # Where tests run in the background, a shell has SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"run(slow_cells(12), Path({str(tmp_path)!r}), Path({str(journal)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while sum(is_done(read(tmp_path, cell)) for cell in cells) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(blow)
    process.wait(timeout=30)
    finished = [str(cell) for cell in cells if is_done(read(tmp_path, cell))]
    began = journal.read_text().split()
    time.sleep(0.5)  # longer than a cell: an orphan would begin another
    assert journal.read_text().split() == began
    assert 2 <= len(finished) < 12

    stand_ins.run(cells, tmp_path, journal)
    assert all(is_done(read(tmp_path, cell)) for cell in cells)
    assert len(list((tmp_path / "cells").glob("*.json"))) == len(cells)
    again = journal.read_text().split()[len(began) :]
    assert again == [str(cell) for cell in cells if str(cell) not in finished]


def test_failures_are_recorded_and_tried_again(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    cells = [Cell("line", name, 0, SETTINGS) for name in ("raises", "dies", "good")]
    stand_ins.run(cells, tmp_path, journal, jobs=2)
    raises, dies, good = (read(tmp_path, cell) or {} for cell in cells)
    assert raises["error"] == "ValueError: not today"
    assert dies["error"] == "the worker died (exit code -9)"
    assert good["status"] == "done"
    assert good["metrics"]["test_log_likelihood"] == pytest.approx(
        log_standard_normal(density_set("line", 0).x_test).mean()
    )
    assert {"versions", "commit", "date"} <= set(good["provenance"])

    journal.with_name("healed").touch()
    journal.unlink()
    stand_ins.run(cells, tmp_path, journal)
    assert journal.read_text().split() == ["line/raises/0", "line/dies/0"]
    assert all(is_done(read(tmp_path, cell)) for cell in cells)


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv("XLA_FLAGS", "--before")
    assert thread_limits(2)["OMP_NUM_THREADS"] == "2"
    assert thread_limits(8)["XLA_FLAGS"].startswith("--before --xla_cpu_multi_thread_eigen=false")
    monkeypatch.delenv("NEW_NAME", raising=False)
    with environment({"NEW_NAME": "1", "XLA_FLAGS": "--within"}):
        assert os.environ["NEW_NAME"] == "1" and os.environ["XLA_FLAGS"] == "--within"
    assert "NEW_NAME" not in os.environ and os.environ["XLA_FLAGS"] == "--before"


# Test rows


def test_test_rows_are_seen_once_and_after_the_fit() -> None:
    events: list[Any] = []

    class Watched(DensitySet):
        def __getattribute__(self, name: str) -> Any:
            if name == "x_test":
                events.append("test rows")
            return super().__getattribute__(name)

    class Watching:
        def fit(self, data: Rows, seed: int, budget: Budget) -> Fitted:
            events.append(("fit", data._fields))
            return Fitted(self.log_prob, 0, {}, ())

        def log_prob(self, x: np.ndarray) -> np.ndarray:
            events.append(("evaluated", len(x)))
            return log_standard_normal(x)

    plain = density_set("line", 0)
    data = Watched("line", plain.x_train, plain.x_valid, plain.x_test[:7], notes="")
    events.clear()
    record = measure_density(Cell("line", "watching", 0, SETTINGS), Watching(), data)
    assert record["rows"] == {"train": 60, "valid": 30, "test": 7}
    assert events[0] == ("fit", ("x_train", "x_valid"))
    assert events.count(("evaluated", 7)) == 1


# The command line


@pytest.fixture
def builtin_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CPMM_DATA_DIR", raising=False)


@pytest.mark.usefixtures("builtin_alone")
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--preset", "smoke", "--sets", "moons,pinwheel,moons", "--out", str(tmp_path)]
    command += ["--methods", "sklearn_diag,sklearn_tied", "--budget", "0.05"]
    assert main([*command, "--jobs", "2"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"versions", "commit"} <= set(summary["provenance"])
    assert set(summary["data"]["sets"]) == {"moons", "pinwheel"}
    one = summary["data"]["sets"]["moons"]["methods"]["sklearn_diag"]
    assert one["seeds"] == [0, 1]
    assert one["test_log_likelihood"]["mean"] == pytest.approx(np.mean(one["test_log_likelihoods"]))
    assert "| pinwheel" in (tmp_path / "summary.md").read_text()

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert len(stamps) == 8
    capsys.readouterr()
    assert main(command) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert "Test log-likelihood" in capsys.readouterr().out


@pytest.mark.usefixtures("builtin_alone")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "--methods must be of sklearn_full,"),
        (["--sets", "moons,nowhere"], "got nowhere"),
        (["--rank", "3"], "--components and --rank go together"),
        (["--components", "2", "--rank", "1", "--methods", "flow"], "(with --components and"),
        (["--seeds", "0"], "must be at least 1"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--preset", "main", *arguments])
    assert message in capsys.readouterr().err
