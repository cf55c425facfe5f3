"""What the density costs: the precision of its products, the sizes it forms, its peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest


def test_gradient_runs_at_float32_matmul_precision(rng, make_mixture, walk):
    # Left to themselves GPUs multiply in TF32; an outer `default_matmul_precision` does not reach
    # a derivative rule that is traced later.
    mixture = make_mixture(rng, 3, dim=5, rank=2)
    x = jnp.zeros((4, 5), jnp.float32)

    def everything(mixture, x):
        other = mixture.condition([0, 2], x[0, :2])
        moments = mixture.mean().sum() + mixture.covariance().sum() + other.covariance().sum()
        sampled = mixture.sample(jax.random.key(0), 2).sum()
        return mixture.log_prob(x, chunk_size=2).sum() + moments + sampled

    jaxpr = jax.make_jaxpr(jax.value_and_grad(everything, argnums=(0, 1)))(mixture, x).jaxpr
    products = [
        equation
        for equation in walk(jaxpr)
        if equation.primitive.name == "dot_general"
        and equation.outvars[0].aval.dtype == jnp.float32
    ]
    assert len(products) > 10
    for equation in products:
        assert equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2, equation


@pytest.mark.parametrize("method", ["log_prob", "responsibilities"])
def test_nothing_of_size_n_k_d_is_formed(method, make_mixture, walk, rng):
    num_examples, num_components, dim = 512, 64, 128
    mixture = make_mixture(rng, num_components, dim=dim, rank=4)
    x = jnp.zeros((num_examples, dim), jnp.float32)

    def value(mixture, x):
        return jnp.sum(getattr(mixture, method)(x) ** 2)

    jaxpr = jax.make_jaxpr(jax.value_and_grad(value, argnums=(0, 1)))(mixture, x).jaxpr
    sizes = [
        variable.aval.size
        for equation in walk(jaxpr)
        for variable in equation.outvars
        if hasattr(variable.aval, "size")
    ]
    assert max(sizes) >= num_examples * num_components * 4  # the walk goes inside
    assert max(sizes) < num_examples * num_components * dim / 4


MEMORY = """
import re, pathlib
import jax, jax.numpy as jnp, numpy as np
from cpmm_jax.mixture import MFA
rng = np.random.default_rng(0)
x = rng.standard_normal((1_000_000, 64), np.float32)
shapes = (100,), (100, 64), (100, 64, 4), (100, 64)
mixture = MFA(*(jnp.asarray(0.5 * rng.standard_normal(shape), jnp.float32) for shape in shapes))
total = float(mixture.log_prob(x).sum())
assert np.isfinite(total), total
status = pathlib.Path("/proc/self/status").read_text()
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) / 2**10)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_a_million_examples_stay_under_two_gibibytes():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        # The bound is that of float32 without checks.
        env={**os.environ, "JAX_ENABLE_X64": "0", "JAX_DEBUG_NANS": "0"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2048, f"{done.stdout} MiB"
