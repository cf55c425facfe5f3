"""`load`: names, paths and arrays; what it cannot make sense of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cpmm_jax.data import BUILTIN_NAMES, load
from cpmm_jax.errors import DataError
from tests.data.files import (
    IMAGE_LABELS,
    IMAGES,
    Case,
    X,
    Y,
    assert_refused_in_one_line,
    npy,
    npz,
    text,
)


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_load_reads_every_builtin_with_its_parts(name: str) -> None:
    data = load(name, seed=1)
    again = load(name, seed=1)
    np.testing.assert_array_equal(data.x_train, again.x_train)
    assert not np.array_equal(data.x_train, load(name, seed=2).x_train)
    if name == "digits":
        assert (len(data.x_train), data.x_valid, len(data.x_test)) == (1347, None, 450)
        assert data.event_shape == (8, 8) and data.class_names == tuple("0123456789")
        for digit in range(10):  # stratified
            assert abs((data.y_train == digit).mean() - (data.y_test == digit).mean()) < 0.002
    else:
        assert [len(x) for x in (data.x_train, data.x_valid, data.x_test)] == [3000, 1000, 1000]
        assert (data.y_train is None) == (name == "checkerboard")


def test_npz_with_one_array_ignores_the_others(tmp_path: Path) -> None:
    path = npz(tmp_path, x=X.astype(np.float32), y=Y + 3, note=np.array(["a"]), z=np.ones(1))
    data = load(str(path), labels=True)
    assert data.name == "f" and data.x_valid is None and data.x_test is None
    assert data.x_train.dtype == np.float32 and data.y_train.dtype == np.int64
    assert data.class_names == ("3", "4", "5") and data.num_classes == 3 and data.dim == 2
    np.testing.assert_array_equal(data.y_train, Y)


def test_npz_with_parts_codes_labels_by_the_training_part(tmp_path: Path) -> None:
    path = npz(tmp_path, x_train=X, y_train=Y * 2 + 1, x_test=X[:2], y_test=[5, 1], x_valid=X[:1])
    data = load(path)
    assert data.class_names == ("1", "3", "5") and data.y_valid is None
    np.testing.assert_array_equal(data.y_test, [2, 0])
    np.testing.assert_array_equal(data.part("test")[1], [2, 0])


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_images_are_flattened(tmp_path: Path, compressed: bool) -> None:
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "f.npz", x_train=np.asfortranarray(IMAGES), y_train=IMAGE_LABELS[:, None])
    data = load(tmp_path / "f.npz")
    assert data.event_shape == (4, 3) and data.x_train.dtype == np.float32
    np.testing.assert_array_equal(data.x_train.reshape(5, 4, 3), IMAGES)


def test_npz_ignored_array_of_objects_is_never_read(tmp_path: Path) -> None:
    path = npz(tmp_path, x=X, extra=np.array([{}, 1], object))
    np.testing.assert_array_equal(load(path).x_train, X)


def test_npy(tmp_path: Path) -> None:
    np.testing.assert_array_equal(load(npy(tmp_path, X.astype(">f8"))).x_train, X)
    assert load(npy(tmp_path, X.astype(">f8"))).x_train.dtype.isnative
    assert load(npy(tmp_path, IMAGES)).event_shape == (4, 3)


def test_a_name_wins_over_a_folder_but_a_path_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("moons").mkdir()
    assert load("moons").name == "moons"
    for source in ("./moons", Path("moons")):
        with pytest.raises(DataError, match="train-images-idx3-ubyte"):
            load(source)


def test_data_needs_no_jax() -> None:
    code = (
        "import sys; sys.modules['jax'] = None; sys.modules['sklearn'] = None\n"
        "from cpmm_jax.data import load, Standardizer\n"
        "Standardizer.fit(load('moons').x_train)\n"
        "try: load('digits')\n"
        "except ValueError as error: print(error)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert "cpmm_jax[sklearn]" in done.stdout and done.stdout.count("\n") == 1


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = npy(tmp_path, X)

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # a mode of 000 does not stop root
    with pytest.raises(DataError, match="Permission denied"):
        load(path)


BAD: dict[str, Case] = {
    "unknown name": (
        lambda f: "digit",
        {},
        ["25gaussians", ".npz", "IDX", "did you mean 'digits'"],
    ),
    "newline in the name": (lambda f: "no\nsuch", {}, ["digits", "check the name"]),
    "other kind": (lambda f: text(f, "1 2", "f.txt"), {}, [".npz", "another kind", "f.txt"]),
    "too long a name": (lambda f: "x" * 5000, {}, ["readable"]),
    "folder without data": (lambda f: f, {}, ["train-images-idx3-ubyte", "no files"]),
    "label column of npz": (lambda f: npz(f, x=X), {"label_column": "y"}, ["label_column", ".csv"]),
    "label column of a name": (lambda f: "moons", {"label_column": "y"}, ["label_column", ".csv"]),
    "objects in npy": (
        lambda f: npy(f, np.array([[1, {}]], object)),
        {},
        ["dtype 'object'", "never"],
    ),
    "objects in npz": (
        lambda f: npz(f, x=X.astype(object)),
        {},
        ["`x`", "dtype 'object'", "never"],
    ),
    "labels as objects": (lambda f: npz(f, x=X, y=Y.astype(object)), {}, ["`y`", "dtype 'object'"]),
    "records": (lambda f: npy(f, np.zeros(3, [("a", "f8")])), {}, ["not plain numbers"]),
    "strings": (lambda f: npz(f, x=X.astype(str)), {}, ["`x`", "real numbers", "<U"]),
    "a word": (lambda f: npz(f, x=np.array([["1", "q"]])), {}, ["row 0", "column 1", "'q'"]),
    "complex": (lambda f: npz(f, x=X + 1j), {}, ["`x`", "real numbers", "complex128"]),
    "one dimension": (lambda f: npy(f, X[0]), {}, ["(N, D)", "(2,)", "reshape"]),
    "no dimension": (lambda f: npy(f, np.array(1.0)), {}, ["(N, D)", "()"]),
    "no rows": (lambda f: npz(f, x=X[:0]), {}, ["`x`", "(0, 2)"]),
    "no images": (lambda f: npz(f, x=IMAGES[:0]), {}, ["`x`", "(0, 0)"]),
    "NaN": (
        lambda f: npz(f, x=np.where(X > 8, np.nan, X)),
        {},
        ["NaN in row 4", "column 1", "3 such"],
    ),
    "infinity": (
        lambda f: npz(f, x_train=X, x_test=np.where(X == 4, -np.inf, X)),
        {},
        ["`x_test`", "-infinity in row 2", "column 0", "1 such"],
    ),
    "neither x nor x_train": (lambda f: npz(f, data=X), {}, ["`x`", "`x_train`", "'data'"]),
    "both x and x_train": (lambda f: npz(f, x=X, x_train=X), {}, ["either", "'x_train'"]),
    "test part of another D": (
        lambda f: npz(f, x_train=X, x_test=X[:, :1]),
        {},
        ["`x_test`", "D = 2", "D = 1"],
    ),
    "test part of another shape": (
        lambda f: npz(f, x_train=IMAGES, x_test=IMAGES[:, :3]),
        {},
        ["`x_test`", "(4, 3)", "(3, 3)"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_names_and_arrays_get_one_clear_line(case: str, tmp_path: Path) -> None:
    assert_refused_in_one_line(BAD[case], tmp_path)
