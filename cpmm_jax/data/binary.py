"""Safe readers of .npy, .npz and IDX files.

A header is only a claim. Here it is compared with the size of the file (or of the zip member, whose
own claimed size is bounded by what deflate can expand) before anything is allocated, objects are
refused (never unpickled), and nothing is extracted to disk.
"""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from cpmm_jax.data.checks import show, show_path
from cpmm_jax.errors import CpmmError, DataError

DEFLATE_RATIO = 1032  # the most that one byte of a deflate stream can expand to
_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into a DataError of one line."""
    try:
        yield
    except CpmmError:
        raise
    except OSError as error:
        if error.errno is None:  # gzip reports damage as an OSError without a number
            raise _damaged(path, kind, error) from error
        raise DataError(
            f"{show_path(path)} must be readable; got {error.strerror!r}; "
            "check the path and its permissions."
        ) from error
    except Exception as error:
        # NumPy, zipfile, zlib and csv raise a dozen unrelated types on damaged or hostile bytes.
        raise _damaged(path, kind, error) from error


def _damaged(path: Path, kind: str, error: Exception) -> DataError:
    return DataError(
        f"{show_path(path)} must be an intact {kind}; got a truncated, damaged or foreign file "
        f"({type(error).__name__}); write it again."
    )


def _check_claim(claimed: int, held: int, what: str) -> None:
    """Raise DataError unless an array needs exactly the bytes that are there for it."""
    if claimed != held:
        state = "truncated" if claimed > held else "not a single array"
        raise DataError(
            f"{what} must hold the array that its header describes; got {held} bytes where the "
            f"header claims {claimed} ({state}); write the file again."
        )


def _check_header(stream: IO[bytes], size: int, what: str) -> None:
    """Read the .npy header of `stream`, of `size` bytes in all, and refuse what it must not be."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:  # 3.0 exists for field names in Unicode only, and records are refused below
        raise ValueError(f"version {version}")
    if dtype.hasobject or dtype.names is not None or dtype.kind not in "fiubcUS":
        why = "Python objects, which are never loaded" if dtype.hasobject else "not plain numbers"
        raise DataError(
            f"{what} must be a plain array of numbers (or of strings, for labels); "
            f"got dtype {show(str(dtype))} ({why}); save it again after .astype(float)."
        )
    if any(length < 0 for length in shape):
        raise ValueError(f"shape {shape}")
    _check_claim(stream.tell() + math.prod(shape) * dtype.itemsize, size, what)


def read_npy(path: Path) -> npt.NDArray[Any]:
    """Return the array of a .npy file.

    Raises:
        DataError: unreadable, truncated, foreign, or an array of objects or records.
    """
    with reading(path, ".npy file"), path.open("rb") as stream:
        _check_header(stream, path.stat().st_size, show_path(path))
        stream.seek(0)
        return np.lib.format.read_array(stream, allow_pickle=False)


def read_npz(path: Path, wanted: Sequence[str]) -> tuple[dict[str, npt.NDArray[Any]], list[str]]:
    """Return those arrays of an .npz file that are `wanted`, and the names of all its arrays.

    Arrays that are not wanted are not read, so they may hold anything.

    Raises:
        DataError: unreadable, truncated, foreign, or a wanted array of objects or records.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    with reading(path, ".npz file"), zipfile.ZipFile(path) as archive:
        members = {i.filename[:-4]: i for i in archive.infolist() if i.filename.endswith(".npy")}
        for name in wanted:
            if name not in members:
                continue
            info, what = members[name], f"`{name}` in {show_path(path)}"
            _check_member(info, path.stat().st_size, what)
            with archive.open(info) as stream:
                _check_header(stream, info.file_size, what)
            with archive.open(info) as stream:  # read to its end, so the checksum is verified
                arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
        return arrays, list(members)


def _check_member(info: zipfile.ZipInfo, size: int, what: str) -> None:
    """Refuse a zip member that claims more bytes than the file of `size` bytes can hold."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"compression {info.compress_type}")
    ratio = 1 if info.compress_type == zipfile.ZIP_STORED else DEFLATE_RATIO
    held = min(info.compress_size, size)
    if info.compress_size > size or info.file_size > held * ratio:
        raise DataError(
            f"{what} must fit in its file; got a claim of {info.file_size} bytes in {held} packed "
            "bytes (truncated or forged); write the file again."
        )


def read_idx(path: Path) -> npt.NDArray[Any]:
    """Return the array of an IDX file (the format of MNIST), plain or gzip-compressed.

    Layout: two zero bytes, a type code, the number of dimensions, one big-endian uint32 per
    dimension, then the values in C order, big-endian (http://yann.lecun.com/exdb/mnist/).

    Raises:
        DataError: unreadable, truncated or foreign.
    """
    packed = path.suffix == ".gz"
    what = show_path(path)
    with reading(path, "IDX file"), gzip.open(path) if packed else path.open("rb") as stream:
        magic = stream.read(4)
        if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES:
            found = f"the bytes {magic.hex(' ')}" if magic else "no bytes"
            raise DataError(
                f"{what} must be an intact IDX file, beginning with 00 00, a code of the type and "
                f"the number of dimensions; got {found} (foreign); check that it is the original."
            )
        shape = struct.unpack(f">{magic[3]}I", stream.read(4 * magic[3]))
        dtype = np.dtype(_IDX_TYPES[magic[2]])
        claimed = 4 + 4 * len(shape) + math.prod(shape) * dtype.itemsize
        size = path.stat().st_size
        if not packed:
            _check_claim(claimed, size, what)
        elif claimed > size * DEFLATE_RATIO:
            raise DataError(
                f"{what} must hold the array that its header describes; got {size} packed bytes "
                f"where the header claims {claimed} (truncated or forged); write the file again."
            )
        values = np.empty(shape, dtype)
        held = _fill(stream, values)
        if held < values.nbytes or stream.read(1):
            raise EOFError("the values do not end where the header says")
        return values.astype(dtype.newbyteorder("="), copy=False)


def _fill(stream: Any, values: npt.NDArray[Any]) -> int:
    """Read into `values` until it is full or the stream ends; return the number of bytes read."""
    target = values.reshape(-1).view(np.uint8).data
    held = 0
    while held < len(target) and (count := stream.readinto(target[held : held + (1 << 20)])):
        held += count
    return held
