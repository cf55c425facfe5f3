"""Figures of a mixture; functions draw on axes and return them, and matplotlib is loaded lazily.

Everything is drawn from the light `artifact.Mixture`: no network is needed to look at a model. Its
`extra["num_times"]` and `extra["num_trajectories"]`, where stored, say how many consecutive
components form one trajectory, and how many trajectories come before the twins (see
`MFA.with_tails`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmm_jax.artifact import Mixture
from cpmm_jax.errors import ConfigError, RunError

Axes = Any  # matplotlib.axes.Axes; matplotlib is not imported here
_FEW_POINTS = 3000  # examples drawn at most
_COLOUR_MAP = "viridis"  # one trajectory, or many
_HUES = ("Blues", "Oranges", "Greens", "Purples", "Reds", "Greys")  # of a few trajectories
_DPI = 110


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ConfigError(
            "figures need matplotlib; got no such package here; "
            "install it with: pip install 'cpmm_jax[plot]'."
        ) from error
    return plt


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return `ax`, or the axes of a new figure of `size` inches."""
    return ax if ax is not None else _pyplot().subplots(figsize=size, layout="constrained")[1]


def num_times(mixture: Mixture) -> int:
    """Return T, the pseudotimes of each trajectory; K where it is not stored."""
    stored = mixture.extra.get("num_times")
    if isinstance(stored, int) and stored > 0 and mixture.num_components % stored == 0:
        return stored
    return mixture.num_components


