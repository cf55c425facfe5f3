"""How training tells of itself: a bar on the terminal and a file of reports."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from cpmm_jax.errors import RunError, SnapshotWarning
from cpmm_jax.training.config import Schedule, TrainConfig
from cpmm_jax.training.state import CAUSES, BlockTotals, TrainState

Ending = Literal["finished", "early stopping", "refused"]


class ProgressBar:
    """A bar on stderr: loss, validation log-likelihood, ODE steps, examples/s, time left.

    Args:
        total: training steps.
        shown: True or False to show it or not; None to show it where stderr is a terminal.
    """

    def __init__(self, total: int, *, shown: bool | None = None) -> None:
        self._bar: Any = None
        if shown or (shown is None and sys.stderr.isatty()):
            from tqdm import tqdm  # only where it is seen

            self._bar = tqdm(total=total, unit="step", file=sys.stderr, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def restart(self) -> None:
        """Start the clock anew, so that compiling does not count in the time left."""
        if self._bar is not None:
            self._bar.reset()

    def update(self, report: Mapping[str, Any]) -> None:
        """Move the bar to `report["step"]` and show the figures of the report."""
        if self._bar is None:
            return
        figures = {
            "loss": _short(report["loss"], ".3f"),
            "valid": _short(report["valid_log_likelihood"], ".3f"),
            "ode": _short(report["ode_steps"], ".0f"),
            "ex/s": _short(report["examples_per_second"], ".3g"),
        }
        if "v" in report:
            figures = {"v": _short(report["v"], ".3g")} | figures
        if report["refused"]:
            figures["refused"] = str(report["refused"])
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update(report["step"] - self._bar.n)


def _short(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


class MetricsFile:
    """A JSON-lines file of reports, written line by line so that a killed run leaves its curve.

    Where a line cannot be written (a full disk, say), training goes on, and the line is written
    with the next one.

    Args:
        path: a file that does not exist yet, or None for no file.
        earlier: reports of a run that goes on, with which the file begins, where it may exist.

    Raises:
        RunError: the file exists or cannot be made.

    Warns:
        SnapshotWarning: a line could not be written.
    """

    def __init__(
        self, path: str | Path | None, earlier: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        self._file: Any = None
        self._waiting, self._end = b"", 0
        if path is None:
            return
        try:
            self._file = Path(path).open("xb" if earlier is None else "wb", buffering=0)  # noqa: SIM115
        except FileExistsError as error:
            raise RunError(
                f"`metrics_path` must name a new file; {str(path)!r} exists; "
                "remove it or choose another name."
            ) from error
        except OSError as error:
            raise RunError(
                f"`metrics_path` must be writable; got {str(path)!r} ({error.strerror}); "
                "make the folder first or choose another."
            ) from error
        for report in earlier or ():
            self.write(report)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            if self._waiting:
                self._try_again()
            self._file.close()

    def write(self, report: Mapping[str, Any]) -> None:
        """Append one line."""
        if self._file is None:
            return
        told = bool(self._waiting)
        self._waiting += json.dumps(report, allow_nan=False).encode() + b"\n"
        reason = self._try_again()
        if reason and not told:
            message = f"a report could not be written ({reason}); training goes on"
            warnings.warn(message, SnapshotWarning, stacklevel=2)

    def _try_again(self) -> str | None:
        """Write what waits; return why that failed, or None."""
        try:
            self._file.seek(self._end)  # over half a line that was written before
            self._file.truncate()
            if self._file.write(self._waiting) < len(self._waiting):
                return "no space for the whole line"
        except OSError as error:
            return str(error)
        self._end += len(self._waiting)
        self._waiting = b""
        return None


def number(value: Any) -> float | None:
    """Return a float for a report, None where it is not finite (JSON knows no NaN)."""
    value = float(value)
    return value if math.isfinite(value) else None


def ending(state: TrainState, config: TrainConfig, stale: int) -> Ending | None:
    """Return why training ends here, None where it goes on.

    Args:
        state: the state after a report.
        config: number of steps, patience, refused steps that are borne.
        stale: reports since the best one.
    """
    if int(state.refused_in_a_row) > config.max_refused:
        return "refused"
    if int(state.step) >= config.steps:
        return "finished"
    if config.patience is not None and stale >= config.patience:
        return "early stopping"
    return None


def means(totals: BlockTotals) -> dict[str, float | None]:
    """Return the means over the accepted steps of a block, None where there was none."""
    accepted = int(totals.accepted)
    sums = {name: getattr(totals, name) for name in ("loss", "grad_norm", "ode_steps")}
    return {name: number(total / accepted) if accepted else None for name, total in sums.items()}


def scheduled_rate(schedule: Schedule, state: TrainState) -> float:
    """Return the learning rate of the last update."""
    updates = int(state.step) - int(state.refused.sum())
    return float(schedule(max(updates - 1, 0)))


def refusals(state: TrainState) -> str:
    """Say how many steps were refused, by cause."""
    counts = zip(CAUSES, state.refused.tolist(), strict=True)
    return ", ".join(f"{cause} {count}" for cause, count in counts if count)
