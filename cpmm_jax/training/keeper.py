"""A training kept safe: saved now and then, resumed, locked, and ended well by a signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from cpmm_jax.errors import ConfigError, Interrupted
from cpmm_jax.files import locked
from cpmm_jax.training.running import Running
from cpmm_jax.training.snapshots import Checkpoints, Fingerprint, Saver

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Keeper:
    """What a training calls every second or so.

    Attributes:
        between: saves where that is due, and ends the training where a signal has come; None where
            nothing is saved.
    """

    def __init__(self, run: Running, saver: Saver, caught: list[int]) -> None:
        self._run, self._saver, self._caught = run, saver, caught
        self.between = self._between if saver.is_on else None

    def _between(self) -> None:
        run = self._run
        if self._caught:
            saved = self._saver.save(run.step, run.saved(), wait=True)
            self.end("stopped", saved=saved)
        if self._saver.due(run.step):
            self._saver.save(run.step, run.saved())

    def end(self, how: str, *, saved: bool) -> NoReturn:
        """Raise Interrupted: the training has been saved, or could not be."""
        number, run = self._caught[0], self._run
        after = "is saved" if saved else "could not be saved since its last snapshot"
        raise Interrupted(
            f"training was {how} by {signal.Signals(number).name} at step {run.step} of "
            f"{run.config.steps}, and {after}; go on with `resume`.",
            number,
        )


@contextmanager
def kept(
    run: Running,
    checkpoints: Checkpoints | str | Path | None,
    fingerprint: Callable[[], Fingerprint],
    *,
    resume: bool,
) -> Iterator[Keeper]:
    """Keep a training safe while it runs; at the end, whatever it was, the last snapshot is saved.

    Args:
        run: the training.
        checkpoints: where to save it; None for nowhere.
        fingerprint: makes that of settings and data, see `fingerprint_of`.
        resume: whether to go on from the newest snapshot.

    Raises:
        ConfigError: `resume` without `checkpoints`.
        RunError: see `Saver.restore`; or another process trains in the same folder.
    """
    if checkpoints is None:
        if resume:
            raise ConfigError("`checkpoints` must be given to `resume`; got None; name the folder.")
        yield Keeper(run, Saver(None, {}), [])
        return
    if not isinstance(checkpoints, Checkpoints):
        checkpoints = Checkpoints(folder=checkpoints)
    saver = Saver(checkpoints, fingerprint())
    with locked(Path(checkpoints.folder)), closing(saver), signals_caught() as caught:
        saver.tidy()
        if resume:
            found = saver.restore()
            if found is not None:
                run.restore(found)
        else:
            saver.check_empty()
        keeper = Keeper(run, saver, caught)
        yield keeper
        saved = saver.save(run.step, run.saved(), wait=True)
        if caught:
            keeper.end("finished when it was stopped", saved=saved)


@contextmanager
def signals_caught() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of being ended by them; a second one ends as ever."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may handle signals
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        put_back()

    for number in SIGNALS:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        put_back()
