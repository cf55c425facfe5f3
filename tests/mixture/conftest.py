"""What the tests of the mixtures share: a dense float64 reference, random mixtures, jaxprs."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special

from cpmm_jax.mixture import MFA


@pytest.fixture(scope="module", autouse=True)
def optimised() -> Iterator[None]:
    """Compile as users do: how a program rounds is part of what is tested here."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def covariances(mixture: MFA) -> np.ndarray:
    """Return the (K, D, D) covariance matrices in float64."""
    loadings = np.asarray(mixture.loadings, np.float64)
    noise = np.exp(np.asarray(mixture.log_noise, np.float64))
    low_rank = np.einsum("kdr,ker->kde", loadings, loadings)
    return low_rank + noise[:, :, None] * np.eye(noise.shape[1])[None]


def component_log_prob(mixture: MFA, x: Any) -> np.ndarray:
    """Return log w_k + log N(x; component k), (N, K), from dense covariances in float64."""
    x, means = np.asarray(x, np.float64), np.asarray(mixture.means, np.float64)
    log_weights = scipy.special.log_softmax(np.asarray(mixture.logits, np.float64))
    columns = []
    for mean, covariance in zip(means, covariances(mixture), strict=True):
        factor = scipy.linalg.cholesky(covariance, lower=True)
        white = scipy.linalg.solve_triangular(factor, (x - mean).T, lower=True)
        log_det = 2.0 * np.log(np.diag(factor)).sum()
        size = x.shape[1] * np.log(2.0 * np.pi)
        columns.append(-0.5 * (np.square(white).sum(0) + log_det + size))
    return np.stack(columns, axis=1) + log_weights


def log_prob(mixture: MFA, x: Any) -> np.ndarray:
    """Return log p(x), (N,), from dense covariances in float64."""
    return scipy.special.logsumexp(component_log_prob(mixture, x), axis=1)


def relative_error(got: Any, expected: np.ndarray) -> float:
    """Return the largest error, relative to max(1, |expected|): log p may be near zero."""
    got = np.asarray(got, np.float64)
    assert got.shape == expected.shape
    return float(np.max(np.abs(got - expected) / np.maximum(1.0, np.abs(expected))))


def make(rng: np.random.Generator, *batch: int, dim: int, rank: int, dtype: Any = None) -> MFA:
    """Return a well-conditioned random mixture; `batch` is (K,), (C, K), ..."""

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * rng.normal(size=(*batch, *shape)), dtype or jnp.float32)

    return MFA(
        normal(), normal(dim, scale=2.0), normal(dim, rank, scale=0.7), normal(dim, scale=0.5)
    )


def equations(jaxpr: Any) -> Iterator[Any]:
    """Walk the equations of a jaxpr and of all jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        leaves = jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda value: hasattr(value, "jaxpr") or hasattr(value, "eqns"),
        )
        for leaf in leaves:
            inner = getattr(leaf, "jaxpr", leaf)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.fixture(scope="session")
def dense() -> SimpleNamespace:
    """Return the dense reference, which shares no code with the library."""
    return SimpleNamespace(
        covariances=covariances,
        component_log_prob=component_log_prob,
        log_prob=log_prob,
        relative_error=relative_error,
    )


@pytest.fixture(scope="session")
def make_mixture() -> Any:
    """Return the function `make(rng, *batch, dim=, rank=, dtype=)`."""
    return make


@pytest.fixture(scope="session")
def walk() -> Any:
    """Return the function that walks the equations of a jaxpr."""
    return equations
