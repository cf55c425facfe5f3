"""A continuous normalizing flow: an invertible map from data to a latent standard normal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from cpmm_jax.dynamics.course import FlowReading, carry_points, latent_log_prob
from cpmm_jax.dynamics.fields import MLPField
from cpmm_jax.dynamics.solve import SolverConfig, check_result
from cpmm_jax.dynamics.trace import ExactTrace, Trace
from cpmm_jax.errors import ConfigError, DataError


class CNF(nnx.Module):
    """A continuous normalizing flow between data, v = 0, and a standard normal, v = 1.

    Points move along du/dv = g(v, u), which is invertible by solving it backwards, and

        log p_v(u_v) = log N(u_1; 0, I) + integral from v to 1 of tr(dg/du) ds.

    All rows of a block share the solver's steps. Inference is jitted and, with the default
    `eval_solver`, as accurate as single precision makes sensible; training takes `solver`. The
    module is a plain pytree for `jax.*` transforms. Under them values are not checked, and a failed
    solve gives NaN.

    Args:
        dim: number of features, D.
        widths: units of the field's hidden layers.
        activation: "sin" or "tanh".
        output_scale: scale of the untrained field; 0 for a flow that starts as the identity.
        solver: how the ODE is solved in training; by default 16 equal steps.
        eval_solver: how it is solved for inference and validation; by default adaptive steps of
            Tsit5 at rtol = atol = 1e-5. Several positions are read by the solver's own
            interpolation, which is linear for `ReversibleHeun`.
        param_dtype: dtype of the parameters.
        rngs: a flax `nnx.Rngs`, used here and not kept.

    Raises:
        ConfigError: `dim` below 1, no hidden layer, a width below 1, an unknown activation.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> flow, x = CNF(2, rngs=nnx.Rngs(0)), jnp.array([[0.0, 0.0], [0.3, -1.0]])
        >>> flow.transform(x, jnp.array([0.0, 0.5, 1.0]))[-1].tolist()  # untrained: the identity
        [[0.0, 0.0], [0.3, -1.0]]

    Source: CPMM paper, section 3.3, Eq. 8; Grathwohl et al. (2019), "FFJORD".
    """

    def __init__(
        self,
        dim: int,
        *,
        widths: Sequence[int] = (128, 128),
        activation: str = "sin",
        output_scale: float = 0.0,
        solver: SolverConfig | None = None,
        eval_solver: SolverConfig | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if dim < 1:
            raise ConfigError(f"`dim` must be at least 1; got {dim}.")
        self.dim = dim
        self.solver = SolverConfig() if solver is None else solver
        self.eval_solver = _strict() if eval_solver is None else eval_solver
        self.field = MLPField(
            dim,
            widths=tuple(widths),
            activation=activation,
            output_scale=output_scale,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the parameters, to which points are converted."""
        return self.field.output.kernel[...].dtype

    def velocity(
        self, v: Float[Array, "*N"] | float, u: Float[Array, "N D"]
    ) -> Float[Array, "N D"]:
        """Evaluate g(v, u) at points of shape (N, D), at one position or at one for each (N,)."""
        return jax.vmap(self.field, in_axes=(0 if jnp.ndim(v) else None, 0))(v, u)

    def read(
        self,
        u: Float[Array, "N D"],
        positions: Float[Array, " T"],
        start: Float[Array, ""] | float = 0.0,
        *,
        trace: Trace | None = None,
        key: Array | None = None,
        energies: bool = False,
        solver: SolverConfig | None = None,
        chunk_size: int | None = None,
    ) -> FlowReading:
        """Carry points from one position to others, in one solve; differentiable, not jitted.

        Args:
            u: points at position `start`, shape (N, D), in the dtype of the parameters.
            positions: where to read, going away from `start`, in [0, 1], shape (T,).
            start: where the points are.
            trace: how tr(dg/du) is computed; None to integrate the points alone.
            key: PRNG key for a trace that is estimated.
            energies: whether to integrate |g|^2 and |dg/du|_F^2 along; needs a trace.
            solver: how to solve; None for `eval_solver`.
            chunk_size: rows solved at a time; None for a number that fits the memory.

        Returns:
            A `FlowReading`. A failed solve is told in its `result`.

        Raises:
            ConfigError: energies without a trace, or a random trace without a key.

        Source: Finlay et al. (2020), "How to train your neural ODE" (the energies).
        """
        return carry_points(
            self.field,
            u,
            positions,
            start,
            self.eval_solver if solver is None else solver,
            trace=trace,
            key=key,
            energies=energies,
            chunk_size=chunk_size,
        )

    def transform(
        self,
        x: Float[ArrayLike, "N D"],
        v: Float[ArrayLike, " T"] | float,
        *,
        chunk_size: int | None = None,
    ) -> Float[Array, "*T N D"]:
        """Carry data to position v: u_v(x).

        Args:
            x: examples, shape (N, D).
            v: a position in [0, 1], or several, increasing, shape (T,), read from one solve.
            chunk_size: rows solved at a time; None for a number that fits the memory.

        Returns:
            Points, shape (N, D) for a scalar v, otherwise (T, N, D).

        Raises:
            DataError: `x` of another shape, or not finite.
            ConfigError: positions outside [0, 1], or decreasing.
            SolverError: the ODE could not be solved (only outside `jit`; inside, NaN).
        """
        positions = _check_positions(v)
        states = _read_strictly(self, x, "x", jnp.atleast_1d(positions), 0.0, chunk_size).states
        return states if positions.ndim else states[0]

    def inverse(
        self,
        u: Float[ArrayLike, "N D"],
        v: Float[ArrayLike, ""] | float = 1.0,
        *,
        chunk_size: int | None = None,
    ) -> Float[Array, "N D"]:
        """Carry points at position v back to data, v = 0.

        Args:
            u: points at position v, shape (N, D).
            v: their position in [0, 1], a scalar.
            chunk_size: as for `transform`.

        Returns:
            Examples, shape (N, D).

        Raises:
            DataError, ConfigError, SolverError: as for `transform`.
        """
        start = _check_positions(v, scalar=True)
        return _read_strictly(self, u, "u", jnp.zeros(1), start, chunk_size).states[0]

    def log_prob(
        self,
        x: Float[ArrayLike, "N D"],
        *,
        trace: Trace | None = None,
        key: Array | None = None,
        chunk_size: int | None = None,
    ) -> Float[Array, " N"]:
        """Evaluate the log-density of data, log p_0(x).

        Args:
            x: examples, shape (N, D).
            trace: None for `ExactTrace()`; `HutchinsonTrace()` where D is large.
            key: PRNG key for a trace that is estimated.
            chunk_size: as for `transform`.

        Returns:
            Log-densities in nats, shape (N,).

        Raises:
            DataError, SolverError: as for `transform`.
            ConfigError: an estimated trace without a key.
        """
        return self._log_prob_at(x, "x", jnp.zeros(()), trace, key, chunk_size)

    def log_prob_at(
        self,
        u: Float[ArrayLike, "N D"],
        v: Float[ArrayLike, ""] | float,
        *,
        trace: Trace | None = None,
        key: Array | None = None,
        chunk_size: int | None = None,
    ) -> Float[Array, " N"]:
        """Evaluate log p_v(u), the log-density at position v (in [0, 1]) of points there (N, D).

        The other arguments, result and errors are those of `log_prob`, which is v = 0.
        """
        start = _check_positions(v, scalar=True)
        return self._log_prob_at(u, "u", start, trace, key, chunk_size)

    def _log_prob_at(
        self,
        u: Any,
        name: str,
        v: Any,
        trace: Trace | None,
        key: Array | None,
        chunk_size: int | None,
    ) -> Float[Array, " N"]:
        trace = ExactTrace() if trace is None else trace
        reading = _read_strictly(self, u, name, jnp.ones(1), v, chunk_size, trace, key)
        return latent_log_prob(reading)

    def sample(self, key: Array, n: int, *, chunk_size: int | None = None) -> Float[Array, "n D"]:
        """Draw n examples, shape (n, D): standard normal points carried back to data.

        Raises:
            ConfigError: n below 1.
            SolverError: as for `transform`.
        """
        if n < 1:
            raise ConfigError(f"`n` must be at least 1 (examples to draw); got {n}.")
        return self.inverse(
            jax.random.normal(key, (n, self.dim), self.dtype), chunk_size=chunk_size
        )


