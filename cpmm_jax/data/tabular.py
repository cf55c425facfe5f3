"""`load_tabular`: the five density benchmarks, read from their original public files.

The preprocessing is that of Papamakarios, Pavlakou and Murray, "Masked Autoregressive Flow for
Density Estimation" (2017), appendix D, and of the code published with it; where the two differ, or
where the code does something that its words do not say, the comment at the step says so. Sizes and,
to check a set of files by, the test log-likelihood in nats of a Gaussian with full covariance
fitted to the training part:

| name      | files                                  |  D | train / valid / test          |  nats  |
| --------- | -------------------------------------- | -- | ----------------------------- | ------ |
| power     | household_power_consumption.txt (UCI)  |  6 | 1,659,917 / 184,435 / 204,928 |  -7.74 |
| gas       | ethylene_CO.txt (UCI)                  |  8 | 852,174 / 94,685 / 105,206    |  -3.58 |
| hepmass   | 1000_train.csv and 1000_test.csv (UCI) | 21 | 315,123 / 35,013 / 174,987    | -27.93 |
| miniboone | MiniBooNE_PID.txt (UCI)                | 43 | 29,556 / 3,284 / 3,648        | -37.24 |
| bsds300   | BSDS300.hdf5 (the paper's own archive) | 63 | 1,000,000 / 50,000 / 250,000  |  96.67 |

MNIST needs no reader here: `cpmm_jax.data.load` reads a folder of its IDX files.
"""

from __future__ import annotations

import gzip
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt

from cpmm_jax.data.binary import reading
from cpmm_jax.data.checks import check_examples, check_finite, listing, show, show_path
from cpmm_jax.data.dataset import Dataset, generator
from cpmm_jax.errors import ConfigError, DataError

_Matrix = npt.NDArray[np.float64]

_POWER_NAMES = ("global_active_power", "voltage", *(f"sub_metering_{i}" for i in (1, 2, 3)))
_NUM_SENSORS = 16
_HEPMASS_FEATURES = 26
_MINIBOONE_FEATURES = 50
_BSDS300_PARTS = ("train", "validation", "test")

_MOST_CORRELATED = 0.98
_MOST_RECURRENCES = 5
_HELD_OUT = 0.1


def load_tabular(name: str, path: str | os.PathLike[str], *, seed: int = 42) -> Dataset:
    """Read one of the five tabular density benchmarks, with the parts of the published results.

    Log-likelihoods of the parts returned are in the units of the published ones: of standardised
    columns, but for bsds300, which stays in its own units.

    Args:
        name: "power", "gas", "hepmass", "miniboone" or "bsds300".
        path: the folder that holds the original files under their own names (text may be packed as
            .gz), or the file itself where a set has one.
        seed: of the order and the noise of power (42 is the published one) and of the rows of gas;
            the other sets involve no chance.

    Returns:
        x_train, x_valid and x_test, float32 (N, D), with the names of the columns.

    Raises:
        DataError: unknown name, missing, damaged or foreign file, or h5py not installed (bsds300).
        ConfigError: `seed` is not a whole number in 0..2**32 - 1.
    """
    if name not in _SETS:
        raise DataError(
            f"`name` must be a tabular benchmark ({', '.join(_SETS)}); got {show(name)}; "
            "use one of these names."
        )
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ConfigError(
            f"`seed` must be a whole number in 0..2**32 - 1; got {seed!r}; use for instance 42."
        )
    read, files = _SETS[name]
    return read(_find(Path(path), files), int(seed))


def _find(path: Path, names: Sequence[str]) -> list[Path]:
    """Return the files of those names in the folder `path`, plain or packed, or `path` itself."""
    with reading(path, "folder or file"):
        if not path.is_dir():
            if len(names) > 1:
                raise DataError(
                    f"{show_path(path)} must be the folder that holds {' and '.join(names)}; "
                    "got no folder; give the folder."
                )
            return [path]
        held = {entry.name for entry in path.iterdir()}
    found = []
    for name in names:
        present = next((n for n in (name, f"{name}.gz") if n in held), None)
        if present is None:
            files = f"files {listing([show(n) for n in sorted(held)])}" if held else "no files"
            raise DataError(
                f"the folder {show_path(path)} must hold {name} (or {name}.gz); got {files}; "
                "check the path."
            )
        found.append(path / present)
    return found


