"""The experiments with labels: which rows and labels are seen, and the scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

from cpmm_jax.errors import DataError
from experiments.labels import __main__ as labels
from experiments.labels import measures
from experiments.labels.sets import all_rows, labelled_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set of three classes, the last of which is too rare."""
    y = np.r_[np.zeros(60), np.ones(60), np.full(5, 2)].astype(int)
    x = np.random.default_rng(0).normal(size=(125, 2)) + 6 * y[:, None]
    np.savez(tmp_path / "blobs.npz", x=x, y=y)
    np.savez(tmp_path / "bare.npz", x=x)
    return tmp_path


def test_rare_classes_are_left_out_and_the_rest_cut_class_by_class(folder: Path) -> None:
    data = labelled_set("blobs", 0, data_dir=folder)
    assert np.bincount(data.y_train).tolist() == [42, 42]
    assert np.bincount(data.y_test).tolist() == [18, 18]
    assert len(all_rows("blobs", 0, data_dir=folder).x_train) == 120


def test_some_labels_are_hidden_at_random_by_class(folder: Path) -> None:
    few = labelled_set("blobs@0.1", 0, data_dir=folder)
    assert np.bincount(few.y_train + 1).tolist() == [76, 4, 4]
    fewest = labelled_set("blobs@0.001", 1, data_dir=folder)
    assert np.bincount(fewest.y_train + 1).tolist() == [80, 2, 2]
    whole = labelled_set("blobs", 1, data_dir=folder)
    np.testing.assert_array_equal(fewest.x_train, whole.x_train)
    known = fewest.y_train >= 0
    np.testing.assert_array_equal(fewest.y_train[known], whole.y_train[known])


@pytest.mark.parametrize(("name", "message"), [("no_such", "CPMM_DATA_DIR"), ("bare", "labels")])
def test_sets_that_do_not_serve(folder: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        labelled_set(name, 0, data_dir=folder)


def test_clusters_are_named_one_to_one() -> None:
    y = np.array([0, 0, 0, 1, 1, 2])
    assert measures.matched_accuracy(y, np.array([5, 5, 5, 7, 7, 1])) == 1.0
    assert measures.matched_accuracy(y, np.zeros(6, int)) == 0.5
    assert measures.matched_accuracy(y, np.array([0, 0, 0, 1, 1, -1])) == 1.0  # HDBSCAN's noise


def test_confidence_that_is_right_is_calibrated(rng: np.random.Generator) -> None:
    confidence = rng.uniform(0.5, 1.0, 20_000)
    right = rng.uniform(size=20_000) < confidence
    assert measures.calibration_error(confidence, right) < 0.01
    assert measures.calibration_error(np.ones(10), np.zeros(10, bool)) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "cluster"])
def test_the_whole_way(folder: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [task, "--sets", "blobs", "--seeds", "1", "--data-dir", str(folder)]
    if task == "classify":
        given += ["--labels", "1,0.1"]
    assert labels.main([*given, "--out", str(folder / "out")]) == 0
    numbers = json.loads((folder / "out" / f"{task}.json").read_text())["data"]
    assert all(len(values) == 1 for values in numbers.values())
    first = "accuracy/blobs@0.1/cpmm" if task == "classify" else "nmi/blobs/cpmm"
    assert numbers[first][0] > 0.9
    assert "95 % interval" in capsys.readouterr().out


def test_principal_components_are_those_of_the_training_part() -> None:
    data, whole = labelled_set("digits:8@0.5", 0), labelled_set("digits@0.5", 0)
    assert data.x_train.shape == (len(whole.x_train), 8)
    assert data.x_test.shape[1] == 8
    np.testing.assert_array_equal(data.y_train, whole.y_train)
    covariance = np.cov(data.x_train.T)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-2)
    largest = np.linalg.eigvalsh(np.cov(whole.x_train.T))[::-1][:8]
    np.testing.assert_allclose(np.diag(covariance), largest, rtol=1e-3)
