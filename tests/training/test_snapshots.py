"""Trainings that are stopped, killed, damaged or short of disk, and go on to the same result."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import cpmm_jax as cpmm
from cpmm_jax.errors import ConfigError, Interrupted, RunError, SnapshotWarning
from cpmm_jax.training import running, snapshots
from cpmm_jax.training.keeper import LOCK, locked
from cpmm_jax.training.progress import MetricsFile
from cpmm_jax.training.snapshots import differences, read_snapshot
from tests.training.stand_in import QUICK, planted, start

X, Y = planted(600)
CURRICULA: dict[str, Callable[[], cpmm.Curriculum]] = {
    "none": cpmm.NoCurriculum,
    "interpolant": lambda: cpmm.InterpolantCurriculum(stages=STAGES),
    "custom": lambda: cpmm.CustomCurriculum(lambda x, v: x / (1 + v), stages=STAGES),
}
STAGES = cpmm.Stages.linear(3, tolerance=1e-3)
TIMES = ("seconds", "examples_per_second")


def train(folder: Path | None = None, *, kind: str = "none", **settings: Any) -> Any:
    saved = None if folder is None else cpmm.Checkpoints(folder=folder, every_steps=1)
    own: dict[str, Any] = {"config": QUICK, "checkpoints": saved, **settings}
    return cpmm.fit(start(), X, Y, curriculum=CURRICULA[kind](), progress=False, **own)


def stop_at(report: int) -> Callable[[dict[str, Any]], None]:
    """Send this process the signal of a job that is taken away, at a report."""
    count = 0

    def callback(_: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if count == report:
            os.kill(os.getpid(), signal.SIGTERM)

    return callback


def assert_same(one: Any, other: Any) -> None:
    for name in ("model", "last_model"):
        leaves = zip(*(jax.tree.leaves(getattr(r, name)) for r in (one, other)), strict=True)
        assert all(np.array_equal(a, b) for a, b in leaves)
    assert (one.best_step, one.best_score, one.steps) == (
        other.best_step,
        other.best_score,
        other.steps,
    )
    bare = [
        [{k: v for k, v in report.items() if k not in TIMES} for report in result.history]
        for result in (one, other)
    ]
    assert bare[0] == bare[1]


@pytest.mark.parametrize("kind", CURRICULA)
def test_a_stopped_training_goes_on_to_the_same_result(kind: str, tmp_path: Path) -> None:
    whole = train(kind=kind)
    handler = signal.getsignal(signal.SIGTERM)
    for report in (1, 2):
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM at step .* of 250") as caught:
            train(
                tmp_path,
                kind=kind,
                callback=stop_at(report),
                resume=report > 1,
            )
        assert caught.value.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is handler
    path = tmp_path / "metrics.jsonl"
    path.write_text("what a killed process wrote after its last snapshot")
    resumed = train(tmp_path, kind=kind, resume=True, metrics_path=path)
    assert_same(resumed, whole)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == list(resumed.history)
    assert_same(train(tmp_path, kind=kind, resume=True), whole)  # finished: nothing is left to do


def test_a_flow_goes_on_to_the_same_result(tmp_path: Path) -> None:
    objective = cpmm.FlowMatching(coupling=cpmm.OptimalTransportCoupling())
    config = cpmm.TrainConfig(steps=60, batch_size=32, report_every=25)
    flow = cpmm.CNF(2, widths=(8,), rngs=nnx.Rngs(0))

    def fitted(**settings: Any) -> Any:
        with pytest.warns(UserWarning, match="latent"):
            return cpmm.fit_flow(flow, X, objective=objective, config=config, **settings)

    def stop(self: Any) -> None:
        if self._run.step >= 40:
            os.kill(os.getpid(), signal.SIGINT)
        own(self)

    own = cpmm.training.keeper.Keeper._between  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpmm_jax.training.keeper.Keeper._between", stop)
        patch.setattr(running, "LOOK", 0.0)
        with pytest.raises(Interrupted, match=r"by SIGINT at step 4. of 60"):
            cpmm.fit_flow(flow, X, objective=objective, config=config, checkpoints=tmp_path)
    one, other = fitted(checkpoints=tmp_path, resume=True), fitted()
    for a, b in zip(*(jax.tree.leaves(result.flow) for result in (one, other)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [r["valid_loss"] for r in one.history] == [r["valid_loss"] for r in other.history]
    assert (one.best_loss, one.best_step) == (other.best_loss, other.best_step)


CHILD = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from cpmm_jax.training import running
from tests.training.test_snapshots import X, Y, QUICK, start
import cpmm_jax as cpmm, numpy as np, jax
running.LOOK = 0.0  # a look at the clock after every step
folder = Path({folder!r})
config = cpmm.TrainConfig(steps=400, num_times=2, batch_size=128, report_every=60)
saved = cpmm.Checkpoints(folder=folder / "snapshots", every_steps=20)
stages = cpmm.Stages.linear(3)
result = cpmm.fit(
    start(), X, Y, config=config, checkpoints=saved, resume=(folder / "begun").exists(),
    curriculum=cpmm.InterpolantCurriculum(stages=stages), progress=False,
    callback=lambda report: time.sleep(0.02),
) if (folder / "begun").exists() or not (folder / "begun").touch() else None
np.savez(folder / "result.npz", *jax.tree.leaves(result.model), *jax.tree.leaves(result.last_model))
"""


