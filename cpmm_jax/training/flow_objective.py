"""What the training of a flow minimises: the likelihood's negative, or the matching error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Float, Int

from cpmm_jax.dynamics.course import latent_log_prob
from cpmm_jax.dynamics.flow import CNF
from cpmm_jax.dynamics.solve import SUCCESS
from cpmm_jax.dynamics.trace import ExactTrace, Trace
from cpmm_jax.errors import ConfigError
from cpmm_jax.training.objective import Diagnostics

GOLDEN_RATIO = 2654435769  # its fractional part, in units of 2**-32
Batches = tuple[npt.NDArray[Any], npt.NDArray[Any]]  # x and e, each (B, D)


class Coupling(Protocol):
    """Which noise each example of a batch is joined to; hashable."""

    def assign(self, batches: Callable[[], list[Batches]]) -> Int[npt.NDArray[Any], "M B"] | None:
        """Return, for M batches, the row of e for every row of x; None where it stays its own.

        `batches` computes the batches; a coupling that does not look at them does not call it.
        """


@dataclass(frozen=True)
class IndependentCoupling:
    """Every example with a noise vector drawn independently of it.

    Source: Lipman et al. (2023), "Flow matching for generative modeling".
    """

    def assign(self, batches: Callable[[], list[Batches]]) -> None:
        """Return None: the noise stays as it was drawn."""


@dataclass(frozen=True)
class OptimalTransportCoupling:
    """Examples and noise vectors of a batch joined so that the sum of |e - x|^2 is least.

    Paths then cross less, and the flow's own become straighter: fewer solver steps. The
    assignment takes O(B^3) time on the host.

    Example:
        >>> import numpy as np
        >>> x, e = np.array([[0.0], [5.0]]), np.array([[4.0], [1.0]])
        >>> OptimalTransportCoupling().assign(lambda: [(x, e)]).tolist()
        [[1, 0]]

    Source: Tong et al. (2024), "Improving and generalizing flow-based generative models with
    minibatch optimal transport".
    """

    def assign(self, batches: Callable[[], list[Batches]]) -> Int[npt.NDArray[Any], "M B"]:
        """Return the row of e for every row of x, shape (M, B)."""
        from scipy.optimize import linear_sum_assignment  # only where it is asked for

        # |e - x|^2 without the squares, which are the same for every assignment.
        columns = [linear_sum_assignment(-x @ e.T)[1] for x, e in batches()]
        return np.stack(columns).astype(np.int32)


class Objective(Protocol):
    """A loss of flows; frozen and hashable, since the training step is compiled for it.

    The randomness of a step comes from `draw`, so that a validation can keep it fixed.
    """

    @property
    def coupling(self) -> Coupling:
        """How what is drawn is joined to the examples."""

    def draw(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Any:
        """Draw what the loss of examples of a shape (N, D) needs."""

    def loss(
        self, flow: CNF, x: Float[Array, "N D"], drawn: Any
    ) -> tuple[Float[Array, ""], Diagnostics]:
        """Compute what a step minimises, and how the solve went."""

    def validation_loss(self, flow: CNF, x: Float[Array, "N D"], drawn: Any) -> Float[Array, ""]:
        """Compute what the best parameters have least of; NaN if a solve failed."""


@dataclass(frozen=True, kw_only=True)
class MaximumLikelihood:
    """The mean of -log p(x), with penalties on the work done along the way.

        -log p_0(x) + kinetic * integral |g|^2 dv + jacobian * integral |dg/du|_F^2 dv.

    The penalties prefer, among the fields of equal likelihood, those of short and straight ways,
    which take fewer solver steps. Validation is by the likelihood alone, with the flow's
    `eval_solver`.

    Attributes:
        trace: how tr(dg/du) is computed: exact, or `HutchinsonTrace()` where D is large.
        kinetic: weight of the kinetic energy, >= 0.
        jacobian: weight of the Jacobian's squared Frobenius norm, >= 0.

    Raises:
        ConfigError: a weight that is negative or not finite.

    Example:
        >>> MaximumLikelihood(kinetic=0.01).trace
        ExactTrace()

    Source: Grathwohl et al. (2019), "FFJORD"; Finlay et al. (2020), "How to train your neural ODE".
    """

    trace: Trace = ExactTrace()
    kinetic: float = 0.0
    jacobian: float = 0.0

    def __post_init__(self) -> None:
        for name in ("kinetic", "jacobian"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"`{name}` must be a finite weight >= 0; got {value}; use 0.01, say."
                )

    @property
    def coupling(self) -> IndependentCoupling:
        """Nothing is joined."""
        return IndependentCoupling()

    def draw(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return the key itself, which the trace draws from."""
        return key

    def loss(
        self, flow: CNF, x: Float[Array, "N D"], drawn: Array
    ) -> tuple[Float[Array, ""], Diagnostics]:
        """Compute the penalised negative log-likelihood in nats per example, by `flow.solver`."""
        energies = self.kinetic > 0 or self.jacobian > 0
        reading = flow.read(
            x, jnp.ones(1), trace=self.trace, key=drawn, energies=energies, solver=flow.solver
        )
        loss = -jnp.mean(latent_log_prob(reading))
        if reading.kinetic is not None and reading.jacobian is not None:
            loss += self.kinetic * reading.kinetic.mean() + self.jacobian * reading.jacobian.mean()
        return loss, Diagnostics(reading.num_steps, reading.result)

    def validation_loss(self, flow: CNF, x: Float[Array, "N D"], drawn: Array) -> Float[Array, ""]:
        """Compute the negative log-likelihood in nats per example, by `flow.eval_solver`."""
        reading = flow.read(x, jnp.ones(1), trace=self.trace, key=drawn)
        return jnp.where(reading.ok, -jnp.mean(latent_log_prob(reading)), jnp.nan)