@partial(jax.jit, static_argnames=("trace", "chunk_size"))
def _read(
    flow: CNF,
    u: Array,
    positions: Array,
    start: Array,
    key: Array | None,
    *,
    trace: Trace | None,
    chunk_size: int | None,
) -> FlowReading:
    with jax.default_matmul_precision("float32"):
        reading = flow.read(u, positions, start, trace=trace, key=key, chunk_size=chunk_size)
    if reading.log_det is not None:
        reading = reading._replace(log_det=jnp.where(reading.ok, reading.log_det, jnp.nan))
    return reading._replace(states=jnp.where(reading.ok, reading.states, jnp.nan))


def _read_strictly(
    flow: CNF,
    u: Any,
    name: str,
    positions: Array,
    start: Any,
    chunk_size: int | None,
    trace: Trace | None = None,
    key: Array | None = None,
) -> FlowReading:
    """Check the points, solve, and raise where that failed and can be known."""
    points = _check_points(u, flow.dim, flow.dtype, name)
    start = jnp.asarray(start, flow.dtype)
    positions = positions.astype(flow.dtype)
    reading = _read(flow, points, positions, start, key, trace=trace, chunk_size=chunk_size)
    if not isinstance(reading.result, jax.core.Tracer):
        check_result(reading.result)
    return reading


