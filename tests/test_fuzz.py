"""Every reader against mutated files: a clean error or a right answer, and nothing else.

No crash, no hang, no code run, no file written, no memory beyond what the file is worth. `make
torture` reads 10,000 files of all kinds together, `make test` some hundred.
"""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import struct
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

import cpmm_jax as cpmm
from cpmm_jax import artifact
from cpmm_jax.data import Dataset, load
from cpmm_jax.errors import CpmmError, RunError
from cpmm_jax.run import open_run
from cpmm_jax.training.checkpoint import load_model, save_model
from cpmm_jax.training.snapshot_file import Snapshot, read_snapshot, write_snapshot
from tests.artifact.golden import GOLDEN
from tests.data.files import cifar_bytes, png_bytes, tree
from tests.models.small import small

X = np.random.default_rng(0).normal(size=(40, 3)).round(3)
Y = np.arange(40) % 3
MOST_BYTES = 64 * 2**20  # that a file of some kilobytes may cost
MOST_SECONDS = 20.0


class Kind(NamedTuple):
    """Files of one kind: how to make one in a folder, how to read it, and what it may be.

    `same` tells whether what was read is what was written, where a checksum protects it; None
    where another content is as good.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    same: Callable[[Any], bool] | None = None


def _npz(folder: Path) -> Path:
    np.savez(folder / "f.npz", x_train=X[:30], y_train=Y[:30], x_test=X[30:], y_test=Y[30:])
    return folder / "f.npz"


def _packed(folder: Path) -> Path:
    np.savez_compressed(folder / "f.npz", x=X.astype(np.float32), y=Y)
    return folder / "f.npz"


def _npy(folder: Path) -> Path:
    np.save(folder / "f.npy", X)
    return folder / "f.npy"


def _csv(folder: Path) -> Path:
    rows = [",".join([*(str(v) for v in x), "ab"[y % 2]]) for x, y in zip(X, Y, strict=True)]
    (folder / "f.csv").write_text("\n".join(["left,middle,right,kind", *rows]) + "\n")
    return folder / "f.csv"


def _idx(array: np.ndarray) -> bytes:
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def _images(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 4, 4), dtype=np.uint8)
    (folder / "train-images-idx3-ubyte").write_bytes(_idx(pixels))
    labels = gzip.compress(_idx((np.arange(12) % 3).astype(np.uint8)), mtime=0)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(labels)
    return folder


PIXELS = np.random.default_rng(1).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)


def _cifar(folder: Path) -> Path:
    batches = {
        f"data_batch_{i + 1}.bin": cifar_bytes(PIXELS[2 * i : 2 * i + 2], [i, i]) for i in range(5)
    }
    return tree(folder, {**batches, "batches.meta.txt": b"a\nb\nc\nd\ne\nf\ng\nh\ni\nj\n"})


def _pngs(folder: Path) -> Path:
    small = PIXELS[:, :5, :4]
    return tree(folder, {f"{'ab'[i % 2]}/{i}.png": png_bytes(x) for i, x in enumerate(small)})


def _are_the_pngs(read: Dataset) -> bool:
    by_class = np.concatenate([PIXELS[::2, :5, :4], PIXELS[1::2, :5, :4]])
    return np.array_equal(read.x_train.reshape(by_class.shape), by_class)


def _mixture(folder: Path) -> Path:
    return Path(shutil.copy(GOLDEN, folder / "mixture.npz"))


def _run(folder: Path) -> Path:
    source = {"data": "moons", "labels": False, "label_column": None, "seed": 0}
    content = {"schema": 1, "source": source, "recipe": {}, "versions": {}}
    (folder / "config.json").write_text(json.dumps(content, indent=2))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n' * 3)
    return _mixture(folder).parent


def _read_run(path: Path) -> Any:
    run = open_run(path)
    return run.source, run.history()


def _model(folder: Path) -> Path:
    save_model(folder / "model", small())
    return folder / "model"


HOST = {"fingerprint": {"a": 1}, "step": 3, "history": [{"step": 3, "loss": 1.5}]}
ARRAYS = {"model/means": X, "step": np.int32(3), "optimizer/0": X[0]}


def _snapshot(folder: Path) -> Path:
    write_snapshot(folder / "00000003", Snapshot(ARRAYS, HOST))
    return folder / "00000003"


def _is_the_mixture(read: artifact.Mixture) -> bool:
    return np.array_equal(read.means, artifact.load(GOLDEN).means)


def _is_the_model(read: cpmm.CPMM) -> bool:
    leaves = zip(jax.tree.leaves(nnx.state(read)), jax.tree.leaves(nnx.state(small())), strict=True)
    return all(np.array_equal(one, other) for one, other in leaves)


def _is_the_snapshot(read: Snapshot) -> bool:
    return all(np.array_equal(read.arrays[name], array) for name, array in ARRAYS.items())


KINDS: dict[str, Kind] = {
    "npz": Kind(_npz, lambda path: load(path, labels=True)),
    "compressed npz": Kind(_packed, load),
    "npy": Kind(_npy, load),
    "csv": Kind(_csv, lambda path: load(path, label_column="kind", labels=True)),
    "idx": Kind(_images, load),
    "cifar": Kind(_cifar, load),
    "png": Kind(_pngs, load, _are_the_pngs),
    "mixture": Kind(_mixture, artifact.load, _is_the_mixture),
    "run": Kind(_run, _read_run),
    "model": Kind(_model, load_model, _is_the_model),
    "snapshot": Kind(_snapshot, read_snapshot, _is_the_snapshot),
}


class _Trap:
    """Touches a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def mutate(content: bytes, rng: np.random.Generator, trap: bytes) -> bytes:
    """Return a file with one to four random changes."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, len(data) + 1))
        size = int(min(rng.geometric(0.1), 64))
        change = int(rng.integers(0, 9))
        if change == 0 and at < len(data):
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif change == 1:
            del data[at:]
        elif change == 2:
            del data[at : at + size]
        elif change == 3:
            data[at:at] = rng.bytes(size)
        elif change == 4:
            data[at : at + 4] = [b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff"][at % 3]
        elif change == 5:
            data[at:at] = data[at : at + size]
        elif change == 6:
            numbers = (b"99999999999", b"-1", b"nan", b"1e400", b"../../etc", b"\n\n", b'"', b"{")
            data[at : at + 1] = numbers[int(rng.integers(0, len(numbers)))]
        elif change == 7:
            data[at:at] = trap
        else:
            data[at : at + size] = b"\0" * size
    return bytes(data)


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


@pytest.mark.parametrize("count", [25, pytest.param(1112, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_give_an_error_or_an_answer(
    kind: str, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, read, same = KINDS[kind]
    rng = np.random.default_rng(count)
    folder, sprung = tmp_path / "files", tmp_path / "sprung"
    trap = pickle.dumps(_Trap(sprung))
    folder.mkdir()
    path = make(folder)
    whole = {file: file.read_bytes() for file in _files(path)}
    read(path)  # as it is
    outcomes = {"read": 0, "refused": 0}
    tracemalloc.start()
    try:
        for number in range(count):
            file = list(whole)[int(rng.integers(0, len(whole)))]
            file.write_bytes(mutate(whole[file], rng, trap))
            before = {p: p.stat().st_size for p in tmp_path.rglob("*")}
            tracemalloc.reset_peak()
            start = time.perf_counter()
            held = tracemalloc.get_traced_memory()[0]
            where = f"file {number} of kind {kind}: {file.name}"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = read(path)
            except CpmmError as error:
                assert "\n" not in str(error), where
                outcomes["refused"] += 1
            except Exception as error:
                pytest.fail(f"{where}: {type(error).__name__}: {error}")
            else:
                outcomes["read"] += 1
                assert same is None or same(found), where
            assert time.perf_counter() - start < MOST_SECONDS, where
            assert tracemalloc.get_traced_memory()[1] - held < MOST_BYTES, where
            after = {p: p.stat().st_size for p in tmp_path.rglob("*")}
            assert after == before and not sprung.exists(), where
            file.write_bytes(whole[file])
    finally:
        tracemalloc.stop()
    if count > 100:
        with capsys.disabled():
            print(
                f"\n{kind}: {count} files, {outcomes['read']} read, {outcomes['refused']} refused"
            )
    assert outcomes["refused"] > 0


def test_a_snapshot_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    """A symbolic link in place of the arrays leads out of the folder: its files do not count."""
    path = _snapshot(tmp_path)
    shutil.move(path / "arrays", tmp_path / "elsewhere")
    (path / "arrays").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "_METADATA").write_text("{}")
    with pytest.raises(RunError, match="undamaged snapshot"):
        read_snapshot(path)