def run_to_the_end(folder: Path, kills: int, rng: np.random.Generator) -> int:
    """Train in processes that are killed at random moments; return how many were."""
    folder.mkdir()
    root = str(Path(__file__).resolve().parents[2])
    code = CHILD.format(root=root, folder=str(folder))
    killed = 0
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    while not (folder / "result.npz").exists():
        child = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code], env=environment, stderr=subprocess.PIPE
        )
        if killed < kills:
            while child.poll() is None and not list(folder.glob("snapshots/*")):
                time.sleep(0.02)  # from when there is something to lose
            time.sleep(rng.uniform(0.0, 3.0))
            child.send_signal(signal.SIGKILL)
        error = child.communicate()[1].decode()
        if child.returncode == -signal.SIGKILL:
            killed += 1
        else:
            assert child.returncode == 0, error
    return killed


@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_training_ends_in_the_same_bits(
    kills: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    assert run_to_the_end(tmp_path / "whole", 0, rng) == 0
    survived = runs = differing = 0
    while survived < kills:
        runs += 1
        survived += run_to_the_end(tmp_path / f"run{runs}", kills - survived, rng)
        whole, found = (np.load(tmp_path / name / "result.npz") for name in ("whole", f"run{runs}"))
        differing += not all(np.array_equal(whole[name], found[name]) for name in whole.files)
    with capsys.disabled():
        print(f"\n{survived} kills, {survived} resumes, {runs} runs, {differing} that differ")
    assert differing == 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two snapshots."""
    folder = tmp_path_factory.mktemp("saved") / "snapshots"
    with pytest.raises(Interrupted):
        train(folder, callback=stop_at(3))
    assert len(list(folder.glob("0*"))) == 2
    return folder


def newest(folder: Path) -> Path:
    return max(path for path in folder.iterdir() if path.name.isdigit())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def largest(folder: Path) -> Path:
    files = [path for path in (folder / "arrays").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda folder: flip(largest(folder)),
    "truncated": lambda folder: os.truncate(largest(folder), 100),
    "a file missing": lambda folder: largest(folder).unlink(),
    "torn": lambda folder: (folder / "state.json").unlink(),
    "a flipped bit in the state": lambda folder: flip(folder / "state.json"),
    "another schema": lambda folder: _edit(folder, schema=9),
    "another checksum": lambda folder: _edit(folder, checksum="0"),
    "foreign": lambda folder: (folder / "state.json").write_text("[]"),
}


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_snapshot_is_named_and_the_one_before_used(
    damage: str, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "snapshots"
    _copy(saved, folder)
    name = newest(folder).name
    DAMAGE[damage](newest(folder))
    with pytest.warns(SnapshotWarning, match=f"passed over: .*{name}.*undamaged snapshot"):
        resumed = train(folder, resume=True)
    assert_same(resumed, train())


def test_where_all_are_damaged_nothing_begins_anew(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    _copy(saved, folder)
    for path in folder.glob("0*"):
        flip(largest(path))
    with (
        pytest.warns(SnapshotWarning),
        pytest.raises(RunError, match="an undamaged snapshot to go on from; got 2 damaged"),
    ):
        train(folder, resume=True)


def test_without_a_snapshot_training_begins_and_says_so(tmp_path: Path) -> None:
    with pytest.warns(SnapshotWarning, match="no snapshot in .* begins at step 0"):
        resumed = train(tmp_path, resume=True)
    assert_same(resumed, train())


def _copy(saved: Path, folder: Path) -> None:
    shutil.copytree(saved, folder)


def test_other_settings_or_data_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    _copy(saved, folder)
    longer = replace(QUICK, steps=300)
    with pytest.raises(RunError, match=r"`config.steps` was 250 and is 300; set them as") as caught:
        train(folder, resume=True, config=longer)
    assert "`data" not in str(caught.value)
    with pytest.raises(RunError, match=r"`data.train/x.sha256` was"):
        cpmm.fit(start(), X + 1, Y, config=QUICK, checkpoints=folder, resume=True)
    with pytest.raises(RunError, match=r"`curriculum.kind` was 'NoCurriculum' and is 'Interp"):
        train(folder, resume=True, kind="interpolant")
    allowed = cpmm.Checkpoints(folder=folder, allow_changes=True)
    assert train(resume=True, config=longer, checkpoints=allowed).steps == 300


def test_an_earlier_training_is_not_written_over(saved: Path) -> None:
    with pytest.raises(RunError, match=r"must hold no snapshots.*go on from it with `resume`"):
        train(saved)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / LOCK), pytest.raises(RunError, match="one process at a time"):
        train(tmp_path)
    assert train(tmp_path).stopped == "finished"


def test_a_full_disk_costs_a_snapshot_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = snapshots.write_snapshot, []

    def full(folder: Path, snapshot: Any) -> None:
        calls.append(folder)
        if len(calls) in (2, 3):
            folder.mkdir()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, snapshot)

    monkeypatch.setattr(snapshots, "write_snapshot", full)
    monkeypatch.setattr(running, "LOOK", 0.0)
    with pytest.warns(SnapshotWarning, match="could not be saved .*No space left.*goes on") as seen:
        result = train(tmp_path)
    assert len(seen) == 1 and len(calls) > 4
    assert_same(result, train())
    assert not list(tmp_path.glob("*.part"))
    assert read_snapshot(newest(tmp_path)).host["step"] == result.steps


def test_a_full_disk_delays_the_reports(tmp_path: Path) -> None:
    class Disk:
        """A file whose disk is full for some writes, of which half a line is left."""

        def __init__(self, path: Path) -> None:
            self.file, self.writes = path.open("wb", buffering=0), 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, content: bytes) -> int:
            self.writes += 1
            if self.writes == 2:
                return self.file.write(content[:5])
            if self.writes == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(content)

    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics._file.close()
        metrics._file = Disk(path)
        with pytest.warns(SnapshotWarning, match="report could not be written .*goes on") as seen:
            for step in range(5):
                metrics.write({"step": step})
    assert len(seen) == 1
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*range(5)]


def test_names_are_plain(saved: Path) -> None:
    names = set(read_snapshot(newest(saved)).arrays)
    assert {"model/means", "best/means", "good/means", "step", "totals/loss"} <= names
    assert all("value" not in name and "." not in name for name in names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_seconds": -1.0}, "`every_seconds` must be at least 0"),
        ({"every_steps": 0}, "`every_steps` must be at least 1"),
        ({"keep": 0}, "`keep` must be at least 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(checkpoints=cpmm.Checkpoints(folder=tmp_path, **settings))


def test_there_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`checkpoints` must be given to `resume`"):
        train(resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="`checkpoints` must name a folder that can be written"):
        train(tmp_path / "file")


def test_differences_are_named() -> None:
    then, now = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}
    assert differences(then, now) == ["`a.c` was 2 and is 3", "`d` was None and is 4"]


def test_a_snapshot_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """`snapshot_v1` was written by the first version; change the schema rather than this file."""
    golden = Path(__file__).parent / "snapshot_v1"
    arrays, host = read_snapshot(golden)
    assert host["schema"] == 1 and host["step"] == 40
    assert arrays["model/field/output/kernel"].shape == (8, 7)
    model, config = golden_training()
    shutil.copytree(golden, tmp_path / "00000040")
    allowed = cpmm.Checkpoints(folder=tmp_path, allow_changes=True)  # libraries may differ
    result = cpmm.fit(model, X, Y, config=config, checkpoints=allowed, resume=True, progress=False)
    assert [report["step"] for report in result.history] == [20, 40, 60]
    assert result.history[1]["loss"] == host["history"][1]["loss"]


def golden_training() -> tuple[cpmm.CPMM, cpmm.TrainConfig]:
    """Return the model and the settings of the golden snapshot."""
    model = cpmm.CPMM(
        2, 1, 2, augmented=1, widths=(8,), solver=cpmm.SolverConfig(num_steps=4), rngs=nnx.Rngs(0)
    )
    return model, replace(QUICK, steps=60, report_every=20)