class Ends(NamedTuple):
    """What flow matching draws: latent points (N, D), and a position on each path (N,)."""

    noise: Float[Array, "N D"]
    positions: Float[Array, " N"]

    def joined(self, rows: Int[Array, " N"]) -> Ends:
        """Return them with the latent points in another order."""
        return self._replace(noise=self.noise[rows])


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """The mean squared error of g at straight paths from data to noise; nothing is solved.

        |g(v, (1 - v) x + v e) - (e - x)|^2 / D,    e ~ N(0, I),

    with positions v evenly spread over [0, 1]. The flow that minimises it carries data to a
    standard normal, and its law at v is that of (1 - v) x + v e.

    Attributes:
        coupling: which noise an example is joined to; `OptimalTransportCoupling()` for straighter
            flows, whose law at v is that of the joined pairs.

    Example:
        >>> FlowMatching(coupling=OptimalTransportCoupling()).coupling
        OptimalTransportCoupling()

    Source: Lipman et al. (2023), "Flow matching for generative modeling"; Tong et al. (2024).
    """

    coupling: Coupling = IndependentCoupling()

    def draw(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Ends:
        """Draw noise and positions for examples of a shape (N, D)."""
        noise_key, position_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, shape, dtype)
        shift = jax.random.bits(position_key, (1,), jnp.uint32)
        # Multiples of the golden ratio, modulo one: evenly spread whatever part of them one takes,
        # and unrelated to an order that the examples may have.
        bits = shift + jnp.arange(shape[0], dtype=jnp.uint32) * jnp.uint32(GOLDEN_RATIO)
        return Ends(noise, (bits >> 8).astype(dtype) * 2.0**-24)

    def loss(
        self, flow: CNF, x: Float[Array, "N D"], drawn: Ends
    ) -> tuple[Float[Array, ""], Diagnostics]:
        """Compute the mean squared error per feature."""
        v = drawn.positions[:, None]
        velocity = flow.velocity(drawn.positions, (1 - v) * x + v * drawn.noise)
        loss = jnp.mean((velocity - (drawn.noise - x)) ** 2)
        return loss, Diagnostics(jnp.int32(0), jnp.int32(SUCCESS))

    def validation_loss(self, flow: CNF, x: Float[Array, "N D"], drawn: Ends) -> Float[Array, ""]:
        """Compute the mean squared error per feature."""
        return self.loss(flow, x, drawn)[0]
