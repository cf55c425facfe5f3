"""The settings of a fit: those given, and for the others what suits N, D and the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cpmm_jax.data.checks import check_enough_rows
from cpmm_jax.errors import ConfigError

LONGEST_LOCAL = 16  # times; a longer one, of tables, must cross the data from an example
DIVISIONS = (1, 2, 4, 8)  # lengths of trajectories that are tried
CURRICULA = ("none", "interpolant", "flow")
WIDE_NOISE = 0.1  # least noise variance of a classifier's components
IMAGE_SIDE = 16  # pixels from which images have a convolutional field
IMAGE_TRAJECTORIES = 10  # of a density of images
IMAGES: dict[str, Any] = {"widths": (16,), "coarse_widths": (32,), "ode_steps": 8}
# A classifier of images has many short trajectories of many factors, and the wider noise since many
# pixels make components surer of a class.
IMAGE_ROWS, MOST_SHORT = 128, 40  # rows for each of these trajectories, and most of them
SHORT_RANK, SHORT_TIMES, SHORT_STEPS = 20, 2, 300
SHORT_IMAGES: dict[str, Any] = {
    "widths": (8,),
    "coarse_widths": (),
    "ode_steps": 2,
    "least_noise": 0.25,
}
REFIT_BELOW = 5000  # rows under which a validation part is too much to leave out of the fit


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of one fit.

    Attributes:
        num_classes: classes of the hierarchy, C; without labels every trajectory is one.
        num_trajectories: trajectories of each class, S.
        clusters: whether the classes are clusters, to be found without labels.
        num_times: pseudotimes at which each trajectory is extracted, T.
        train_times: pseudotimes drawn in a training step; fewer where rows are scarce, as a
            regulariser.
        rank: factors of a component, R.
        divisions: lengths of the trajectories, T, among which validation decides, of the mixtures
            by EM that they would start at; () for T as it is given.
        local_start: whether trajectories start as the components of a mixture fitted by EM, one
            for each, and move little at first; else at examples, and move across the data.
        polish: whether EM goes on from the extracted mixture, as long as validation gains.
        discriminative: with labels, the share of log p(x) that is taken from log p(x, y); what is
            left tells the classes apart the better, and describes the examples the less.
        least_noise: smallest noise variance of a component, of standardised features; besides that
            which the resolution of the data sets.
        curriculum: along which map to a Gaussian to train first: "none", "interpolant", or "flow",
            one that is trained by flow matching.
        tails: probability of the broad twin that every component is given after training (see
            `MFA.with_tails`); 0 for none.
        event_shape: (H, W, channels) of images that a convolutional field moves; None for tables.
        dequantise: whether they are recorded pixels, 0..255, dequantised anew in every step; once
            where a flow carries them.
        widths: hidden units of the field; of a convolutional one channels.
        coarse_widths: its channels at each halving of the resolution.
        ode_steps: steps of the solver.
        steps: training steps.
        batch_size: examples in a step.
        learning_rate: highest learning rate.
        patience: reports without improvement before training stops.
        refit: whether to train anew on training and validation rows together, for as many steps as
            the validation found best.
        seed: seed of everything random.
    """

    num_classes: int
    num_trajectories: int
    clusters: bool
    num_times: int
    train_times: int
    rank: int
    divisions: tuple[int, ...]
    local_start: bool
    polish: bool
    discriminative: float
    least_noise: float
    curriculum: str
    tails: float
    event_shape: tuple[int, int, int] | None
    dequantise: bool
    widths: tuple[int, ...]
    coarse_widths: tuple[int, ...]
    ode_steps: int
    steps: int
    batch_size: int
    learning_rate: float
    patience: int | None
    refit: bool
    seed: int

    @property
    def num_components(self) -> int:
        """Components of the extracted mixture: C S T, and as many twins where it has tails."""
        read = self.num_classes * self.num_trajectories * self.num_times
        return 2 * read if self.tails else read


