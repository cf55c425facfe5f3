"""One cell fitted and scored; in a file of its own, so that a worker can import it by name."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from benchmarks.provenance import provenance
from experiments.compare.cells import Cell, Record
from experiments.labels.methods import OURS, cluster, make_classifier
from experiments.labels.sets import LabelledSet

BINS = 15


def classify(cell: Cell, method: str, data: LabelledSet) -> Record:
    """Fit a classifier, and score it."""
    x, y = data.x_train, data.y_train
    if method not in OURS:
        x, y = x[y >= 0], y[y >= 0]
    with quiet():
        start = time.perf_counter()
        model = make_classifier(method, cell.seed, y).fit(x, y)
        seconds = time.perf_counter() - start
    proba = np.asarray(model.predict_proba(data.x_test), np.float64)
    right = proba.argmax(axis=1) == data.y_test
    own = proba[np.arange(len(proba)), data.y_test]
    metrics = {
        "accuracy": float(right.mean()),
        "log_loss": float(-np.log(np.maximum(own, 1e-15)).mean()),
        "calibration_error": calibration_error(proba.max(axis=1), right),
        "seconds": seconds,
    }
    return record(cell, metrics, data)


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the mean gap between confidence and accuracy over equally full bins."""
    bins = np.array_split(np.argsort(confidence, kind="stable"), BINS)
    gaps = [len(b) * abs(confidence[b].mean() - right[b].mean()) for b in bins if len(b)]
    return float(sum(gaps) / len(right))


def group(cell: Cell, method: str, data: LabelledSet) -> Record:
    """Cluster all rows, and compare with the labels."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    with quiet():
        start = time.perf_counter()
        found = cluster(method, data.x_train, len(np.unique(data.y_train)), cell.seed)
        seconds = time.perf_counter() - start
    metrics = {
        "nmi": float(normalized_mutual_info_score(data.y_train, found)),
        "ari": float(adjusted_rand_score(data.y_train, found)),
        "accuracy": matched_accuracy(data.y_train, found),
        "seconds": seconds,
    }
    return record(cell, metrics, data)


def matched_accuracy(y: np.ndarray, clusters: np.ndarray) -> float:
    """Return the accuracy of the best one-to-one naming of clusters by classes."""
    from scipy.optimize import linear_sum_assignment

    codes = np.unique(clusters, return_inverse=True)[1]
    counts = np.zeros((codes.max() + 1, y.max() + 1))
    np.add.at(counts, (codes, y), 1)
    rows, columns = linear_sum_assignment(-counts)
    return float(counts[rows, columns].sum() / len(y))


def record(cell: Cell, metrics: dict[str, float], data: LabelledSet) -> Record:
    """Return what is kept of a cell."""
    return {
        "config": cell.config,
        "status": "done",
        "metrics": metrics,
        "rows": {"train": len(data.x_train), "test": len(data.x_test)},
        "dim": data.x_train.shape[1],
        "provenance": provenance(),
    }


def name_of(cell: Cell) -> str:
    """Return the method of a cell, which is all that its measure needs."""
    return cell.method


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back the warnings of fits that are meant to be tried."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
