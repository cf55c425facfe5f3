"""How long until the first step: imports, and compiling with and without JAX's cache.

    .venv/bin/python -m benchmarks.startup [--full]

Every number comes from fresh processes. The first step is that of the demo's model (D = 64, 10
classes, rank 12, two layers of 256 units), compiled by `fit`; validation compiles with it. The
command line keeps JAX's persistent compilation cache in the user's cache folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping

import numpy as np

from benchmarks.report import Report, Table, main

IMPORT = """
import time
start = time.perf_counter()
import jax, diffrax, flax.nnx
others = time.perf_counter()
import cpmm_jax
print(others - start, time.perf_counter() - others)
"""

COMPILE = """
import numpy as np
import cpmm_jax as cpmm
from flax import nnx
rng = np.random.default_rng(0)
x, y = rng.standard_normal((1144, 64)).astype("float32"), np.arange(1144) % 10
model = cpmm.CPMM(64, 12, 10, widths=(256, 256), rngs=nnx.Rngs(0))
config = cpmm.TrainConfig(steps=1, num_times=3, valid_times=16)
print(cpmm.fit(model, x, y, config=config, progress=False).compile_seconds)
"""


def _run(code: str, environment: Mapping[str, str] | None = None) -> list[float]:
    """Run code in a fresh process and return the numbers that it prints."""
    cacheless = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**cacheless, **(environment or {})},
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(number) for number in done.stdout.split()]


def measure(full: bool) -> Report:
    """Measure imports and compilation."""
    repeats = 7 if full else 3
    imports = np.array([_run(IMPORT) for _ in range(repeats + 1)][1:])  # the first reads the disk
    cold, warm = [], []
    for _ in range(repeats if full else 1):
        with tempfile.TemporaryDirectory() as folder:
            from cpmm_jax.cli import compilation_cache

            environment = compilation_cache(folder)
            cold += _run(COMPILE, environment)
            warm += _run(COMPILE, environment)
    numbers = {
        "import jax, diffrax, flax.nnx": imports[:, 0],
        "import cpmm_jax, beyond these": imports[:, 1],
        "first step and validation compiled, cold": np.array(cold),
        "first step and validation compiled, warm cache": np.array(warm),
    }
    rows = [
        (name, f"{np.median(v):.2f} s", f"{v.min():.2f}..{v.max():.2f} s", str(len(v)))
        for name, v in numbers.items()
    ]
    table = Table("Start-up", ("what", "median", "range", "processes"), rows)
    return Report("startup", [table], {name: v.tolist() for name, v in numbers.items()})


if __name__ == "__main__":
    main("startup", measure)
