"""The command `cpmm`: parse, build, call.

Exit codes: 0 all went well; 1 data, settings or files break a rule, said in one line (`--debug`
shows where); 2 the command line itself is wrong; 130, 143 a fit was stopped by SIGINT, SIGTERM, and
can be resumed.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from cpmm_jax import __version__, commands
from cpmm_jax.data.builtin import BUILTIN_NAMES
from cpmm_jax.data.readers import FILE_KINDS
from cpmm_jax.errors import (
    CpmmError,
    DataWarning,
    FlowWarning,
    Interrupted,
    SnapshotWarning,
)
from cpmm_jax.recipe import CURRICULA

_DATA_HELP = f"a built-in name ({', '.join(BUILTIN_NAMES)}) or the path of an {FILE_KINDS}"


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
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> Any:
        sub = subparsers.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(run=run)
        return sub

    fit = command("fit", commands.fit, "Fit a mixture to data and leave a run folder.")
    fit.add_argument("data", metavar="DATA", nargs="?", help=_DATA_HELP)
    fit.add_argument("--out", metavar="RUN", help="the run folder to make")
    fit.add_argument(
        "--resume",
        metavar="RUN",
        help="instead of DATA and --out: go on with a fit that was stopped",
    )
    fit.add_argument(
        "--allow-changes", action="store_true", help="resume with other settings or data"
    )
    fit.add_argument(
        "--save-every",
        type=_rate,
        default=30.0,
        metavar="S",
        help="seconds of training between two snapshots; default: 30",
    )
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
        metavar="SHARE",
        help="with labels, the share of log p(x) taken from the objective; default: 0",
    )
    fit.add_argument(
        "--curriculum", choices=CURRICULA, help="train towards DATA along a map; default: from DATA"
    )
    fit.add_argument(
        "--flow", metavar="PATH", help="an earlier run on DATA, whose flow is the curriculum"
    )
    fit.add_argument("--learning-rate", type=_rate, metavar="RATE", help="highest learning rate")
    fit.add_argument("--seed", type=_at_least(0), metavar="N", help="default: 0")
    fit.add_argument("--overwrite", action="store_true", help="replace a run that exists")
    fit.add_argument("--quiet", action="store_true", help="no progress bar")

    score = command("evaluate", commands.evaluate, "Score a run on the test part, else on all.")
    predict = command("predict", commands.predict, "Write classes, probabilities and log p.")
    sample = command("sample", commands.sample, "Draw examples from the mixture of a run.")
    plot = command("plot", commands.plot, "Draw the figures of a run into RUN/figures.")
    export = command("export", commands.export, "Write the mixture file, which NumPy alone reads.")
    bench = command(
        "bench-solvers",
        commands.bench_solvers,
        "Time solvers on the model of a run; recommend one.",
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
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "fit" and (wrong := _check_fit(arguments)):
        _Parser(prog="cpmm fit").error(wrong)
    for name, value in compilation_cache().items():  # JAX reads them when it is first imported
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        for kind in (DataWarning, FlowWarning, SnapshotWarning):
            warnings.simplefilter("always", kind)
        warnings.showwarning = _show_warning
        try:
            arguments.run(arguments)
        except KeyboardInterrupt:
            print("cpmm: interrupted; nothing was left behind", file=sys.stderr)
            return 1
        except Interrupted as stop:
            print(f"cpmm {arguments.command}: {stop}", file=sys.stderr)
            return 128 + stop.signal
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


def _check_fit(arguments: argparse.Namespace) -> str | None:
    """Return what is wrong with the arguments of `fit` taken together, or None."""
    names = ("data", "out", "labels", "label", "flow", "seed", "overwrite")
    values = {"DATA" if n == "data" else f"--{n}": getattr(arguments, n) for n in names}
    given = {name: v is not None and v is not False for name, v in values.items()}
    if arguments.resume is not None:
        wrong = next((name for name, is_given in given.items() if is_given), None)
        rule = "--resume RUN goes on with the data and places that it has; leave out"
        return wrong and f"{rule} {wrong}"
    missing = [name for name in ("DATA", "--out") if not given[name]]
    if missing:
        return f"the following arguments are required: {', '.join(missing)}"
    return "--allow-changes goes with --resume" if arguments.allow_changes else None


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    print(f"cpmm: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
