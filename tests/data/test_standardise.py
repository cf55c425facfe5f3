"""Standardisation: accuracy far from the origin, round trips, resolution and noise floor."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from cpmm_jax.data import Standardizer
from cpmm_jax.errors import DataError, DataWarning

RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=(500, 3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e7])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e5])
def test_moments_and_round_trip(dtype: type, offset: float, size: float) -> None:
    x = ((NORMAL + [0.0, 1.0, -2.0]) * size + offset * size).astype(dtype)
    s = Standardizer.fit(x)
    exact = x.astype(np.longdouble)
    np.testing.assert_allclose(s.shift, exact.mean(0).astype(float), rtol=1e-13, atol=size * 1e-13)
    np.testing.assert_allclose(s.scale, exact.std(0).astype(float), rtol=1e-8)
    z = s.transform(x)
    assert z.dtype == dtype and z.shape == x.shape
    np.testing.assert_allclose(z.mean(0), 0.0, atol=1e-6)
    np.testing.assert_allclose(z.std(0), 1.0, rtol=1e-5)
    back = s.inverse(z)
    assert back.dtype == dtype
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(back, x, rtol=4 * eps, atol=8 * eps * size)


def test_rows_are_converted_in_pieces() -> None:
    x = RNG.normal(size=(700_000, 2)).astype(np.float32)
    s = Standardizer(np.array([1.0, 2.0]), np.array([2.0, 4.0]), np.zeros(2))
    expected = ((x.astype(np.float64) - s.shift) / s.scale).astype(np.float32)
    np.testing.assert_array_equal(s.transform(x), expected)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_squares_neither_underflow_nor_overflow(size: float) -> None:
    s = Standardizer.fit(NORMAL * size)
    np.testing.assert_allclose(s.scale / size, NORMAL.std(0), rtol=1e-12)


def test_resolution_is_the_step_of_recorded_columns() -> None:
    n = 400
    tenths = (np.round(RNG.normal(size=n), 1) + 20).astype(np.float32)
    nearly = np.repeat(np.arange(4.0, dtype=np.float32), n // 4)
    nearly[::7] = np.nextafter(nearly[::7], np.float32(9))  # rounding errors are no step
    x = np.stack([RNG.normal(size=n), RNG.integers(0, 17, n), tenths, nearly], 1).astype(np.float32)
    s = Standardizer.fit(x)
    np.testing.assert_allclose(s.resolution, [0.0, 1.0, 0.1, 1.0], rtol=1e-4)
    steps = np.array([0.0, 1.0, 0.1, 1.0])
    exact = steps**2 / 12 / x.astype(float).var(axis=0)
    np.testing.assert_allclose(s.noise_floor(), np.clip(exact, 1e-5, 5e-3), rtol=1e-3)
    assert (exact[[1, 2]] < 5e-3).all() and exact[3] > 5e-3
    np.testing.assert_allclose(s.noise_floor(most=np.inf)[1:], exact[1:], rtol=1e-3)


def test_floor_is_the_variance_of_the_rounding_error() -> None:
    true = RNG.normal(size=200_000) * 3
    recorded = np.round(true * 2) / 2
    s = Standardizer.fit(recorded[:, None])
    error = (recorded - true) / s.scale
    np.testing.assert_allclose(s.noise_floor(most=1.0), error.var(), rtol=0.02)


@pytest.mark.parametrize("constant", [7.0, 0.1])
@pytest.mark.parametrize("others", [NORMAL[:, :1], np.round(NORMAL[:, :2] * 2) / 2])
def test_constant_columns_are_warned_of_and_floored(constant: float, others: np.ndarray) -> None:
    x = np.column_stack([others, np.full(len(others), constant)]).astype(np.float32)
    with pytest.warns(DataWarning, match=f"column {x.shape[1] - 1}") as caught:
        s = Standardizer.fit(x)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert caught[0].filename == __file__
    assert s.scale[-1] == 1.0
    assert (s.transform(x)[:, -1] == 0).all() and s.noise_floor()[-1] == 5e-3
    np.testing.assert_array_equal(s.inverse(s.transform(x))[:, -1], x[:, -1])


def test_many_constant_columns_are_one_short_warning() -> None:
    with pytest.warns(DataWarning, match="100 of 103 .* 'p0'|p0, p1") as caught:
        names = [f"p{j}" for j in range(100)] + ["a", "b", "c"]
        Standardizer.fit(np.hstack([np.zeros((500, 100)), NORMAL]), names=names)
    assert len(caught) == 1 and len(str(caught[0].message)) < 250


def test_duplicated_columns_are_warned_of_in_pairs() -> None:
    x = NORMAL[:, [0, 1, 0, 2, 0]].copy()
    x[3, 1] = 0.0
    x = np.column_stack([x, np.where(x[:, 1] == 0, -0.0, x[:, 1])])
    with pytest.warns(DataWarning) as caught:
        Standardizer.fit(x, names=list("abcdef"))
    assert len(caught) == 1
    assert "3 pair(s)" in str(caught[0].message) and "a = c, a = e, b = f" in str(caught[0].message)


def test_one_row_is_all_constant() -> None:
    with pytest.warns(DataWarning, match="2 of 2"):
        s = Standardizer.fit([[1, 2]])
    assert s.transform([[1.0, 2.0]]).tolist() == [[0.0, 0.0]]


def test_digits_floor_is_finite_and_positive() -> None:
    x = np.minimum(RNG.poisson(2.0, (300, 4)), 16).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        floor = Standardizer.fit(x).noise_floor()
    assert np.isfinite(floor).all() and (floor >= 1e-5).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.transform(NORMAL[:, :2]), ["`x`", "D = 3", "D = 2", "D at evaluation"]),
        (lambda s: s.inverse(NORMAL[:, :2]), ["`z`", "D = 3", "D = 2"]),
        (lambda s: s.transform(NORMAL[0]), ["(N, D)", "(3,)"]),
        (lambda s: Standardizer.fit([[1.0], [float("nan")]]), ["NaN in row 1"]),
        (lambda s: Standardizer.fit([[1.7e308], [1.6e308]]), ["float64", "column 0"]),
    ],
)
def test_bad_input_gets_one_clear_line(call, words) -> None:
    with pytest.raises(DataError) as caught:
        call(Standardizer.fit(NORMAL))
    assert "\n" not in str(caught.value) and str(caught.value).count(";") == 2
    for word in words:
        assert word in str(caught.value)


def test_a_weight_stands_for_rows() -> None:
    x = np.column_stack([NORMAL[:40, 0], np.arange(40) % 5])
    weight = np.arange(40) % 3 + 1
    weighted = Standardizer.fit(x, weight=weight.astype(float))
    repeated = Standardizer.fit(np.repeat(x, weight, axis=0))
    np.testing.assert_allclose(weighted.shift, repeated.shift)
    np.testing.assert_allclose(weighted.scale, repeated.scale)
    assert weighted.resolution[1] == repeated.resolution[1] == 1.0
    alone = np.arange(5.0)[:, None]  # no row twice, and yet on a grid
    assert Standardizer.fit(alone, weight=np.full(5, 100.0)).resolution.tolist() == [1.0]
    assert Standardizer.fit(alone).resolution.tolist() == [0.0]


@pytest.mark.parametrize("recorded", [False, True])
def test_images_have_one_shift_and_scale(recorded: bool, rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (500, 6)) * np.linspace(0.1, 1, 6)
    x = x.round() if recorded else x
    s = Standardizer.fit_images(x, recorded=recorded)
    assert len(set(s.shift)) == len(set(s.scale)) == 1
    seen = x + rng.uniform(size=x.shape) if recorded else x
    z = s.transform(seen)
    assert z.mean() == pytest.approx(0, abs=0.01) and z.std() == pytest.approx(1, abs=0.01)
    assert s.resolution.tolist() == [float(recorded)] * 6


def test_greys_of_few_values_and_pixels_of_one_have_their_floor(rng: np.random.Generator) -> None:
    x = np.column_stack([rng.integers(0, 2, (50, 3)), np.zeros(50)]).astype(np.float32)
    s = Standardizer.fit_images(x, recorded=False)
    np.testing.assert_allclose(s.resolution, [1.0, 1.0, 1.0, s.scale[0]])
    assert s.noise_floor().tolist() == [5e-3] * 4


def test_images_of_one_grey_are_refused() -> None:
    with pytest.raises(DataError, match="`x` must have pixels that vary; got 7 in all of 3 images"):
        Standardizer.fit_images(np.full((3, 4), 7), recorded=True)
