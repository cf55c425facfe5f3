"""Binary files: IDX, and .npy, .npz and IDX that are damaged, forged or a trap."""

from __future__ import annotations

import gzip
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cpmm_jax.data import load
from cpmm_jax.errors import DataError
from tests.data.files import (
    IMAGE_LABELS,
    IMAGES,
    Case,
    X,
    assert_refused_in_one_line,
    idx,
    idx_bytes,
    npy,
    npy_bytes,
    npz,
    text,
    zipped,
)


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


BAD: dict[str, Case] = {
    "empty npz": (lambda f: text(f, "", "f.npz"), {}, ["empty file"]),
    "empty npy": (lambda f: text(f, "", "f.npy"), {}, ["empty file"]),
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
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_get_one_clear_line(case: str, tmp_path: Path) -> None:
    assert_refused_in_one_line(BAD[case], tmp_path)


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
