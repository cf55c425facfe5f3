"""Labels: their kinds, their codes, and labels that are no class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cpmm_jax.data import load, recode_labels
from cpmm_jax.errors import DataError, DataWarning
from tests.data.files import (
    IMAGE_LABELS,
    IMAGES,
    Case,
    X,
    Y,
    assert_refused_in_one_line,
    idx,
    idx_bytes,
    npy,
    npz,
    text,
)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b", "c", "a", "a"], ("a", "b", "c")),
        (["10", "9", "9", "10", "9", "9"], ("9", "10")),  # as numbers, not as words
        ([1.0, 0.0, 1.0, 0.0, 1.0, 2.0], ("0", "1", "2")),
        ([True, False, True, True, True, True], ("0", "1")),
        ([b"u", b"v", b"u", b"u", b"u", b"u"], ("u", "v")),
    ],
)
def test_label_kinds(tmp_path: Path, labels: list, names: tuple[str, ...]) -> None:
    data = load(npz(tmp_path, x=X, y=np.array(labels)), labels=True)
    assert data.class_names == names
    back = [str(value.decode() if isinstance(value, bytes) else value) for value in labels]
    if names[0] in ("a", "9", "u"):
        assert [names[code] for code in data.y_train] == back


def test_recode_labels_follows_the_class_names_of_a_model(tmp_path: Path) -> None:
    data = load(npz(tmp_path, x=X, y=np.array([5, 3, 5, 5, 3, 3])))
    recoded = recode_labels(data, ["1", "3", "4", "5"])
    np.testing.assert_array_equal(recoded.y_train, [3, 1, 3, 3, 1, 1])
    assert recoded.class_names == ("1", "3", "4", "5")
    assert recode_labels(recoded, ("1", "3", "4", "5")) is recoded
    with pytest.raises(DataError, match="'5'") as caught:
        recode_labels(data, ["1", "3"])
    assert "\n" not in str(caught.value)


BAD: dict[str, Case] = {
    "none in a set": (lambda f: "checkerboard", {"labels": True}, ["labels", "checkerboard"]),
    "none in npy": (lambda f: npy(f, X), {"labels": True}, ["labels", "one array"]),
    "none in npz": (lambda f: npz(f, x=X, t=Y), {"labels": True}, ["'x', 't'", "`y`"]),
    "none for train": (
        lambda f: npz(f, x_train=X, x_test=X, y_test=Y),
        {"labels": True},
        ["'y_test'", "`y_train`"],
    ),
    "none in csv": (
        lambda f: text(f, "a,b\n1,2\n"),
        {"labels": True},
        ["'a', 'b'", "label_column"],
    ),
    "none in idx": (
        lambda f: idx(f, train_x=idx_bytes(IMAGES)),
        {"labels": True},
        ["train-labels-idx1-ubyte"],
    ),
    "of another length": (lambda f: npz(f, x=X, y=Y[:4]), {}, ["`y`", "6 examples", "4 labels"]),
    "of another length in idx": (
        lambda f: idx(f, train_x=idx_bytes(IMAGES), train_y=idx_bytes(IMAGE_LABELS[:3])),
        {},
        ["train-labels", "5 examples", "3 labels"],
    ),
    "one-hot": (lambda f: npz(f, x=X, y=np.eye(6)), {}, ["`y`", "(6, 6)", "argmax"]),
    "NaN label": (
        lambda f: npz(f, x=X, y=np.where(Y == 2, np.nan, Y)),
        {"labels": True},
        ["nan in row 2", "2 such"],
    ),
    "fractional label": (lambda f: npz(f, x=X, y=Y / 2), {"labels": True}, ["0.5 in row 1"]),
    "negative label": (
        lambda f: npz(f, x=X, y=Y - 1),
        {"labels": True},
        ["-1 in row 0", "missing"],
    ),
    "huge label": (
        lambda f: npz(f, x=X, y=np.full(6, 2**63, np.uint64)),
        {"labels": True},
        ["2**63"],
    ),
    "complex label": (lambda f: npz(f, x=X, y=Y + 1j), {"labels": True}, ["integer", "complex"]),
    "bytes label": (lambda f: npz(f, x=X, y=np.array([b"\xff"] * 6)), {"labels": True}, ["UTF-8"]),
    "empty label": (
        lambda f: text(f, "a,y\n1,u\n\n2,\n"),
        {"labels": True, "label_column": "y"},
        ["label column y", "'' in line 4"],
    ),
    "class absent in train": (
        lambda f: npz(f, x_train=X, y_train=Y, x_test=X, y_test=Y + 1),
        {"labels": True},
        ["`y_test`", "`y_train`", "3 in row 2", "2 such"],
    ),
    "words against numbers": (
        lambda f: npz(f, x_train=X, y_train=Y, x_test=X[:1], y_test=np.array(["u"])),
        {"labels": True},
        ["`y_test`", "'u' in row 0"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_labels_get_one_clear_line(case: str, tmp_path: Path) -> None:
    assert_refused_in_one_line(BAD[case], tmp_path)


@pytest.mark.parametrize(
    "y", [Y / 2, Y - 1, np.where(Y == 0, np.nan, Y)], ids=["target", "negative", "missing"]
)
def test_labels_nobody_asked_for_are_left_out_with_a_warning(tmp_path: Path, y: np.ndarray) -> None:
    with pytest.warns(DataWarning, match="left out") as caught:
        data = load(npz(tmp_path, x=X, y=y))
    assert data.y_train is None and data.class_names is None
    assert caught[0].filename == __file__


def test_test_labels_without_training_labels_are_left_out(tmp_path: Path) -> None:
    with pytest.warns(DataWarning, match="`y_test`"):
        assert load(npz(tmp_path, x_train=X, x_test=X, y_test=Y)).y_test is None
