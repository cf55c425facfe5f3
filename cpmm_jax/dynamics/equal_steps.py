"""Equal steps of an explicit solver: a `lax.scan` whose stages are written out.

Tableaus and interpolations are diffrax's, and so are the numbers. Diffrax loops over the stages,
in steps whose number is not known beforehand; here nothing is left of that to run or to compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

Evaluate = Callable[[Any, Array, Any], Array]


def are_written_out(solver: diffrax.AbstractSolver) -> bool:
    """Tell whether `solve_equal_steps` knows the solver."""
    return isinstance(solver, (diffrax.ReversibleHeun, diffrax.AbstractERK))


def solve_equal_steps(
    vector_field: Callable[[Any, PyTree, Any], PyTree],
    initial_state: PyTree,
    times: Float[Array, " T"],
    solver: diffrax.AbstractSolver,
    num_steps: int,
    taps: Callable[[tuple[int, ...]], Any],
) -> PyTree:
    """Solve dh/dt = vector_field(t, h, tap) over [0, 1] and read h at `times`.

    Args:
        vector_field: the right-hand side; the third argument are the taps of this one call.
        initial_state: h(0), a pytree of arrays.
        times: in [0, 1], shape (T,).
        solver: one that `are_written_out` knows.
        num_steps: number of steps.
        taps: makes taps with given leading axes; see `dynamics.deferred`.

    Returns:
        The states, each leaf with a leading axis of length T.
    """
    start, unravel = ravel_pytree(initial_state)
    grid = jnp.arange(num_steps + 1, dtype=times.dtype) / num_steps

    def evaluate(t: Any, vector: Array, tap: Any) -> Array:
        return ravel_pytree(vector_field(t, unravel(vector), tap))[0]

    if isinstance(solver, diffrax.ReversibleHeun):
        first, calls, step = True, 1, _reversible_heun
    else:
        tableau: diffrax.ButcherTableau = solver.tableau  # type: ignore[attr-defined]
        first = tableau.fsal  # the last slope of a step is the first of the next
        calls, step = tableau.num_stages - int(first), _runge_kutta(tableau)
    slope = evaluate(grid[0], start, taps(())) if first else None

    def body(carry: Any, between: Any) -> Any:
        t0, t1, tap = between
        own = [jax.tree.map(lambda leaf, i=i: leaf[i], tap) for i in range(calls)]
        return step(evaluate, t0, t1, carry, own)

    carry = (start, start, slope)
    _, dense = jax.lax.scan(body, carry, (grid[:-1], grid[1:], taps((num_steps, calls))))

    def read(time: Array) -> PyTree:
        index = jnp.clip((time * num_steps).astype(jnp.int32), 0, num_steps - 1)
        # Rounding may put a time one step too far; the interpolation is continuous there.
        own = jax.tree.map(lambda leaf: leaf[index], dense)
        between = {"t0": grid[index], "t1": grid[index + 1]}
        return unravel(solver.interpolation_cls(**between, **own).evaluate(time))

    return jax.vmap(read)(times)


def _reversible_heun(evaluate: Evaluate, t0: Array, t1: Array, carry: Any, taps: Any) -> Any:
    """Kidger et al. (2021), "Efficient and accurate gradients for neural SDEs"."""
    y0, shadow, slope = carry
    shadow = 2.0 * y0 - shadow + (t1 - t0) * slope
    new_slope = evaluate(t1, shadow, taps[0])
    y1 = y0 + 0.5 * (t1 - t0) * (slope + new_slope)
    return (y1, shadow, new_slope), {"y0": y0, "y1": y1}


def _runge_kutta(tableau: diffrax.ButcherTableau) -> Callable[..., Any]:
    def combine(y0: Array, weights: Any, increments: list[Array]) -> Array:
        pairs = zip(weights.tolist(), increments, strict=True)
        return sum((weight * k for weight, k in pairs if weight), start=y0)

    def step(evaluate: Evaluate, t0: Array, t1: Array, carry: Any, taps: Any) -> Any:
        y0, _, slope = carry
        span, taps = t1 - t0, iter(taps)
        slope = evaluate(t0, y0, next(taps)) if slope is None else slope
        increments, state = [span * slope], y0
        for weights, node in zip(tableau.a_lower, tableau.c.tolist(), strict=True):
            state = combine(y0, weights, increments)
            slope = evaluate(t1 if node == 1 else t0 + node * span, state, next(taps))
            increments.append(span * slope)
        y1 = state if tableau.ssal else combine(y0, tableau.b_sol, increments)
        memory = slope if tableau.fsal else None
        return (y1, y1, memory), {"y0": y0, "y1": y1, "k": jnp.stack(increments)}

    return step
