"""Laws of `split`."""

from __future__ import annotations

import numpy as np
import pytest

from cpmm_jax.data import Dataset, split
from cpmm_jax.errors import ConfigError, DataError


def numbered(n: int, labels: list[int] | None = None, **parts: np.ndarray) -> Dataset:
    y = None if labels is None else np.array(labels)
    return Dataset("numbered", np.arange(float(n))[:, None], y, **parts)


@pytest.mark.parametrize("labels", [None, [0, 1] * 50, [0] * 90 + [1] * 8 + [2, 3]])
@pytest.mark.parametrize("seed", [0, 1])
def test_parts_are_disjoint_complete_stratified_and_deterministic(
    labels: list[int] | None, seed: int
) -> None:
    whole = numbered(100, labels)
    data, again = split(whole, seed=seed), split(whole, seed=seed)
    sizes = [len(x) for x in (data.x_train, data.x_valid, data.x_test)]
    assert sizes == [65, 15, 20]
    rows = np.concatenate([data.x_train, data.x_valid, data.x_test])[:, 0]
    np.testing.assert_array_equal(np.sort(rows), np.arange(100))
    np.testing.assert_array_equal(data.x_test, again.x_test)
    assert not np.array_equal(data.x_test, split(whole, seed=seed + 2).x_test)
    if labels is None:
        assert data.y_train is None and data.y_test is None
        return
    counts = np.bincount(labels)
    for which, part in (("train", 0.65), ("valid", 0.15), ("test", 0.2)):
        x, y = data.part(which)
        np.testing.assert_array_equal(y, np.array(labels)[x[:, 0].astype(int)])
        assert np.abs(np.bincount(y, minlength=len(counts)) - part * counts).max() < 2
    assert np.bincount(data.y_train).min() >= 1 and len(np.bincount(data.y_train)) == len(counts)


def test_parts_that_are_there_stay() -> None:
    test = np.ones((7, 1))
    data = split(numbered(100, x_test=test), seed=0)
    assert data.x_test is test and len(data.x_valid) == 15 and len(data.x_train) == 85
    full = split(data, seed=1)
    assert full is data
    none = split(numbered(100), seed=0, valid_fraction=0.0)
    assert none.x_valid is None and len(none.x_test) == 20


def test_every_class_keeps_a_training_example() -> None:
    data = split(numbered(9, [0, 0, 0, 0, 0, 1, 1, 2, 3]), seed=0, test_fraction=0.6)
    assert set(data.y_train) == {0, 1, 2, 3}
    assert [len(x) for x in (data.x_train, data.x_valid, data.x_test)] == [4, 1, 4]


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: split(numbered(1), seed=0), DataError, ["1 row(s)", "test part"]),
        (lambda: split(numbered(2), seed=0), DataError, ["2 row(s)", "test part"]),
        (lambda: split(numbered(3, [0, 1, 2]), seed=0), DataError, ["3 class(es)"]),
        (
            lambda: split(numbered(9), seed=0, test_fraction=1.0),
            ConfigError,
            ["`test_fraction`", "1.0"],
        ),
        (lambda: split(numbered(9), seed=0, valid_fraction=-0.1), ConfigError, ["-0.1"]),
        (lambda: split(numbered(9), seed=0, valid_fraction=float("nan")), ConfigError, ["nan"]),
        (lambda: split(numbered(9), seed=-1), ConfigError, ["`seed`", "-1"]),
    ],
)
def test_bad_input_gets_one_clear_line(call, kind, words) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value) and str(caught.value).count(";") == 2
    for word in words:
        assert word in str(caught.value)


def test_weights_go_with_their_rows() -> None:
    whole = numbered(40, weight_train=np.arange(40.0) + 1)
    data = split(whole, seed=0, valid_fraction=0.2, test_fraction=0.1)
    np.testing.assert_array_equal(data.weight_train, data.x_train[:, 0] + 1)
    np.testing.assert_array_equal(data.weight_valid, data.x_valid[:, 0] + 1)