def _text(path: Path) -> TextIO:
    """Open a text file, plain or gzip-compressed."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _numbers(
    lines: Iterable[str],
    path: Path,
    columns: Sequence[int],
    *,
    delimiter: str | None = None,
    max_rows: int | None = None,
) -> _Matrix:
    """Return those columns of the lines as numbers, float64 (N, D), N >= 1, finite."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of no rows at all, refused below
            x = np.loadtxt(
                lines,
                comments=None,
                delimiter=delimiter,
                usecols=columns,
                max_rows=max_rows,
                ndmin=2,
            )
    except ValueError as error:  # NumPy's message names the row and the column
        raise DataError(
            f"{show_path(path)} must hold numbers under its first line, in {max(columns) + 1} "
            f"columns; got {show(str(error), 120)}; check that it is the original file."
        ) from error
    if not len(x):
        raise DataError(
            f"{show_path(path)} must hold rows of numbers; got none under its first line; "
            "check that it is the original file."
        )
    check_finite(x, name=path.name)
    return x


def _power(files: list[Path], seed: int) -> Dataset:
    """Household power: the measurements with few zeros and the minute of the day, dequantised."""
    (path,) = files
    with reading(path, "text file"), _text(path) as stream:
        next(stream, None)
        # Date;hh;mm;ss;active;reactive;voltage;intensity;sub_1;sub_2;sub_3: the time's colons turn
        # into separators. Rows with missing values ("?", or nothing) are dropped.
        rows = (line.replace(":", ";") for line in stream if not _has_gap(line))
        table = _numbers(rows, path, (4, 6, 8, 9, 10, 1, 2), delimiter=";")
    x = np.column_stack([table[:, :5], 60.0 * table[:, 5] + table[:, 6]])
    # The legacy generator, drawing in the published order, since the parts depend on it.
    rng = np.random.RandomState(seed)
    x = x[rng.permutation(len(x))]
    x[:, 1] += 0.01 * rng.rand(len(x))
    x[:, 0] += 0.001 * rng.rand(len(x))
    x[:, 2:5] += rng.rand(len(x), 3)
    # The paper adds noise to the minute too, the published code does not; without it, the minutes
    # of the day are 1,440 atoms on which a density is unbounded.
    x[:, 5] += rng.rand(len(x))
    rest, test = _cut(x, path)
    train, valid = _cut(rest, path)
    return _standardised("power", [train, valid, test], rest, (*_POWER_NAMES, "minute"))


def _has_gap(line: str) -> bool:
    return "?" in line or ";;" in line or line.rstrip().endswith(";")


def _gas(files: list[Path], seed: int) -> Dataset:
    """Gas sensors in ethylene and CO: a quarter of the rows, one of each group of like sensors."""
    (path,) = files
    with reading(path, "text file"), _text(path) as stream:
        next(stream, None)
        # Columns 0, 1 and 2 are the time and the set points of the two concentrations.
        x = _numbers(stream, path, range(3, 3 + _NUM_SENSORS))
    # The published parts add up to a quarter of the file's rows; which quarter is not known.
    x = x[generator(seed).permutation(len(x))[: round(len(x) / 4)]]
    rest, test = _cut(x, path)
    train, valid = _cut(rest, path)
    constant = np.flatnonzero(np.ptp(x, axis=0) == 0)
    if len(constant):
        raise DataError(
            f"{show_path(path)} must have sensors that vary; got one value alone in column "
            f"{3 + constant[0]}; check that it is the original file."
        )
    kept = _uncorrelated(x)
    names = tuple(f"sensor_{j + 1}" for j in kept)
    parts = [part[:, kept] for part in (train, valid, test)]
    return _standardised("gas", parts, x[:, kept], names)  # the published code: by all rows


def _uncorrelated(x: _Matrix) -> list[int]:
    """Drop the first column that correlates highly with another one until none does."""
    correlation = np.atleast_2d(np.corrcoef(x, rowvar=False))
    kept = list(range(len(correlation)))
    while True:
        alike = correlation[np.ix_(kept, kept)] > _MOST_CORRELATED
        crowded = np.flatnonzero(alike.sum(axis=1) > 1)  # each column correlates with itself
        if not len(crowded):
            return kept
        del kept[crowded[0]]


def _hepmass(files: list[Path], seed: int) -> Dataset:
    """Particle collisions: the signal (class 1), continuous features."""
    signal = []
    for path in files:
        with reading(path, "CSV file"), _text(path) as stream:
            next(stream, None)
            # Label, f0, ..., f26. The first line of the training file names one column fewer than
            # its rows hold, whereby the published code lost f26; its 21 features come from f0..f25.
            table = _numbers(stream, path, range(1 + _HEPMASS_FEATURES), delimiter=",")
        signal.append(table[table[:, 0] == 1, 1:])
        if not len(signal[-1]):
            raise DataError(
                f"{show_path(path)} must hold rows of class 1; got none; "
                "check that it is the original file."
            )
    given, test = signal
    kept = _continuous(given, files[0])
    train, valid = _cut(given, files[0])
    names = tuple(f"f{j}" for j in kept)
    parts = [part[:, kept] for part in (train, valid, test)]
    return _standardised("hepmass", parts, given[:, kept], names)


