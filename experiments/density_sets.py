"""The data sets of the density comparison: the built-in ones and the tables of a folder.

    CPMM_DATA_DIR=folder .venv/bin/python -m experiments.density_sets

lists them with their sizes, what was done to them, and the test log-likelihood of a Gaussian.

A density on recorded numbers is unbounded where a value repeats, so that whoever fits the narrowest
spike would win. What follows is derived from the numbers alone (of all parts together), is the same
for every method and seed, and is written down in `DensitySet.notes`. Per column, in units of its
standard deviation:

- with 95 % of the rows on one value, or a linear function of earlier columns: left out;
- with more than half of the rows on values that repeat, it was recorded on a grid: uniform noise
  of one step (the median gap between the common values) is added to it. A finer grid is below the
  spacing of the rows and cannot be told from a continuum;
- every value that repeats gets uniform noise of a quarter of its share of the rows, if that is
  wider: a spike of half the rows becomes an eighth of a standard deviation wide. No value then has
  a density above 4, ten times the peak of a normal.

Parts are taken as they are given; a missing validation part is cut from the training part, and a
set without a test part is cut 70/10/20 (train, valid, test), both by seed. Identical rows stay on
one side; where given parts share rows, they are pooled and cut anew. All columns are standardised
by the training part, and log-likelihoods are nats of the standardised columns.
"""

from __future__ import annotations

import os
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmm_jax.data import BUILTIN_NAMES, Dataset, load
from cpmm_jax.data.checks import show_path
from cpmm_jax.errors import DataError, DataWarning

PARTS = ("train", "valid", "test")

# What the numbers cannot say. In sets of this prefix (those of ADBench), y = 0 marks the normal
# rows and y = 1 the anomalies, which are no sample of a density.
ANOMALY_PREFIX = "ad_"

ONE_VALUE = 0.95  # share of the rows
DETERMINED = 1e-6  # of a column's variance is left when earlier columns are known
ON_GRID = 0.5  # share of the rows on values that repeat
COMMON = 0.9  # share of the rows, besides those on the heaviest value, on common values
DENSEST = 4.0  # per standard deviation
HEAVY = 0.05  # share of the rows on one value that deserves a note
# A row that repeats more often is an atom of the distribution and dealt out copy by copy.
MOST_COPIES, MOST_COPIES_SHARE = 10, 0.01

Matrix = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class DensitySet:
    """A table in three parts, float32 (N, D), standardised by its training part.

    `notes` says which columns were left out or dequantised, and where the parts come from.
    """

    name: str
    x_train: npt.NDArray[np.float32]
    x_valid: npt.NDArray[np.float32]
    x_test: npt.NDArray[np.float32]
    notes: str


def names(data_dir: Path | None = None) -> list[str]:
    """Return the sets that are here: the built-in ones and the tables of the folder of data.

    Images (arrays of more than two axes) are left out.

    Args:
        data_dir: folder that holds .npz files with `x` or `x_train`; by default that of the
            environment's CPMM_DATA_DIR, if any.
    """
    found = [name for name in BUILTIN_NAMES if name != "digits" or find_spec("sklearn")]
    folder = _folder(data_dir)
    files = sorted(folder.glob("*.npz")) if folder else []
    return found + [path.stem for path in files if path.stem not in found and _is_table(path)]


def density_set(name: str, seed: int, data_dir: Path | None = None) -> DensitySet:
    """Return a set by name, with the parts of a seed.

    Raises:
        DataError: there is no such set, its file is damaged, or it holds images.
    """
    data, notes = _read(name, seed, data_dir)
    given = [getattr(data, f"x_{part}") for part in PARTS]
    part = np.repeat(PARTS, [0 if x is None else len(x) for x in given])
    raw = np.concatenate([x for x in given if x is not None]).astype(np.float64)
    levels = [_Levels.of(column) for column in raw.T]
    kept, omissions = _columns(levels)
    # Not by Python's own hash of a string, which differs from process to process.
    noise = np.random.default_rng(zlib.crc32(name.encode()))
    x = np.stack([levels[j].z + levels[j].noise(noise) for j in kept], axis=1)
    groups = _groups(np.stack([levels[j].row for j in kept], axis=1))
    part, origin = _parts(part, groups, seed)
    train = x[part == "train"]
    standardised = ((x - train.mean(axis=0)) / train.std(axis=0)).astype(np.float32)
    notes += omissions + _additions({j: levels[j] for j in kept}) + [origin]
    rows = {f"x_{which}": standardised[part == which] for which in PARTS}
    return DensitySet(name, **rows, notes="; ".join(notes))


