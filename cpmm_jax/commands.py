"""What the commands of `cpmm` do with their arguments: call, and print."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from cpmm_jax.data.checks import show_path
from cpmm_jax.errors import ConfigError, CpmmError, Interrupted, RunError
from cpmm_jax.evaluate import evaluate as metrics_of
from cpmm_jax.files import check_new, is_csv, write_columns, write_file
from cpmm_jax.run import Run, Source, fit_run, open_run, read_examples, resume_run

_CALLS = "function_evaluations"
_SETTINGS = (
    "components",
    "trajectories",
    "clusters",
    "rank",
    "steps",
    "batch_size",
    "learning_rate",
    "discriminative",
    "curriculum",
)


def _table(values: dict[str, Any]) -> str:
    """Return one line for each value, names and numbers aligned."""
    width = max(map(len, values))
    lines = []
    for name, value in values.items():
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        lines.append(f"{name.replace('_', ' '):<{width}}  {shown}")
    return "\n".join(lines)


def fit(arguments: argparse.Namespace) -> None:
    """Fit, or go on with a fit."""
    given = {name: getattr(arguments, name) for name in _SETTINGS}
    settings = {name: value for name, value in given.items() if value is not None}
    common: dict[str, Any] = {
        "progress": False if arguments.quiet else None,
        "every_seconds": arguments.save_every,
        **settings,
    }
    out = arguments.out if arguments.resume is None else arguments.resume
    with _stopped_by_sigterm(out):
        if arguments.resume is None:
            labels = arguments.labels or arguments.label is not None
            source = Source(arguments.data, labels, arguments.label, arguments.seed or 0)
            if arguments.flow is not None:
                common |= {"flow": arguments.flow, "curriculum": "flow"}
            metrics = fit_run(source, out, overwrite=arguments.overwrite, **common)
        else:
            metrics = resume_run(out, allow_changes=arguments.allow_changes, **common)
    print(_table(metrics))
    print(f"\nThe run is in {out}. Next: cpmm plot {out}")


@contextmanager
def _stopped_by_sigterm(out: str) -> Iterator[None]:
    """Say how to go on, where a fit is interrupted in or between its trainings."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise Interrupted("the fit was stopped by SIGTERM.", number)

    main = threading.current_thread() is threading.main_thread()  # others may handle no signals
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        number = getattr(error, "signal", signal.SIGINT)
        said = str(error).split(";", maxsplit=1)[0].rstrip(".") or "the fit was interrupted"
        raise Interrupted(f"{said}; go on with: cpmm fit --resume {out}", number) from error
    finally:
        if main:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def evaluate(arguments: argparse.Namespace) -> None:
    """Score a run."""
    run = open_run(arguments.folder)
    examples = read_examples(run, arguments.data, arguments.label)
    scores = metrics_of(run.mixture, examples.x, examples.y, supervised=run.supervised)
    print(_table({"rows": f"{len(examples.x)} ({examples.part})", **scores}))


def predict(arguments: argparse.Namespace) -> None:
    """Write classes, probabilities and log p."""
    run = open_run(arguments.folder)
    examples = read_examples(run, arguments.data, arguments.label)
    joint = run.mixture.class_log_prob(examples.x)
    log_prob = np.logaddexp.reduce(joint, axis=1)
    names = run.mixture.class_names or tuple(str(c) for c in range(joint.shape[1]))
    columns = {
        "prediction": np.array(names)[joint.argmax(axis=1)],
        "log_prob": log_prob,
        **{f"p({name})": p for name, p in zip(names, np.exp(joint.T - log_prob), strict=True)},
    }
    write_columns(arguments.out, columns, overwrite=arguments.overwrite)
    print(f"{len(log_prob)} predictions ({examples.part}) are in {arguments.out}.")


