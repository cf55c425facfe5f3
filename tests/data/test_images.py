"""Folders of images: CIFAR's batches and PNG files, written here by the letter of their formats."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from cpmm_jax.data import load
from cpmm_jax.data.images import read_png
from cpmm_jax.errors import DataError
from tests.data.files import (
    IMAGE_LABELS,
    IMAGES,
    Case,
    assert_refused_in_one_line,
    cifar_bytes,
    idx,
    idx_bytes,
    npz,
    png_bytes,
    text,
    tree,
)

RNG = np.random.default_rng(0)
COLOURED = RNG.integers(0, 256, (5, 4, 3, 3), dtype=np.uint8)
TINY = RNG.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
CODES = np.array([9, 0, 3, 3, 1, 2, 4, 5, 6, 7, 9, 0])
NAMES = [f"class {letter}" for letter in "abcdefghij"]
GREY, RGB = png_bytes(IMAGES[0]), png_bytes(COLOURED[0])


def cifar10(folder: Path, **replaced: bytes | None) -> Path:
    """Write two images to each of six batches; None leaves a file out."""
    files: dict[str, bytes | None] = {}
    for i, name in enumerate([*(f"data_batch_{b}" for b in range(1, 6)), "test_batch"]):
        files[name] = cifar_bytes(TINY[2 * i : 2 * i + 2], CODES[2 * i : 2 * i + 2])
    files |= replaced
    return tree(folder, {f"{name}.bin": held for name, held in files.items() if held is not None})


def test_cifar10(tmp_path: Path) -> None:
    data = load(cifar10(tmp_path), labels=True)
    assert data.event_shape == (32, 32, 3) and data.x_train.dtype == np.float32
    np.testing.assert_array_equal(data.x_train.reshape(10, 32, 32, 3), TINY[:10])
    np.testing.assert_array_equal(data.x_test.reshape(2, 32, 32, 3), TINY[10:])
    assert [data.class_names[code] for code in data.y_train] == [str(c) for c in CODES[:10]]


def test_cifar10_with_the_names_of_its_classes(tmp_path: Path) -> None:
    text(tmp_path, "\n".join(NAMES) + "\n\n", "batches.meta.txt")
    data = load(cifar10(tmp_path))
    assert [data.class_names[code] for code in data.y_train] == [NAMES[c] for c in CODES[:10]]
    assert data.class_names[data.y_test[1]] == "class a"


def test_cifar100_has_its_fine_labels(tmp_path: Path) -> None:
    coarse, fine = np.full(12, 19), CODES * 11
    files = {
        "train.bin": cifar_bytes(TINY, coarse, fine),
        "test.bin": cifar_bytes(TINY[:1], [1], [0]),
    }
    data = load(tree(tmp_path, files))
    np.testing.assert_array_equal(data.x_train.reshape(12, 32, 32, 3), TINY)
    assert [data.class_names[code] for code in data.y_train] == [str(c) for c in fine]


def test_png_files_without_labels(tmp_path: Path) -> None:
    files = {f"{i}.{'PNG' if i else 'png'}": png_bytes(image) for i, image in enumerate(IMAGES)}
    data = load(tree(tmp_path, {**files, "README": b"hello", ".hidden.png": b""}))
    assert data.event_shape == (4, 3) and data.y_train is None and data.x_test is None
    np.testing.assert_array_equal(data.x_train.reshape(5, 4, 3), IMAGES)


def test_png_files_in_folders_of_classes(tmp_path: Path) -> None:
    files = {f"{'ab'[i % 2]}/{i}.png": png_bytes(image) for i, image in enumerate(COLOURED)}
    data = load(tree(tmp_path, files), labels=True)
    assert data.event_shape == (4, 3, 3) and data.class_names == ("a", "b")
    np.testing.assert_array_equal(data.y_train, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(data.x_train.reshape(5, 4, 3, 3), COLOURED[[0, 2, 4, 1, 3]])


def test_png_files_in_parts(tmp_path: Path) -> None:
    places = ("train/8", "train/3", "train/3", "valid/8", "test/3")
    files = {f"{place}/{i}.png": png_bytes(IMAGES[i]) for i, place in enumerate(places)}
    data = load(tree(tmp_path, files), labels=True)
    assert data.class_names == ("3", "8")
    np.testing.assert_array_equal(data.x_train.reshape(-1, 4, 3), IMAGES[[1, 2, 0]])
    np.testing.assert_array_equal(data.x_valid.reshape(-1, 4, 3), IMAGES[3:4])
    assert [y.tolist() for y in (data.y_train, data.y_valid, data.y_test)] == [[0, 0, 1], [1], [0]]
    unlabelled = tree(tmp_path / "u", {"train/0.png": GREY, "test/0.png": GREY})
    assert load(unlabelled).y_train is None and len(load(unlabelled).x_test) == 1


def test_png_files_of_pillow_are_read(tmp_path: Path) -> None:
    PIL.Image.fromarray(COLOURED[0]).save(tmp_path / "a.png", optimize=True)
    np.testing.assert_array_equal(read_png(tmp_path / "a.png"), COLOURED[0])


def test_npz_of_coloured_images(tmp_path: Path) -> None:
    data = load(npz(tmp_path, x_train=COLOURED, x_test=COLOURED[:2]))
    assert data.event_shape == (4, 3, 3)
    np.testing.assert_array_equal(data.x_test.reshape(2, 4, 3, 3), COLOURED[:2])


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"Pillow; got no such package.*cpmm_jax\[plot\]"):
        load(tree(tmp_path, {"a.png": GREY}))


def test_pillows_limit_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 11)  # it only warns up to twice this
    with pytest.raises(DataError, match=r"a.png' must hold at most 11 pixels.*bomb"):
        load(tree(tmp_path, {"a.png": GREY}))


def link(folder: Path, name: str, target: Path) -> Path:
    (folder / "data").mkdir()
    (folder / "data" / name).symlink_to(target)
    return tree(folder / "data", {"b/0.png": GREY})


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a.png")
    return folder


BAD: dict[str, Case] = {
    "cifar without a batch": (
        lambda f: cifar10(f, data_batch_3=None),
        {},
        ["got no data_batch_3.bin", "binary"],
    ),
    "cifar batch cut off": (
        lambda f: cifar10(f, data_batch_2=bytes(3072)),
        {},
        ["data_batch_2.bin", "3073 bytes", "got 3072 bytes (truncated"],
    ),
    "cifar batch empty": (lambda f: cifar10(f, test_batch=b""), {}, ["test_batch.bin", "got 0"]),
    "cifar label out of range": (
        lambda f: cifar10(f, data_batch_5=bytes(3073) + b"\x0a" + bytes(3072)),
        {},
        ["data_batch_5.bin", "labels 0..9", "got 10 in record 1"],
    ),
    "cifar names of another set": (
        lambda f: cifar10(text(f, "cat\ndog\n", "batches.meta.txt").parent),
        {},
        ["batches.meta.txt", "10 different", "got 2"],
    ),
    "cifar names that are none": (
        lambda f: cifar10(text(f, b"\xff\xfe", "batches.meta.txt").parent),
        {},
        ["batches.meta.txt", "damaged"],
    ),
    "cifar as pickles": (
        lambda f: text(f, b"\x80\x04.", "data_batch_1").parent,
        {},
        ["data_batch_1.bin", "'data_batch_1'", "never loaded"],
    ),
    "cifar without training part": (
        lambda f: tree(f, {"test.bin": cifar_bytes(TINY[:1], [0], [0])}),
        {},
        ["got no train.bin"],
    ),
    "png of another size": (
        lambda f: tree(f, {"a.png": GREY, "b.png": png_bytes(IMAGES[0].T)}),
        {},
        ["b.png' must", "'a.png', 4 x 3 grey", "got 3 x 4 grey"],
    ),
    "png of another mode": (
        lambda f: tree(f, {"test/a/1.png": RGB, "train/a/0.png": GREY}),
        {},
        ["1.png' must", "'train/a/0.png', 4 x 3 grey", "got 4 x 3 RGB"],
    ),
    "png with a palette": (
        lambda f: tree(f, {"a.png": png_bytes(IMAGES[0], colour=3)}),
        {},
        ["a.png", "grey or RGB", "'P'"],
    ),
    "png of 16 bits": (
        lambda f: tree(f, {"a.png": png_bytes(COLOURED[0].astype(">u2"), depth=16)}),
        {},
        ["a.png", "8 bits", "16 bits", "convert"],
    ),
    "png with transparency": (
        lambda f: tree(f, {"a.png": png_bytes(np.zeros((2, 2, 4), np.uint8), colour=6)}),
        {},
        ["a.png", "'RGBA'"],
    ),
    "png is text": (lambda f: tree(f, {"a.png": b"hello", "b.png": GREY}), {}, ["a.png", "intact"]),
    "png is empty": (lambda f: tree(f, {"a.png": b""}), {}, ["a.png", "intact"]),
    "png is a jpeg": (
        lambda f: tree(f, {"a.png": b"\xff\xd8\xff\xe0" + bytes(40)}),
        {},
        ["a.png", "foreign"],
    ),
    "png is short": (lambda f: tree(f, {"a.png": GREY[:-20]}), {}, ["a.png", "truncated"]),
    "png with a flipped bit": (
        lambda f: tree(f, {"a.png": GREY[:45] + bytes([GREY[45] ^ 1]) + GREY[46:]}),
        {},
        ["a.png", "damaged"],
    ),
    "png claims much": (
        lambda f: tree(f, {"a.png": png_bytes(IMAGES[0], claim=(9000, 9000))}),
        {},
        ["a.png", "claims 81000000", "forged"],
    ),
    "png is a bomb": (
        lambda f: tree(f, {"a.png": png_bytes(IMAGES[0], claim=(2**31 - 1, 2**31 - 1))}),
        {},
        ["a.png", "at most", "bomb"],
    ),
    "png files and classes": (
        lambda f: tree(f, {"a.png": GREY, "b/0.png": GREY}),
        {},
        ["both", "'a.png'", "'b'"],
    ),
    "class without png": (
        lambda f: tree(f, {"a/0.png": GREY, "b/0.jpg": b""}),
        {},
        ["b' must hold PNG files", "none"],
    ),
    "part without png": (
        lambda f: tree(f, {"train/0.png": GREY, "test/0.jpg": b""}),
        {},
        ["test' must hold PNG files", "none"],
    ),
    "parts and others": (
        lambda f: tree(f, {"train/0.png": GREY, "val/0.png": GREY}),
        {},
        ["train, valid and test", "got train, 'val'"],
    ),
    "parts without train": (
        lambda f: tree(f, {"test/0.png": GREY, "valid/0.png": GREY}),
        {},
        ["train is needed", "got valid, test"],
    ),
    "folders without images": (lambda f: tree(f, {"a/b": b""}), {}, ["*.png", "'a'", "IDX"]),
    "labels of loose png files": (
        lambda f: tree(f, {"a.png": GREY}),
        {"labels": True},
        ["one folder per class"],
    ),
    "a single png": (
        lambda f: tree(f, {"a.png": GREY}) / "a.png",
        {},
        ["folder of", "PNG", "another kind", "a.png"],
    ),
    "link out of the folder": (
        lambda f: link(f, "a.png", text(f, GREY, "secret.png")),
        {},
        ["a.png", "link that leads elsewhere"],
    ),
    "class that is a link out of the folder": (
        lambda f: link(f, "a", f),
        {},
        ["a' must", "link that leads elsewhere"],
    ),
    "link to nothing": (lambda f: link(f, "a.png", f / "none"), {}, ["a.png", "elsewhere"]),
    "pipe": (pipe, {}, ["a.png", "no regular file"]),
    "idx of labels as images": (
        lambda f: idx(f, train_x=idx_bytes(IMAGE_LABELS)),
        {},
        ["train-images", "(5,)"],
    ),
    "idx with another magic number": (
        lambda f: idx(f, train_x=b"\0\1" + idx_bytes(IMAGES)[2:]),
        {},
        ["train-images", "beginning with 00 00", "00 01 08 03", "foreign"],
    ),
    "idx of another type": (
        lambda f: idx(f, train_x=idx_bytes(IMAGES, code=0x0A)),
        {},
        ["train-images", "00 00 0a 03"],
    ),
    "idx is empty": (lambda f: idx(f, train_x=b""), {}, ["train-images", "no bytes"]),
    "npz with whole and scaled pixels": (
        lambda f: npz(f, x_train=IMAGES, x_test=IMAGES / 255),
        {},
        ["`x_test`", "scale of `x_train`", "uint8", "float64"],
    ),
    "npz with another number of channels": (
        lambda f: npz(f, x_train=COLOURED, x_test=COLOURED[..., :1]),
        {},
        ["`x_test`", "(4, 3, 3)", "(4, 3, 1)"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_get_one_clear_line(case: str, tmp_path: Path) -> None:
    assert_refused_in_one_line(BAD[case], tmp_path)


def test_every_truncated_png_is_refused(tmp_path: Path) -> None:
    for length in range(len(RGB) - 4):  # the checksum of the end mark tells nothing
        with pytest.raises(DataError, match=r"a.png'"):
            load(tree(tmp_path, {"a.png": RGB[:length]}))


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    tree(tmp_path, {"a/0.png": GREY})
    (tmp_path / "a" / "1.png").symlink_to(tmp_path / "a" / "0.png")
    assert len(load(tmp_path).x_train) == 2
