"""The command `cpmm`: parse, build, call.

Exit codes: 0 all went well; 1 data, settings or files break a rule, said in one line (`--debug`
shows where); 2 the command line itself is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from cpmm_jax import __version__
from cpmm_jax.data.builtin import BUILTIN_NAMES
from cpmm_jax.data.checks import show_path
from cpmm_jax.data.readers import FILE_KINDS
from cpmm_jax.errors import ConfigError, CpmmError, DataWarning, FlowWarning, RunError
from cpmm_jax.evaluate import evaluate
from cpmm_jax.output import check_new, is_csv, write_columns, write_file
from cpmm_jax.recipe import CURRICULA
from cpmm_jax.run import Run, Source, fit_run, open_run, read_examples

_DATA_HELP = f"a built-in name ({', '.join(BUILTIN_NAMES)}) or the path of an {FILE_KINDS}"
_CALLS = "function_evaluations"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _at_least(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number >= {least}; got {text!r}")
        return value

    return whole


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0; got {text!r}")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1]; got {text!r}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="cpmm",
        description="Fit, score, sample and plot continuously parameterized mixture models.",
        epilog="Start with: cpmm fit digits --labels --out runs/digits",
    )
    parser.add_argument("--version", action="version", version=f"cpmm_jax {__version__}")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show where an error was raised")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(run=run)
        return sub

    fit = command("fit", _fit, "Fit a mixture to data and leave a run folder.")
    fit.add_argument("data", metavar="DATA", help=_DATA_HELP)
    fit.add_argument("--out", metavar="RUN", required=True, help="the run folder to make")
    fit.add_argument("--labels", action="store_true", help="train on the labels of DATA")
    fit.add_argument(
        "--label", metavar="COLUMN", help="train on this column of a .csv (header or index)"
    )
    whole = {
        "components": (1, "TOTAL", "components of the extracted mixture in total"),
        "trajectories": (1, "S", "trajectories of each class; without labels, in all"),
        "clusters": (1, "C", "clusters to find in DATA; default: none, a density"),
        "rank": (0, "R", "factors of each component"),
        "steps": (1, "N", "training steps"),
        "batch-size": (1, "N", "examples in a step"),
    }
    for name, (least, metavar, text) in whole.items():
        fit.add_argument(
            f"--{name}",
            type=_at_least(least),
            metavar=metavar,
            help=text if "default" in text else f"{text}; default: from DATA",
        )
    fit.add_argument(
        "--discriminative",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="with labels, the share of log p(x) taken from the objective; default: 0",
    )
    fit.add_argument(
        "--curriculum", choices=CURRICULA, default="none", help="train towards DATA along a map"
    )
    fit.add_argument(
        "--flow", metavar="PATH", help="an earlier run on DATA, whose flow is the curriculum"
    )
    fit.add_argument("--learning-rate", type=_rate, metavar="RATE", help="highest learning rate")
    fit.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="default: 0")
    fit.add_argument("--overwrite", action="store_true", help="replace a run that exists")
    fit.add_argument("--quiet", action="store_true", help="no progress bar")

    score = command("evaluate", _evaluate, "Score a run on the test part of data, else on all.")
    predict = command("predict", _predict, "Write classes (or clusters), probabilities and log p.")
    sample = command("sample", _sample, "Draw examples from the mixture of a run.")
    plot = command("plot", _plot, "Draw the figures of a run into RUN/figures.")
    export = command("export", _export, "Write the mixture file, which NumPy alone reads.")
    bench = command(
        "bench-solvers", _bench_solvers, "Time ODE solvers on the model of a run; recommend one."
    )
    for sub in (score, predict, sample, plot, export, bench):
        sub.add_argument("folder", metavar="RUN", help="the folder of a finished run")
    for sub in (score, predict):
        sub.add_argument("data", metavar="DATA", help=_DATA_HELP)
        sub.add_argument("--label", metavar="COLUMN", help="column of labels of a .csv")
    for sub in (predict, sample):
        sub.add_argument("--out", metavar="FILE", required=True, help="the .csv or .npz to write")
    sample.add_argument("-n", type=_at_least(1), default=1000, metavar="N", help="default: 1000")
    sample.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="default: 0")
    export.add_argument("out", metavar="FILE", help="the .npz to write")
    bench.add_argument("--out", metavar="FILE", help="the .json to write the figures into as well")
    bench.add_argument(
        "--seconds", type=_rate, default=120.0, metavar="S", help="time limit; default: 120"
    )
    bench.add_argument(
        "--tolerance",
        type=_rate,
        default=0.01,
        metavar="E",
        help="largest relative error of trajectory and gradient; default: 0.01",
    )
    for sub in (predict, sample, export, bench):
        sub.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    return parser


def compilation_cache(folder: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Return the environment that makes JAX keep its compiled programs in a folder.

    Args:
        folder: where; by default `cpmm_jax` in the user's cache folder.
    """
    if folder is None:
        from platformdirs import user_cache_path

        folder = user_cache_path("cpmm_jax", appauthor=False)
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),  # bytes; what was used least goes first
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = build_parser().parse_args(argv)
    for name, value in compilation_cache().items():  # JAX reads them when it is first imported
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        for kind in (DataWarning, FlowWarning):
            warnings.simplefilter("always", kind)
        warnings.showwarning = _show_warning
        try:
            arguments.run(arguments)
        except KeyboardInterrupt:
            print("cpmm: interrupted; nothing was left behind", file=sys.stderr)
            return 1
        except BrokenPipeError:  # `cpmm evaluate ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (CpmmError, MemoryError) as error:
            if arguments.debug:
                raise
            reason = str(error) or "out of memory; use fewer components or a smaller batch"
            print(f"cpmm {arguments.command}: error: {reason}", file=sys.stderr)
            return 1
    return 0


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    print(f"cpmm: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _table(values: dict[str, Any]) -> str:
    """Return one line for each value, names and numbers aligned."""
    width = max(map(len, values))
    lines = []
    for name, value in values.items():
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        lines.append(f"{name.replace('_', ' '):<{width}}  {shown}")
    return "\n".join(lines)


def _fit(arguments: argparse.Namespace) -> None:
    labels = arguments.labels or arguments.label is not None
    metrics = fit_run(
        Source(arguments.data, labels, arguments.label, arguments.seed),
        arguments.out,
        overwrite=arguments.overwrite,
        progress=False if arguments.quiet else None,
        components=arguments.components,
        trajectories=arguments.trajectories,
        clusters=arguments.clusters,
        rank=arguments.rank,
        discriminative=arguments.discriminative,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        curriculum=arguments.curriculum if arguments.flow is None else "flow",
        flow=arguments.flow,
    )
    print(_table(metrics))
    print(f"\nThe run is in {arguments.out}. Next: cpmm plot {arguments.out}")


def _evaluate(arguments: argparse.Namespace) -> None:
    run = open_run(arguments.folder)
    examples = read_examples(run, arguments.data, arguments.label)
    scores = evaluate(run.mixture, examples.x, examples.y, supervised=run.supervised)
    print(_table({"rows": f"{len(examples.x)} ({examples.part})", **scores}))


def _predict(arguments: argparse.Namespace) -> None:
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


def _sample(arguments: argparse.Namespace) -> None:
    mixture = open_run(arguments.folder).mixture
    x = mixture.sample(np.random.default_rng(arguments.seed), arguments.n)
    names = mixture.feature_names or tuple(f"x{j}" for j in range(mixture.dim))
    columns = dict(zip(names, x.T, strict=True)) if is_csv(arguments.out) else {"x": x}
    write_columns(arguments.out, columns, overwrite=arguments.overwrite)
    print(f"{arguments.n} samples are in {arguments.out}.")


def _plot(arguments: argparse.Namespace) -> None:
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


def _export(arguments: argparse.Namespace) -> None:
    run: Run = open_run(arguments.folder)
    if Path(arguments.out).suffix != ".npz":
        raise RunError(f"FILE must end in .npz; got {show_path(arguments.out)}; rename it.")
    source = run.path / "mixture.npz"
    write_file(arguments.out, lambda part: shutil.copyfile(source, part), arguments.overwrite)
    print(f"The mixture is in {arguments.out}. Read it with cpmm_jax.artifact.load: NumPy alone.")


def _bench_solvers(arguments: argparse.Namespace) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
