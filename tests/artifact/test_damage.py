"""Damaged, foreign and forged files: each an `ArtifactError` of one line, and none runs code."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpmm_jax import artifact
from cpmm_jax.errors import ArtifactError
from tests.artifact.golden import GOLDEN, GOLDEN_LOG_PROB, GOLDEN_X


def _as_npy(value: Any, allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asanyarray(value), allow_pickle=allow_pickle)
    return stream.getvalue()


def _header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    stream = io.BytesIO()
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


def _entries() -> dict[str, bytes]:
    with zipfile.ZipFile(GOLDEN) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zip(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


def _with(**changes: Any) -> bytes:
    """Return the golden file with some arrays replaced (bytes as they are), or left out (None)."""
    entries = _entries()
    for name, value in changes.items():
        if value is None:
            del entries[f"{name}.npy"]
        else:
            entries[f"{name}.npy"] = value if isinstance(value, bytes) else _as_npy(value)
    return _zip(entries)


def _metadata(**changes: Any) -> bytes:
    return _with(metadata=np.array(json.dumps(changes)))


def _bits_flipped() -> bytes:
    data = bytearray(GOLDEN.read_bytes())
    at = data.index(b"means.npy") + 200
    data[at] ^= 0xFF
    return bytes(data)


def _entry_claiming(size: int) -> bytes:
    """Return a file whose directory and header both claim a `means` of `size` float32 numbers."""
    header = _header((size,))
    data = bytearray(_with(means=header + b"\0" * 16))
    directory = data.rindex(b"PK\x01\x02", 0, data.rindex(b"means.npy"))
    struct.pack_into("<II", data, directory + 20, len(header) + 16, len(header) + 4 * size)
    return bytes(data)


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("unpickled",))


F4 = np.float32
DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "got an empty file"),
    "text": (lambda: b"x,y\n1,2\n" * 50, "File is not a zip file"),
    "bare npy": (lambda: _as_npy(np.zeros(3)), "File is not a zip file"),
    "pickle": (lambda: pickle.dumps(_Trap()), "File is not a zip file"),
    "half": (lambda: GOLDEN.read_bytes()[:1500], "File is not a zip file"),
    "end missing": (lambda: GOLDEN.read_bytes()[:-10], "File is not a zip file"),
    "middle missing": (lambda: GOLDEN.read_bytes()[:400] + GOLDEN.read_bytes()[900:], "sound"),
    "bits flipped": (_bits_flipped, "Bad CRC-32"),
    "empty zip": (lambda: _zip({}), "schema, .*metadata, which it lacks; got nothing"),
    "data set": (
        lambda: _zip({"x_train.npy": _as_npy(np.zeros((3, 2))), "y.npy": _as_npy(np.zeros(3))}),
        "schema, class_logits.*lacks; got 'x_train', 'y'",
    ),
    "no schema": (lambda: _with(schema=None), "must hold schema, which it lacks"),
    "no loadings": (lambda: _with(loadings=None), "must hold loadings, which it lacks"),
    "no metadata": (lambda: _with(metadata=None), "must hold metadata, which it lacks"),
    "later schema": (
        lambda: _with(schema=np.int64(2), means=None),
        "later version, schema 2; this version reads up to 1; upgrade cpmm_jax",
    ),
    "schema 0": (lambda: _with(schema=np.int64(0)), "one positive integer"),
    "schema text": (lambda: _with(schema=np.array("1")), "one positive integer"),
    "schema list": (lambda: _with(schema=np.array([1, 1])), "one positive integer"),
    "objects": (
        lambda: _with(means=_as_npy(np.array([_Trap()], object), allow_pickle=True)),
        "`means` must hold plain values; got Python objects",
    ),
    "object metadata": (
        lambda: _with(metadata=_as_npy(np.array(_Trap(), object), allow_pickle=True)),
        "`metadata` must hold plain values",
    ),
    "pickled entry": (lambda: _with(means=pickle.dumps(_Trap())), "magic string"),
    "not a number": (lambda: _with(logits=np.full((2, 3), "a")), "float64; got dtype <U1"),
    "integers": (lambda: _with(means=np.zeros((2, 3, 4), int)), "`means` must be float32 or"),
    "complex": (lambda: _with(logits=np.zeros((2, 3), complex)), "got dtype complex128"),
    "other D": (
        lambda: _with(log_noise=np.zeros((2, 3, 5), F4)),
        r"`log_noise` must have shape \(2, 3, 4\).*`means` of shape \(2, 3, 4\).*got \(2, 3, 5\)",
    ),
    "other K": (lambda: _with(logits=np.zeros((2, 4), F4)), r"\(2, 3\) to go.*got \(2, 4\)"),
    "other C": (lambda: _with(class_logits=np.zeros(3, F4)), r"\(2,\) to go.*got \(3,\)"),
    "scalar loadings": (lambda: _with(loadings=F4(1)), r"\(2, 3, 4, 'R'\).*got \(\)"),
    "flat means": (lambda: _with(means=np.zeros((3, 4), F4)), r"\(C, K, D\); got \(3, 4\)"),
    "no components": (lambda: _with(means=np.zeros((2, 0, 4), F4)), r"got \(2, 0, 4\)"),
    "NaN": (lambda: _with(logits=np.full((2, 3), np.nan, F4)), r"finite.*got nan at \(0, 0\)"),
    "infinity": (
        lambda: _with(class_logits=np.array([0, -np.inf], F4)),
        r"`class_logits` must be finite.*got -inf at \(1,\)",
    ),
    "noise too small": (lambda: _with(log_noise=np.full((2, 3, 4), -1e3)), "at most 200; got -1"),
    "shape too large": (
        lambda: _with(means=_header((2**40, 2**20)) + b"\0" * 96),
        r"`means` must hold the \d+ bytes of its header's shape.*got 96",
    ),
    "shape too small": (lambda: _with(means=_header((1, 1, 1)) + b"\0" * 96), "4 bytes .*got 96"),
    "negative shape": (lambda: _with(means=_header((-2, -3, 4)) + b"\0" * 96), "sound .npz"),
    "entry too large": (
        lambda: _entry_claiming(10**9),
        r"`means` must hold at most \d+ bytes .* claims 40+128",
    ),
    "inflating": (
        lambda: _zip({**_entries(), "means.npy": b"\0" * (2**26 + 10**7)}, zipfile.ZIP_DEFLATED),
        r"`means` must hold at most \d+ bytes in a file of",
    ),
    "broken header": (lambda: _with(means=b"\x93NUMPY\x01\x00\x10\x00{'shape': (((((("), "sound"),
    "format 3": (lambda: _with(means=b"\x93NUMPY\x03\x00" + b" " * 100), "format 1 or 2; got"),
    "metadata text": (lambda: _with(metadata=np.array("{oops")), "`metadata` must be JSON; got"),
    "metadata deep": (lambda: _with(metadata=np.array("[" * 100_000)), "`metadata` must be JSON"),
    "metadata list": (lambda: _with(metadata=np.array("[1]")), "must be JSON objects"),
    "metadata bytes": (lambda: _with(metadata=np.array(b"{}")), r"one string; got .*dtype \|S2"),
    "extra list": (lambda: _metadata(extra=[]), "must be JSON objects"),
    "few names": (lambda: _metadata(class_names=["a"]), r"`class_names` must hold 2.*got 1"),
    "number names": (lambda: _metadata(class_names=[0, 1]), "`class_names` must be a list of str"),
    "feature names": (lambda: _metadata(feature_names=["a"] * 5), "`feature_names` must hold 4"),
    "event shape": (lambda: _metadata(event_shape=[3, 2]), r"D = 4 entries in all; got \(3, 2\)"),
    "negative event": (lambda: _metadata(event_shape=[-2, -2]), "`event_shape` must hold D = 4"),
    "event flags": (lambda: _metadata(event_shape=[True, 4]), "must be a list of int; got"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = DAMAGED[name]
    path = tmp_path / "mixture.npz"
    path.write_bytes(make())
    with pytest.raises(ArtifactError, match=message) as caught:
        artifact.load(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 800 and text.startswith(f"{path}: ")
    assert re.search(r"Write it again|upgrade", text)
    assert os.listdir(tmp_path) == ["mixture.npz"]  # nothing was unpickled


def test_any_flipped_byte_loads_or_is_an_artifact_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(13)
    path = tmp_path / "mixture.npz"
    good = GOLDEN.read_bytes()
    for _ in range(300):
        data = bytearray(good)
        for at in rng.integers(len(data), size=rng.integers(1, 4)):
            data[at] = rng.integers(256)
        path.write_bytes(data[: rng.integers(len(data))] if rng.random() < 0.1 else data)
        try:
            mixture = artifact.load(path)
        except ArtifactError as error:
            assert "\n" not in str(error)
        else:
            assert np.isfinite(mixture.log_prob(GOLDEN_X)).all()


def test_compressed_and_fortran_ordered_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mixture.npz"
    means = np.asfortranarray(artifact.load(GOLDEN).means.astype(">f4"))
    path.write_bytes(_zip({**_entries(), "means.npy": _as_npy(means)}, zipfile.ZIP_DEFLATED))
    np.testing.assert_allclose(artifact.load(path).log_prob(GOLDEN_X), GOLDEN_LOG_PROB, rtol=1e-9)