def _folder(data_dir: Path | None) -> Path | None:
    given = data_dir or os.environ.get("CPMM_DATA_DIR")
    if not given:
        return None
    folder = Path(given)
    if not folder.is_dir():
        raise DataError(
            f"the folder of data sets must exist; got {show_path(folder)}; check its name, or name "
            "none for the built-in sets alone."
        )
    return folder


def _is_table(path: Path) -> bool:
    """Tell from the header alone whether `x` or `x_train` has two axes."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in {"x.npy", "x_train.npy"}.intersection(archive.namelist()):
                with archive.open(member) as stream:
                    version = np.lib.format.read_magic(stream)
                    if version == (1, 0):
                        shape, _, _ = np.lib.format.read_array_header_1_0(stream)
                    else:
                        shape, _, _ = np.lib.format.read_array_header_2_0(stream)
                    return len(shape) == 2
    except (ValueError, zipfile.BadZipFile):
        pass
    return False


def _read(name: str, seed: int, data_dir: Path | None) -> tuple[Dataset, list[str]]:
    """Return the rows as they were recorded, and notes on those left out."""
    if name == "digits":
        digits = load(name)
        return Dataset(name, np.concatenate([digits.x_train, digits.x_test])), []
    if name in BUILTIN_NAMES:
        return load(name, seed=seed), ["drawn anew for every seed"]
    folder = _folder(data_dir)
    path = folder / f"{name}.npz" if folder else None
    if path is None or not path.is_file():
        raise DataError(
            f"`name` must be one of {', '.join(names(data_dir))}; got {name!r}; use one of these, "
            "or name the folder that holds it (CPMM_DATA_DIR)."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # labels that are no classes: not used here
        data = load(path)
    if data.event_shape is not None:
        raise DataError(
            f"{show_path(path)} must hold a table; got examples of shape {data.event_shape}; "
            "images have no place in this comparison."
        )
    classes = data.class_names or ()
    if name.startswith(ANOMALY_PREFIX) and "0" in classes:
        return _rows_of(data, classes.index("0")), ["normal rows (y = 0) alone"]
    return data, []


def _rows_of(data: Dataset, code: int) -> Dataset:
    """Keep the rows of one class, in every part that has labels."""
    rows: dict[str, Any] = {}
    for part in PARTS:
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        if x is not None and y is not None:
            rows |= {f"x_{part}": x[y == code], f"y_{part}": None}
    return replace(data, **rows, class_names=None)


@dataclass(frozen=True, eq=False)
class _Levels:
    """One column in units of its standard deviation: its rows (N,) on its distinct values (L,)."""

    z: Matrix
    row: Integers  # index of the value on which each row stands
    values: Matrix
    counts: Integers

    @classmethod
    def of(cls, column: Matrix) -> _Levels:
        spread = column.std() if np.ptp(column) > 0 else 1.0
        z = (column - column.mean()) / spread
        # Values closer than this differ by the rounding of how they were stored or computed.
        values, row, counts = np.unique(np.round(z, 6), return_inverse=True, return_counts=True)
        return cls(z, row, values, counts)

    @property
    def share(self) -> Matrix:
        """Share of the rows on each value."""
        return self.counts / len(self.z)

    @property
    def step(self) -> float:
        """Step of the grid on which the column was recorded; 0 if it cannot be told."""
        if self.share[self.counts > 1].sum() <= ON_GRID:
            return 0.0
        order = np.argsort(-self.counts, kind="stable")
        held = np.cumsum(self.counts[order[1:]])
        common = order[: np.searchsorted(held, COMMON * held[-1]) + 2]
        return float(np.median(np.diff(np.sort(self.values[common]))))

    def width(self) -> Matrix:
        """Return the width of the noise on each value."""
        spike = np.where(self.counts > 1, self.share / DENSEST, 0.0)
        return np.maximum(spike, self.step)

    def noise(self, rng: np.random.Generator) -> Matrix:
        """Draw the noise of every row."""
        return self.width()[self.row] * rng.uniform(-0.5, 0.5, len(self.z))


def _columns(levels: list[_Levels]) -> tuple[list[int], list[str]]:
    """Return the columns to keep, and notes on the others."""
    alike = [j for j, column in enumerate(levels) if column.share.max() > ONE_VALUE]
    varied = [j for j in range(len(levels)) if j not in alike]
    if not varied:
        raise DataError(
            "the columns must vary; got one value in nearly every row of each; drop the set."
        )
    # Squared, the diagonal of R is what earlier columns leave of a column's sum of squares.
    z = np.stack([levels[j].z for j in varied], axis=1)
    left = np.diag(np.linalg.qr(z, mode="r")) ** 2 / len(z)
    determined = [varied[i] for i in np.flatnonzero(left < DETERMINED)]
    notes = []
    if alike:
        notes.append(f"left out, over {ONE_VALUE:.0%} of the rows on one value: {_listed(alike)}")
    if determined:
        notes.append(f"left out, linear functions of earlier columns: {_listed(determined)}")
    return [j for j in varied if j not in determined], notes


def _additions(levels: dict[int, _Levels]) -> list[str]:
    """Return notes on the noise that was added to each column."""
    stepped = [j for j, column in levels.items() if column.step > 0]
    heavy = [
        j
        for j, column in levels.items()
        if column.share.max() > HEAVY and column.share.max() / DENSEST > column.step
    ]
    notes = []
    if stepped:
        notes.append(f"dequantised by one step: {_listed(stepped)}")
    if heavy:
        share = max(levels[j].share.max() for j in heavy)
        notes.append(
            f"values with up to {share:.0%} of the rows spread over up to {share / DENSEST:.2f} "
            f"standard deviations: {_listed(heavy)}"
        )
    return notes


def _listed(columns: Iterable[int]) -> str:
    """Name columns, those in a row as a range."""
    runs: list[list[int]] = []
    for j in columns:
        if runs and j == runs[-1][-1] + 1:
            runs[-1].append(j)
        else:
            runs.append([j])
    spans = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    word = "column" if sum(map(len, runs)) == 1 else "columns"
    return f"{word} {', '.join(spans)}"


def _groups(rows: npt.NDArray[np.int64]) -> Integers:
    """Return for each row of (N, D) the number of its group, which no split may cut."""
    _, groups, copies = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    groups = groups.reshape(-1)
    atom = copies[groups] > max(MOST_COPIES, MOST_COPIES_SHARE * len(rows))
    groups[atom] = len(copies) + np.arange(atom.sum())
    return groups


def _parts(
    part: npt.NDArray[np.str_], groups: Integers, seed: int
) -> tuple[npt.NDArray[np.str_], str]:
    """Return the part of each row, and a note on where it comes from."""
    rng = np.random.default_rng(seed)
    test, valid = part == "test", part == "valid"
    shared = np.isin(groups[test], groups[~test]).any()
    if shared or not test.any():
        origin = "cut 70/10/20 by seed"
        origin = f"given parts share rows: pooled, {origin}" if shared else origin
        return _deal(groups, {"test": 0.2, "valid": 0.1}, rng), origin
    if valid.any():
        return part, "parts as given"
    part[~test] = _deal(groups[~test], {"valid": 0.1}, rng)
    return part, "test part as given, validation cut from the training part by seed"


def _deal(
    groups: Integers, fractions: dict[str, float], rng: np.random.Generator
) -> npt.NDArray[np.str_]:
    """Deal groups out to parts of those fractions of the rows, the rest to the training part."""
    sizes = np.bincount(groups)
    order = rng.permutation(len(sizes))
    before = np.cumsum(sizes[order]) - sizes[order]
    ends = np.round(np.cumsum(list(fractions.values())) * len(groups))
    dealt = np.empty(len(sizes), np.int64)
    dealt[order] = np.searchsorted(ends, before, side="right")
    return np.array([*fractions, "train"])[dealt[groups]]


def gaussian_nats(data: DensitySet) -> float:
    """Return the mean test log-likelihood of the Gaussian fitted to the training part."""
    mean = data.x_train.mean(axis=0, dtype=np.float64)
    centred = data.x_train - mean
    factor = np.linalg.cholesky(centred.T @ centred / len(centred))
    white = np.linalg.solve(factor, (data.x_test - mean).T)
    log_det = 2 * np.log(np.diag(factor)).sum()
    return float(-0.5 * ((white**2).sum(axis=0).mean() + log_det + len(mean) * np.log(2 * np.pi)))


def main() -> None:
    for name in names():
        data = density_set(name, seed=0)
        rows = "/".join(str(len(getattr(data, f"x_{part}"))) for part in PARTS)
        dim = data.x_train.shape[1]
        print(f"{name}: {rows}, D = {dim}, Gaussian {gaussian_nats(data):.3f} nats; {data.notes}")


if __name__ == "__main__":
    main()
