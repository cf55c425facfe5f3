"""Recorded pixels: dequantised anew in every step, by its key; scored with one noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import cpmm_jax as cpmm
from cpmm_jax.data import AffinePixels, LogitPixels, dequantise
from cpmm_jax.data.batches import batch_indices
from cpmm_jax.errors import ConfigError, DataError, RunError
from cpmm_jax.mixture.em import fit_em
from cpmm_jax.models.direct import DirectMFA
from cpmm_jax.training.step import make_keys

PIXELS = AffinePixels(4.0, 2.0)
X = np.random.default_rng(0).poisson(4.0, (300, 2)).clip(0, 255)
QUICK = cpmm.TrainConfig(steps=1, batch_size=64, report_every=1, num_times=1, valid_fraction=0.2)


def start() -> DirectMFA:
    return DirectMFA.from_mixture(fit_em(PIXELS.forward(X + 0.5), 1, 1, max_iter=3).mixture)


def train(x: Any = X, **settings: Any) -> Any:
    config = replace(QUICK, **settings)
    return cpmm.fit(start(), x, config=config, pixels=PIXELS, progress=False)


def test_the_noise_of_a_step_is_that_of_its_key() -> None:
    """The first loss is that of the first batch, dequantised by the documented key."""
    parts: dict[str, Any] = {"x_valid": X[200:], "pixels": PIXELS, "progress": False}
    result = cpmm.fit(start(), X[:200], config=QUICK, **parts)
    keys = make_keys(QUICK.seed)
    batch = X[:200][np.asarray(batch_indices(keys[0], 0, 64, 200))].astype(np.float32)
    z = PIXELS.forward(dequantise(jax.random.fold_in(keys[3], 0), batch))
    loss = -np.asarray(start().extract().log_prob(z)).mean()
    assert result.history[0]["loss"] == pytest.approx(loss, rel=1e-4)


def test_training_finds_the_density_of_dequantised_pixels() -> None:
    result = train(steps=200, report_every=100, learning_rate=0.02)
    z = PIXELS.forward(dequantise(np.random.default_rng(1), X))
    by_em = fit_em(z, 1, 1).mixture
    found = np.asarray(result.model.extract().log_prob(z.astype(np.float32))).mean()
    assert found == pytest.approx(np.asarray(by_em.log_prob(z.astype(np.float32))).mean(), abs=0.05)


def test_the_same_bytes_give_the_same_result() -> None:
    one, other = (train(x, steps=4, report_every=4) for x in (X, X.astype(np.uint8)))
    for a, b in zip(*map(jax.tree.leaves, (one.last_model, other.last_model)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["interpolant", "custom"])
def test_a_curriculum_carries_pixels(kind: str) -> None:
    stages = cpmm.Stages.linear(3)
    maps = {
        "interpolant": cpmm.InterpolantCurriculum(stages=stages),
        "custom": cpmm.CustomCurriculum(lambda x, v: x / (1 + v), stages=stages),
    }
    config = replace(QUICK, steps=30, report_every=10)
    parts: dict[str, Any] = {"curriculum": maps[kind], "progress": False}
    result = cpmm.fit(start(), X, config=config, pixels=LogitPixels(), **parts)
    assert result.refused == 0 and [r["v"] for r in result.history][::2] == [1.0, 0.0]


def test_what_is_no_pixel_is_refused() -> None:
    with pytest.raises(DataError, match=r"`x` must hold pixels as they were recorded.*got 6\.5"):
        train(X + 0.5)
    bad = np.where(X.max() == X, 256, X)
    with pytest.raises(DataError, match=r"`x_valid` must hold .* got 256"):
        cpmm.fit(start(), X, x_valid=bad, config=QUICK, pixels=PIXELS, progress=False)


@pytest.mark.parametrize("pixels", ["affine", lambda x: x])
def test_what_is_no_map_is_refused(pixels: Any) -> None:
    with pytest.raises(ConfigError, match=r"`pixels` must be a hashable map .* such as Affine"):
        cpmm.fit(start(), X, config=QUICK, pixels=pixels, progress=False)


def test_another_map_is_told_of_on_resuming(tmp_path: Path) -> None:
    kept: dict[str, Any] = {"config": QUICK, "progress": False, "checkpoints": tmp_path}
    cpmm.fit(start(), X, pixels=PIXELS, **kept)
    with pytest.raises(RunError, match=r"`pixels` was .*4\.0.* and is .*5\.0"):
        cpmm.fit(start(), X, pixels=AffinePixels(5.0, 2.0), resume=True, **kept)
    assert cpmm.fit(start(), X, pixels=PIXELS, resume=True, **kept).steps == 1
