"""Checks of examples and labels: what passes unchanged, and one line for what does not."""

from __future__ import annotations

import numpy as np
import pytest

from cpmm_jax.data import check_enough_rows, check_examples, check_labels
from cpmm_jax.errors import DataError


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        (np.float32, np.float32),
        (np.float64, np.float64),
        (np.float16, np.float32),
        (np.uint8, np.float32),
        (np.int16, np.float32),
        (np.int32, np.float64),
        (np.bool_, np.float32),
        (np.dtype(">f4"), np.float32),
    ],
)
def test_examples_become_native_floats_without_loss(given: type, becomes: type) -> None:
    x = np.array([[0, 1], [1, 1]], given)
    checked = check_examples(x, dim=2)
    assert checked.dtype == becomes and checked.dtype.isnative
    np.testing.assert_array_equal(checked, x)
    assert (checked is x) == (x.dtype == becomes and x.dtype.isnative)


def test_labels_become_int64() -> None:
    for y in ([0, 1, 2], [0.0, 1.0, 2.0], np.array([0, 1, 2], np.uint8)):
        codes = check_labels(y, 3)
        assert codes.dtype == np.int64 and codes.tolist() == [0, 1, 2]
    # A part to evaluate on may lack classes of the model; one to train on may not.
    assert check_labels([2, 2], 2, num_classes=4).tolist() == [2, 2]
    check_enough_rows(3, 3)


NAN = float("nan")
BAD = {
    "ragged": (check_examples, ([[1.0], [1.0, 2.0]],), {}, ["different lengths"]),
    "no array": (check_examples, ({"a": 1},), {}, ["`x`", "object"]),
    "words": (check_examples, ([["1", "b"]],), {}, ["'b'", "column 1"]),
    "objects": (check_examples, (np.array([[1, None]], object),), {}, ["object", "None"]),
    "dates": (check_examples, (np.array([["2020-01-01"]], "M8[D]"),), {}, ["datetime64"]),
    "vector": (check_examples, ([1.0],), {"name": "data"}, ["`data`", "(N, D)", "(1,)"]),
    "empty": (check_examples, (np.zeros((0, 3)),), {}, ["(0, 3)"]),
    "no columns": (check_examples, (np.zeros((3, 0)),), {}, ["(3, 0)"]),
    "other D": (check_examples, ([[1.0, 2.0]],), {"dim": 3}, ["D at evaluation", "D = 3", "D = 2"]),
    "NaN": (check_examples, ([[1.0, 2.0], [3.0, NAN]],), {}, ["NaN in row 1", "column 1"]),
    "length": (check_labels, ([0, 1], 3), {}, ["3 examples", "2 labels"]),
    "columns": (check_labels, ([[0], [1]], 2), {}, ["(2, 1)"]),
    "word labels": (check_labels, (["a", "b"], 2), {}, ["integer", "<U1"]),
    "fraction": (check_labels, ([0.0, 0.5], 2), {"name": "y_test"}, ["`y_test`", "0.5 in row 1"]),
    "missing": (check_labels, ([0.0, NAN], 2), {}, ["nan in row 1"]),
    "negative": (check_labels, ([0, -1], 2), {}, ["-1 in row 1"]),
    "too many": (check_labels, ([0, 5], 2), {"num_classes": 3}, ["0..2", "5 in row 1"]),
    "gap": (check_labels, ([0, 1, 3], 3), {}, ["0..3", "class 2", "gaps"]),
    "no zero": (check_labels, ([1, 2], 2), {}, ["class 0"]),
    "huge gap": (check_labels, ([0, 10**15], 2), {}, ["class 1", "999999999999999 classes"]),
    "last absent": (
        check_labels,
        ([0, 1], 2),
        {"num_classes": 3, "require_all": True},
        ["0..2", "class 2"],
    ),
    "rows": (check_enough_rows, (5, 8), {}, ["5 rows", "8 components", "at most 5"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line(case: str) -> None:
    check, args, options, words = BAD[case]
    with pytest.raises(DataError) as caught:
        check(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and message.count(";") == 2
    for word in words:
        assert word in message, message


def test_labels_that_are_not_known() -> None:
    assert check_labels([0, -1, 1], 3, unknown=True).tolist() == [0, -1, 1]
    with pytest.raises(DataError, match="labels >= 0"):
        check_labels([0, -1, 1], 3)
    with pytest.raises(DataError, match=r"got none of class 0 .*gaps"):
        check_labels([1, -1], 2, unknown=True)
