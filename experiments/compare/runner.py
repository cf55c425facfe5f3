"""Cells run in worker processes; the parent alone writes their files."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmm_jax.cli import compilation_cache
from experiments.compare.cells import Cell, Record, is_done, read, write

if TYPE_CHECKING:
    from experiments.compare.methods import Method
    from experiments.density_sets import DensitySet

MakeMethod = Callable[[Cell], Any]
Load = Callable[[str, int], Any]  # name, seed
Measure = Callable[[Cell, Any, Any], Record]  # cell, method, data

ONE_THREAD = (
    "--xla_cpu_multi_thread_eigen=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    make_method: MakeMethod,
    load: Load,
    *,
    jobs: int = 1,
    measure: Measure | None = None,
) -> None:
    """Run the cells that are not done, several at a time; failed ones are tried again.

    A cell's file appears when the cell has ended. A method that raises, and a worker that dies,
    make a failed cell, and the others go on. Interrupted, this ends the workers and leaves the
    cells that have ended.

    Args:
        cells: in the order to run them.
        folder: where their files are.
        make_method: returns a cell's method; called in a worker, so importable by name.
        load: returns a data set split by a seed; likewise.
        jobs: worker processes.
        measure: fits a cell and returns its record, likewise; None for a density's.
    """
    from tqdm import tqdm

    pending = deque(cell for cell in cells if not is_done(read(folder, cell)))
    bar = tqdm(total=len(cells), initial=len(cells) - len(pending), unit="cell", disable=None)
    around = thread_limits(jobs) | compilation_cache(folder / "compiled")
    work = partial(attempt, make_method=make_method, load=load, measure=measure or measure_density)
    idle = [Worker(work, around) for _ in range(min(jobs, len(pending)))]
    busy: dict[Worker, Cell] = {}
    try:
        while pending or busy:
            while pending and idle:
                worker = idle.pop()
                busy[worker] = pending.popleft()
                worker.begin(busy[worker])
            ready = wait([worker.connection for worker in busy])
            for worker in [worker for worker in busy if worker.connection in ready]:
                cell = busy.pop(worker)
                record = worker.finish(cell)
                idle.append(worker)
                write(folder, cell, record)
                bar.write(f"{cell}: {_outcome(record)}")
                bar.update()
    finally:
        bar.close()
        for worker in [*idle, *busy]:
            worker.stop()


class Worker:
    """A process that runs one cell after another, and is replaced when it has died."""

    def __init__(self, work: Callable[[Cell], Record], around: dict[str, str]) -> None:
        self._work = work
        self._environment = around
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")
        # Readable when a cell has ended.
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._work), daemon=True)
        with environment(self._environment):
            self._process.start()
        theirs.close()  # held by the worker alone, so that its death is seen as an end of file

    def begin(self, cell: Cell) -> None:
        """Hand over a cell."""
        if not self._process.is_alive():
            self.connection.close()
            self._start()
        with suppress(BrokenPipeError):  # died meanwhile: `finish` will see it
            self.connection.send(cell)

    def finish(self, cell: Cell) -> Record:
        """Return the record of the cell that has ended."""
        try:
            record: Record = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            return cell.failed(f"the worker died (exit code {self._process.exitcode})")
        return record

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._process.terminate()
        self._process.join()
        self.connection.close()


def thread_limits(jobs: int) -> dict[str, str]:
    """Return the environment under which one of `jobs` workers keeps to its share of the cores."""
    share = max(1, (os.cpu_count() or 1) // jobs)
    limits = dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(share)
    )
    # XLA's pool keeps two threads, because on a single one a callback from compiled code to Python
    # can wait for itself; but an operation then runs on one, and compiling is not cut up for many.
    limits["PJRT_NPROC"] = str(max(2, share))
    if share == 1:
        limits["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *ONE_THREAD])
    return limits


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables of the environment for a while: for the processes started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Connection, work: Callable[[Cell], Record]) -> None:
    """Run the cells that come in, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            cell: Cell = connection.recv()
        except EOFError:
            return
        connection.send(work(cell))


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def attempt(cell: Cell, make_method: MakeMethod, load: Load, measure: Measure) -> Record:
    """Return the record of a cell; whatever is raised becomes a failure with its reason."""
    from experiments.compare.search import one_line

    try:
        record = measure(cell, make_method(cell), load(cell.dataset, cell.seed))
        json.dumps(record, allow_nan=False)  # what a file cannot hold is this cell's failure
        return record
    except Exception as error:
        return cell.failed(one_line(error))


def measure_density(cell: Cell, method: Method, data: DensitySet) -> Record:
    """Fit one cell and return its record.

    Compiled programs are kept in the folder, so that the budget goes to fitting: a method pays once
    for each of its sizes. It is given the training and validation rows; the test rows are looked at
    here, once, after it.
    """
    import jax

    from benchmarks.provenance import provenance
    from cpmm_jax.errors import DataWarning
    from experiments.compare.methods import Rows
    from experiments.compare.search import Budget, mean_log_likelihood

    made = provenance()
    if find_spec("flowjax") is not None:
        made["versions"]["flowjax"] = version("flowjax")
    jax.clear_caches()  # those of other sizes would pile up in the memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        start = time.perf_counter()
        fitted = method.fit(
            Rows(data.x_train, data.x_valid), cell.seed, Budget(cell.settings.budget)
        )
        seconds = time.perf_counter() - start
    return {
        "config": cell.config,
        "status": "done",
        "metrics": {
            "test_log_likelihood": mean_log_likelihood(fitted.log_prob, data.x_test),
            "valid_log_likelihood": mean_log_likelihood(fitted.log_prob, data.x_valid),
            "num_parameters": fitted.num_parameters,
            "seconds": seconds,
        },
        "chosen": fitted.settings,
        "tried": fitted.tried,
        "trials": [trial._asdict() for trial in fitted.trials],
        "rows": {part: len(getattr(data, f"x_{part}")) for part in ("train", "valid", "test")},
        "dim": data.x_train.shape[1],
        "notes": data.notes,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "provenance": made,
    }


def _outcome(record: Record) -> str:
    if not is_done(record):
        return f"failed, {record['error']}"
    metrics: dict[str, Any] = record["metrics"]
    first = next(iter(metrics))
    return f"{first} {metrics[first]:.3f} in {metrics['seconds']:.1f} s"
