"""The direct mixture: its start, its training by `fit`, and bad arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cpmm_jax.errors import ConfigError
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.mixture.mfa import MFA
from cpmm_jax.models.direct import DirectMFA
from cpmm_jax.training.config import TrainConfig
from cpmm_jax.training.loop import fit


def mixture() -> MFA:
    rng = np.random.default_rng(0)
    return MFA(
        jnp.asarray([0.3, -0.2], jnp.float32),
        jnp.asarray(rng.normal(size=(2, 3)), jnp.float32),
        jnp.asarray(rng.normal(size=(2, 3, 1)), jnp.float32),
        jnp.asarray(rng.normal(size=(2, 3)), jnp.float32),
    )


X = np.random.default_rng(1).normal(size=(300, 3)).astype(np.float32)


def test_starts_at_a_mixture() -> None:
    flat = mixture()
    model = DirectMFA.from_mixture(flat, noise_floor=1e-3)
    np.testing.assert_allclose(model.extract().log_prob(X), flat.log_prob(X), rtol=1e-4)
    classes = HierarchicalMFA(
        jnp.array([0.0, 1.0], jnp.float32), jax.tree.map(lambda v: jnp.stack([v, v]), flat)
    )
    np.testing.assert_allclose(
        DirectMFA.from_mixture(classes, noise_floor=1e-3).extract(9).class_log_prob(X),
        classes.class_log_prob(X),
        rtol=1e-4,
    )


def test_noise_keeps_above_its_floor() -> None:
    model = DirectMFA.from_mixture(mixture(), noise_floor=[10.0, 1.0, 0.1])
    noise = np.exp(np.asarray(model.extract().components.log_noise))
    assert (noise > np.array([10.0, 1.0, 0.1])).all()


def test_fit_trains_it_as_a_cpmm() -> None:
    y = (X[:, 0] > 0).astype(int)
    model = DirectMFA(3, 1, 4, 2, rngs=nnx.Rngs(0))
    before = float(np.mean(model.extract().log_prob(X)))
    config = TrainConfig(steps=120, batch_size=64, num_times=1, learning_rate=1e-2)
    result = fit(model, X, y, config=config, progress=False)
    trained = result.model.extract()
    assert trained.components.means.shape == (2, 4, 3)
    assert float(np.mean(trained.log_prob(X))) > before + 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "`dim` must be at least 1; got 0"),
        ({"num_components": 0}, "`num_components` must be at least 1; got 0"),
        ({"num_classes": 0}, "`num_classes` must be at least 1; got 0"),
        ({"rank": 4}, "`rank` must lie between 0 and D = 3, the features; got 4"),
        ({"initial_noise": 0.0}, "`initial_noise` must be a positive variance; got 0.0"),
        ({"noise_floor": -1.0}, "`noise_floor` must be positive, .* smallest -1.0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    arguments = {"dim": 3, "rank": 1, "num_components": 2, "rngs": nnx.Rngs(0)} | settings
    with pytest.raises(ConfigError, match=message):
        DirectMFA(**arguments)