def recommend(
    num_examples: int,
    dim: int,
    num_classes: int = 1,
    *,
    labelled: bool = False,
    clusters: int | None = None,
    components: int | None = None,
    trajectories: int | None = None,
    rank: int | None = None,
    local_start: bool | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    discriminative: float = 0.0,
    curriculum: str | None = None,
    event_shape: Sequence[int] | None = None,
    dequantise: bool = False,
    seed: int = 0,
) -> Recipe:
    """Choose the settings that are not given from N, D and the number of classes.

    Where rows are plentiful for the number of features, many short trajectories fit best; where
    they are scarce, few long ones with more factors do, since the shared field keeps them from
    overfitting. They start at the components of a mixture fitted by EM, but at examples where rows
    are too few for one; unless `components` sets how many there are, each is given a broad twin
    then. A classifier of images has short trajectories of a smaller field, as many as its rows can
    start, and wide components.

    Args:
        num_examples: training rows, N.
        dim: features, D.
        num_classes: classes of the labels, C (used when `labelled`).
        labelled: whether labels are trained on.
        clusters: clusters to find, each of which becomes a class; None for a density.
        components: components of the extracted mixture in total.
        trajectories: trajectories per class or cluster; for a density, in all.
        rank: factors, R.
        local_start: whether trajectories start at the components of a mixture fitted by EM.
        steps: training steps.
        batch_size: examples in a step.
        learning_rate: highest learning rate.
        discriminative: with labels, the share of log p(x) that is taken from the objective. Above
            0, components are wide: narrow ones are too sure of the class of what lies near them.
        curriculum: "none", "interpolant" or "flow". Where it is left open, a density of tables has
            "interpolant" if its trajectories are so long that each must cross the data.
        event_shape: of one example: images of 16 x 16 pixels and more get a convolutional field.
        dequantise: whether images are recorded pixels, whole numbers 0..255.
        seed: seed of everything random.

    Returns:
        A complete `Recipe`.

    Raises:
        ConfigError: a setting out of range, or components that do not divide into trajectories.
        DataError: fewer rows than components.

    Example:
        >>> recommend(1000, 2).num_components
        64
    """
    for name, value, least in (
        ("components", components, 1),
        ("trajectories", trajectories, 1),
        ("clusters", clusters, 1),
        ("rank", rank, 0),
    ):
        if value is not None and value < least:
            raise ConfigError(f"`{name}` must be at least {least}; got {value}.")
    if rank is not None and rank > dim:
        raise ConfigError(
            f"`rank` must be at most D = {dim}, the number of features; got {rank}. "
            f"Ranks near {min(4, dim)} are a good start."
        )
    if curriculum is not None and curriculum not in CURRICULA:
        raise ConfigError(
            f"`curriculum` must be one of {', '.join(CURRICULA)}; got {curriculum!r}."
        )
    if not 0 <= discriminative <= 1 or (discriminative and not labelled):
        raise ConfigError(
            "`discriminative` must be a share of log p(x) in [0, 1], and 0 without labels; got "
            f"{discriminative} {'with' if labelled else 'without'} labels; 0.9 is a good start for "
            "a classifier."
        )
    if labelled and clusters is not None:
        raise ConfigError(
            f"`clusters` must be None where labels are trained on; got {clusters}; leave one out."
        )
    grouped = labelled or clusters is not None
    classes = (clusters or num_classes) if grouped else 1
    rows = num_examples / classes  # of one class
    asked = local_start
    towards = curriculum in ("interpolant", "flow")
    if local_start is None:  # clusters are where they start
        enough = _ample(rows, dim) if labelled else not _few(rows, dim)
        local_start = clusters is not None or (enough and not towards)
    divisions: tuple[int, ...] = ()
    if _ample(rows, dim) and local_start and components and trajectories is None and not grouped:
        divisions = tuple(times for times in DIVISIONS if components % times == 0)
    tails = 0.1 if components is None and _few(rows, dim) else 0.0
    image = image_shape(event_shape)
    open_sizes = trajectories is None and components is None
    short = image is not None and discriminative > 0 and open_sizes and rows >= 2 * IMAGE_ROWS
    if rank is None:
        rank = SHORT_RANK if short else default_rank(rows, dim)
    if short:
        trajectories = min(MOST_SHORT, int(rows) // IMAGE_ROWS)
        steps = SHORT_STEPS if steps is None else steps
    elif trajectories is None and image is not None and components is None and not grouped:
        trajectories = max(1, min(IMAGE_TRAJECTORIES, num_examples // 8))
    if trajectories is None:
        trajectories = _default_trajectories(rows, dim, rank, components, classes)
    if components is None:
        times = SHORT_TIMES if short else _default_times(rows, dim, trajectories)
    elif components % (classes * trajectories):
        raise ConfigError(
            f"`components` must be a multiple of classes x trajectories = {classes} x "
            f"{trajectories}, for equally many in each; got {components}."
        )
    else:
        times = components // (classes * trajectories)
    check_enough_rows(num_examples, classes * trajectories * times)
    if curriculum is None:
        crossing = times > LONGEST_LOCAL and image is None and not grouped
        curriculum = "interpolant" if crossing else "none"
    recipe = Recipe(
        num_classes=classes if grouped else trajectories,
        num_trajectories=trajectories if grouped else 1,
        clusters=clusters is not None,
        num_times=times,
        train_times=_default_train_times(rows, dim, times),
        rank=rank,
        divisions=divisions,
        local_start=local_start and times <= LONGEST_LOCAL,
        polish=not labelled or (_ample(rows, dim) and not discriminative),
        discriminative=discriminative,
        least_noise=WIDE_NOISE if discriminative else 0.0,
        curriculum=curriculum,
        tails=tails,
        event_shape=None,
        dequantise=False,
        widths=(128, 128) if dim < 16 else (256, 256),
        coarse_widths=(),
        ode_steps=16,
        steps=(1500 if _few(rows, dim) else 3000) if steps is None else steps,
        batch_size=_default_batch_size(num_examples) if batch_size is None else batch_size,
        learning_rate=3e-3 if learning_rate is None else learning_rate,
        patience=10,
        refit=num_examples < REFIT_BELOW,
        seed=seed,
    )
    if image is None:
        return recipe
    return replace(
        recipe,
        event_shape=image,
        dequantise=dequantise,
        local_start=(clusters is not None or not towards) if asked is None else asked,
        train_times=times,
        divisions=(),
        tails=0.0,
        refit=False,
        **(SHORT_IMAGES if short else IMAGES),
    )


def image_shape(event_shape: Sequence[int] | None) -> tuple[int, int, int] | None:
    """Return (H, W, channels) of images large enough for a convolutional field; else None."""
    if event_shape is None or len(event_shape) not in (2, 3):
        return None
    height, width, channels = (*event_shape, 1)[:3]
    return (height, width, channels) if min(height, width) >= IMAGE_SIDE else None


def _default_trajectories(
    rows: float, dim: int, rank: int, components: int | None, classes: int
) -> int:
    wanted = 8 if rows > 60 * dim else 2 if rows > 20 * dim else 1
    if dim > 3 and rows > 200 * dim:
        wanted = 40
    if components is None:
        return max(1, min(wanted, int(rows) // 8))
    if components % classes:
        raise ConfigError(
            f"`components` must be a multiple of the {classes} classes; got {components}."
        )
    per_class = components // classes
    if not _few(rows, dim):  # the fewer rows a component has, the more of them share a trajectory
        available = rows / per_class
        times = 1 if available >= 6 * (rank + 2) * dim else 2 if available >= 4 * dim else 8
        wanted = per_class // times
    return max(s for s in range(1, max(1, wanted) + 1) if per_class % s == 0)


def _few(rows: float, dim: int) -> bool:
    """Whether a class has few rows for its features: regularisation is then what counts."""
    return rows <= 20 * dim


def _ample(rows: float, dim: int) -> bool:
    """Whether components can be as narrow as the data ask without following single rows."""
    return rows > 100 * dim


def _default_times(rows: float, dim: int, trajectories: int) -> int:
    times = 2 if trajectories >= 40 else 16 if _few(rows, dim) else 8
    return max(1, min(times, int(rows) // (2 * trajectories)))


def _default_batch_size(num_examples: int) -> int:
    """Return 256; of few rows a power of two, the same with a validation part and without."""
    return min(256, 1 << (max(1, int(0.8 * num_examples)).bit_length() - 1))


def _default_train_times(rows: float, dim: int, times: int) -> int:
    return min(times, max(3, times // 5)) if _few(rows, dim) else times


def default_rank(rows: float, dim: int) -> int:
    """Return how many factors suit so many rows of D features."""
    return max(0, min(dim - 1, 4 if rows > 100 * dim or dim <= 16 else 12))
