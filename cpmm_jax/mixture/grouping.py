"""Groups of examples by who is near whom: clusters, and labels carried to those without.

The graph of nearest neighbours tells what belongs together whatever shape it has: a group is a
region that few of its edges leave. A mixture then describes each group.

Source: Ng, Jordan and Weiss, "On spectral clustering" (2001); Shi and Malik, "Normalized cuts and
image segmentation" (2000); Zhou et al., "Learning with local and global consistency" (2003).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
from jaxtyping import Float, Int
from scipy.sparse.linalg import eigsh

from cpmm_jax.mixture.initialise import kmeans

NEIGHBOURS = 10
MOST_ROWS = 20_000  # of a graph; beyond, so many are drawn, and the others follow the nearest
SMALL = 500  # rows up to which eigenvectors are those of a dense matrix
RESTARTS = 10  # of the k-means among eigenvectors
WEAK = 0.1  # part of a group's edges that leave it, from which on the graph does not fall apart
SPREAD = 0.99  # of a label that goes on to the neighbours at each step
STEPS = 100
BLOCK_ELEMENTS = 2**22  # distances held at a time


def group_examples(
    x: Float[np.ndarray, "N D"],
    num_groups: int,
    *,
    scales: Sequence[npt.ArrayLike] = (1.0,),
    weight: Float[np.ndarray, " N"] | None = None,
    seed: int = 0,
) -> Int[np.ndarray, " N"]:
    """Cut the graph of nearest neighbours where few of its edges are.

    Which neighbours are near depends on the units of the features. Of several choices that is taken
    whose graph falls apart best: by the sum over groups of the part of a group's edges that leave
    it, the normalised cut. Where more than a tenth of the edges do, there is no gap for a cut to
    follow, and the groups are those of k-means, in the first of the choices.

    Args:
        x: examples, shape (N, D).
        num_groups: C, at most N.
        scales: by which the features may be multiplied, each a number or shape (D,).
        weight: how much each example counts, shape (N,), or None.
        seed: of the k-means among eigenvectors, and of the examples drawn where there are many.

    Returns:
        The group of each example, shape (N,); no group is empty.
    """
    rows = np.arange(len(x))
    if len(x) > MOST_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MOST_ROWS, replace=False))
    own = np.ones(len(rows)) if weight is None else weight[rows]
    best: tuple[float, Any, Any] = (np.inf, None, None)
    for scale in scales:
        scaled = np.asarray(x, np.float32) * np.asarray(scale, np.float32)
        counted = scipy.sparse.diags_array(own)
        graph = (counted @ neighbour_graph(scaled[rows]) @ counted).tocsr()
        groups = _spectral(graph, num_groups, seed)
        cut = _normalised_cut(graph, groups, num_groups)
        if cut < best[0] or best[1] is None:
            best = cut, groups, scaled
    cut, groups, scaled = best
    if cut > WEAK * num_groups:
        return kmeans(np.asarray(x * scales[0], np.float32), num_groups, seed=seed)[1]
    if len(rows) < len(x):
        groups = groups[nearest_rows(scaled, scaled[rows], 1)[:, 0]]
    return groups  # type: ignore[no-any-return]


def _members(groups: Int[np.ndarray, " N"], num_groups: int) -> Any:
    """Return who is in which group, a sparse (N, C) matrix."""
    count = len(groups)
    return scipy.sparse.csr_array(
        (np.ones(count), (np.arange(count), groups)), shape=(count, num_groups)
    )


def _spectral(graph: Any, num_groups: int, seed: int) -> Int[np.ndarray, " N"]:
    count = graph.shape[0]
    if num_groups == 1:
        return np.zeros(count, np.int64)
    root = scipy.sparse.diags_array(1.0 / np.sqrt(np.maximum(graph.sum(axis=1), 1e-12)))
    walk = (root @ graph @ root).tocsr()
    if count <= max(SMALL, 2 * num_groups):
        places = np.linalg.eigh(walk.todense())[1][:, -num_groups:]
    else:
        start = np.random.default_rng(seed).normal(size=count)
        places = eigsh(walk, k=num_groups, which="LA", tol=1e-3, v0=start)[1]
    places = places / np.maximum(np.linalg.norm(places, axis=1, keepdims=True), 1e-12)
    return kmeans(places.astype(np.float32), num_groups, seed=seed, restarts=RESTARTS)[1]


def _normalised_cut(graph: Any, groups: Int[np.ndarray, " N"], num_groups: int) -> float:
    member = _members(groups, num_groups)
    edges = np.asarray((member.T @ graph @ member).todense())
    return float(np.sum(1.0 - np.diag(edges) / np.maximum(edges.sum(axis=1), 1e-12)))


def nearest_rows(
    x: Float[np.ndarray, "N D"], others: Float[np.ndarray, "M D"], count: int
) -> Int[np.ndarray, "N count"]:
    """Return which `count` of `others` are nearest to each example, in any order."""
    centre = others.mean(axis=0)
    moved = others - centre
    squares = np.sum(moved**2, axis=1)
    nearest = np.empty((len(x), count), np.int64)
    size = max(1, BLOCK_ELEMENTS // len(others))
    for start in range(0, len(x), size):
        distance = squares[None, :] - 2.0 * ((x[start : start + size] - centre) @ moved.T)
        nearest[start : start + size] = np.argpartition(distance, count - 1, axis=1)[:, :count]
    return nearest


def neighbour_graph(x: Float[np.ndarray, "N D"], neighbours: int = NEIGHBOURS) -> Any:
    """Return the symmetric graph of nearest neighbours, a sparse (N, N) matrix of 0, 1 and 2.

    Args:
        x: examples, shape (N, D).
        neighbours: of each example; fewer where there are fewer examples.
    """
    rows = np.asarray(x, np.float32)
    count, kept = len(rows), min(neighbours + 1, len(rows))  # itself is the nearest
    nearest = nearest_rows(rows, rows, kept)
    ends = np.arange(0, count * kept + 1, kept)
    graph = scipy.sparse.csr_array(
        (np.ones(count * kept), nearest.ravel(), ends), shape=(count, count)
    )
    graph.setdiag(0.0)
    return graph + graph.T


def spread_labels(
    x: Float[np.ndarray, "N D"],
    y: Int[np.ndarray, " N"],
    num_classes: int,
    *,
    weight: Float[np.ndarray, " N"] | None = None,
) -> Int[np.ndarray, " N"]:
    """Give every example a class: the labels that are known spread among nearest neighbours.

    Args:
        x: examples, shape (N, D).
        y: class codes, shape (N,), -1 where not known; every class occurs.
        num_classes: C.
        weight: how much each label counts, shape (N,), or None.

    Returns:
        Class codes, shape (N,), those known as they were. Of more than 20,000 examples the first
        so many, those known before others, make up the graph; the rest follow the nearest of them.
    """
    order = np.argsort(y < 0, kind="stable")
    rows, rest = order[:MOST_ROWS], order[MOST_ROWS:]
    found: npt.NDArray[np.int64] = np.array(y, np.int64)
    found[rows] = _spread(x[rows], y[rows], num_classes, None if weight is None else weight[rows])
    rest = rest[y[rest] < 0]
    if len(rest):
        found[rest] = found[rows][nearest_rows(x[rest], x[rows], 1)[:, 0]]
    return found


def _spread(x: Any, y: Any, num_classes: int, weight: Any) -> npt.NDArray[np.int64]:
    known = np.flatnonzero(y >= 0)
    found: npt.NDArray[np.int64] = np.array(y, np.int64)
    given = np.zeros((len(x), num_classes), np.float32)
    given[known, y[known]] = 1.0 if weight is None else weight[known]
    given /= np.maximum(given.sum(axis=0), 1e-12)  # classes weigh the same, however many are known
    graph = neighbour_graph(x)
    degree = scipy.sparse.diags_array(1.0 / np.sqrt(np.maximum(graph.sum(axis=1), 1e-12)))
    step = (SPREAD * (degree @ graph @ degree)).tocsr()
    share = given
    for _ in range(STEPS):
        share = step @ share + given
    found[y < 0] = np.argmax(share[y < 0], axis=1)
    return found
