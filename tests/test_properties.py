"""Laws that hold for whatever numbers: of the density, of the mixture file, of the readers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import multivariate_normal

import cpmm_jax as cpmm
from cpmm_jax import artifact
from cpmm_jax.data import load

FEW = settings(max_examples=20)
SIZES = [(1, 1, 0), (3, 2, 1), (4, 5, 3)]  # K, D, R: few, since each compiles


def floats(shape: tuple[int, ...], low: float, high: float) -> Any:
    return hnp.arrays(np.float32, shape, elements=st.floats(low, high, width=32))


@st.composite
def mixtures(draw: Any, sizes: Sequence[tuple[int, int, int]] = SIZES) -> cpmm.MFA:
    """Means and scales over several orders of magnitude, loadings of rank R or less."""
    k, d, r = draw(st.sampled_from(sizes))
    return cpmm.MFA(
        jnp.asarray(draw(floats((k,), -8, 8))),
        jnp.asarray(draw(floats((k, d), -1000, 1000))),
        jnp.asarray(draw(floats((k, d, r), -30, 30))),
        jnp.asarray(draw(floats((k, d), -6, 6))),
    )


def exact(mixture: cpmm.MFA, x: np.ndarray) -> np.ndarray:
    """Return log p(x), (N,), from dense covariances in double precision, without this library."""
    logits, means, loadings, log_noise = (
        np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(mixture)
    )
    weights = logits - np.logaddexp.reduce(logits)
    terms = [
        weight + multivariate_normal(mean, a @ a.T + np.diag(np.exp(noise))).logpdf(x)
        for weight, mean, a, noise in zip(weights, means, loadings, log_noise, strict=True)
    ]
    return np.logaddexp.reduce(np.reshape(terms, (len(weights), len(x))), axis=0)


def near(mixture: cpmm.MFA, seed: int, count: int = 8) -> np.ndarray:
    return np.asarray(mixture.sample(jax.random.key(seed), count), np.float32)


@FEW
@given(mixtures(), st.integers(0, 99))
def test_the_density_is_that_of_dense_covariances(mixture: cpmm.MFA, seed: int) -> None:
    x = near(mixture, seed)
    wanted = exact(mixture, np.asarray(x, np.float64))
    np.testing.assert_allclose(mixture.log_prob(x), wanted, rtol=2e-3, atol=5e-2)


@FEW
@given(mixtures(), st.integers(0, 99))
def test_the_order_of_components_does_not_matter(mixture: cpmm.MFA, seed: int) -> None:
    x = near(mixture, seed)
    order = np.random.default_rng(seed).permutation(mixture.num_components)
    other = jax.tree.map(lambda leaf: leaf[order], mixture)
    np.testing.assert_allclose(other.log_prob(x), mixture.log_prob(x), rtol=1e-4, atol=1e-3)
    parts = np.asarray(mixture.responsibilities(x))
    np.testing.assert_allclose(parts.sum(axis=1), 1.0, atol=1e-5)
    assert (parts >= 0).all()


@FEW
@given(mixtures(SIZES[2:]), st.integers(0, 99))
def test_a_marginal_and_a_conditional_make_the_whole(mixture: cpmm.MFA, seed: int) -> None:
    """log p(a, b) = log p(a) + log p(b | a)."""
    x = near(mixture, seed, 4)
    indices = np.array([mixture.dim - 1])
    rest = mixture.condition(indices, x[0, indices])
    parts = mixture.marginal(indices).log_prob(x[:1, indices]) + rest.log_prob(x[:1, :-1])
    np.testing.assert_allclose(parts, mixture.log_prob(x[:1]), rtol=5e-3, atol=0.1)


@FEW
@given(mixtures(), st.integers(0, 99))
def test_the_file_tells_what_the_mixture_does(mixture: cpmm.MFA, seed: int) -> None:
    x = near(mixture, seed)
    with tempfile.TemporaryDirectory() as folder:
        cpmm.save_mixture(f"{folder}/m.npz", mixture)
        light = artifact.load(f"{folder}/m.npz")
    wanted = exact(mixture, np.asarray(x, np.float64))
    np.testing.assert_allclose(light.log_prob(x), wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(np.ravel(light.means), np.ravel(mixture.means))


@FEW
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.int16]),
        st.tuples(st.integers(1, 9), st.integers(1, 4)),
        elements={"allow_nan": False, "allow_infinity": False},
    ),
    st.sampled_from(["npy", "npz", "csv"]),
)
def test_what_is_written_is_read(x: np.ndarray, kind: str) -> None:
    assume(np.isfinite(x).all() and (np.abs(x) < 1e30).all())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x.{kind}"
        if kind == "npy":
            np.save(path, x)
        elif kind == "npz":
            np.savez(path, x=x)
        else:
            lines = [",".join(repr(value) for value in row) for row in x.tolist()]
            path.write_text("\n".join(lines) + "\n")
        found = load(path).x_train
    np.testing.assert_array_equal(np.asarray(found, np.float64), np.asarray(x, np.float64))
