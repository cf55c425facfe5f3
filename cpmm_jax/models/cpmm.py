"""CPMM: a mixture whose components are read off trajectories of a neural ODE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from cpmm_jax.dynamics.draws import draw_arrays
from cpmm_jax.dynamics.fields import MLPField
from cpmm_jax.dynamics.image_field import ConvField, check_image
from cpmm_jax.dynamics.solve import Solution, SolverConfig, check_result
from cpmm_jax.dynamics.trajectory import (
    DensityIntegral,
    GridTimes,
    TrajectoryState,
    integrate,
    integrate_density,
)
from cpmm_jax.errors import ConfigError
from cpmm_jax.mixture.checks import check_noise, check_noise_floor, check_sizes
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.mixture.mfa import MFA, check_features
from cpmm_jax.models.reading import Reading

MOST_AUGMENTED = 128  # channels, by default
AUGMENTED_CHANNELS = 8  # of a pixel, at most, by default


class CPMM(nnx.Module):
    """A continuously parameterized mixture model.

    Each of C classes has S trajectories; read at T pseudotimes they are K = S T components,

        p(x) = sum_c lambda_c sum_s w_cs 1/T sum_j N(x; mean_cs(t_j), psi_cs(t_j) + L L^T),

    where h_cs(t) = (mean, L, log psi, augmented) solves dh/dt = f(t, h) from a learned h_cs(0), and
    all trajectories share f. C = 1, S = 1 is the plain CPMM of the paper; several trajectories in a
    class, with learned weights w_cs, are a generalisation. The module is a plain pytree for `jax.*`
    transforms.

    Args:
        dim: number of features, D; None for those of `event_shape`.
        rank: number of factors, R, with 0 <= R <= D.
        num_classes: C.
        num_trajectories: trajectories of each class, S.
        event_shape: (H, W, channels) of images, or (H, W): the state then keeps that shape, and a
            convolutional field moves it (see `ConvField`); examples and components are flat, as of
            tables, for which it is None.
        augmented: augmented channels, A, of images of each pixel; by default twice the parameters
            of a component, at most 128, and 8 of an image.
        widths: units of the field's hidden layers; for images channels, by default (32,).
        coarse_widths: of a convolutional field, channels at each halving of the resolution.
        coordinates: whether a convolutional field sees where a pixel lies.
        activation: "sin" or "tanh".
        output_scale: scale of the untrained field; 0 for trajectories that start at rest.
        evolve_weights: whether log-weights are part of the state instead of constant.
        field_per_class: whether each class has a field of its own instead of a shared one.
        initial_means: means at t = 0, shape (C, S, D), for instance class means or cluster
            centres; by default standard normal draws, which suits standardised data.
        initial_noise: noise variance at t = 0.
        noise_floor: added to every noise variance, a scalar or shape (D,), in the squared units
            of the data; it bounds the density where data are constant or recorded in steps.
        solver: how the ODE is solved.
        compute_dtype: of a convolutional field, the dtype of its arithmetic; see `ConvField`.
        param_dtype: dtype of the parameters.
        rngs: a flax `nnx.Rngs`, used here and not kept.

    Raises:
        ConfigError: a size out of range, `initial_means` of another shape, or settings of images
            without an `event_shape`.

    Example:
        >>> import cpmm_jax as cpmm
        >>> from flax import nnx
        >>> model = cpmm.CPMM(2, 1, num_classes=3, rngs=nnx.Rngs(0))
        >>> model.extract(5).components.means.shape
        (3, 5, 2)
        >>> images = cpmm.CPMM(rank=1, event_shape=(4, 4), rngs=nnx.Rngs(0))
        >>> images.extract(5).components.means.shape
        (1, 5, 16)

    Source: CPMM paper, sections 3.1 and 3.2, Eq. 5 to 7.
    """

    def __init__(
        self,
        dim: int | None = None,
        rank: int = 4,
        num_classes: int = 1,
        num_trajectories: int = 1,
        *,
        event_shape: Sequence[int] | None = None,
        augmented: int | None = None,
        widths: Sequence[int] | None = None,
        coarse_widths: Sequence[int] = (),
        coordinates: bool = True,
        activation: str = "sin",
        output_scale: float = 1.0,
        evolve_weights: bool = False,
        field_per_class: bool = False,
        initial_means: Float[ArrayLike, "C S D"] | None = None,
        initial_noise: float = 0.5,
        noise_floor: Float[ArrayLike, " D"] | float = 1e-4,
        solver: SolverConfig | None = None,
        compute_dtype: Any = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        shape = None if event_shape is None else check_image(event_shape)
        dim = _features(dim, shape)
        check_sizes(dim, rank, num_classes=num_classes, num_trajectories=num_trajectories)
        if augmented is None:
            augmented = MOST_AUGMENTED if shape is None else AUGMENTED_CHANNELS
            augmented = min(2 * (rank + 2) * (dim if shape is None else shape[2]), augmented)
        if augmented < 0:
            raise ConfigError(f"`augmented` must be at least 0; got {augmented}.")
        check_noise(initial_noise)
        floor = check_noise_floor(noise_floor, dim)
        self.dim, self.rank = dim, rank
        self.num_classes, self.num_trajectories = num_classes, num_trajectories
        self.field_per_class = field_per_class
        self.solver = SolverConfig() if solver is None else solver

        self.event_shape = shape
        lead = (num_classes, num_trajectories)
        hidden_size = augmented if shape is None else augmented * shape[0] * shape[1]
        shapes = [(*lead, dim), (*lead, dim, rank), (*lead, hidden_size)]
        means, loadings, hidden = draw_arrays(jax.random.normal, rngs.params(), shapes, param_dtype)
        if initial_means is not None:
            means = jnp.asarray(initial_means, param_dtype)
            if means.shape != (*lead, dim):
                raise ConfigError(
                    f"`initial_means` must have shape (C, S, D) = {(*lead, dim)}; "
                    f"got {means.shape}."
                )
        self.means = nnx.Param(means)
        self.loadings = nnx.Param(loadings * math.sqrt(0.5 / max(rank, 1)))
        self.log_noise = nnx.Param(jnp.full((*lead, dim), math.log(initial_noise), param_dtype))
        self.augmented = nnx.Param(hidden)
        self.logits = nnx.Param(jnp.zeros(lead, param_dtype)) if evolve_weights else None
        self.class_logits = nnx.Param(jnp.zeros((num_classes,), param_dtype))
        self.trajectory_logits = nnx.Param(jnp.zeros(lead, param_dtype))
        self.log_floor = nnx.Variable(jnp.log(jnp.asarray(floor, param_dtype)))

        settings: dict[str, Any] = {
            "activation": activation,
            "output_scale": output_scale,
            "param_dtype": param_dtype,
        }
        images: dict[str, Any] = {
            "coarse_widths": tuple(coarse_widths),
            "coordinates": coordinates,
            "compute_dtype": compute_dtype,
        }
        _check_kind(shape, images, evolve_weights=evolve_weights)
        if shape is None:
            size = (rank + 2) * dim + int(evolve_weights) + augmented
            settings["widths"] = (128, 128) if widths is None else tuple(widths)
            make_field: Any = partial(MLPField, size, **settings)
        else:
            settings["widths"] = (32,) if widths is None else tuple(widths)
            make_field = partial(ConvField, shape, rank, augmented, **settings, **images)
        if field_per_class:
            keys = jax.random.split(rngs.params(), num_classes)
            self.field = jax.vmap(lambda key: make_field(rngs=nnx.Rngs(key)))(keys)
        else:
            self.field = make_field(rngs=rngs)

    def initial_state(self) -> TrajectoryState:
        """Return h(0) of every trajectory, with leading axes (C, S)."""
        logits = None if self.logits is None else self.logits[...]
        component = MFA(logits, self.means[...], self.loadings[...], self.log_noise[...])  # type: ignore[arg-type]
        return TrajectoryState(component, self.augmented[...])

    def read(self, times: Float[Array, " T"]) -> Reading:
        """Solve the ODE and read the mixture at `times` (increasing, in [0, 1])."""
        solution: Solution = integrate(
            self.field,
            self.initial_state(),
            times,
            self.solver,
            field_per_class=self.field_per_class,
        )
        return Reading(self._mixture(solution.states), solution.num_steps, solution.result)

    def _mixture(self, components: MFA) -> HierarchicalMFA:
        num_times = components.means.shape[1] // self.num_trajectories
        logits = jnp.repeat(self.trajectory_logits[...], num_times, axis=1)
        if components.logits is not None:
            logits = logits + components.logits
        floor = self.log_floor[...][None, None, :]
        return HierarchicalMFA(
            self.class_logits[...],
            components.replace(  # type: ignore[attr-defined]
                logits=logits, log_noise=jnp.logaddexp(components.log_noise, floor)
            ),
        )

    def mixture(self, times: Float[Array, " T"]) -> HierarchicalMFA:
        """Return the mixture at `times`, differentiable; K = S T components in each class."""
        return self.read(times).mixture

    def extract(self, num_times: int) -> HierarchicalMFA:
        """Return the mixture on the uniform grid of `num_times` pseudotimes.

        `num_times` need not be the number that the model was trained with. After this the network
        can be thrown away.

        Raises:
            ConfigError: `num_times` is less than 1.
            SolverError: the ODE could not be solved.
        """
        if num_times < 1:
            raise ConfigError(f"`num_times` must be at least 1; got {num_times}.")
        # Padded to a power of two, so that many numbers of times are few compiled programs.
        padding = (1 << (num_times - 1).bit_length()) - num_times
        reading = _read(self, jnp.pad(GridTimes()(None, num_times), (0, padding), mode="edge"))
        check_result(reading.result)

        def without_padding(leaf: Array) -> Array:
            padded = (leaf.shape[0], self.num_trajectories, num_times + padding)
            by_time = leaf.reshape(*padded, *leaf.shape[2:])
            return jax.lax.collapse(by_time[:, :, :num_times], 1, 3)

        components = jax.tree.map(without_padding, reading.mixture.components)
        return reading.mixture.replace(components=components)  # type: ignore[attr-defined,no-any-return]

    def continuous_log_prob(
        self, x: Float[ArrayLike, "N D"], *, reference_times: int = 32
    ) -> Float[Array, " N"]:
        """Evaluate log p(x) with the mixture integrated over pseudotime inside the solver (Eq. 6).

        The limit of infinitely many components, for study: it needs the field, solves the ODE for
        every batch of examples, and is as accurate as the solver's steps. The sampled form,
        `extract(num_times).log_prob(x)`, approaches it as `num_times` grows.

        Args:
            x: examples, shape (N, D).
            reference_times: pseudotimes of the sampled mixture that sets the scale of each
                example, so that nothing underflows.

        Returns:
            Log-densities in nats, shape (N,).

        Raises:
            SolverError: the ODE could not be solved (only outside `jit`; inside, NaN).
        """
        coarse = self.read(GridTimes()(None, reference_times)).mixture
        flat = coarse.flatten()
        x = check_features(x, flat).astype(flat.means.dtype)
        lead = (self.num_classes, self.num_trajectories)
        trajectory_logits = self.trajectory_logits[...]
        uniform = flat.replace(logits=jnp.zeros_like(flat.logits))  # type: ignore[attr-defined]
        log_density = uniform.component_log_prob(x) + math.log(flat.num_components)
        log_density = log_density.reshape(-1, *lead, reference_times)
        log_weights = coarse.components.logits.reshape(*lead, -1) - trajectory_logits[..., None]
        solution = integrate_density(
            self.field,
            self.initial_state(),
            x,
            DensityIntegral(
                jnp.max(log_density + log_weights[None], axis=-1), jnp.max(log_weights, axis=-1)
            ),
            self.log_floor[...],
            self.solver,
            field_per_class=self.field_per_class,
        )
        if not isinstance(solution.result, jax.core.Tracer):
            check_result(solution.result)
        class_weights = jax.nn.log_softmax(self.class_logits[...])[None, :, None]
        log_joint, log_mass = solution.states
        total = jax.nn.logsumexp(trajectory_logits + log_mass, axis=-1, keepdims=True)
        weights = (trajectory_logits - total)[None]
        log_prob = jax.nn.logsumexp(class_weights + weights + log_joint, axis=(1, 2))
        return jnp.where(solution.ok, log_prob, jnp.nan)


def _features(dim: int | None, shape: tuple[int, int, int] | None) -> int:
    """Return D, of which an image has H W channels."""
    sizes = {dim, None if shape is None else math.prod(shape)} - {None}
    if len(sizes) != 1:
        raise ConfigError(
            "`dim` must be the number of features, and that of an `event_shape` where there is "
            f"one; got {dim} and {shape}; give one of them."
        )
    return int(sizes.pop() or 0)


def _check_kind(
    shape: tuple[int, int, int] | None, images: dict[str, Any], *, evolve_weights: bool
) -> None:
    """Raise ConfigError where settings of images are given without, or of tables with a shape."""
    plain = {"coarse_widths": (), "coordinates": True, "compute_dtype": None}
    given = [f"`{name}` {value}" for name, value in images.items() if value != plain[name]]
    if shape is None and given:
        raise ConfigError(
            f"`event_shape` must be given with {', '.join(images)}, which are of "
            f"convolutional fields; got {', '.join(given)} without; leave them out."
        )
    if shape is not None and evolve_weights:
        raise ConfigError(
            "`evolve_weights` must be False with an `event_shape`, since a log-weight is no image; "
            "got True; leave it out."
        )


@jax.jit
def _read(model: CPMM, times: Array) -> Reading:
    return model.read(times)
