"""Groups and spread labels: shapes that no Gaussian has, units, and many examples."""

from __future__ import annotations

import numpy as np
import pytest

from cpmm_jax.mixture import grouping
from cpmm_jax.mixture.grouping import group_examples, neighbour_graph, spread_labels
from cpmm_jax.mixture.initialise import kmeans


def rings(rng: np.random.Generator, count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Two rings, one inside the other."""
    angle, y = rng.uniform(0, 2 * np.pi, count), np.arange(count) % 2
    x = (1.0 + 2.0 * y)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return (x + 0.05 * rng.normal(size=x.shape)).astype(np.float32), y


def agree(groups: np.ndarray, y: np.ndarray) -> bool:
    """Whether two partitions are the same."""
    return len(set(zip(groups.tolist(), y.tolist(), strict=True))) == len(np.unique(y))


@pytest.mark.parametrize("small", [500, 10])
def test_rings_are_told_apart(
    rng: np.random.Generator, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "SMALL", small)  # a dense matrix, and a sparse one
    x, y = rings(rng)
    assert agree(group_examples(x, 2), y)


def test_where_the_graph_does_not_fall_apart_groups_are_those_of_k_means(
    rng: np.random.Generator,
) -> None:
    x = rng.normal(size=(200, 4)).astype(np.float32)  # one cloud
    found = group_examples(x, 3, scales=(1.0, 0.5), seed=2)
    np.testing.assert_array_equal(found, kmeans(x, 3, seed=2)[1])


def test_a_row_is_no_neighbour_of_itself(rng: np.random.Generator) -> None:
    x = rng.normal(size=(40, 3)).astype(np.float32)
    graph = neighbour_graph(x, 5).todense()
    assert (np.diag(graph) == 0).all()
    np.testing.assert_array_equal(graph, graph.T)
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
    nearest = np.argsort(distance, axis=1)[:, 1:6]
    assert all(graph[i, j] >= 1 for i in range(40) for j in nearest[i])


def test_the_units_are_taken_in_which_groups_are_apart(rng: np.random.Generator) -> None:
    x, y = rings(rng)
    noisy = np.column_stack([x, rng.normal(size=(len(x), 3))]).astype(np.float32)
    scales = (1.0, np.array([1, 1, 0.01, 0.01, 0.01]))
    assert agree(group_examples(noisy, 2, scales=scales), y)
    assert agree(group_examples(noisy, 2, scales=scales[::-1]), y)


def test_of_many_examples_some_are_cut_and_the_others_follow(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "MOST_ROWS", 200)
    x, y = rings(rng, 600)
    assert agree(group_examples(x, 2), y)
    partly = np.where(np.arange(600) < 4, y, -1)
    np.testing.assert_array_equal(spread_labels(x, partly, 2), y)


@pytest.mark.parametrize("weighted", [False, True])
def test_few_labels_spread_along_the_rings(rng: np.random.Generator, *, weighted: bool) -> None:
    x, y = rings(rng)
    partly = np.full(300, -1)
    partly[[5, 8]] = y[[5, 8]]
    weight = rng.uniform(0.5, 2.0, 300) if weighted else None
    np.testing.assert_array_equal(spread_labels(x, partly, 2, weight=weight), y)


@pytest.mark.parametrize("most", [20_000, 30])
def test_known_labels_stay(
    rng: np.random.Generator, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "MOST_ROWS", most)
    x, _ = rings(rng)
    partly = np.full(300, -1)
    partly[:40] = (np.arange(40) // 4) % 2  # right or wrong, but given
    np.testing.assert_array_equal(spread_labels(x, partly, 2)[:40], partly[:40])


def test_as_many_groups_as_examples(rng: np.random.Generator) -> None:
    x = rng.normal(size=(5, 2)).astype(np.float32)
    assert sorted(group_examples(x, 5).tolist()) == [0, 1, 2, 3, 4]
    assert group_examples(x, 1).tolist() == [0] * 5
