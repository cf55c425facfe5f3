"""From an order to a finished run, at once or after interruptions."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cpmm_jax import __version__, artifact
from cpmm_jax.data.pixels import are_recorded, check_pixels
from cpmm_jax.errors import RunError
from cpmm_jax.evaluate import evaluate
from cpmm_jax.files import write_json
from cpmm_jax.run.folder import ORDER, TRAINING, check_free, new_folder, old_folder
from cpmm_jax.run.reading import FLOW, MODEL, SCHEMA, Source, as_fitted

_LIBRARIES = ("jax", "flax", "diffrax", "optax", "numpy")


@dataclass(frozen=True)
class Order:
    """What was asked of a fit, as `fit.json` holds it.

    Attributes:
        source: the data.
        settings: those of `recommend` that were given.
        flow: an earlier run, or the folder of its flow; None for none.
        overwrite: whether an older run is to be replaced.
    """

    source: Source
    settings: dict[str, Any]
    flow: str | None = None
    overwrite: bool = False

    @classmethod
    def read(cls, folder: Path) -> Order:
        """Return the order of an unfinished run.

        Raises:
            RunError: it is damaged.
        """
        try:
            content = json.loads((folder / ORDER).read_text(encoding="utf-8"))
            return cls(**(content | {"source": Source(**content["source"])}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{str(folder / ORDER)!r} must tell what was to be fitted; got "
                f"{type(error).__name__}; begin anew with `--overwrite`."
            ) from error


def fit_run(
    source: Source,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool | None = None,
    flow: str | os.PathLike[str] | None = None,
    every_seconds: float = 30.0,
    **settings: Any,
) -> dict[str, Any]:
    """Fit a mixture and leave a run folder.

    Args:
        source: the data. What lacks a test or validation part gives 20 and 15 % of its rows.
        out: the folder, which must not exist.
        overwrite: replace a run that is there.
        progress: as for `fit`.
        flow: an earlier run on the same data, or the folder of its flow, for the curriculum "flow".
        every_seconds: seconds of training between two snapshots, from which `resume_run` goes on.
        **settings: those of `recommend` that are not to follow from the data.

    Returns:
        What `metrics.json` holds: `test_log_likelihood` (nats per example in the units of the data
        as given), with labels `accuracy` or `nmi` and `ari`, `num_components`, `num_parameters`,
        `seconds`, and the numbers of rows.

    Raises:
        RunError: see `new_folder`.
        DataError: see `load`.
        ConfigError: see `recommend`.
        Interrupted: a signal came; what was trained is saved.
        TrainingError: see `fit`.
    """
    order = Order(source, settings, None if flow is None else str(flow), overwrite)
    with new_folder(out, overwrite=overwrite) as folder:
        write_json(folder / ORDER, asdict(order))
        return _fill(folder, order, progress=progress, every_seconds=every_seconds)


def resume_run(
    out: str | os.PathLike[str],
    *,
    allow_changes: bool = False,
    progress: bool | None = None,
    every_seconds: float = 30.0,
    **changes: Any,
) -> dict[str, Any]:
    """Go on with a fit that was stopped or killed; the result is as if it had not been.

    Args:
        out: the folder that was asked for.
        allow_changes: whether to go on with other settings or data.
        progress: as for `fit`.
        every_seconds: as for `fit_run`.
        **changes: settings of `recommend` that are given again.

    Returns:
        What `fit_run` does.

    Raises:
        RunError: see `old_folder`; or other settings or data, all of them named.
        Interrupted: a signal came again.
    """
    from cpmm_jax.training.snapshots import differences

    with old_folder(out) as folder:
        order = Order.read(folder)
        found = differences(order.settings, order.settings | changes)
        if found and not allow_changes:
            raise RunError(
                f"{str(out)!r} must go on with the settings that it has; got {'; '.join(found)}; "
                "leave them out, or add `--allow-changes`."
            )
        check_free(Path(out), overwrite=order.overwrite)
        order = replace(order, settings=order.settings | changes)
        if found:
            write_json(folder / ORDER, asdict(order))
        kept: dict[str, Any] = {"progress": progress, "every_seconds": every_seconds}
        return _fill(folder, order, resume=True, allow_changes=allow_changes, **kept)


def _fill(
    folder: Path,
    order: Order,
    *,
    progress: bool | None,
    every_seconds: float,
    resume: bool = False,
    allow_changes: bool = False,
) -> dict[str, Any]:
    """Fit, and write everything that a finished run holds."""
    source = order.source
    start = time.perf_counter()
    data = source.load_parts()
    # Here and not above: reading data, evaluating and sampling need no JAX.
    from cpmm_jax.dynamics.flow import CNF
    from cpmm_jax.pipeline import fit_mixture
    from cpmm_jax.recipe import recommend
    from cpmm_jax.training.checkpoint import load_model, save_model
    from cpmm_jax.training.snapshots import Checkpoints

    assert data.x_test is not None  # `split` made it
    y_train = data.y_train if source.labels else None
    recipe = recommend(
        len(data.x_train),
        data.dim,
        data.num_classes or 1,
        labelled=source.labels,
        event_shape=data.event_shape,
        dequantise=data.event_shape is not None and are_recorded(data.x_train),
        seed=source.seed,
        **order.settings,
    )
    if recipe.dequantise:  # now, not after the training
        for part in ("valid", "test"):
            check_pixels(getattr(data, f"x_{part}"), name=f"x_{part}")
    known = None if order.flow is None else load_model(_flow_folder(order.flow), CNF)
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
        checkpoints=Checkpoints(
            folder=folder / TRAINING, every_seconds=every_seconds, allow_changes=allow_changes
        ),
        resume=resume,
    )
    recipe = fitted.recipe  # with what validation has settled
    for name in (MODEL, FLOW):  # of a process that was killed here
        shutil.rmtree(folder / name, ignore_errors=True)
    for left in folder.glob(".*.part"):
        left.unlink()
    artifact.save(
        folder / "mixture.npz",
        fitted.mixture,
        class_names=data.class_names if source.labels else None,
        feature_names=data.feature_names,
        event_shape=data.event_shape,
        extra={
            "num_times": recipe.num_times,
            "num_trajectories": recipe.num_trajectories,
            **({"dequantised": True} if recipe.dequantise else {}),
        },
    )
    save_model(folder / MODEL, fitted.model)
    if fitted.flow is not None:
        save_model(folder / FLOW, fitted.flow)
    mixture = artifact.load(folder / "mixture.npz")
    x_test = as_fitted(mixture, data.x_test, source.seed)
    scores = evaluate(mixture, x_test, data.y_test, supervised=source.labels)
    scores = {name if name in _BARE else f"test_{name}": v for name, v in scores.items()}
    metrics = {
        **scores,
        "num_components": recipe.num_components,
        "num_parameters": fitted.num_parameters,
        "best_step": fitted.result.best_step,
        "refused_steps": fitted.result.refused,
        "returns": fitted.result.returns,
        "rows_train": len(data.x_train),
        "rows_valid": 0 if data.x_valid is None else len(data.x_valid),
        "rows_test": len(data.x_test),
        "seconds": time.perf_counter() - start,
    }
    write_json(folder / "metrics.json", metrics)
    write_json(
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
