"""What bad input gets: one line, exit code 1 or 2, and nothing lost or left half-written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpmm_jax import artifact
from cpmm_jax.errors import DataError
from tests.cli.conftest import Cpmm

GOOD = np.random.default_rng(0).standard_normal((60, 3))
Make = Callable[[Path], str]


def _npy(change: Callable[[np.ndarray], Any]) -> Make:
    def make(folder: Path) -> str:
        path = folder / "data.npy"
        np.save(path, change(GOOD.copy()), allow_pickle=True)
        return str(path)

    return make


def _npz(**arrays: Any) -> Make:
    def make(folder: Path) -> str:
        path = folder / "data.npz"
        np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
        return str(path)

    return make


def _text(text: str, name: str = "data.csv") -> Make:
    def make(folder: Path) -> str:
        (folder / name).write_text(text)
        return str(folder / name)

    return make


def _truncated(folder: Path) -> str:
    path = Path(_npz(x=GOOD)(folder))
    path.write_bytes(path.read_bytes()[:700])
    return str(path)


def _set(row: int, column: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(x: np.ndarray) -> np.ndarray:
        x[row, column] = value
        return x

    return change


Y = np.arange(60) % 2
ROWS = "1,2\n" * 30
FIT: dict[str, tuple[Make, list[str], int, str]] = {
    "NaN": (_npy(_set(7, 1, np.nan)), [], 1, "NaN in row 7 .*column 1"),
    "infinity": (_npy(_set(3, 2, np.inf)), [], 1, "infinity in row 3 .*column 2"),
    "few rows": (_npy(lambda x: x[:9]), ["--components", "40"], 1, "as many rows as.*40 comp"),
    "no rows": (_npy(lambda x: x[:0]), [], 1, "at least one row"),
    "strings": (_text("a,b\n1,2\n1,red\n"), [], 1, "'red' on line 3, column 'b'"),
    "ragged": (_text("1,2\n3,4\n5\n"), [], 1, "2 cells on every line.*1 on line 3"),
    "empty": (_text(""), [], 1, "empty file"),
    "header alone": (_text("a,b\n"), [], 1, "a header alone"),
    "truncated": (_truncated, [], 1, "truncated, damaged or foreign"),
    "foreign npz": (_npz(weights=GOOD), [], 1, "examples either as `x` or as `x_train`"),
    "not an npz": (_text("hello", "data.npz"), [], 1, "truncated, damaged or foreign"),
    "objects": (_npy(lambda x: x.astype(object)), [], 1, "Python objects, which are never loaded"),
    "labels too short": (_npz(x=GOOD, y=Y[:-1]), ["--labels"], 1, "60 examples; got 59 labels"),
    "missing labels": (
        _npz(x=GOOD, y=np.where(Y == 1, np.nan, 0.0)),
        ["--labels"],
        1,
        "a label in every row; got nan in row 1",
    ),
    "no labels": (_npz(x=GOOD), ["--labels"], 1, "must hold labels when they are asked for"),
    "no such column": (_text("a,b\n" + ROWS), ["--label", "c"], 1, "label_column.*got 'c'"),
    "unknown name": (lambda _: "moonz", [], 1, "built-in name .*digits, moons.*'moonz'.*moons"),
    "no such file": (lambda folder: str(folder / "no.csv"), [], 1, "built-in name"),
    "unknown kind": (_text("x", "data.xyz"), [], 1, r"\.npz.*\.csv"),
    "one file as images": (lambda folder: str(folder), [], 1, "train-images-idx3-ubyte"),
    "no components": (_npy(lambda x: x), ["--components", "0"], 2, ">= 1; got '0'"),
    "half a component": (_npy(lambda x: x), ["--components", "1.5"], 2, ">= 1; got '1.5'"),
    "negative rank": (_npy(lambda x: x), ["--rank", "-1"], 2, ">= 0; got '-1'"),
    "rank over D": (_npy(lambda x: x), ["--rank", "4"], 1, "`rank` must be at most D = 3.*got 4"),
    "uneven": (
        _npy(lambda x: x),
        ["--components", "5", "--trajectories", "2"],
        1,
        "multiple of classes x trajectories.*got 5",
    ),
    "rate": (_npy(lambda x: x), ["--learning-rate", "0"], 2, "a number > 0; got '0'"),
    "share": (_npy(lambda x: x), ["--discriminative", "2"], 2, r"in \[0, 1\]; got '2'"),
    "share of nothing": (
        _npy(lambda x: x),
        ["--discriminative", "0.5"],
        1,
        "0 without labels; got 0.5 without labels",
    ),
    "labels and clusters": (
        _npz(x=GOOD, y=Y),
        ["--labels", "--clusters", "3"],
        1,
        "`clusters` must be None where labels are trained on; got 3",
    ),
    "many clusters": (_npy(lambda x: x), ["--clusters", "61"], 1, "as many rows as"),
    "unknown option": (_npy(lambda x: x), ["--rnk", "2"], 2, "unrecognized arguments: --rnk"),
}


@pytest.mark.parametrize("name", FIT)
def test_fit_refuses(name: str, cpmm: Cpmm, tmp_path: Path) -> None:
    make, options, code, message = FIT[name]
    (tmp_path / "in").mkdir()
    answer = cpmm("fit", make(tmp_path / "in"), "--out", tmp_path / "run", *options)
    assert answer.code == code
    _one_line(answer.err, message)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]  # no half-written run


def _one_line(text: str, message: str) -> None:
    line = text.rstrip("\n").splitlines()[-1]
    assert line.startswith("cpmm") and ": error: " in line
    assert "Traceback" not in text
    assert re.search(message, line), line


def test_constant_and_duplicated_columns_are_warned_of(tmp_path: Path, cpmm: Cpmm) -> None:
    columns = [GOOD[:, 0], np.ones(60), GOOD[:, 0], GOOD[:, 1]]
    np.save(tmp_path / "data.npy", np.stack(columns, axis=1))
    answer = cpmm(
        *("fit", tmp_path / "data.npy", "--out", tmp_path / "run", "--steps", 2),
        *("--components", 2, "--rank", 1, "--batch-size", 16, "--quiet"),
    )
    assert answer.code == 0, answer.err
    assert "warning: 1 of 4 columns are constant (column 1)" in answer.err
    assert "1 pair(s) of columns are equal (column 0 = column 2)" in answer.err
    mixture = artifact.load(tmp_path / "run" / "mixture.npz")
    assert np.exp(mixture.log_noise[..., 1]).min() >= 1e-5


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("run", "must not exist yet; got one.*--overwrite"),
        ("file", "must not exist yet"),
        ("file/run", "must lie in a folder that can be written"),
    ],
)
def test_fit_writes_over_nothing(
    place: str, message: str, run: Path, cpmm: Cpmm, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    before = (tmp_path / "run" / "mixture.npz").read_bytes()
    answer = cpmm("fit", "moons", "--out", tmp_path / place)
    assert answer.code == 1
    _one_line(answer.err, message)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "run" / "mixture.npz").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_overwrite_spares_what_is_no_run(cpmm: Cpmm, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    answer = cpmm("fit", "moons", "--out", tmp_path / "home", "--overwrite")
    assert answer.code == 1
    _one_line(answer.err, "must be a run folder to be replaced")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "mine"


def test_a_failed_overwrite_leaves_the_older_run(run: Path, cpmm: Cpmm, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    answer = cpmm("fit", "moonz", "--out", tmp_path / "run", "--overwrite")
    assert answer.code == 1
    _one_line(answer.err, "built-in name")
    assert (tmp_path / "run" / "mixture.npz").read_bytes() == (run / "mixture.npz").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def _no_run(run: Path) -> None:
    shutil.rmtree(run)


def _damaged(run: Path) -> None:
    path = run / "mixture.npz"
    path.write_bytes(path.read_bytes()[:300])


def _later(run: Path) -> None:
    with np.load(run / "mixture.npz") as arrays:
        held = dict(arrays)
    np.savez(run / "mixture.npz", **{**held, "schema": np.int64(99)})


def _later_run(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "schema": 99}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_run, "must be the folder of a finished run.*no such folder"),
        (_damaged, "cannot be read as a mixture"),
        (_later, "later version, schema 99"),
        (_later_run, "must be a run of schema 1; got schema 99"),
    ],
)
def test_spoiled_runs_are_refused(
    spoil: Callable[[Path], None], message: str, run: Path, cpmm: Cpmm, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    spoil(tmp_path / "run")
    for command in (("evaluate", "moons"), ("sample", "--out", str(tmp_path / "s.csv"))):
        answer = cpmm(command[0], tmp_path / "run", *command[1:])
        assert answer.code == 1
        _one_line(answer.err, message)


def test_other_data_are_refused(run: Path, cpmm: Cpmm, tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", GOOD)
    answer = cpmm("evaluate", run, tmp_path / "wide.npy")
    assert answer.code == 1
    _one_line(answer.err, "D = 2 features of training; got D = 3")
    (tmp_path / "ash.csv").write_text("left,kind,right\n1,ash,2\n")
    _one_line(cpmm("evaluate", run, tmp_path / "ash.csv").err, "must be classes of the model")


def test_files_are_not_written_over(run: Path, cpmm: Cpmm, tmp_path: Path) -> None:
    out = tmp_path / "mine.npz"
    out.write_text("mine")
    for command in (("sample", run, "--out", out), ("export", run, out)):
        _one_line(cpmm(*command).err, "must not exist yet; got one")
    _one_line(cpmm("sample", run, "--out", tmp_path / "s.txt").err, r"\.csv or \.npz")
    _one_line(cpmm("export", run, tmp_path / "no" / "m.npz").err, "that can be written")
    assert out.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.npz"]


def test_debug_shows_where(cpmm: Cpmm, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="built-in name"):
        cpmm("fit", "moonz", "--out", tmp_path / "run", "--debug")
