"""A normalizing flow from the optional package flowjax: autoregressive rational-quadratic splines.

Trained as the mixtures are: Adam, batches of 256, a look at the validation rows every 100 steps.

Source: Durkan et al., "Neural Spline Flows" (2019); Papamakarios et al., "Masked Autoregressive
Flow for Density Estimation" (2017).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import paramax
from flowjax.bijections import RationalQuadraticSpline
from flowjax.distributions import Normal
from flowjax.flows import masked_autoregressive_flow

from experiments.compare.methods import Rows
from experiments.compare.search import Axes, Budget, Choice, Density, Fitted, search

STEPS = 5000
BATCH_SIZE = 256
REPORT_EVERY = 100
PATIENCE = 10  # reports without improvement
AXES: Axes = {
    "width": (16, 32, 64, 128),
    "layers": (1, 2, 4, 8),
    "learning_rate": (3e-4, 1e-3, 3e-3),
}
START: Choice = {"width": 64, "layers": 4, "learning_rate": 1e-3}


@dataclass(frozen=True)
class SplineFlow:
    """A masked autoregressive flow with splines of eight knots on [-5, 5]."""

    steps: int | None = None

    def fit(self, data: Rows, seed: int, budget: Budget) -> Fitted:
        """Return the best candidate."""
        return search(AXES, START, partial(self._fit, data, seed), data.x_valid, budget)

    def _fit(self, data: Rows, seed: int, choice: Choice) -> Density:
        build_key, train_key = jax.random.split(jax.random.key(seed))
        flow = masked_autoregressive_flow(
            build_key,
            base_dist=Normal(jnp.zeros(data.x_train.shape[1])),
            transformer=RationalQuadraticSpline(knots=8, interval=5),
            flow_layers=choice["layers"],
            nn_width=choice["width"],
        )
        flow = train(train_key, flow, data, self.steps or STEPS, choice["learning_rate"])
        params, _ = _partition(flow)
        num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        return Density(eqx.filter_jit(flow.log_prob), num_parameters, {})


def train(key: jax.Array, flow: Any, data: Rows, steps: int, learning_rate: float) -> Any:
    """Return the flow with the parameters that were best by validation."""
    x, x_valid = jnp.asarray(data.x_train), jnp.asarray(data.x_valid)
    params, static = _partition(flow)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(learning_rate, steps, 0.05)),
    )
    state = optimizer.init(params)
    best, best_loss, stale = params, jnp.inf, 0
    for done in range(0, steps, REPORT_EVERY):
        shape = min(REPORT_EVERY, steps - done), min(BATCH_SIZE, len(x))
        batches = jax.random.randint(jax.random.fold_in(key, done), shape, 0, len(x))
        params, state, loss = _block(params, static, state, optimizer, x, batches, x_valid)
        stale += 1
        if loss < best_loss:
            best, best_loss, stale = params, loss, 0
        if stale >= PATIENCE:
            break
    return eqx.combine(best, static)


@eqx.filter_jit
def _block(
    params: Any, static: Any, state: Any, optimizer: Any, x: Any, batches: Any, x_valid: Any
) -> tuple[Any, Any, Any]:
    """Take one step for each batch of row numbers; return the validation loss too."""

    def step(carry: tuple[Any, Any], rows: Any) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        gradient = jax.grad(_loss)(params, static, x[rows])
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, state), batches)
    return params, state, _loss(params, static, x_valid)


def _loss(params: Any, static: Any, x: Any) -> Any:
    return -paramax.unwrap(eqx.combine(params, static)).log_prob(x).mean()


def _partition(flow: Any) -> Any:
    """Split a flow into what is trained and what is not."""
    return eqx.partition(
        flow,
        eqx.is_inexact_array,
        is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable),
    )
