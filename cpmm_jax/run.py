"""The run folder: everything that one fit leaves, complete or not there at all.

config.json     what was fitted, on what, with which settings and versions (schema 1)
metrics.jsonl   one line per report of the training
metrics.json    the result on the test part
mixture.npz     the extracted mixture, which NumPy alone reads
checkpoints/    model/: the trained model with its field, in standardised units, to study it or to
                extract it anew (see `training.checkpoint`); flow/: that of the curriculum
figures/        what `cpmm plot` and `cpmm bench-solvers` draw
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cpmm_jax import __version__, artifact
from cpmm_jax.data.checks import check_examples, show
from cpmm_jax.data.dataset import Dataset, split
from cpmm_jax.data.labels import recode_labels
from cpmm_jax.data.readers import load
from cpmm_jax.data.table import count_columns
from cpmm_jax.errors import RunError
from cpmm_jax.evaluate import evaluate

if TYPE_CHECKING:
    from cpmm_jax.models.cpmm import CPMM

SCHEMA = 1
MODEL, FLOW = Path("checkpoints", "model"), Path("checkpoints", "flow")  # of a run folder
_LIBRARIES = ("jax", "flax", "diffrax", "optax", "numpy")


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
        """Return the reports of the training."""
        lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

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


@contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give a hidden folder to fill, which becomes `path` when all went well and else disappears.

    An older run at `path` is replaced at that moment only, and only with `overwrite`.

    Raises:
        RunError: `path` exists, is no run that may be replaced, or cannot be written.
    """
    path = Path(path)
    if path.is_symlink() or path.exists():
        is_run = (path / "config.json").is_file() and (path / "mixture.npz").is_file()
        if overwrite and not is_run and not (path.is_dir() and not any(path.iterdir())):
            raise RunError(
                f"{str(path)!r} must be a run folder to be replaced; got something else, which is "
                "left alone; choose another `--out`."
            )
        if not overwrite:
            raise RunError(
                f"{str(path)!r} must not exist yet; got one; "
                "choose another `--out`, or replace it with `--overwrite`."
            )
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
    except OSError as error:
        raise RunError(
            f"{str(path)!r} must lie in a folder that can be written; "
            f"got {error.strerror or error}; choose another `--out`."
        ) from error
    try:
        yield part
        _put_in_place(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _put_in_place(part: Path, path: Path) -> None:
    old = part.with_suffix(".old")
    try:
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            os.replace(old, path)
        raise RunError(
            f"{str(path)!r} must be replaceable; got {error.strerror or error}; "
            "choose another `--out`."
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def fit_run(
    source: Source,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool | None = None,
    flow: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Fit a mixture and leave a run folder.

    Args:
        source: the data. What lacks a test or validation part gives 20 and 15 % of its rows.
        out: the folder, which must not exist.
        overwrite: replace a run that is there.
        progress: as for `fit`.
        flow: an earlier run on the same data, or the folder of its flow, for the curriculum "flow".
        **settings: those of `recommend` that are not to follow from the data.

    Returns:
        What `metrics.json` holds: `test_log_likelihood` (nats per example in the units of the data
        as given), with labels `accuracy` or `nmi` and `ari`, `num_components`, `num_parameters`,
        `seconds`, and the numbers of rows.

    Raises:
        RunError: see `new_folder`.
        DataError: see `load`.
        ConfigError: see `recommend`.
        TrainingError: see `fit`.
    """
    start = time.perf_counter()
    with new_folder(out, overwrite=overwrite) as folder:
        data = source.load_parts()
        # Here and not above: reading data, evaluating and sampling need no JAX.
        from cpmm_jax.dynamics.flow import CNF
        from cpmm_jax.pipeline import fit_mixture
        from cpmm_jax.recipe import recommend
        from cpmm_jax.training.checkpoint import load_model, save_model

        assert data.x_test is not None  # `split` made it
        y_train = data.y_train if source.labels else None
        recipe = recommend(
            len(data.x_train),
            data.dim,
            data.num_classes or 1,
            labelled=source.labels,
            seed=source.seed,
            **settings,
        )
        known = None if flow is None else load_model(_flow_folder(flow), CNF)
        fitted = fit_mixture(
            data.x_train,
            y_train,
            data.x_valid,
            data.y_valid if source.labels else None,
            recipe,
            flow=known,
            feature_names=data.feature_names,
            metrics_path=folder / "metrics.jsonl",
            progress=progress,
        )
        recipe = fitted.recipe  # with what validation has settled
        artifact.save(
            folder / "mixture.npz",
            fitted.mixture,
            class_names=data.class_names if source.labels else None,
            feature_names=data.feature_names,
            event_shape=data.event_shape,
            extra={
                "num_times": recipe.num_times,
                "num_trajectories": recipe.num_trajectories,
            },
        )
        save_model(folder / MODEL, fitted.model)
        if fitted.flow is not None:
            save_model(folder / FLOW, fitted.flow)
        mixture = artifact.load(folder / "mixture.npz")
        scores = evaluate(mixture, data.x_test, data.y_test, supervised=source.labels)
        scores = {name if name in _BARE else f"test_{name}": v for name, v in scores.items()}
        metrics = {
            **scores,
            "num_components": recipe.num_components,
            "num_parameters": fitted.num_parameters,
            "best_step": fitted.result.best_step,
            "refused_steps": fitted.result.refused,
            "rows_train": len(data.x_train),
            "rows_valid": 0 if data.x_valid is None else len(data.x_valid),
            "rows_test": len(data.x_test),
            "seconds": time.perf_counter() - start,
        }
        _write_json(folder / "metrics.json", metrics)
        _write_json(
            folder / "config.json",
            {
                "schema": SCHEMA,
                "source": asdict(source),
                "recipe": asdict(recipe),
                "versions": {
                    "cpmm_jax": __version__,
                    "python": platform.python_version(),
                    **{name: version(name) for name in _LIBRARIES},
                },
            },
        )
    return metrics


def _flow_folder(path: str | os.PathLike[str]) -> Path:
    inside = Path(path, FLOW)
    return inside if inside.is_dir() else Path(path)


_BARE = ("accuracy", "nmi", "ari")  # these say by themselves that they are of the test part


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


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
    if x is not None:
        return Examples(x, y, "test part")
    return Examples(dataset.x_train, dataset.y_train, "all rows")
