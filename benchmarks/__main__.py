"""Run all benchmarks, each in a process of its own: `make bench`, or `make bench-full`."""

from __future__ import annotations

import subprocess
import sys
import time

SHORT = (
    "density",
    "training_step",
    "solvers",
    "em",
    "inference",
    "startup",
    "scaling",
    "snapshots",
)
FULL = (*SHORT, "flow", "images")

if __name__ == "__main__":
    began, failed = time.perf_counter(), []
    for name in FULL if "--full" in sys.argv else SHORT:
        print(f"\n# {name}", flush=True)
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]])
        if done.returncode:
            failed.append(name)
    print(f"\n{time.perf_counter() - began:.0f} s in all.")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