def _miniboone(files: list[Path], seed: int) -> Dataset:
    """Neutrino events: the signal without outliers, continuous features, in the file's order."""
    (path,) = files
    with reading(path, "text file"), _text(path) as stream:
        counts = next(stream, "").split()
        if len(counts) != 2 or not all(count.isdecimal() for count in counts):
            raise DataError(
                f"{show_path(path)} must begin with the numbers of signal and background rows; "
                f"got {show(' '.join(counts))}; check that it is the original file."
            )
        num_signal = int(counts[0])  # the signal stands first
        x = _numbers(stream, path, range(_MINIBOONE_FEATURES), max_rows=num_signal)
    if len(x) < num_signal:
        raise DataError(
            f"{show_path(path)} must hold the {num_signal} signal rows of its first line; "
            f"got {len(x)} (truncated); fetch the file again."
        )
    x = x[x[:, 0] >= -100]  # the outliers hold about -1000 in every column
    kept = _continuous(x, path)
    rest, test = _cut(x[:, kept], path)
    train, valid = _cut(rest, path)
    return _standardised("miniboone", [train, valid, test], rest, tuple(f"f{j}" for j in kept))


def _continuous(x: _Matrix, path: Path) -> list[int]:
    """Return the columns whose smallest value recurs little.

    The paper removes features "with too many recurring values"; the published code looks at the
    smallest value of a feature only, and the published dimensions follow from that.
    """
    kept = np.flatnonzero((x == x.min(axis=0)).sum(axis=0) <= _MOST_RECURRENCES).tolist()
    if not kept:
        raise DataError(
            f"{show_path(path)} must hold continuous features; got none whose smallest value "
            f"occurs at most {_MOST_RECURRENCES} times; check that it is the original file."
        )
    return kept


def _bsds300(files: list[Path], seed: int) -> Dataset:
    """Patches of natural images, 8 x 8 less the last pixel, as they were published."""
    try:
        import h5py
    except ImportError as error:
        raise DataError(
            "`bsds300` must be read with h5py; got no such package here; "
            "install it with: pip install 'cpmm_jax[hdf5]'."
        ) from error
    (path,) = files
    with reading(path, "HDF5 file"), h5py.File(path, "r") as stored:
        missing = [key for key in _BSDS300_PARTS if key not in stored]
        if missing:
            raise DataError(
                f"{show_path(path)} must hold the parts {', '.join(_BSDS300_PARTS)}; "
                f"got no {listing(missing)}; check that it is the original file."
            )
        train, valid, test = (np.asarray(stored[key], np.float32) for key in _BSDS300_PARTS)
    dim = check_examples(train, name="train").shape[1]
    check_examples(valid, name="validation", dim=dim)
    check_examples(test, name="test", dim=dim)
    return Dataset("bsds300", train, x_valid=valid, x_test=test)


def _cut(x: _Matrix, path: Path) -> tuple[_Matrix, _Matrix]:
    """Return all but the last tenth of the rows, and the last tenth."""
    held_out = int(_HELD_OUT * len(x))
    if held_out < 1:
        raise DataError(
            f"{show_path(path)} must hold enough rows to cut a tenth off twice; got {len(x)} "
            "left to cut; check that it is the original file."
        )
    return x[:-held_out], x[-held_out:]


def _standardised(
    name: str, parts: list[_Matrix], reference: _Matrix, feature_names: tuple[str, ...]
) -> Dataset:
    """Return the parts with the mean and standard deviation of `reference` taken out."""
    mean, std = reference.mean(axis=0), reference.std(axis=0)
    train, valid, test = (((x - mean) / std).astype(np.float32) for x in parts)
    return Dataset(name, train, x_valid=valid, x_test=test, feature_names=feature_names)


_SETS: dict[str, tuple[Callable[[list[Path], int], Dataset], tuple[str, ...]]] = {
    "power": (_power, ("household_power_consumption.txt",)),
    "gas": (_gas, ("ethylene_CO.txt",)),
    "hepmass": (_hepmass, ("1000_train.csv", "1000_test.csv")),
    "miniboone": (_miniboone, ("MiniBooNE_PID.txt",)),
    "bsds300": (_bsds300, ("BSDS300.hdf5",)),
}