def _by_trajectory(mixture: Mixture, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Reshape (C, K, ...) to (C * S, T, ...), without twins."""
    times = num_times(mixture)
    trajectories = mixture.extra.get("num_trajectories")
    if not (isinstance(trajectories, int) and 0 < trajectories * times <= mixture.num_components):
        trajectories = mixture.num_components // times
    return values[:, : trajectories * times].reshape(-1, times, *values.shape[2:])


def _covariances(mixture: Mixture, basis: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the covariances of basis^T x of every component, (C, K, 2, 2)."""
    projected = np.einsum("ckdr,de->cker", mixture.loadings, basis)
    noise = np.einsum("ckd,de,df->ckef", np.exp(mixture.log_noise), basis, basis)
    return np.asarray(np.einsum("cker,ckfr->ckef", projected, projected) + noise)


def principal_plane(mixture: Mixture) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the plane of the two leading principal axes of a mixture.

    Returns:
        The mean of the mixture, (D,), and two orthonormal axes, (D, 2).
    """
    weights = np.exp(mixture.logits - mixture.logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    classes = np.exp(mixture.class_logits - mixture.class_logits.max())
    weights = weights * (classes / classes.sum())[:, None]
    means = mixture.means.reshape(-1, mixture.dim)
    centre = weights.reshape(-1) @ means
    root = np.sqrt(weights)[:, :, None, None]
    spread = (root * mixture.loadings).transpose(2, 0, 1, 3).reshape(mixture.dim, -1)
    columns = np.concatenate([(np.sqrt(weights.reshape(-1, 1)) * (means - centre)).T, spread], 1)
    noise = np.einsum("ck,ckd->d", weights, np.exp(mixture.log_noise))
    _, vectors = np.linalg.eigh(columns @ columns.T + np.diag(noise))
    return centre, vectors[:, :-3:-1]


def plot_components(
    mixture: Mixture,
    x: npt.NDArray[Any] | None = None,
    *,
    sigmas: Sequence[float] = (1.0, 2.0),
    ax: Axes | None = None,
) -> Axes:
    """Draw data, and every component as ellipses coloured by pseudotime (Figure 1 of the paper).

    More than two features are shown on the plane of the mixture's two leading principal axes, where
    the ellipses are those of the projected components.

    Args:
        mixture: of D >= 2 features.
        x: examples beside it, shape (N, D), in the units of the mixture.
        sigmas: Mahalanobis radii of the ellipses.
        ax: axes to draw on; new ones by default.

    Returns:
        The axes.

    Raises:
        ConfigError: the mixture has one feature, or matplotlib is not installed.
    """
    if mixture.dim < 2:
        raise ConfigError(
            f"ellipses need a mixture of at least 2 features; got {mixture.dim}; "
            "use `plot_density`."
        )
    ax = _axes(ax, (5.2, 4.6))
    plt = _pyplot()
    from matplotlib.collections import EllipseCollection

    centre, basis = np.zeros(mixture.dim), np.eye(mixture.dim)
    names = mixture.feature_names or ("feature 0", "feature 1")
    if mixture.dim > 2:
        centre, basis = principal_plane(mixture)
        names = ("first principal axis of the mixture", "second principal axis")
    if x is not None:
        points = (_thin(x) - centre) @ basis
        ax.scatter(*points.T, s=3, c="0.75", linewidths=0, zorder=1, rasterized=True)
    means = _by_trajectory(mixture, (mixture.means - centre) @ basis)
    eigenvalues, vectors = np.linalg.eigh(_by_trajectory(mixture, _covariances(mixture, basis)))
    angles = np.degrees(np.arctan2(vectors[..., 1, 1], vectors[..., 0, 1]))
    lengths = 2.0 * np.sqrt(np.maximum(eigenvalues, 0.0))
    times = (np.arange(means.shape[1]) + 0.5) / means.shape[1]
    several = 1 < len(means) <= len(_HUES)
    for index, trajectory in enumerate(means):
        colours = plt.get_cmap(_HUES[index])(0.35 + 0.6 * times) if several else None
        if colours is None:
            colours = plt.get_cmap(_COLOUR_MAP)(times)
        if len(trajectory) > 2:
            ax.plot(*trajectory.T, color="0.35", linewidth=0.6, zorder=2)
        for sigma in sigmas:
            ellipses = EllipseCollection(
                lengths[index, :, 1] * sigma,
                lengths[index, :, 0] * sigma,
                angles[index],
                units="xy",
                offsets=trajectory,
                transOffset=ax.transData,
                facecolors="none",
                edgecolors=colours,
                linewidths=1.3 if sigma == min(sigmas) else 0.7,
                zorder=3,
            )
            ax.add_collection(ellipses)
    # What an EllipseCollection covers is no part of the automatic limits.
    radius = 0.5 * min(sigmas) * lengths[..., 1:]
    ax.update_datalim(np.concatenate([means - radius, means + radius]).reshape(-1, 2))
    ax.autoscale_view()
    ax.set(xlabel=names[0], ylabel=names[1], aspect="equal")
    if not several and means.shape[1] > 1:
        scale = plt.cm.ScalarMappable(plt.Normalize(0.0, 1.0), _COLOUR_MAP)
        ax.figure.colorbar(scale, ax=ax, label="pseudotime", shrink=0.8)
    return ax


def plot_density(
    mixture: Mixture, x: npt.NDArray[Any] | None = None, *, ax: Axes | None = None
) -> Axes:
    """Draw the density of a mixture of one feature over a histogram of examples (N, 1)."""
    ax = _axes(ax, (5.2, 3.2))
    spread = 4.0 * np.sqrt(np.exp(mixture.log_noise) + np.sum(mixture.loadings**2, axis=-1))
    line = np.linspace((mixture.means - spread).min(), (mixture.means + spread).max(), 1000)
    if x is not None:
        ax.hist(x[:, 0], bins=60, density=True, color="0.85", label="data")
    ax.plot(line, np.exp(mixture.log_prob(line[:, None])), label="mixture")
    ax.set(xlabel=(mixture.feature_names or ("feature 0",))[0], ylabel="density")
    ax.legend(frameon=False)
    return ax


def _thin(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return at most `_FEW_POINTS` rows, the same every time."""
    if len(x) <= _FEW_POINTS:
        return x
    return x[np.random.default_rng(0).choice(len(x), _FEW_POINTS, replace=False)]


def plot_images(
    images: npt.ArrayLike,
    *,
    names: Sequence[str] = (),
    limits: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw images in rows and columns, higher values darker; three channels are colours.

    Args:
        images: shape (rows, columns, H, W) or (rows, columns, H, W, channels).
        names: of groups of equally many rows, from the top.
        limits: values of white and black; by default the least and the largest.
        ax: axes to draw on; new ones by default.

    Returns:
        The axes.
    """
    shown = np.asarray(images, float)
    rows, columns, height, _, *channels = shown.shape
    ax = _axes(ax, (0.55 * columns + 0.6, 0.55 * rows + 0.3))
    low, high = limits or (float(shown.min()), float(shown.max()))
    between = [(0, 0)] * 2 + [(0, 1)] * 2 + [(0, 0)] * len(channels)
    sheet = np.pad(shown, between, constant_values=np.nan).swapaxes(1, 2)
    sheet = sheet.reshape(rows * (height + 1), -1, *channels)[:-1, :-1]
    colours = _pyplot().get_cmap("gray_r").with_extremes(bad="white")
    if sheet.ndim == 3 and sheet.shape[2] == 3:  # colours, which are shown as they are, in [0, 1]
        sheet = np.nan_to_num(np.clip((sheet - low) / (high - low), 0.0, 1.0), nan=1.0)
    ax.imshow(sheet, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    for side in ax.spines.values():
        side.set_visible(False)
    step = (height + 1) * rows / max(1, len(names))
    ax.set(xticks=[])
    ax.set_yticks([step * (i + 0.5) - 1 for i in range(len(names))], names)
    ax.tick_params(length=0)
    return ax


def _is_image(shape: tuple[int, ...] | None) -> bool:
    return shape is not None and len(shape) in (2, 3) and (*shape, 1)[2] in (1, 3)


def _image_shape(mixture: Mixture) -> tuple[int, ...]:
    shape = mixture.event_shape
    if shape is None or not _is_image(shape):
        rule = "(H, W) or (H, W, channels), of 1 or 3 channels"
        raise ConfigError(f"images need a mixture whose `event_shape` is {rule}; got {shape}.")
    return shape


def plot_trajectory_images(mixture: Mixture, *, ax: Axes | None = None) -> Axes:
    """Draw the means along each trajectory as a row of images, pseudotime from left to right.

    Args:
        mixture: with the `event_shape` of an image.
        ax: axes to draw on; new ones by default.

    Returns:
        The axes.

    Raises:
        ConfigError: no image shape, or matplotlib is not installed.
    """
    shape = _image_shape(mixture)
    means = _by_trajectory(mixture, mixture.means)
    ax = plot_images(means.reshape(*means.shape[:2], *shape), ax=ax, **_look(mixture))
    ax.set_xlabel("pseudotime →")
    return ax


def _look(mixture: Mixture) -> dict[str, Any]:
    names = mixture.class_names or tuple(map(str, range(mixture.num_classes)))
    return {"names": names, "limits": (max(mixture.means.min(), 0.0), mixture.means.max())}


def plot_sample_images(
    mixture: Mixture, rng: np.random.Generator, *, columns: int = 10, ax: Axes | None = None
) -> Axes:
    """Draw samples of each class as a row of images.

    Args:
        mixture: with the `event_shape` of an image.
        rng: where the samples come from.
        columns: samples of each class.
        ax: axes to draw on; new ones by default.

    Returns:
        The axes.
    """
    shape = _image_shape(mixture)
    count = mixture.num_classes
    samples = np.stack([mixture.classes([c]).sample(rng, columns) for c in range(count)])
    return plot_images(samples.reshape(count, columns, *shape), ax=ax, **_look(mixture))


def plot_training(history: Sequence[Mapping[str, Any]], *, ax: Axes | None = None) -> Axes:
    """Draw the objective on training batches and of the validation part by step.

    Args:
        history: reports, as in `FitResult.history` or `metrics.jsonl`.
        ax: axes to draw on; new ones by default.

    Returns:
        The axes; it is in nats per example, in standardised units.
    """
    ax = _axes(ax, (5.2, 3.2))
    steps = [report["step"] for report in history]
    for name, sign, label in (
        ("loss", -1.0, "training"),
        ("valid_log_likelihood", 1.0, "validation"),
    ):
        values = [np.nan if r[name] is None else sign * r[name] for r in history]
        if not np.all(np.isnan(values)):
            ax.plot(steps, values, label=label)
    shown = [y for line in ax.lines for y in line.get_ydata() if np.isfinite(y)]
    if len(shown) > 4:  # the first steps must not flatten the rest
        low, high = np.quantile(shown, 0.05), max(shown)
        ax.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    ax.set(xlabel="step", ylabel="objective (nats, standardised)")
    ax.legend(frameon=False)
    return ax


def plot_work_precision(
    measurements: Sequence[Mapping[str, Any]], *, ax: Axes | None = None
) -> Axes:
    """Draw the error of gradients against the time that they take, log-log: down and left is good.

    Args:
        measurements: records as of `solver_study.SolverMeasurement.record`; failures are left out.
        ax: axes to draw on; new ones by default.

    Returns:
        The axes. A marker and colour for each solver; equal steps joined by solid lines, tolerances
        by dashed ones; hollow where an adjoint is set; a ring round what is used now.
    """
    ax = _axes(ax, (6.4, 4.6))
    shown = [m for m in measurements if m["seconds_per_gradient"] is not None]
    solvers = list(dict.fromkeys(m["solver"] for m in shown))
    families: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for m in shown:
        point = (1e3 * m["seconds_per_gradient"], m["gradient_error"])
        families.setdefault((m["solver"], m["adaptive"], m["adjoint"]), []).append(point)
        if m["own"]:
            ax.scatter(*point, s=170, facecolors="none", edgecolors="0.3", label="present")
    for (solver, adaptive, adjoint), points in families.items():
        index = solvers.index(solver)
        ax.plot(
            *zip(*sorted(points, key=lambda point: -point[1]), strict=True),
            color=f"C{index}",
            marker="osD^vP*Xd<>h"[index % 12],
            linestyle="--" if adaptive else "-",
            linewidth=0.8,
            markerfacecolor="none" if adjoint else f"C{index}",
            label=solver if solver not in ax.get_legend_handles_labels()[1] else None,
        )
    ax.set(xscale="log", yscale="log")
    ax.xaxis.set_minor_formatter("")  # over less than a decade they would be printed on each other
    ax.set(xlabel="time per gradient (ms)", ylabel="relative error of the gradient")
    ax.legend(frameon=False, fontsize="small")
    return ax


def plot_run(
    mixture: Mixture,
    history: Sequence[Mapping[str, Any]],
    folder: Path,
    x: npt.NDArray[Any] | None = None,
) -> list[Path]:
    """Write the figures that suit a mixture, as PNG files.

    Args:
        mixture: of a run.
        history: its reports.
        folder: where to write; made where it is missing.
        x: examples to show beside the mixture, shape (N, D).

    Returns:
        The files: `training.png`, and `trajectories.png` and `samples.png` of images,
        `components.png` of other data (`density.png` of one feature).

    Raises:
        RunError: the folder cannot be written.
        ConfigError: matplotlib is not installed.
    """
    figures = {"training.png": plot_training(history)}
    if _is_image(mixture.event_shape):
        figures["trajectories.png"] = plot_trajectory_images(mixture)
        figures["samples.png"] = plot_sample_images(mixture, np.random.default_rng(0))
    elif mixture.dim > 1:
        figures["components.png"] = plot_components(mixture, x)
    else:
        figures["density.png"] = plot_density(mixture, x)
    return [save_figure(ax, folder / name) for name, ax in figures.items()]


def save_figure(ax: Axes, path: Path) -> Path:
    """Write the figure of `ax` to a file, close it, and return the path."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ax.figure.savefig(path, dpi=_DPI)
    except OSError as error:
        raise RunError(
            f"{str(path)!r} must be a file that can be written; got {error.strerror or error}; "
            "check the folder."
        ) from error
    finally:
        _pyplot().close(ax.figure)
    return path
