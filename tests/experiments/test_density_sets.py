"""The data sets of the density comparison: bounded densities, clean splits, honest notes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from cpmm_jax.data import BUILTIN_NAMES
from cpmm_jax.errors import DataError
from experiments.density_sets import DensitySet, density_set, gaussian_nats, names

N = 400


@pytest.fixture(autouse=True)
def no_folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "data_dir" not in request.fixturenames:
        monkeypatch.delenv("CPMM_DATA_DIR", raising=False)


def save(folder: Path, name: str, **arrays: Any) -> None:
    np.savez(folder / f"{name}.npz", **arrays)


def save_in_order(folder: Path, name: str, x: np.ndarray) -> None:
    """Save parts of which each is kept as it is, so that rows can be followed."""
    save(folder, name, x_train=x[:300], x_valid=x[300:350], x_test=x[350:])


def parts(data: DensitySet) -> list[np.ndarray]:
    return [data.x_train, data.x_valid, data.x_test]


def sizes(data: DensitySet) -> list[int]:
    return [len(x) for x in parts(data)]


def most_on_one_value(data: DensitySet) -> int:
    """Return the number of rows on the commonest value of any column."""
    columns = np.concatenate(parts(data)).T
    return max(int(np.unique(column, return_counts=True)[1].max()) for column in columns)


def assert_sound(data: DensitySet) -> None:
    for x in parts(data):
        assert x.dtype == np.float32 and x.ndim == 2 and len(x) and np.isfinite(x).all()
    np.testing.assert_allclose(data.x_train.mean(axis=0, dtype=float), 0, atol=1e-5)
    np.testing.assert_allclose(data.x_train.std(axis=0, dtype=float), 1, atol=1e-5)
    assert most_on_one_value(data) <= max(2, 0.002 * sum(sizes(data)))
    assert np.isfinite(gaussian_nats(data))


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_built_in_sets_need_no_folder(name: str) -> None:
    assert name in names()
    data = density_set(name, seed=1)
    assert_sound(data)
    for x, again, other in zip(
        parts(data), parts(density_set(name, 1)), parts(density_set(name, 2)), strict=True
    ):
        np.testing.assert_array_equal(x, again)
        assert not np.array_equal(x, other)


def test_names_are_those_of_tables(tmp_path: Path, rng: np.random.Generator) -> None:
    save(tmp_path, "whole", x=rng.normal(size=(N, 2)), y=np.zeros(N, int))
    save(tmp_path, "cut", x_train=rng.normal(size=(N, 2)), x_test=rng.normal(size=(9, 2)))
    save(tmp_path, "images", x=np.zeros((5, 4, 3)))
    save(tmp_path, "vector", x=np.zeros(5))
    save(tmp_path, "other", z=np.zeros((5, 2)))
    save(tmp_path, "moons", x=np.zeros((5, 2)))  # a built-in name wins
    (tmp_path / "damaged.npz").write_bytes(b"PK")
    found = names(tmp_path)
    assert found == [*BUILTIN_NAMES, "cut", "whole"]
    assert len(set(found)) == len(found)
    assert_sound(density_set("cut", 0, tmp_path))


def test_folder_of_the_environment(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "whole", x=rng.normal(size=(N, 2)))
    monkeypatch.setenv("CPMM_DATA_DIR", str(tmp_path))
    assert "whole" in names() and sizes(density_set("whole", 0)) == [280, 40, 80]


def test_columns_get_what_they_need(tmp_path: Path, rng: np.random.Generator) -> None:
    smooth = rng.normal(5, 2, N)
    grid = rng.integers(0, 30, N) * 0.1  # of step 0.1
    rare = np.where(np.arange(N) < 10, rng.normal(size=N), 3.0)
    spike = np.where(np.arange(N) % 2, 0.0, rng.gamma(2.0, 1.0, N))
    table = np.stack([smooth, grid, np.ones(N), rare, 2 * smooth - grid, spike], axis=1)
    save_in_order(tmp_path, "mixed", table)
    data = density_set("mixed", 0, tmp_path)
    assert_sound(data)
    assert sizes(data) == [300, 50, 50]
    assert data.notes.split("; ") == [
        "left out, over 95% of the rows on one value: columns 2-3",
        "left out, linear functions of earlier columns: column 4",
        "dequantised by one step: column 1",
        "values with up to 50% of the rows spread over up to 0.12 standard deviations: column 5",
        "parts as given",
    ]

    x = np.concatenate(parts(data)).astype(float)
    np.testing.assert_allclose(noise(x[:, 0], smooth), 0, atol=1e-5)
    assert_uniform(noise(x[:, 1], grid), 0.1)
    np.testing.assert_allclose(noise(x[:, 2], spike)[spike != 0], 0, atol=0.03)
    assert np.ptp(x[spike == 0, 2]) == pytest.approx(0.5 / 4, rel=0.05)


def noise(x: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    """Return what was added to the recorded values before they were standardised."""
    slope, shift = np.polyfit(x, recorded, 1)
    return slope * x + shift - recorded


def assert_uniform(added: np.ndarray, width: float) -> None:
    assert np.ptp(added) == pytest.approx(width, rel=0.08)
    assert added.std() == pytest.approx(width / np.sqrt(12), rel=0.05)


def test_values_off_a_grid_do_not_refine_its_step(tmp_path: Path, rng: np.random.Generator) -> None:
    x = np.column_stack([rng.integers(0, 40, N), rng.normal(size=N)])
    x[:5, 0] += 1 / 3
    x[:, 0] += 1e-9 * rng.normal(size=N)  # the rounding of some computation
    save_in_order(tmp_path, "grid", x)
    noisy = np.concatenate(parts(density_set("grid", 0, tmp_path))).astype(float)
    assert_uniform(noise(noisy[:, 0], x[:, 0]), 1.0)


def test_treatment_does_not_depend_on_the_seed(tmp_path: Path, rng: np.random.Generator) -> None:
    save(tmp_path, "grid", x=rng.integers(0, 9, (N, 2)))
    first, second = (
        np.sort(np.concatenate(parts(density_set("grid", seed, tmp_path)))[:, 0].astype(float))
        for seed in (0, 1)
    )
    np.testing.assert_allclose(noise(second, first), 0, atol=1e-5)  # but for the scale


@pytest.mark.parametrize("seed", range(5))
def test_identical_rows_stay_on_one_side(
    seed: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    save(tmp_path, "copies", x=np.tile(rng.normal(size=(N // 4, 2)), (4, 1)))
    assert sizes(density_set("copies", seed, tmp_path)) == [280, 40, 80]
    save(tmp_path, "copies", x=np.tile(rng.normal(size=(N // 7, 2)), (7, 1)))
    assert [size % 7 for size in sizes(density_set("copies", seed, tmp_path))] == [0, 0, 0]


def test_a_row_that_fills_a_third_is_dealt_out(tmp_path: Path, rng: np.random.Generator) -> None:
    x = rng.normal(size=(N, 2))
    x[: N // 3] = -4.0
    save(tmp_path, "atom", x=x)
    for part in parts(density_set("atom", 0, tmp_path)):
        assert 0.15 < (part < -1).all(axis=1).mean() < 0.55


def test_given_parts_are_kept(tmp_path: Path, rng: np.random.Generator) -> None:
    x = rng.normal(size=(N, 2))
    save(tmp_path, "test", x_train=x[:300], x_test=x[300:])
    data, other = (density_set("test", seed, tmp_path) for seed in (0, 1))
    assert sizes(data) == sizes(other) == [270, 30, 100]
    assert data.notes == "test part as given, validation cut from the training part by seed"
    np.testing.assert_allclose(noise(data.x_test[:, 0].astype(float), x[300:, 0]), 0, atol=1e-5)
    assert not np.array_equal(data.x_valid, other.x_valid)


def test_parts_that_share_rows_are_pooled(tmp_path: Path, rng: np.random.Generator) -> None:
    x = rng.normal(size=(N, 2))
    save(tmp_path, "shared", x_train=x[:301], x_valid=x[310:350], x_test=x[300:310])
    data = density_set("shared", 0, tmp_path)
    assert sum(sizes(data)) == 351 and abs(len(data.x_test) - 70) <= 2
    assert data.notes == "given parts share rows: pooled, cut 70/10/20 by seed"


def test_anomalies_are_left_out(tmp_path: Path, rng: np.random.Generator) -> None:
    y = (np.arange(N) % 8 == 0).astype(int)
    x = rng.normal(size=(N, 2)) + 100 * y[:, None]
    save(tmp_path, "ad_some", x=x, y=y)
    save(tmp_path, "some", x=x, y=y)
    normal = density_set("ad_some", 0, tmp_path)
    assert sum(sizes(normal)) == N - N // 8 and "normal rows (y = 0) alone" in normal.notes
    assert max(np.abs(part).max() for part in parts(normal)) < 5
    assert sum(sizes(density_set("some", 0, tmp_path))) == N


def test_refusals(tmp_path: Path) -> None:
    save(tmp_path, "images", x=np.zeros((5, 4, 3)))
    save(tmp_path, "flat", x=np.ones((50, 2)))
    for name, folder, words in (
        ("none", tmp_path, "'none'"),
        ("none", None, "CPMM_DATA_DIR"),
        ("images", tmp_path, "table"),
        ("flat", tmp_path, "must vary"),
        ("flat", tmp_path / "none", "must exist"),
    ):
        with pytest.raises(DataError, match=words):
            density_set(name, 0, folder)


def test_gaussian_is_the_usual_one() -> None:
    data = density_set("pinwheel", 0)
    train = data.x_train.astype(float)
    law = multivariate_normal(train.mean(axis=0), np.cov(train, rowvar=False, bias=True))
    assert gaussian_nats(data) == pytest.approx(law.logpdf(data.x_test).mean(), abs=1e-5)


# Rows in all and columns kept.
REAL = {
    "ad_mammography": (10923, 6),
    "glass": (214, 9),
    "miniboone_partial": (6932, 43),
    "optdigits": (5620, 50),
    "pendigits": (10992, 16),
    "power_plant": (9568, 5),
    "winequality_red": (1599, 11),
    "wishbone_thymus": (25000, 13),
}


@pytest.mark.parametrize("name", REAL)
def test_real_sets(name: str, data_dir: Path) -> None:
    if not (data_dir / f"{name}.npz").is_file():
        pytest.skip(f"{name}.npz is not in CPMM_DATA_DIR")
    assert name in names(data_dir)
    data = density_set(name, 0, data_dir)
    assert_sound(data)
    assert (sum(sizes(data)), data.x_train.shape[1]) == REAL[name]
