"""scikit-learn's own checks of an estimator, with no failure expected."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

pytest.importorskip("sklearn")

from sklearn.utils.estimator_checks import parametrize_with_checks

import cpmm_jax as cpmm

BY_EM = [cpmm.MFADensity(), cpmm.MFAClassifier(), cpmm.MFACluster()]
CONTINUOUS = [
    cpmm.CPMMDensity(max_iter=20),
    cpmm.CPMMClassifier(max_iter=20),
    cpmm.CPMMCluster(max_iter=20),
]


def run(estimator: Any, check: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


@parametrize_with_checks(BY_EM)
def test_checks_of_those_by_em(estimator: Any, check: Any) -> None:
    run(estimator, check)


@pytest.mark.slow
@parametrize_with_checks(CONTINUOUS)
def test_checks_of_the_continuous(estimator: Any, check: Any) -> None:
    run(estimator, check)
