"""What changes from step to step."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

# Why a step was refused, in the order in which the causes are looked for.
FAILED_SOLVE = "failed ODE solve"
CAUSES = (FAILED_SOLVE, "non-finite loss", "non-finite gradient", "non-finite update")


@flax.struct.dataclass
class TrainState:
    """Everything that training carries from step to step; the rest is a function of the step.

    Attributes:
        step: steps done, refused ones included.
        params: the `nnx.Param` leaves of the model.
        opt_state: state of the optax transformation.
        refused: steps refused so far, by cause (see `CAUSES`), shape (4,).
        refused_in_a_row: steps refused since the last accepted one.
        last_failure: code of the last failed solve (see `dynamics.solve.check_result`).
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    refused: Int[Array, " 4"]
    refused_in_a_row: Int[Array, ""]
    last_failure: Int[Array, ""]


@flax.struct.dataclass
class BlockTotals:
    """Sums over the accepted steps of one block: loss, gradient norm, ODE steps, and how many."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    ode_steps: Float[Array, ""]
    accepted: Int[Array, ""]


def empty_totals() -> BlockTotals:
    """Return the totals of no step."""
    zero = jnp.zeros((), jnp.float32)
    return BlockTotals(loss=zero, grad_norm=zero, ode_steps=zero, accepted=jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnames="optimizer")
def initial_state(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    """Return the state before the first step, sharing no buffer with `params`."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=_fresh(params),
        opt_state=_fresh(optimizer.init(params)),
        refused=jnp.zeros((len(CAUSES),), jnp.int32),
        refused_in_a_row=zero,
        last_failure=zero,
    )


@jax.jit
def snapshot(tree: Any) -> Any:
    """Copy a pytree of arrays, which then outlives the donation of the original."""
    return _fresh(tree)


def _fresh(tree: Any) -> Any:
    def copy(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        # A weakly typed scalar (a hyperparameter in the optimiser's state, say) would become
        # strongly typed by the first step, and that would be a second trace.
        strong = (
            leaf
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
            else (jax.lax.convert_element_type(leaf, leaf.dtype))
        )
        return jnp.copy(strong)

    return jax.tree.map(copy, tree)
