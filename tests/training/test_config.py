from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmm_jax.errors import ConfigError
from cpmm_jax.training.config import TrainConfig, default_optimizer, learning_rate_schedule


def test_defaults_are_good_and_hashable() -> None:
    TrainConfig().check()
    assert hash(TrainConfig()) == hash(TrainConfig())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("steps", True),
        ("batch_size", 0),
        ("num_times", 0),
        ("report_every", 0),
        ("warmup_steps", -1),
        ("patience", 0),
        ("max_refused", -1),
        ("seed", -1),
        ("seed", 2**32),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", "fast"),
        ("final_learning_rate", 1.1),
        ("discriminative", 1.1),
        ("discriminative", "all"),
        ("clip_norm", 0.0),
        ("valid_fraction", 1.0),
        ("valid_fraction", -0.1),
        ("time_sampler", None),
        ("time_sampler", []),
    ],
)
def test_refuses(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^`{name}` must be .*; got ") as caught:
        replace(TrainConfig(), **{name: value}).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("patience", None), ("clip_norm", None)])
def test_none_switches_off(name: str, value: Any) -> None:
    replace(TrainConfig(), **{name: value}).check()


def test_schedule_rises_and_falls() -> None:
    rate = learning_rate_schedule(
        TrainConfig(steps=100, warmup_steps=10, learning_rate=0.1, final_learning_rate=0.2)
    )
    values = np.asarray([rate(i) for i in range(101)])
    assert values[0] > 0
    np.testing.assert_allclose(values[10], 0.1, rtol=1e-6)
    assert values.argmax() == 10
    np.testing.assert_allclose(values[100], 0.02, rtol=1e-5)
    assert (np.diff(values[10:]) <= 0).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_warmup_longer_than_the_training_is_cut(steps: int) -> None:
    rate = learning_rate_schedule(TrainConfig(steps=steps, warmup_steps=100))
    values = np.asarray([rate(i) for i in range(steps)])
    assert np.isfinite(values).all()
    assert values.max() == pytest.approx(3e-3)


def test_equal_settings_share_the_optimiser() -> None:
    """Else a second fit of the same kind would compile everything again."""
    assert default_optimizer(TrainConfig(seed=1)) is default_optimizer(TrainConfig(seed=2))
    unclipped = default_optimizer(TrainConfig(clip_norm=None))
    with jax.numpy_dtype_promotion("standard"):  # as in training
        update, _ = unclipped.update(jnp.ones(2), unclipped.init(jnp.ones(2)))
    assert jnp.isfinite(update).all()
