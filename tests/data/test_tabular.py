"""`load_tabular` on small files in the formats of the originals."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cpmm_jax.data import Dataset, load_tabular
from cpmm_jax.errors import ConfigError, CpmmError, DataError
from tests.data.files import text

N = 120
POWER_HEAD = (
    "Date;Time;Global_active_power;Global_reactive_power;Voltage;Global_intensity;"
    "Sub_metering_1;Sub_metering_2;Sub_metering_3\n"
)
GAS_HEAD = "Time (seconds), CO conc (ppm), Ethylene conc (ppm), sensor readings (16 channels)\n"


def write(path: Path, content: str) -> Path:
    packed = path.suffix == ".gz"
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    return path


def lines(rows: Any, separator: str, form: str = "%.9g") -> str:
    return "".join(separator.join(form % value for value in row) + "\n" for row in rows)


def power_row(minute: int, *values: Any) -> str:
    time = f"{minute // 60:02d}:{minute % 60:02d}:00"
    return ";".join(["16/12/2006", time, *map(str, values)]) + "\n"


def stacked(data: Dataset) -> np.ndarray:
    return np.concatenate([data.x_train, data.x_valid, data.x_test])


def sizes(data: Dataset) -> list[int]:
    return [len(x) for x in (data.x_train, data.x_valid, data.x_test)]


def standardised(x: np.ndarray, by: np.ndarray | None = None) -> np.ndarray:
    by = x if by is None else by
    return (x - by.mean(axis=0)) / by.std(axis=0)


def test_power_is_shuffled_dequantised_and_standardised(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    minutes = rng.integers(0, 1440, N)
    measured = np.column_stack(
        [
            rng.integers(0, 9999, N) / 1000,
            rng.integers(0, 500, N) / 1000,
            rng.integers(23000, 25000, N) / 100,
            rng.integers(0, 400, N) / 10,
            rng.integers(0, 40, (N, 3)),
        ]
    )
    rows = [power_row(m, *v) for m, v in zip(minutes.tolist(), measured.tolist(), strict=True)]
    gaps = ["17/12/2006;00:01:00;?;?;?;?;?;?;\n", power_row(7, 1, 0, 240, 2, 0, 0, "")]
    content = POWER_HEAD + "".join([*rows[:50], *gaps, *rows[50:]])
    path = write(tmp_path / "household_power_consumption.txt", content)

    expected = np.column_stack([measured, minutes.astype(float)])
    legacy = np.random.RandomState(42)
    legacy.shuffle(expected)
    expected = np.delete(expected, [1, 3], axis=1)
    voltage, active = 0.01 * legacy.rand(N, 1), 0.001 * legacy.rand(N, 1)
    expected += np.hstack([active, voltage, legacy.rand(N, 3), legacy.rand(N, 1)])
    expected = standardised(expected, by=expected[:-12])

    for source in (tmp_path, path):
        data = load_tabular("power", source)
        assert data.name == "power" and data.dim == 6 and data.x_train.dtype == np.float32
        assert data.feature_names[0] == "global_active_power" and data.feature_names[5] == "minute"
        assert sizes(data) == [98, 10, 12]
        np.testing.assert_allclose(stacked(data), expected, atol=1e-5)
    assert not np.array_equal(stacked(load_tabular("power", path, seed=1)), stacked(data))


def test_gas_keeps_a_quarter_and_one_sensor_of_each_group(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    n = 4 * N
    base = rng.normal(size=(n, 8)) * 1000
    twins = base + rng.normal(size=(n, 8))
    twins[:, 7] *= -1  # an opposite sensor is not alike
    table = np.column_stack([np.arange(n) / 100, np.zeros((n, 2)), base, twins])
    write(tmp_path / "ethylene_CO.txt", GAS_HEAD + lines(table, "  ", "%.2f"))
    data = load_tabular("gas", tmp_path, seed=3)
    assert data.feature_names == tuple(f"sensor_{i}" for i in range(8, 17))
    assert sizes(data) == [98, 10, 12]
    x = stacked(data).astype(float)
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(x.std(axis=0), 1, atol=1e-6)

    raw = table[:, 10:]
    near = standardised(raw)  # close enough to recognise the rows by
    chosen = [int(np.argmin(((near - row) ** 2).sum(axis=1))) for row in x]
    assert len(set(chosen)) == N
    np.testing.assert_allclose(x, standardised(raw[chosen]), atol=1e-4)
    assert np.array_equal(stacked(load_tabular("gas", tmp_path, seed=3)), stacked(data))
    assert not np.array_equal(stacked(load_tabular("gas", tmp_path, seed=4)), stacked(data))


def hepmass_table(rng: np.random.Generator, n: int) -> np.ndarray:
    x = rng.normal(size=(n, 27))
    for j in (5, 9, 13, 17, 21):
        x[:, j] = rng.integers(0, 3, n)
    return np.column_stack([np.arange(n) % 2, x])


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_hepmass_keeps_the_signal_and_its_continuous_features(
    tmp_path: Path, rng: np.random.Generator, ending: str
) -> None:
    tables = {"train": hepmass_table(rng, 2 * N), "test": hepmass_table(rng, 60)}
    for part, width in (("train", 26), ("test", 27)):  # the training file's head lacks a name
        head = ",".join(["# label", *(f"f{j}" for j in range(width))]) + "\n"
        content = head + lines(tables[part], ",", "%.18e")
        write(tmp_path / f"1000_{part}.csv{ending}", content)
    data = load_tabular("hepmass", tmp_path)
    features = [j for j in range(26) if j not in (5, 9, 13, 17, 21)]
    assert data.feature_names == tuple(f"f{j}" for j in features) and data.dim == 21
    assert sizes(data) == [108, 12, 30]
    train, test = (t[t[:, 0] == 1][:, 1:][:, features] for t in tables.values())
    expected = standardised(np.concatenate([train, test]), by=train)
    np.testing.assert_allclose(stacked(data), expected, atol=1e-6)


def miniboone_table(rng: np.random.Generator) -> np.ndarray:
    x = rng.normal(size=(N, 50))
    x[:6, 3] = -9.0  # the smallest value six times: left out
    x[:5, 4] = -9.0  # five times: kept
    x[:50, 5] = 9.0  # a larger one is not looked at
    x[30] = -999.0
    return x


def test_miniboone_keeps_the_signal_in_the_order_of_the_file(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    signal = miniboone_table(rng)
    background = rng.normal(10, 1, (30, 50))
    head = f" {N} {len(background)}\n"
    write(tmp_path / "MiniBooNE_PID.txt", head + lines([*signal, *background], "  ", "%.6e"))
    data = load_tabular("miniboone", tmp_path / "MiniBooNE_PID.txt")
    assert data.dim == 49 and "f3" not in data.feature_names and sizes(data) == [98, 10, 11]
    raw = np.delete(np.delete(signal, 30, axis=0), 3, axis=1)
    np.testing.assert_allclose(stacked(data), standardised(raw, by=raw[:-11]), atol=1e-5)


class StandInFile(dict):
    """What `load_tabular` uses of an open HDF5 file, so that h5py is not needed here."""

    def __enter__(self) -> StandInFile:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def stand_in(monkeypatch: pytest.MonkeyPatch, **parts: np.ndarray) -> None:
    module = SimpleNamespace(File=lambda path, mode: StandInFile(parts))
    monkeypatch.setitem(sys.modules, "h5py", module)


def test_bsds300_is_taken_as_it_is(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {key: rng.normal(size=(5, 63)) for key in ("train", "validation", "test")}
    stand_in(monkeypatch, **parts)
    data = load_tabular("bsds300", text(tmp_path, "", "BSDS300.hdf5"))
    for x, key in ((data.x_train, "train"), (data.x_valid, "validation"), (data.x_test, "test")):
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, parts[key], rtol=1e-6)


def test_bsds300_without_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, train=np.ones((2, 3)))
    with pytest.raises(DataError, match="got no validation, test"):
        load_tabular("bsds300", text(tmp_path, "", "BSDS300.hdf5"))


def test_bsds300_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r"pip install 'cpmm_jax\[hdf5\]'"):
        load_tabular("bsds300", text(tmp_path, "", "BSDS300.hdf5"))


GAS_ROW = "0.0 0.0 0.0" + " 1.5" * 16 + "\n"
MINIBOONE_ROW = "1.0 " * 50 + "\n"

# Builds the input in a folder, name of the set, words that the message must hold.
BAD: dict[str, tuple[Callable[[Path], Any], str, list[str]]] = {
    "name": (lambda f: f, "mnist", ["power, gas", "'mnist'"]),
    "no such path": (lambda f: f / "none", "power", ["No such file"]),
    "empty folder": (lambda f: f, "gas", ["ethylene_CO.txt", "no files"]),
    "other files": (lambda f: text(f, "").parent, "miniboone", ["MiniBooNE_PID.txt", "'f.csv'"]),
    "file for a folder": (lambda f: text(f, "1"), "hepmass", ["1000_test.csv", "folder"]),
    "empty file": (lambda f: text(f, ""), "power", ["none under its first line"]),
    "header alone": (lambda f: text(f, GAS_HEAD), "gas", ["none under its first line"]),
    "word": (lambda f: text(f, GAS_HEAD + GAS_ROW.replace("1.5", "a", 1)), "gas", ["'a'", "row 0"]),
    "columns": (lambda f: text(f, GAS_HEAD + "1 2 3\n"), "gas", ["19 columns"]),
    "infinity": (lambda f: text(f, GAS_HEAD + GAS_ROW.replace("1.5", "inf", 1)), "gas", ["inf"]),
    "few rows": (lambda f: text(f, GAS_HEAD + GAS_ROW * 8), "gas", ["tenth", "got 2"]),
    "constant": (lambda f: text(f, GAS_HEAD + GAS_ROW * 80), "gas", ["column 3", "one value"]),
    "packed damage": (lambda f: text(f, b"\x1f\x8b\x08", "f.gz"), "gas", ["intact text file"]),
    "bytes": (lambda f: text(f, b"\xff\xfe\x00"), "miniboone", ["intact text file"]),
    "counts": (lambda f: text(f, MINIBOONE_ROW), "miniboone", ["signal and background"]),
    "cut off": (lambda f: text(f, "9 9\n" + MINIBOONE_ROW), "miniboone", ["9 signal", "got 1"]),
    "discrete": (lambda f: text(f, "9 9\n" + MINIBOONE_ROW * 9), "miniboone", ["at most 5"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    build, name, words = BAD[case]
    with pytest.raises(DataError) as caught:
        load_tabular(name, build(tmp_path))
    message = str(caught.value)
    assert "\n" not in message and message.count(";") >= 2 and len(message) < 500, message
    for word in words:
        assert word in message, message


def test_hepmass_without_signal(tmp_path: Path) -> None:
    for part in ("train", "test"):
        text(tmp_path, "# label\n" + lines(np.zeros((3, 28)), ","), f"1000_{part}.csv")
    with pytest.raises(DataError, match="rows of class 1"):
        load_tabular("hepmass", tmp_path)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, True])
def test_bad_seed(seed: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seed") as caught:
        load_tabular("power", tmp_path, seed=seed)
    assert isinstance(caught.value, CpmmError)
