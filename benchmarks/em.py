"""EM for a mixture of factor analyzers: an iteration beside its matrix products, and scikit-learn.

    .venv/bin/python -m benchmarks.em [--full]

The ideal is the time that the products of one iteration, 4 N K D (R + 2) operations, take at the
rate of a large float32 product in the same run. scikit-learn's full-covariance GaussianMixture has
the same examples, number of components, starting means and iterations; it does more work for it,
N K D^2 per iteration, as a user without a low-rank mixture would.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cpmm_jax as cpmm
from benchmarks.memory import peak_memory, show
from benchmarks.peers import find, missing
from benchmarks.report import Report, Table, main
from cpmm_jax.solver_study.timing import interleave

SQUARE = 2048  # side of the product that sets the machine's rate
PEER = "scikit-learn, full covariance"


class Size(NamedTuple):
    """Examples N, components K, features D, factors R, iterations of a fit."""

    n: int
    k: int
    d: int
    r: int
    iterations: int

    def __str__(self) -> str:
        return f"N = {self.n:,}, K = {self.k}, D = {self.d}, R = {self.r}"

    @property
    def operations(self) -> int:
        """Operations of the products of one iteration."""
        return 4 * self.n * self.k * self.d * (self.r + 2)


SIZES = (Size(50_000, 50, 64, 4, 10), Size(8192, 20, 784, 6, 3))
MEMORY = (10_000, 50_000, 200_000)  # examples of the stream


def examples(size: Size) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(size.k, size.d))
    factors = rng.normal(size=(size.n, size.r)) @ rng.normal(size=(size.r, size.d))
    x = centres[rng.integers(size.k, size=size.n)] + factors + rng.normal(size=(size.n, size.d))
    return x.astype(np.float32)


def ours(x: np.ndarray, start: cpmm.MFA, iterations: int) -> cpmm.EMResult:
    return cpmm.fit_em(x, start=start, max_iter=iterations, tol=0.0)


def peer(x: np.ndarray, start: cpmm.MFA, iterations: int) -> Any:
    from sklearn.mixture import GaussianMixture

    count, dim = start.means.shape
    mixture = GaussianMixture(
        count,
        tol=0.0,
        max_iter=iterations,
        reg_covar=1e-3,  # or else clusters of few examples make it fail
        weights_init=np.full(count, 1.0 / count),
        means_init=np.asarray(start.means, np.float64),
        precisions_init=np.broadcast_to(np.eye(dim), (count, dim, dim)),
        init_params="random_from_data",
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, as was asked
        return mixture.fit(x.astype(np.float64))  # in float32 it fails here


def prepare_case(count: str) -> Callable[[], Any]:
    """Return an iteration over a stream of examples that are made as they are asked for."""
    size = SIZES[0]._replace(n=int(count))
    block = examples(size._replace(n=2000))
    start = cpmm.random_start(block, size.k, size.r, seed=0)

    def fit(chunks: int) -> Any:
        return cpmm.fit_em_stream(lambda: (block for _ in range(chunks)), start, max_iter=1)

    fit(1)
    return partial(fit, size.n // len(block))


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def measure(full: bool) -> Report:
    """Time an iteration and a whole fit at each size, and the memory of a stream."""
    square = jnp.asarray(np.random.default_rng(0).normal(size=(SQUARE, SQUARE)), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    rows, data = [], {}
    for size in SIZES if full else (SIZES[0]._replace(iterations=3),):
        x = examples(size)
        start = cpmm.kmeans_start(x, size.k, size.r, seed=0)
        cold = seconds_of(lambda: ours(x, start, 1))  # noqa: B023
        cases = {
            "product": lambda: product(square),
            "one": lambda: ours(x, start, 1),  # noqa: B023
            "fit": lambda: ours(x, start, 1 + size.iterations),  # noqa: B023
        }
        timings = interleave(cases, seconds=4.0 if full else 1.5)
        rate = 2 * SQUARE**3 / timings["product"].median
        iteration = (timings["fit"].median - timings["one"].median) / size.iterations
        ideal = size.operations / rate
        fit = timings["fit"].median
        numbers = {"ideal": ideal, "iteration": iteration, "fit": fit, "compile": cold - fit}
        other = missing("scikit-learn")
        if find("sklearn") is not None:
            numbers["peer"] = seconds_of(lambda: peer(x, start, 1 + size.iterations))  # noqa: B023
            other = f"{numbers['peer']:.1f} s, {numbers['peer'] / fit:.0f} times ours"
        data[str(size)] = numbers
        rows.append(
            [
                str(size),
                f"{1e3 * iteration:.0f} ms",
                f"{iteration / ideal:.1f}",
                f"{fit:.2f} s of {1 + size.iterations}",
                other,
                f"{max(cold - timings['one'].median, 0):.1f} s",
            ]
        )
    columns = ("", "iteration", "times ideal", "fit, iterations", PEER, "compile")
    tables = [Table("EM for a mixture of factor analyzers", columns, rows)]
    memory = {n: peak_memory("em", str(n)) for n in (MEMORY if full else MEMORY[:1])}
    data["stream_bytes"] = {str(n): size for n, size in memory.items()}
    tables.append(
        Table(
            "Peak memory of an iteration over a stream (K = 50, D = 64, R = 4)",
            [f"{n:,} examples" for n in memory],
            [[show(size) for size in memory.values()]],
        )
    )
    return Report("em", tables, data)


if __name__ == "__main__":
    main("em", measure)
