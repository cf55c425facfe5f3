"""`load`: every kind of file, and one line for every kind of bad input."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cpmm_jax.data import BUILTIN_NAMES, load, recode_labels
from cpmm_jax.errors import DataError, DataWarning

X = np.arange(12.0).reshape(6, 2)
Y = np.array([0, 1, 2, 0, 1, 2])


def npz(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "f.npz", **arrays)
    return folder / "f.npz"


def npy(folder: Path, array: np.ndarray) -> Path:
    np.save(folder / "f.npy", array)
    return folder / "f.npy"


def text(folder: Path, content: str | bytes, name: str = "f.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def npy_bytes(array: np.ndarray, *, claim: tuple[int, ...] | None = None) -> bytes:
    """Return a .npy stream, whose header may claim another shape than its values have."""
    stream = io.BytesIO()
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": claim or array.shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + array.tobytes()


def zipped(folder: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(folder / "f.npz", "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return folder / "f.npz"


def idx_bytes(array: np.ndarray, *, claim: tuple[int, ...] | None = None, code: int = 8) -> bytes:
    shape = claim or array.shape
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, code, len(shape), *shape) + array.tobytes()


def idx(folder: Path, **files: bytes) -> Path:
    names = {
        "train_x": "train-images-idx3-ubyte",
        "train_y": "train-labels-idx1-ubyte",
        "test_x": "t10k-images-idx3-ubyte",
        "test_y": "t10k-labels-idx1-ubyte",
    }
    for key, content in files.items():
        packed = key.endswith("_gz")
        name = names[key.removesuffix("_gz")] + (".gz" if packed else "")
        (folder / name).write_bytes(gzip.compress(content) if packed else content)
    return folder


IMAGES = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
IMAGE_LABELS = np.array([3, 8, 3, 8, 3], np.uint8)


# --- what is read -------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b", "c", "a", "a"], ("a", "b", "c")),
        (["10", "9", "9", "10", "9", "9"], ("9", "10")),  # as numbers, not as words
        ([1.0, 0.0, 1.0, 0.0, 1.0, 2.0], ("0", "1", "2")),
        ([True, False, True, True, True, True], ("0", "1")),
        ([b"u", b"v", b"u", b"u", b"u", b"u"], ("u", "v")),
    ],
)
def test_label_kinds(tmp_path: Path, labels: list, names: tuple[str, ...]) -> None:
    data = load(npz(tmp_path, x=X, y=np.array(labels)), labels=True)
    assert data.class_names == names
    back = [str(value.decode() if isinstance(value, bytes) else value) for value in labels]
    if names[0] in ("a", "9", "u"):
        assert [names[code] for code in data.y_train] == back


def test_npy(tmp_path: Path) -> None:
    np.testing.assert_array_equal(load(npy(tmp_path, X.astype(">f8"))).x_train, X)
    assert load(npy(tmp_path, X.astype(">f8"))).x_train.dtype.isnative
    assert load(npy(tmp_path, IMAGES)).event_shape == (4, 3)


@pytest.mark.parametrize(
    ("content", "column", "names", "classes"),
    [
        ("1,2\n3,4\n", None, None, None),
        ("a,b\n1,2\n\n3,4\n", None, ("a", "b"), None),
        ("\ufeffa, b\r\n1, 2\r\n3, 4\r\n", None, ("a", "b"), None),
        ("a,kind,b\n1,u,2\n3,v,4\n", "kind", ("a", "b"), ("u", "v")),
        ("1,u,2\n3,v,4\n", "1", None, ("u", "v")),
        ("a,b,kind\n1,2,7\n3,4,5\n", "2", ("a", "b"), ("5", "7")),
        ('"a\nb",b\n1,2\n3,4\n', None, ("a\nb", "b"), None),
    ],
)
def test_csv(
    tmp_path: Path, content: str, column: str | None, names: tuple, classes: tuple
) -> None:
    data = load(text(tmp_path, content), label_column=column)
    np.testing.assert_array_equal(data.x_train, [[1.0, 2.0], [3.0, 4.0]])
    assert data.feature_names == names and data.class_names == classes


@pytest.mark.parametrize("ending", ["", "_gz"])
def test_idx(tmp_path: Path, ending: str) -> None:
    contents = {
        "train_x": idx_bytes(IMAGES),
        "train_y": idx_bytes(IMAGE_LABELS),
        "test_x": idx_bytes(IMAGES[:2]),
        "test_y": idx_bytes(IMAGE_LABELS[:2]),
    }
    data = load(idx(tmp_path, **{key + ending: value for key, value in contents.items()}))
    assert data.event_shape == (4, 3) and data.class_names == ("3", "8")
    np.testing.assert_array_equal(data.x_train.reshape(5, 4, 3), IMAGES)
    np.testing.assert_array_equal(data.x_test.reshape(2, 4, 3), IMAGES[:2])
    np.testing.assert_array_equal(data.y_test, [0, 1])


def test_idx_big_endian_floats_without_labels(tmp_path: Path) -> None:
    values = (IMAGES / 7).astype(">f4")
    data = load(idx(tmp_path, train_x=idx_bytes(values, code=0x0D)))
    np.testing.assert_array_equal(data.x_train, values.reshape(5, 12))
    assert data.x_train.dtype.isnative and data.y_train is None and data.x_test is None


def test_a_name_wins_over_a_folder_but_a_path_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("moons").mkdir()
    assert load("moons").name == "moons"
    for source in ("./moons", Path("moons")):
        with pytest.raises(DataError, match="train-images-idx3-ubyte"):
            load(source)


def test_recode_labels_follows_the_class_names_of_a_model(tmp_path: Path) -> None:
    data = load(npz(tmp_path, x=X, y=np.array([5, 3, 5, 5, 3, 3])))
    recoded = recode_labels(data, ["1", "3", "4", "5"])
    np.testing.assert_array_equal(recoded.y_train, [3, 1, 3, 3, 1, 1])
    assert recoded.class_names == ("1", "3", "4", "5")
    assert recode_labels(recoded, ("1", "3", "4", "5")) is recoded
    with pytest.raises(DataError, match="'5'") as caught:
        recode_labels(data, ["1", "3"])
    assert "\n" not in str(caught.value)


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


# --- what bad input gets ------------------------------------------------------------------------

BAD = {
    # names and kinds
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
    # empty and damaged
    "empty npz": (lambda f: text(f, "", "f.npz"), {}, ["empty file"]),
    "empty npy": (lambda f: text(f, "", "f.npy"), {}, ["empty file"]),
    "empty csv": (lambda f: text(f, ""), {}, ["empty file"]),
    "blank csv": (lambda f: text(f, "\n \n\n"), {}, ["empty file"]),
    "header alone": (lambda f: text(f, "a,b\n"), {}, ["header alone"]),
    "truncated npz": (
        lambda f: text(f, npz(f, x=X).read_bytes()[:-40], "g.npz"),
        {},
        ["intact .npz", "truncated"],
    ),
    "truncated npy": (
        lambda f: text(f, npy(f, X).read_bytes()[:-8], "g.npy"),
        {},
        ["truncated", "got 216 bytes"],
    ),
    "trailing bytes": (lambda f: text(f, npy_bytes(X) * 2, "f.npy"), {}, ["not a single array"]),
    "flipped byte": (
        lambda f: text(
            f, zipped(f, x=npy_bytes(X)).read_bytes().replace(b"\x26@", b"\x27@"), "g.npz"
        ),
        {},
        ["intact .npz", "damaged"],
    ),
    "npz is text": (lambda f: text(f, "hello", "f.npz"), {}, ["foreign"]),
    "npz is a pickle": (lambda f: text(f, pickle.dumps(X), "f.npz"), {}, ["foreign"]),
    "npy is a pickle": (lambda f: text(f, pickle.dumps(X), "f.npy"), {}, ["foreign"]),
    "npz holds text": (lambda f: zipped(f, x=b"hello, this is no array"), {}, ["foreign"]),
    "bzip2 npz": (lambda f: zipped(f, zipfile.ZIP_BZIP2, x=npy_bytes(X)), {}, ["foreign"]),
    "csv is binary": (lambda f: text(f, b"\x93NUMPY\xff\x00\n"), {}, ["UTF-8", "foreign"]),
    "csv with NUL": (lambda f: text(f, "1,2\n1,\0\n"), {}, ["'\\x00'", "line 2"]),
    "idx is text": (lambda f: idx(f, train_x=b"hello"), {}, ["intact IDX", "foreign"]),
    "idx is short": (lambda f: idx(f, train_x=idx_bytes(IMAGES)[:-1]), {}, ["truncated"]),
    "idx.gz is short": (lambda f: idx(f, train_x_gz=idx_bytes(IMAGES)[:-1]), {}, ["truncated"]),
    "idx.gz is long": (lambda f: idx(f, train_x_gz=idx_bytes(IMAGES) + b"a"), {}, ["damaged"]),
    "idx.gz is not gzip": (
        lambda f: text(f, "hello", "train-images-idx3-ubyte.gz").parent,
        {},
        ["damaged"],
    ),
    "idx without train": (lambda f: idx(f, test_x=idx_bytes(IMAGES)), {}, ["train-images", "t10k"]),
    # headers that claim more than there is
    "huge npy": (
        lambda f: text(f, npy_bytes(X, claim=(10**12, 2)), "f.npy"),
        {},
        ["16000000000", "claims"],
    ),
    "huge npz": (lambda f: zipped(f, x=npy_bytes(X, claim=(10**12, 2))), {}, ["`x`", "claims"]),
    "negative shape": (lambda f: zipped(f, x=npy_bytes(X, claim=(-6, -2))), {}, ["foreign"]),
    "huge idx": (
        lambda f: idx(f, train_x=idx_bytes(IMAGES, claim=(2**31, 99, 99))),
        {},
        ["claims"],
    ),
    "huge idx.gz": (
        lambda f: idx(f, train_x_gz=idx_bytes(IMAGES, claim=(2**31, 99, 99))),
        {},
        ["forged"],
    ),
    # arrays
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
    # tables
    "word in a column": (
        lambda f: text(f, "a,b\n1,2\n3,four\n"),
        {},
        ["'four'", "line 3", "column 'b'"],
    ),
    "word without header": (
        lambda f: text(f, "1,2\n3,four\n"),
        {},
        ["'four'", "line 2", "column 1"],
    ),
    "missing cell": (lambda f: text(f, "1,2\n3,\n"), {}, ["''", "(missing)", "line 2", "column 1"]),
    "missing cell at first": (lambda f: text(f, "1,\n3,4\n"), {}, ["(missing)", "line 1"]),
    "ragged": (
        lambda f: text(f, "a,b\n1,2\n\n3,4,5\n"),
        {},
        ["2 cells", "got 3 on line 4", "ragged"],
    ),
    "NaN in a table": (
        lambda f: text(f, "a,b\n1,2\n\n3,nan\n"),
        {},
        ["NaN in line 4", "column 'b'", "1 such"],
    ),
    "infinity in a table": (lambda f: text(f, "1,2\n1e999,4\n"), {}, ["infinity in line 2"]),
    "unknown label column": (
        lambda f: text(f, "a,b\n1,2\n"),
        {"label_column": "c"},
        ["'c'", "'a', 'b'"],
    ),
    "label column beyond": (
        lambda f: text(f, "1,2\n"),
        {"label_column": "2"},
        ["0..1", "'2'", "no header"],
    ),
    "two label columns": (lambda f: text(f, "a,a\n1,2\n"), {"label_column": "a"}, ["one column"]),
    "labels alone": (lambda f: text(f, "a\n1\n"), {"label_column": "a"}, ["labels alone"]),
    "open quote": (lambda f: text(f, '1,2\n"3,4\n'), {}, ["damaged"]),
    # labels
    "none in a set": (lambda f: "checkerboard", {"labels": True}, ["labels", "checkerboard"]),
    "none in npy": (lambda f: npy(f, X), {"labels": True}, ["labels", "one array"]),
    "none in npz": (lambda f: npz(f, x=X, t=Y), {"labels": True}, ["'x', 't'", "`y`"]),
    "none for train": (
        lambda f: npz(f, x_train=X, x_test=X, y_test=Y),
        {"labels": True},
        ["'y_test'", "`y_train`"],
    ),
    "none in csv": (
        lambda f: text(f, "a,b\n1,2\n"),
        {"labels": True},
        ["'a', 'b'", "label_column"],
    ),
    "none in idx": (
        lambda f: idx(f, train_x=idx_bytes(IMAGES)),
        {"labels": True},
        ["train-labels-idx1-ubyte"],
    ),
    "of another length": (lambda f: npz(f, x=X, y=Y[:4]), {}, ["`y`", "6 examples", "4 labels"]),
    "of another length in idx": (
        lambda f: idx(f, train_x=idx_bytes(IMAGES), train_y=idx_bytes(IMAGE_LABELS[:3])),
        {},
        ["train-labels", "5 examples", "3 labels"],
    ),
    "one-hot": (lambda f: npz(f, x=X, y=np.eye(6)), {}, ["`y`", "(6, 6)", "argmax"]),
    "NaN label": (
        lambda f: npz(f, x=X, y=np.where(Y == 2, np.nan, Y)),
        {"labels": True},
        ["nan in row 2", "2 such"],
    ),
    "fractional label": (lambda f: npz(f, x=X, y=Y / 2), {"labels": True}, ["0.5 in row 1"]),
    "negative label": (
        lambda f: npz(f, x=X, y=Y - 1),
        {"labels": True},
        ["-1 in row 0", "missing"],
    ),
    "huge label": (
        lambda f: npz(f, x=X, y=np.full(6, 2**63, np.uint64)),
        {"labels": True},
        ["2**63"],
    ),
    "complex label": (lambda f: npz(f, x=X, y=Y + 1j), {"labels": True}, ["integer", "complex"]),
    "bytes label": (lambda f: npz(f, x=X, y=np.array([b"\xff"] * 6)), {"labels": True}, ["UTF-8"]),
    "empty label": (
        lambda f: text(f, "a,y\n1,u\n\n2,\n"),
        {"labels": True, "label_column": "y"},
        ["label column y", "'' in line 4"],
    ),
    "class absent in train": (
        lambda f: npz(f, x_train=X, y_train=Y, x_test=X, y_test=Y + 1),
        {"labels": True},
        ["`y_test`", "`y_train`", "3 in row 2", "2 such"],
    ),
    "words against numbers": (
        lambda f: npz(f, x_train=X, y_train=Y, x_test=X[:1], y_test=np.array(["u"])),
        {"labels": True},
        ["`y_test`", "'u' in row 0"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line(case: str, tmp_path: Path) -> None:
    build, options, words = BAD[case]
    with pytest.raises(DataError) as caught:
        load(build(tmp_path), **options)
    message = str(caught.value)
    assert "\n" not in message and message.count(";") >= 2 and len(message) < 500, message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "y", [Y / 2, Y - 1, np.where(Y == 0, np.nan, Y)], ids=["target", "negative", "missing"]
)
def test_labels_nobody_asked_for_are_left_out_with_a_warning(tmp_path: Path, y: np.ndarray) -> None:
    with pytest.warns(DataWarning, match="left out") as caught:
        data = load(npz(tmp_path, x=X, y=y))
    assert data.y_train is None and data.class_names is None
    assert caught[0].filename == __file__


def test_test_labels_without_training_labels_are_left_out(tmp_path: Path) -> None:
    with pytest.warns(DataWarning, match="`y_test`"):
        assert load(npz(tmp_path, x_train=X, x_test=X, y_test=Y)).y_test is None


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = npy(tmp_path, X)

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # a mode of 000 does not stop root
    with pytest.raises(DataError, match="Permission denied"):
        load(path)


def test_no_file_runs_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    bomb = np.empty((1, 1), object)
    bomb[0, 0] = Bomb()
    for path in (npy(tmp_path, bomb), npz(tmp_path, x=bomb), npz(tmp_path, x=X[:1], y=bomb[0])):
        with pytest.raises(DataError, match="never loaded"):
            load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["npy", "npz", "idx", "idx.gz"])
def test_every_truncation_is_refused(tmp_path: Path, kind: str) -> None:
    whole = {
        "npy": npy_bytes(X),
        "npz": zipped(tmp_path, zipfile.ZIP_DEFLATED, x=npy_bytes(X)).read_bytes(),
        "idx": idx_bytes(IMAGES),
        "idx.gz": gzip.compress(idx_bytes(IMAGES)),
    }[kind]
    name = "train-images-idx3-ubyte" + kind[3:] if kind.startswith("idx") else f"g.{kind}"
    for length in range(0, len(whole), 7):
        path = text(tmp_path, whole[:length], name)
        with pytest.raises(DataError) as caught:
            load(path.parent if kind.startswith("idx") else path)
        assert "\n" not in str(caught.value)
