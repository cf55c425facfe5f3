"""What every test runs under: the CPU, strict broadcasting, a fixed share of the machine."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path

# Before NumPy or JAX starts its threads: each test process keeps to its share of the cores. JAX's
# pool stays at two threads or more, because on a single one a callback from compiled code to
# Python can wait for itself.
_WORKERS = max(1, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
_SHARE = max(1, (os.cpu_count() or 1) // _WORKERS)
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, str(_SHARE))
os.environ.setdefault("PJRT_NPROC", str(max(2, _SHARE)))
# Cutting every program up for many compiling threads costs a tenth more work than it saves here.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_parallel_codegen_split_count=1")
# The accelerator is used when asked for: JAX_PLATFORMS=cuda make test.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import jax
import numpy as np
import pytest

# A plugin may have imported JAX before the variable was set.
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_numpy_rank_promotion", "raise")

# Generated examples are the same in every run, and compiling is no reason to call one too slow.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    # Most of a cold run is compiling: outside tests/mixture, which is about precision, programs are
    # optimised little. `make torture` optimises all of them.
    optimised = os.environ.get("CPMM_OPTIMISED_TESTS") == "1"
    jax.config.update("jax_disable_most_optimizations", not optimised)
    # Programs compiled by an earlier run (or the other worker) are read back: the same machine
    # code, sooner. The bound on the size also switches on the lock that keeps the workers from
    # reading a half-written entry; it needs `filelock`, without which there is no cache. (Programs
    # that call back into Python, such as a solve that raises, are compiled anew by jax 0.10.)
    if find_spec("filelock") is None or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = Path(config.rootpath) / ".pytest_cache" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", 512 * 2**20)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


# All tests hold in other settings of JAX too, as `make torture` has it: JAX_ENABLE_X64=1, where
# what is not told its dtype is in 64 bits; JAX_NUMPY_DTYPE_PROMOTION=strict, where no dtype is
# promoted in silence; JAX_DEBUG_NANS=1, where a NaN that leaves a program is an error. The last
# does not apply to tests marked `nan`, of which a NaN is a part, nor to what they are built from.
@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    with jax.debug_nans(False):
        return (yield)


# Linux allows a process 65,530 maps of memory, and compiled programs take some each: without a
# limit the long tests of `make torture` run into it, and XLA aborts.
MOST_MAPS = 40_000
_DONE = count()


def _memory_maps() -> int:
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    errors = jax.config.values["jax_debug_nans"] and item.get_closest_marker("nan") is None
    with jax.debug_nans(errors):
        result = yield
    if next(_DONE) % 10 == 0 and _memory_maps() > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
    return result


@pytest.fixture
def rng() -> np.random.Generator:
    """Return NumPy's generator at seed 0."""
    return np.random.default_rng(0)


@pytest.fixture
def x64() -> Iterator[None]:
    """Compute in float64 within the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def data_dir() -> Path:
    """Return the folder of real data sets, or skip."""
    folder = os.environ.get("CPMM_DATA_DIR")
    if not folder:
        pytest.skip("CPMM_DATA_DIR is not set: real data sets are not here")
    return Path(folder)
