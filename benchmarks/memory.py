"""Peak memory of one call, taken in a process of its own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(module: str, *arguments: str) -> int | None:
    """Return by how many bytes the first call of a function raises the peak of a fresh process.

    Args:
        module: under `benchmarks/`; its `prepare_case(*arguments)` returns a function of no
            arguments, compiled but not called yet (allocators keep what an earlier call used).
        *arguments: text, since they pass through a command line.

    Returns:
        Bytes; None where the system does not tell, or the process died (out of memory).
    """
    command = [sys.executable, "-m", "benchmarks.memory", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    answer = done.stdout.strip().rpartition("\n")[2]
    return int(answer) if done.returncode == 0 and answer.isdigit() else None


def show(size: int | None) -> str:
    """Write a number of bytes for a table."""
    return "not known" if size is None else f"{size / 2**20:,.0f} MiB"


def _peak_of(call: Callable[[], Any]) -> int | None:
    # Linux counts for the whole process; an accelerator since the process began.
    device = _device_stats()
    if device is not None:
        jax.block_until_ready(call())
        after = _device_stats()
        return None if after is None else after["peak_bytes_in_use"] - device["bytes_in_use"]
    if not _CLEAR.exists():
        return None
    _CLEAR.write_text("5")  # resets the peak to what is resident now
    before = _resident("VmRSS")
    jax.block_until_ready(call())
    return _resident("VmHWM") - before


def _limit() -> None:
    """Let this process fail for want of memory rather than the machine."""
    import resource

    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _resident(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return 1024 * int(line.split()[1])


def _device_stats() -> dict[str, int] | None:
    device = jax.devices()[0]
    return None if device.platform == "cpu" else device.memory_stats()


if __name__ == "__main__":
    if _STATUS.exists():
        _limit()
    name, *rest = sys.argv[1:]
    print(_peak_of(importlib.import_module(f"benchmarks.{name}").prepare_case(*rest)))
