"""What it costs to save a training while it runs.

    .venv/bin/python -m benchmarks.snapshots [--full]

The labelled model of the demo's size trains on the digits, with a snapshot every two seconds and
with none. What a snapshot adds to the time, divided by thirty seconds, is the part of a training
that is lost where it is saved as often as `cpmm fit` does.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from flax import nnx

import cpmm_jax as cpmm
from benchmarks.report import Report, Table, main
from benchmarks.training_step import Digits
from cpmm_jax.training import snapshots
from cpmm_jax.training.snapshot_file import Snapshot

EVERY, USUAL = 2.0, 30.0  # seconds


def train(digits: Digits, steps: int, folder: str | None) -> tuple[float, list[float]]:
    """Return the seconds of a training without compiling, and those of its writes."""
    written: list[float] = []
    write = snapshots.write_snapshot

    def timed(path: Path, snapshot: Snapshot) -> None:
        start = time.perf_counter()
        write(path, snapshot)
        written.append(time.perf_counter() - start)

    sizes: Any = {"widths": (256, 256), "noise_floor": digits.noise_floor}
    model = cpmm.CPMM(64, 12, 10, **sizes, rngs=nnx.Rngs(0))
    saved = None if folder is None else cpmm.Checkpoints(folder=folder, every_seconds=EVERY)
    snapshots.write_snapshot = timed  # type: ignore[assignment]
    try:
        result = cpmm.fit(
            model,
            digits.x,
            digits.y,
            config=cpmm.TrainConfig(steps=steps, num_times=3, report_every=50),
            checkpoints=saved,
            progress=False,
        )
    finally:
        snapshots.write_snapshot = write  # type: ignore[assignment]
    seconds = [report["seconds"] for report in result.history]
    return seconds[-1] - seconds[0], written


def measure(full: bool) -> Report:
    """Train with and without snapshots by turns."""
    digits, steps, turns = Digits.read(), 1500 if full else 400, 5 if full else 2
    train(digits, 51, None)  # compiles
    extra, writes, sizes = [], [], []
    for _ in range(turns):
        bare, _ = train(digits, steps, None)
        with tempfile.TemporaryDirectory() as folder:
            kept, written = train(digits, steps, folder)
            newest = max(Path(folder).glob("0*"))
            sizes.append(sum(p.stat().st_size for p in newest.rglob("*") if p.is_file()) / 1e6)
        extra.append((kept - bare) / max(1, len(written) - 1))  # the last comes after the end
        writes += written
    stall = statistics.median(extra)
    numbers = {"extra_seconds": extra, "write_seconds": writes, "megabytes": sizes}
    row = [
        f"{stall:.3f} ({min(extra):.3f}..{max(extra):.3f})",
        f"{statistics.median(writes):.3f}",
        f"{statistics.median(sizes):.1f}",
        f"{100 * stall / USUAL:.2f} %",
    ]
    columns = ["s a snapshot adds (range)", "s to write it", "MB", "of a training, every 30 s"]
    title = f"Snapshots of a training of the demo's size, {turns} turns of {steps} steps"
    return Report("snapshots", [Table(title, columns, [row])], numbers)


if __name__ == "__main__":
    main("snapshots", measure)
