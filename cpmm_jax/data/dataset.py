"""`Dataset`: examples and labels in three parts, and `split`, which makes the missing parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cpmm_jax.errors import ConfigError, DataError

Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = ("train", "valid", "test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples (always flat, (N, D)) and class codes of up to three parts.

    Attributes:
        name: built-in name, or the file's name.
        x_train: training examples, (N, D), float32 or float64, in the units of the source.
        y_train: their class codes 0..C-1, int64 (N,), or None.
        x_valid: validation examples, or None.
        y_valid: their class codes, or None.
        x_test: test examples, or None.
        y_test: their class codes, or None.
        class_names: the labels as they stood in the source, in the order of the codes.
        feature_names: names of the D columns.
        event_shape: shape of one example before it was flattened, (8, 8) for digits; its product
            is D.
        weight_train: how much each training example counts, (N,), or None where all count alike.
        weight_valid: the same for validation.
    """

    name: str
    x_train: npt.NDArray[Any]
    y_train: npt.NDArray[np.int64] | None = None
    x_valid: npt.NDArray[Any] | None = None
    y_valid: npt.NDArray[np.int64] | None = None
    x_test: npt.NDArray[Any] | None = None
    y_test: npt.NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None
    feature_names: tuple[str, ...] | None = None
    event_shape: tuple[int, ...] | None = None
    weight_train: npt.NDArray[np.float64] | None = None
    weight_valid: npt.NDArray[np.float64] | None = None

    @property
    def dim(self) -> int:
        """Number of features D."""
        return int(self.x_train.shape[1])

    @property
    def num_classes(self) -> int | None:
        """Number of classes C, or None without labels."""
        return None if self.class_names is None else len(self.class_names)

    def part(self, which: Part) -> tuple[npt.NDArray[Any] | None, npt.NDArray[np.int64] | None]:
        """Return the examples and labels of one part, each None where there are none."""
        return getattr(self, f"x_{which}"), getattr(self, f"y_{which}")


def generator(seed: int, stream: int = 0) -> np.random.Generator:
    """Return NumPy's generator for (`seed`, `stream`); streams of one seed are independent.

    Raises:
        ConfigError: `seed` is not a whole number >= 0.
    """
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"`seed` must be a whole number >= 0; got {seed!r}; use for instance 0.")
    return np.random.default_rng([int(seed), stream])


def split(
    dataset: Dataset, *, seed: int, valid_fraction: float = 0.15, test_fraction: float = 0.2
) -> Dataset:
    """Cut the parts that a data set lacks from its training part.

    Parts that are there stay as they are. With labels every part has the classes in the same
    proportions (up to rounding), and each class keeps at least one training example.

    Args:
        dataset: any data set.
        seed: the same seed cuts the same rows.
        valid_fraction: part of the rows of `x_train`, as given, that becomes `x_valid`; 0 for none.
        test_fraction: part of the rows of `x_train`, as given, that becomes `x_test`; 0 for none.

    Returns:
        a new `Dataset`; rows keep their order.

    Raises:
        ConfigError: a fraction below 0, or no rows left to train on.
        DataError: too few rows to cut a part from.

    Example:
        >>> data = split(Dataset("line", np.arange(20.0)[:, None]), seed=0)
        >>> len(data.x_train), len(data.x_valid), len(data.x_test)
        (13, 3, 4)
    """
    if not (valid_fraction >= 0 and test_fraction >= 0 and valid_fraction + test_fraction < 1):
        raise ConfigError(
            "`valid_fraction` and `test_fraction` must be >= 0 with a sum below 1; "
            f"got {valid_fraction} and {test_fraction}; use for instance 0.15 and 0.2."
        )
    rng = generator(seed, stream=1)
    n = len(dataset.x_train)
    labels = np.zeros(n, np.int64) if dataset.y_train is None else dataset.y_train
    room = n - len(np.unique(labels))
    rest = np.arange(n)
    found: dict[str, Any] = {}
    fractions: dict[Part, float] = {"test": test_fraction, "valid": valid_fraction}
    missing = [part for part in fractions if dataset.part(part)[0] is None and fractions[part] > 0]
    for later, part in zip(range(len(missing) - 1, -1, -1), missing, strict=True):
        size = math.ceil(fractions[part] * n - 1e-9)  # 0.15 * 100 may be a hair above 15 in binary
        size = min(size, room - later)  # where rows are few, the later part still gets one
        room -= size
        if size < 1:
            raise DataError(
                f"the data must have rows to spare for the {part} part; got {n} row(s) in "
                f"{len(np.unique(labels))} class(es), each of which keeps one to train on; "
                f"give a {part} part, more rows, or no labels."
            )
        taken = _draw(labels[rest], size, rng)
        rows, rest = rest[taken], rest[~taken]
        found[f"x_{part}"] = dataset.x_train[rows]
        found[f"y_{part}"] = None if dataset.y_train is None else labels[rows]
        if part == "valid" and dataset.weight_train is not None:
            found["weight_valid"] = dataset.weight_train[rows]
    if not found:
        return dataset
    if dataset.weight_train is not None:
        found["weight_train"] = dataset.weight_train[rest]
    found["x_train"] = dataset.x_train[rest]
    found["y_train"] = None if dataset.y_train is None else labels[rest]
    return replace(dataset, **found)


def _draw(
    labels: npt.NDArray[np.int64], size: int, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Mark `size` of the rows, in proportion to the classes, leaving one row of each class.

    `size` must be at most the number of rows less that of the classes.
    """
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    room = counts - 1
    share = size * counts / len(labels)
    take = np.minimum(np.floor(share).astype(np.int64), room)
    while (short := size - int(take.sum())) > 0:
        # Largest remainder first, among the classes that have rows left to give.
        order = np.argsort(take - share, kind="stable")
        order = order[take[order] < room[order]]
        take[order[:short]] += 1
    taken = np.zeros(len(labels), np.bool_)
    by_class = np.split(np.argsort(codes, kind="stable"), np.cumsum(counts)[:-1])
    for rows, number in zip(by_class, take, strict=True):
        taken[rng.permutation(rows)[:number]] = True
    return taken
