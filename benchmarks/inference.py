"""The light file against the model that it came from, and against scikit-learn.

    .venv/bin/python -m benchmarks.inference [--full]

A labelled model of the demo's size (D = 64, 10 classes, each of 16 components of rank 12 and their
16 twins) scores examples: from the light file by NumPy, from the extracted mixture by JAX, and from
the model, which solves its ODE anew. scikit-learn's full-covariance GaussianMixture has as many
components.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import cpmm_jax as cpmm
from benchmarks.peers import find, missing
from benchmarks.report import Report, Table, main
from cpmm_jax import artifact
from cpmm_jax.dynamics.trajectory import GridTimes
from cpmm_jax.pipeline import TAIL_NOISE
from cpmm_jax.solver_study.timing import interleave

DIM, CLASSES, TIMES, RANK = 64, 10, 16, 12
PEER = "scikit-learn, full covariance"


@jax.jit
def from_model(model: cpmm.CPMM, x: jax.Array) -> jax.Array:
    mixture = model.mixture(GridTimes()(None, TIMES))
    return mixture.with_tails(TAIL_NOISE, 0.1).log_prob(x)


@jax.jit
def from_mixture(mixture: cpmm.HierarchicalMFA, x: jax.Array) -> jax.Array:
    return mixture.log_prob(x)


def gaussian_mixture(light: artifact.Mixture):
    """Return a scikit-learn GaussianMixture with the components of a light mixture."""
    from sklearn.mixture import GaussianMixture

    means = light.means.reshape(-1, DIM).astype(np.float64)
    loadings = light.loadings.reshape(-1, DIM, RANK).astype(np.float64)
    noise = np.exp(light.log_noise.reshape(-1, DIM).astype(np.float64))
    covariances = loadings @ loadings.transpose(0, 2, 1)
    covariances[:, np.arange(DIM), np.arange(DIM)] += noise
    peer = GaussianMixture(len(means), covariance_type="full")
    class_weights, weights = np.exp(light.class_logits), np.exp(light.logits)
    weights = weights / weights.sum(axis=1, keepdims=True)
    peer.weights_ = (weights * (class_weights / class_weights.sum())[:, None]).reshape(-1)
    peer.means_, peer.covariances_ = means, covariances
    peer.precisions_cholesky_ = np.linalg.inv(np.linalg.cholesky(covariances)).transpose(0, 2, 1)
    return peer


def measure(full: bool) -> Report:
    """Time reading the file, then log p of one example, of the digits' test part, and of more."""
    rng = np.random.default_rng(0)
    model = cpmm.CPMM(DIM, RANK, CLASSES, widths=(256, 256), rngs=nnx.Rngs(0))
    mixture = model.extract(TIMES).with_tails(TAIL_NOISE, 0.1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mixture.npz"
        cpmm.save_mixture(path, mixture)
        kilobytes = path.stat().st_size / 1024
        start = time.perf_counter()
        light = artifact.load(path)
        light.log_prob(np.zeros((1, DIM)))
        loading = time.perf_counter() - start
    counts = (1, 450, 10_000) if full else (1, 450)
    timings = {}
    for n in counts:
        x = rng.standard_normal((n, DIM)).astype(np.float32)
        cases = {
            "light file (NumPy, float64)": lambda x=x: light.log_prob(x),
            "extracted mixture (JAX, jitted)": lambda x=x: from_mixture(mixture, x),
            "model (solves its ODE, jitted)": lambda x=x: from_model(model, x),
        }
        if find("sklearn") is not None:
            peer = gaussian_mixture(light)
            cases[PEER] = lambda x=x, peer=peer: peer.score_samples(x)
        results = [np.asarray(case()) for case in cases.values()]
        for result in results[1:]:
            np.testing.assert_allclose(result, results[0], rtol=1e-4)
        timings[n] = interleave(cases, seconds=1.0, least=5)
    rows = [[name, *(str(timings[n][name]) for n in counts)] for name in timings[1]]
    if PEER not in timings[1]:
        rows.append([PEER, *[missing("scikit-learn")] * len(counts)])
    table = Table(
        f"log p of examples (D = {DIM}, {CLASSES} classes of {2 * TIMES} components, rank {RANK})",
        ("", *(f"{n:,} example{'s' * (n > 1)}" for n in counts)),
        rows,
        (f"The light file holds {kilobytes:.0f} KiB, read and ready in {1e3 * loading:.0f} ms.",),
    )
    data = {
        "kibibytes": kilobytes,
        "loading_seconds": loading,
        "seconds": {n: {name: t.median for name, t in of.items()} for n, of in timings.items()},
    }
    return Report("inference", [table], data)


if __name__ == "__main__":
    main("inference", measure)
