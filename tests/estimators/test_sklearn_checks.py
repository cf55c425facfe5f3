"""scikit-learn's own checks of an estimator, with no failure expected."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

pytest.importorskip("sklearn")

from sklearn.utils.estimator_checks import parametrize_with_checks

import cpmm_jax as cpmm

SHORT = [cpmm.MFAClassifier()]
LONG = [
    cpmm.MFADensity(),
    cpmm.MFACluster(),
    cpmm.CPMMDensity(max_iter=20),
    cpmm.CPMMClassifier(max_iter=20),
    cpmm.CPMMCluster(max_iter=20),
]


def run(estimator: Any, check: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


@parametrize_with_checks(SHORT)
def test_checks(estimator: Any, check: Any) -> None:
    run(estimator, check)


@pytest.mark.slow
@parametrize_with_checks(LONG)
def test_checks_that_take_long(estimator: Any, check: Any) -> None:
    run(estimator, check)
