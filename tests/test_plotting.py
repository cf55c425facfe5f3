"""Figures: what is drawn is what the mixture says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from cpmm_jax import plotting
from cpmm_jax.artifact import Mixture
from cpmm_jax.errors import ConfigError


def mixture(C: int = 2, K: int = 6, D: int = 2, R: int = 1, **extra: object) -> Mixture:
    rng = np.random.default_rng(0)
    shapes = [(C,), (C, K), (C, K, D), (C, K, D, R), (C, K, D)]
    return Mixture(*(rng.standard_normal(shape) for shape in shapes), **extra)  # type: ignore


@pytest.fixture(autouse=True)
def close() -> Iterator[None]:
    yield
    plt.close("all")


def dense(m: Mixture) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and covariance of the whole mixture."""
    w = np.exp(m.logits) / np.exp(m.logits).sum(1, keepdims=True)
    w *= (np.exp(m.class_logits) / np.exp(m.class_logits).sum())[:, None]
    mean = np.einsum("ck,ckd->d", w, m.means)
    centred = m.means - mean
    covariance = np.einsum("ck,ckd,cke->de", w, centred, centred)
    covariance += np.einsum("ck,ckdr,cker->de", w, m.loadings, m.loadings)
    return mean, covariance + np.diag(np.einsum("ck,ckd->d", w, np.exp(m.log_noise)))


def test_ellipses_have_the_axes_of_the_components() -> None:
    m = mixture(C=1, K=3, extra={"num_times": 3})
    ax = plotting.plot_components(m, np.zeros((5, 2)), sigmas=(2.0,))
    _, ellipses = ax.collections
    assert len(ellipses.get_offsets()) == 3
    np.testing.assert_allclose(ellipses.get_offsets(), m.means[0])
    for k in range(3):
        loadings = m.loadings[0, k]
        covariance = loadings @ loadings.T + np.diag(np.exp(m.log_noise[0, k]))
        values = np.linalg.eigvalsh(covariance)
        # widths and heights are kept as half axes, angles in radians
        assert ellipses._widths[k] == pytest.approx(2.0 * np.sqrt(values[1]))
        assert ellipses._heights[k] == pytest.approx(2.0 * np.sqrt(values[0]))
        angle = ellipses._angles[k]
        direction = np.array([np.cos(angle), np.sin(angle)])
        np.testing.assert_allclose(covariance @ direction, values[1] * direction, atol=1e-9)


def test_principal_plane_is_that_of_the_mixture() -> None:
    m = mixture(D=5)
    mean, covariance = dense(m)
    centre, axes = plotting.principal_plane(m)
    np.testing.assert_allclose(centre, mean)
    _, vectors = np.linalg.eigh(covariance)
    np.testing.assert_allclose(np.abs(axes.T @ vectors[:, :-3:-1]), np.eye(2), atol=1e-9)
    assert plotting.plot_components(m).get_xlabel().startswith("first principal axis")


def test_components_divide_into_trajectories() -> None:
    assert plotting.num_times(mixture(K=6, extra={"num_times": 3})) == 3
    assert plotting.num_times(mixture(K=6)) == 6
    assert plotting.num_times(mixture(K=6, extra={"num_times": 4})) == 6  # does not divide
    ax = plotting.plot_components(mixture(C=2, K=6, extra={"num_times": 3}))
    assert len(ax.lines) == 4  # 2 classes of 2 trajectories
    with_twins = {"num_times": 3, "num_trajectories": 1}
    ax = plotting.plot_components(mixture(C=2, K=6, extra=with_twins))
    assert len(ax.lines) == 2
    ax = plotting.plot_components(mixture(C=2, K=6, extra={"num_times": 3, "num_trajectories": 9}))
    assert len(ax.lines) == 4  # more than there are: not ours


def test_images_stand_where_they_belong() -> None:
    m = mixture(C=2, K=4, D=6, event_shape=(2, 3), extra={"num_times": 4}, class_names=("a", "b"))
    ax = plotting.plot_trajectory_images(m)
    sheet = ax.images[0].get_array()
    assert sheet.shape == (2 * 3 - 1, 4 * 4 - 1)
    np.testing.assert_allclose(sheet[3:5, 8:11], m.means[1, 2].reshape(2, 3))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    ax = plotting.plot_sample_images(m, np.random.default_rng(0), columns=5)
    assert ax.images[0].get_array().shape == (5, 19)


def test_training_curve_leaves_gaps_where_nothing_was_measured() -> None:
    history = [
        {"step": s, "loss": 5.0 - s, "valid_log_likelihood": None if s == 2 else s - 6.0}
        for s in range(1, 5)
    ]
    training, validation = plotting.plot_training(history).lines
    np.testing.assert_allclose(training.get_ydata(), [-4, -3, -2, -1])
    np.testing.assert_allclose(validation.get_ydata(), [-5, np.nan, -3, -2])


def test_density_of_one_feature() -> None:
    m = mixture(D=1)
    (line,) = plotting.plot_density(m, np.zeros((10, 1))).lines
    area = np.trapezoid(line.get_ydata(), line.get_xdata())
    assert area == pytest.approx(1.0, abs=0.02)


def test_what_cannot_be_drawn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="at least 2 features; got 1"):
        plotting.plot_components(mixture(D=1))
    with pytest.raises(ConfigError, match=r"`event_shape` is \(H, W\).*got None"):
        plotting.plot_trajectory_images(mixture())
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ConfigError, match=r"pip install 'cpmm_jax\[plot\]'"):
        plotting.plot_components(mixture())


def test_colours_are_shown_as_they_are() -> None:
    """Means in 0..256 would be white where matplotlib clips them to [0, 1]."""
    m = mixture(C=1, K=1, D=12, event_shape=(2, 2, 3), extra={"num_times": 1})
    m = replace(m, means=np.tile([10.0, 120.0, 250.0], 4)[None, None])
    shown = plotting.plot_trajectory_images(m).images[0].get_array()
    assert shown is not None
    np.testing.assert_allclose(shown[0, 0], [0.0, 110 / 240, 1.0])
    with pytest.raises(ConfigError, match=r"of 1 or 3 channels; got \(2, 3, 2\)"):
        plotting.plot_trajectory_images(mixture(D=12, event_shape=(2, 3, 2)))


def test_images_lie_in_rows_and_columns_with_a_gap_and_names_beside_their_rows() -> None:
    images = np.arange(24.0).reshape(2, 2, 2, 3)
    ax = plotting.plot_images(images, names=("a", "b"), limits=(0.0, 23.0))
    gap = np.nan
    np.testing.assert_array_equal(
        np.ma.filled(ax.images[0].get_array(), gap),
        [
            [0, 1, 2, gap, 6, 7, 8],
            [3, 4, 5, gap, 9, 10, 11],
            [gap] * 7,
            [12, 13, 14, gap, 18, 19, 20],
            [15, 16, 17, gap, 21, 22, 23],
        ],
    )
    assert ax.get_yticks().tolist() == [0.5, 3.5]  # the middle of each row of images
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
