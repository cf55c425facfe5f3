"""Files to read, good and bad, and the law that every bad one meets."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpmm_jax.data import load
from cpmm_jax.errors import DataError

X = np.arange(12.0).reshape(6, 2)
Y = np.array([0, 1, 2, 0, 1, 2])
IMAGES = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
IMAGE_LABELS = np.array([3, 8, 3, 8, 3], np.uint8)

# What builds the input in a folder, options of `load`, words that its message must hold.
Case = tuple[Callable[[Path], Any], dict[str, Any], list[str]]


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


def png_bytes(
    array: np.ndarray,
    *,
    claim: tuple[int, int] | None = None,
    depth: int = 8,
    colour: int | None = None,
) -> bytes:
    """Write (H, W) grey or (H, W, 3) RGB as PNG by the letter of its specification.

    The header may claim another width and height, depth and type of colour.
    """

    def chunk(name: bytes, content: bytes) -> bytes:
        length, checksum = struct.pack(">I", len(content)), zlib.crc32(name + content)
        return length + name + content + struct.pack(">I", checksum)

    height, width = array.shape[:2]
    colour = (0 if array.ndim == 2 else 2) if colour is None else colour
    header = struct.pack(">IIBBBBB", *(claim or (width, height)), depth, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tree(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files by their paths relative to the folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def cifar_bytes(images: np.ndarray, *labels: np.ndarray) -> bytes:
    """Write records of labels and (N, 32, 32, 3) images, each with its channels first."""
    return b"".join(
        bytes(int(codes[i]) for codes in labels)
        + b"".join(image[:, :, channel].tobytes() for channel in range(3))
        for i, image in enumerate(images)
    )


def assert_refused_in_one_line(case: Case, folder: Path) -> None:
    build, options, words = case
    with pytest.raises(DataError) as caught:
        load(build(folder), **options)
    message = str(caught.value)
    assert "\n" not in message and message.count(";") >= 2 and len(message) < 500, message
    for word in words:
        assert word in message, message
