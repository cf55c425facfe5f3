"""Snapshots that are damaged, of others, short of disk, or of an earlier version."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flax import nnx

import cpmm_jax as cpmm
from cpmm_jax.errors import ConfigError, Interrupted, RunError, SnapshotWarning
from cpmm_jax.files import locked
from cpmm_jax.training import running, snapshots
from cpmm_jax.training.checkpoint import checksum
from cpmm_jax.training.progress import MetricsFile
from cpmm_jax.training.snapshot_file import read_snapshot
from cpmm_jax.training.snapshots import differences
from tests.training.stand_in import QUICK, start
from tests.training.test_snapshots import X, Y, assert_same, stop_at, train


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


def _edit_host(folder: Path, **changes: Any) -> None:
    """Change the state, and the checksum with it."""
    path = folder / "state.json"
    content = json.loads(path.read_text()) | changes
    del content["checksum"]
    content["checksum"] = checksum(content, folder / "arrays")
    path.write_text(json.dumps(content))


def test_other_software_is_told_of(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    _copy(saved, folder)
    for path in folder.glob("0*"):
        versions = json.loads((path / "state.json").read_text())["versions"]
        _edit_host(path, versions=versions | {"jax": "0.1"})
    with pytest.warns(SnapshotWarning, match=r"other software: `jax` was '0\.1' and is '0\.1\d"):
        train(folder, resume=True)


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


def test_a_damaged_snapshot_takes_nobodys_place(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    _copy(saved, folder)
    good, bad = sorted(path for path in folder.iterdir() if path.name.isdigit())
    flip(largest(bad))
    bad.rename(folder / "00009999")
    good.rename(good.with_suffix(".old"))  # killed while a snapshot of the same step was replaced
    (folder / "00000007.part").mkdir()
    one = cpmm.Checkpoints(folder=folder, keep=1)
    with pytest.warns(SnapshotWarning, match="passed over"):
        train(checkpoints=one, resume=True)
    kept = {path.name for path in folder.iterdir()} - {".lock"}
    assert kept == {"00009999.damaged", "00000250"}
    assert_same(train(folder, resume=True), train())


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
    with pytest.raises(RunError, match="the same curriculum"):
        _edit_host(newest(folder), stage={"index": 7, "start": 0, "score": None})
        train(resume=True, checkpoints=allowed)
    shutil.rmtree(newest(folder))
    assert train(resume=True, config=longer, checkpoints=allowed).steps == 300


def test_an_earlier_training_is_not_written_over(saved: Path) -> None:
    with pytest.raises(RunError, match=r"must hold no snapshots.*go on from it with `resume`"):
        train(saved)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(RunError, match="one process at a time"):
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

    def due(self: snapshots.Saver, step: int) -> bool:
        if self._pending is not None:
            self._pending.result()
        return step % 50 == 0

    monkeypatch.setattr(snapshots, "write_snapshot", full)
    monkeypatch.setattr(snapshots.Saver, "due", due)
    monkeypatch.setattr(running, "LOOK", 0.0)
    with pytest.warns(SnapshotWarning, match="could not be saved .*No space left.*goes on") as seen:
        result = train(tmp_path)
    assert len(seen) == 1 and len(calls) > 4
    assert_same(result, train())
    assert not list(tmp_path.glob("*.part"))
    assert read_snapshot(newest(tmp_path)).host["step"] == result.steps


@pytest.mark.parametrize("report", [1, 5])
@pytest.mark.parametrize("full", [False, True])
def test_a_signal_says_what_became_of_the_training(
    report: int, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it comes at the end, and where the disk is full by then."""

    def fail(folder: Path, snapshot: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if full:
        monkeypatch.setattr(snapshots, "write_snapshot", fail)
    how = "finished when it was stopped" if report == 5 else "stopped"
    what = "could not be saved since its last snapshot" if full else "is saved"
    with (
        pytest.raises(Interrupted, match=rf"training was {how} by SIGTERM at step .*, and {what}"),
        pytest.warns(SnapshotWarning, match="could not be saved") if full else nullcontext(),
    ):
        train(tmp_path, callback=stop_at(report), checkpoints=cpmm.Checkpoints(folder=tmp_path))


def test_a_full_disk_delays_the_reports(tmp_path: Path) -> None:
    class Disk:
        """A file whose disk is full for some writes, of which half a line is left."""

        def __init__(self, path: Path) -> None:
            self.file, self.writes = path.open("wb", buffering=0), 0
            self.is_full = False

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, content: bytes) -> int:
            self.writes += 1
            if self.writes == 2:
                return self.file.write(content[:5])
            if self.writes == 3 or self.is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(content)

    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics._file.close()
        metrics._file = Disk(path)
        with pytest.warns(SnapshotWarning, match="report could not be written .*goes on") as seen:
            for step in range(5):
                metrics._file.is_full = step == 4
                metrics.write({"step": step})
            metrics._file.is_full = False  # there is room again for the last line at the end
    assert len(seen) == 2
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SnapshotWarning)  # of libraries
        result = cpmm.fit(
            model, X, Y, config=config, checkpoints=allowed, resume=True, progress=False
        )
    assert [report["step"] for report in result.history] == [20, 40, 60]
    assert result.history[1]["loss"] == host["history"][1]["loss"]


def golden_training() -> tuple[cpmm.CPMM, cpmm.TrainConfig]:
    """Return the model and the settings of the golden snapshot."""
    model = cpmm.CPMM(
        2, 1, 2, augmented=1, widths=(8,), solver=cpmm.SolverConfig(num_steps=4), rngs=nnx.Rngs(0)
    )
    return model, replace(QUICK, steps=60, report_every=20)