def _strict() -> SolverConfig:
    return SolverConfig(solver=diffrax.Tsit5(), num_steps=None, rtol=1e-5, atol=1e-5)


def _check_points(u: Any, dim: int, dtype: jnp.dtype, name: str) -> Float[Array, "N D"]:
    points = u if isinstance(u, jax.Array) else np.asarray(u)
    if points.ndim != 2 or points.shape[1] != dim or not len(points):
        raise DataError(
            f"`{name}` must have shape (N, D) with N >= 1 and D = {dim}, as the flow; "
            f"got {points.shape}; give one point per row, with the features of training."
        )
    points = jnp.asarray(points, dtype)
    if not isinstance(points, jax.core.Tracer):
        bad = np.argwhere(~np.isfinite(points))
        if len(bad):
            row, column = bad[0]
            raise DataError(
                f"`{name}` must be finite; got {points[row, column]} in row {row}, column "
                f"{column}; leave such rows out, or fill them in."
            )
    return points


def _check_positions(v: Any, *, scalar: bool = False) -> Float[Array, "*T"]:
    positions = jnp.asarray(v, jnp.float32) if not isinstance(v, jax.Array) else v
    if positions.ndim > (0 if scalar else 1) or not positions.size:
        rule = "a number" if scalar else "a number or an increasing vector of them"
        raise ConfigError(
            f"`v` must be {rule}, from 0 (data) to 1 (latent); got shape {positions.shape}; "
            f"{'solve for one position at a time' if scalar else 'list the positions'}."
        )
    if isinstance(positions, jax.core.Tracer):
        return positions
    values = np.asarray(positions)
    if not np.all((values >= 0) & (values <= 1)):
        raise ConfigError(
            f"`v` must lie between 0 (data) and 1 (latent); got {values.tolist()}; "
            "give positions of the flow."
        )
    if values.ndim and np.any(np.diff(values) < 0):
        raise ConfigError(f"`v` must increase; got {values.tolist()}; sort it.")
    return positions