def sample(arguments: argparse.Namespace) -> None:
    """Draw examples."""
    mixture = open_run(arguments.folder).mixture
    x = mixture.sample(np.random.default_rng(arguments.seed), arguments.n)
    names = mixture.feature_names or tuple(f"x{j}" for j in range(mixture.dim))
    columns = dict(zip(names, x.T, strict=True)) if is_csv(arguments.out) else {"x": x}
    write_columns(arguments.out, columns, overwrite=arguments.overwrite)
    print(f"{arguments.n} samples are in {arguments.out}.")


def plot(arguments: argparse.Namespace) -> None:
    """Draw the figures of a run."""
    from cpmm_jax.plotting import plot_run

    run = open_run(arguments.folder)
    for path in plot_run(run.mixture, run.history(), run.path / "figures", _data_of(run)):
        print(path)


def _data_of(run: Run) -> npt.NDArray[Any] | None:
    """Return the rows that a figure shows beside the mixture; None where they are gone."""
    try:
        return read_examples(run, run.source.data).x
    except CpmmError as error:
        print(f"cpmm: warning: figures are without data: {error}", file=sys.stderr)
        return None


def export(arguments: argparse.Namespace) -> None:
    """Copy the mixture file."""
    run: Run = open_run(arguments.folder)
    if Path(arguments.out).suffix != ".npz":
        raise RunError(f"FILE must end in .npz; got {show_path(arguments.out)}; rename it.")
    source = run.path / "mixture.npz"
    write_file(arguments.out, lambda part: shutil.copyfile(source, part), arguments.overwrite)
    print(f"The mixture is in {arguments.out}. Read it with cpmm_jax.artifact.load: NumPy alone.")


def bench_solvers(arguments: argparse.Namespace) -> None:
    """Time ODE solvers on the model of a run."""
    run = open_run(arguments.folder)
    if arguments.out is not None:  # now, not after minutes
        if Path(arguments.out).suffix != ".json":
            raise RunError(f"--out must end in .json; got {show_path(arguments.out)}; rename it.")
        check_new(Path(arguments.out), arguments.overwrite)
    from cpmm_jax.plotting import plot_work_precision, save_figure
    from cpmm_jax.solver_study import compare_solvers, recommend_solver

    measured = compare_solvers(run.load_model(), seconds=arguments.seconds)
    advice = recommend_solver(measured, arguments.tolerance)
    records = [m.record() for m in sorted(measured, key=lambda m: m.seconds_per_gradient or 1e9)]
    print(f"{_solver_table(records)}\n\n{advice.sentence}")
    if arguments.out is not None:
        content = {
            "run": str(run.path),
            "tolerance": arguments.tolerance,
            "recommended": advice.measurement.name,
            "sentence": advice.sentence,
            "measurements": records,
        }
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        write_file(arguments.out, lambda part: part.write_text(text), arguments.overwrite)
    try:
        print(save_figure(plot_work_precision(records), run.path / "figures" / "solvers.png"))
    except ConfigError as error:  # the table is there
        print(f"cpmm: warning: no figure: {error}", file=sys.stderr)


def _solver_table(records: Sequence[dict[str, Any]]) -> str:
    """Return what was measured as aligned columns, then what was not."""
    head = ("(* in use now)", "ms", "compile s", "steps", "calls", "MB", "trajectory", "gradient")
    rows: list[tuple[str, ...]] = [head]
    left: dict[str, list[str]] = {}
    for r in records:
        if r["seconds_per_gradient"] is None:
            left.setdefault(r["result"], []).append(r["name"])
            continue
        numbers = (
            f"{1e3 * r['seconds_per_gradient']:.2f}",
            f"{r['compile_seconds']:.1f}",
            *("-" if r[name] is None else str(r[name]) for name in ("num_steps", _CALLS)),
            "-" if r["memory_bytes"] is None else f"{r['memory_bytes'] / 1e6:.2f}",
            *(f"{r[name]:.1e}" for name in ("trajectory_error", "gradient_error")),
        )
        rows.append((f"{r['name']}{' *' if r['own'] else ''}", *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        row[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    for result, names in left.items():
        others = f" and {len(names) - 3} others" if len(names) > 3 else ""
        lines.append(f"{'; '.join(names[:3])}{others}: {result}")
    return "\n".join(lines)
