"""What is read of a finished run: its settings, its mixture, its data."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cpmm_jax import artifact
from cpmm_jax.data.checks import check_examples, show
from cpmm_jax.data.dataset import Dataset, split
from cpmm_jax.data.labels import recode_labels
from cpmm_jax.data.pixels import dequantise, noise_of
from cpmm_jax.data.readers import load
from cpmm_jax.data.table import count_columns
from cpmm_jax.errors import RunError

if TYPE_CHECKING:
    from cpmm_jax.models.cpmm import CPMM

SCHEMA = 1
MODEL, FLOW = Path("checkpoints", "model"), Path("checkpoints", "flow")  # of a run folder


@dataclass(frozen=True)
class Source:
    """Where data come from, in the words of the command line.

    Attributes:
        data: a built-in name or a path.
        labels: whether labels are trained on.
        label_column: of a CSV file, the column that holds them.
        seed: of built-in data, of the cut into parts and of the fit.
    """

    data: str
    labels: bool = False
    label_column: str | None = None
    seed: int = 0

    def load(self) -> Dataset:
        """Read the data, with the parts that the source has."""
        return load(self.data, labels=self.labels, label_column=self.label_column, seed=self.seed)

    def load_parts(self) -> Dataset:
        """Read the data; 20 and 15 % of the rows become the test and validation part it lacks."""
        return split(self.load(), seed=self.seed, valid_fraction=0.15, test_fraction=0.2)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: the folder.
        config: what `config.json` holds.
        mixture: the extracted mixture, in the units of the data as given.
    """

    path: Path
    config: dict[str, Any]
    mixture: artifact.Mixture

    @property
    def supervised(self) -> bool:
        """Whether labels were trained on; else the classes of the mixture are clusters."""
        return bool(self.config["source"]["labels"])

    @property
    def source(self) -> Source:
        """The data of the fit."""
        return Source(**self.config["source"])

    def history(self) -> list[dict[str, Any]]:
        """Return the reports of the training.

        Raises:
            RunError: their file is missing or damaged.
        """
        path = self.path / "metrics.jsonl"
        try:
            reports = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if not all(isinstance(report, dict) and "step" in report for report in reports):
                raise ValueError("a line that is no report")
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(
                f"{str(path)!r} must hold a report on every line; got {type(error).__name__}: "
                f"{' '.join(str(error).split())}; fit again."
            ) from error
        return reports

    def load_model(self) -> CPMM:
        """Return the trained model, in standardised units.

        Raises:
            RunError: the run has none (one of an early version), or it is damaged.
        """
        from cpmm_jax.training.checkpoint import load_model  # reading a run needs no JAX

        return load_model(self.path / MODEL)


def open_run(path: str | os.PathLike[str]) -> Run:
    """Read a run folder.

    Raises:
        RunError: not a run, or of a later schema.
        ArtifactError: its mixture is damaged.
    """
    path = Path(path)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        schema = config["schema"]
        Source(**config["source"])  # its names are checked
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = "no such folder" if not path.is_dir() else f"{type(error).__name__}: {error}"
        raise RunError(
            f"{str(path)!r} must be the folder of a finished run, with config.json; got "
            f"{' '.join(found.split())}; make one with `cpmm fit DATA --out {path}`."
        ) from error
    if schema != SCHEMA:
        raise RunError(
            f"{str(path)!r} must be a run of schema {SCHEMA}; got schema {schema!r}; "
            "read it with the version of cpmm_jax that wrote it."
        )
    return Run(path, config, artifact.load(path / "mixture.npz"))


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows to evaluate or to predict.

    Attributes:
        x: examples, shape (N, D).
        y: labels in the codes of the run, shape (N,), or None.
        part: "test part" where the source has one, else "all rows".
    """

    x: npt.NDArray[Any]
    y: npt.NDArray[np.int64] | None
    part: str


def read_examples(run: Run, data: str, label_column: str | None = None) -> Examples:
    """Read the rows on which a run is evaluated: the test part of `data`, else all of it.

    The data that the run was fitted on are cut into the same parts again, so that no row of the
    training part is among them.

    Args:
        run: the run.
        data: a built-in name or a path.
        label_column: of a CSV file; by default that of the fit, where the file has one column more
            than the run has features.

    Raises:
        DataError: see `load`; another number of features; labels that the run does not know.
    """
    own = run.source
    if data == own.data and label_column in (None, own.label_column):
        dataset = own.load_parts()
    else:
        if label_column is None and Path(data).suffix.lower() == ".csv":
            wider = count_columns(Path(data)) == run.mixture.dim + 1
            label_column = own.label_column if wider else None
        dataset = Source(data, label_column=label_column, seed=own.seed).load()
    check_examples(dataset.x_train[:1], name=show(data), dim=run.mixture.dim)
    if run.supervised and run.mixture.class_names is not None:
        dataset = recode_labels(dataset, run.mixture.class_names)
    x, y = dataset.part("test")
    part = "test part"
    if x is None:
        x, y, part = dataset.x_train, dataset.y_train, "all rows"
    return Examples(as_fitted(run.mixture, x, own.seed), y, part)


def as_fitted(mixture: artifact.Mixture, x: npt.NDArray[Any], seed: int) -> npt.NDArray[Any]:
    """Return examples as the mixture was fitted to them: recorded pixels with noise, drawn once."""
    return dequantise(noise_of(seed, "test"), x) if mixture.extra.get("dequantised") else x
