"""A mixture of factor analyzers: K Gaussians with diagonal-plus-low-rank covariances."""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from cpmm_jax.errors import ConfigError, DataError
from cpmm_jax.mixture import linalg
from cpmm_jax.mixture.density import (
    Components,
    block_size,
    map_blocks,
    reduce_log_prob,
    working_dtype,
)


@flax.struct.dataclass
class MFA:
    """A mixture of factor analyzers, p(x) = sum_k w_k N(x; mean_k, psi_k + L_k L_k^T).

    A frozen pytree: methods are pure and may be jitted, vmapped and differentiated. The constructor
    stores its arguments and checks nothing; the methods check shapes.

    Attributes:
        logits: unnormalised log-weights, shape (K,); w = softmax(logits).
        means: shape (K, D).
        loadings: factor loadings L, shape (K, D, R); R = 0 is a diagonal covariance.
        log_noise: log of the diagonal noise variances psi, shape (K, D).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> means = jnp.array([[0.0], [3.0]])
        >>> mix = MFA(jnp.zeros(2), means, jnp.zeros((2, 1, 0)), jnp.zeros((2, 1)))
        >>> mix.log_prob(jnp.array([[0.0], [1.5]])).tolist()
        [-1.601, -2.044]

    Source: Ghahramani and Hinton, "The EM Algorithm for Mixtures of Factor Analyzers" (1996);
    CPMM paper, section 2.1.1.
    """

    logits: Float[Array, " K"]
    means: Float[Array, "K D"]
    loadings: Float[Array, "K D R"]
    log_noise: Float[Array, "K D"]

    @property
    def num_components(self) -> int:
        """Number of components, K."""
        return self.means.shape[-2]

    @property
    def dim(self) -> int:
        """Number of features, D."""
        return self.means.shape[-1]

    @property
    def rank(self) -> int:
        """Number of factors, R."""
        return self.loadings.shape[-1]

    def log_prob(
        self, x: Float[ArrayLike, "... D"], *, chunk_size: int | None = None
    ) -> Float[Array, "..."]:
        """Evaluate log p(x) in nats.

        Args:
            x: examples, shape (N, D), or any leading axes.
            chunk_size: examples evaluated at a time; None for a size that fits the memory.

        Returns:
            Log-densities, shape (N,). In float32 the relative error is about 1e-6, also where
            noise variances span many orders of magnitude or the data lie far from the origin.

        Raises:
            DataError: the last axis of `x` is not D.
            ConfigError: the parameters do not fit each other.
        """
        x = check_features(x, self)
        return _log_prob(self, x, chunk_size)

    def component_log_prob(
        self, x: Float[ArrayLike, "... D"], *, chunk_size: int | None = None
    ) -> Float[Array, "... K"]:
        """Evaluate log w_k + log N(x; component k) in nats, shape (N, K)."""
        x = check_features(x, self)
        return _component_log_prob(self, x, chunk_size)

    def responsibilities(
        self, x: Float[ArrayLike, "... D"], *, chunk_size: int | None = None
    ) -> Float[Array, "... K"]:
        """Compute p(component k | x), shape (N, K); each row sums to one."""
        return jax.nn.softmax(self.component_log_prob(x, chunk_size=chunk_size), axis=-1)

    def sample(self, key: Array, n: int) -> Float[Array, "n D"]:
        """Draw n examples, shape (n, D)."""
        check_parameters(self)
        return _sample(self, key, n)

    def marginal(self, indices: Int[ArrayLike, " M"]) -> MFA:
        """Return the mixture of the features `indices`, in that order."""
        check_parameters(self)
        kept = check_indices(indices, self.dim)
        return self.replace(  # type: ignore[attr-defined, no-any-return]
            means=self.means[:, kept],
            loadings=self.loadings[:, kept],
            log_noise=self.log_noise[:, kept],
        )

    def condition(self, indices: Int[ArrayLike, " M"], values: Float[ArrayLike, " M"]) -> MFA:
        """Return p(the other features | x[indices] = values), again a mixture of factor analyzers.

        Given the values, the factors of a component have the posterior N(m, G^-T G^-1); the other
        features keep their noise, their mean moves by L m, their loadings become L G^-T, and the
        component is weighted by its density at the values.

        Args:
            indices: the observed features, shape (M,), without repeats; not all of them.
            values: what was observed, shape (M,).

        Returns:
            An `MFA` over the D - M other features, in their order.

        Example:
            >>> import jax.numpy as jnp
            >>> mix = MFA(jnp.zeros(1), jnp.zeros((1, 2)), jnp.ones((1, 2, 1)), jnp.zeros((1, 2)))
            >>> mix.condition([0], jnp.array([1.0])).mean().tolist()
            [0.5]
        """
        check_parameters(self)
        seen = check_indices(indices, self.dim)
        rest = np.setdiff1d(np.arange(self.dim), seen)
        if rest.size == 0:
            raise ConfigError(
                f"`indices` must leave at least one feature; got all {self.dim}. "
                "Use `log_prob` for the density of a whole example."
            )
        values = jnp.asarray(values, self.means.dtype)
        if values.shape != seen.shape:
            raise DataError(
                f"`values` must have one entry per index, shape {seen.shape}; got {values.shape}."
            )
        observed = self.marginal(seen)
        loadings = self.loadings[:, rest]
        moved, narrowed = jax.vmap(linalg.condition, (None, 0, 0, 0, 0))(
            values, observed.means, observed.loadings, observed.log_noise, loadings
        )
        return MFA(
            logits=observed.component_log_prob(values),
            means=self.means[:, rest] + moved,
            loadings=narrowed,
            log_noise=self.log_noise[:, rest],
        )

    @jax.default_matmul_precision("float32")
    def mean(self) -> Float[Array, " D"]:
        """Return the mean of the whole mixture, shape (D,)."""
        return jax.nn.softmax(self.logits) @ self.means

    @jax.default_matmul_precision("float32")
    def covariance(self) -> Float[Array, "D D"]:
        """Return the covariance of the whole mixture, shape (D, D) (formed: O(D^2) memory)."""
        weights = jax.nn.softmax(self.logits)
        centred = self.means - self.mean()[None, :]
        scatter = jnp.einsum("k,kd,ke->de", weights, centred, centred)
        factors = jnp.einsum("k,kdr,ker->de", weights, self.loadings, self.loadings)
        return scatter + factors + jnp.diag(weights @ jnp.exp(self.log_noise))

    def affine(self, scale: Float[ArrayLike, " D"], shift: Float[ArrayLike, " D"]) -> MFA:
        """Return the mixture of x * scale + shift when x follows this one.

        Undoes a standardisation exactly: log-densities of the result are in the units of the data
        as given, with the Jacobian included.

        Args:
            scale: non-zero factors, shape (D,).
            shift: shape (D,).

        Raises:
            ConfigError: `scale` or `shift` has another shape.
        """
        dtype = self.means.dtype
        scale, shift = jnp.asarray(scale, dtype), jnp.asarray(shift, dtype)
        for name, value in (("scale", scale), ("shift", shift)):
            if value.shape != (self.dim,):
                raise ConfigError(
                    f"`{name}` must have shape (D,) with D = {self.dim}, as the mixture; "
                    f"got {value.shape}."
                )
        return self.replace(  # type: ignore[attr-defined, no-any-return]
            means=self.means * _align(scale, self.means) + _align(shift, self.means),
            loadings=self.loadings * _align(scale[:, None], self.loadings),
            log_noise=self.log_noise + _align(2.0 * jnp.log(jnp.abs(scale)), self.log_noise),
        )

    def with_noise(self, noise: Float[ArrayLike, "*D"]) -> MFA:
        """Return the mixture of x + e, where x follows this one and e ~ N(0, diag(noise)).

        Args:
            noise: variances added, shape (D,) or one for all.

        Raises:
            ConfigError: `noise` is out of range.

        Example:
            >>> import jax.numpy as jnp
            >>> one = MFA(jnp.zeros(1), jnp.zeros((1, 1)), jnp.zeros((1, 1, 0)), jnp.zeros((1, 1)))
            >>> one.with_noise(2.0).covariance().round(3).tolist()
            [[3.0]]
        """
        added = np.asarray(noise)
        if added.shape not in ((), (self.dim,)) or not np.all(added > 0):
            raise ConfigError(
                f"`noise` must be positive, of shape (D,) with D = {self.dim} or one number; got "
                f"shape {added.shape}, smallest {added.min(initial=np.inf):g}. A tenth of each "
                "feature's variance is a good start."
            )
        log_added = _align(jnp.log(added).astype(self.log_noise.dtype), self.log_noise)
        return self.replace(  # type: ignore[attr-defined, no-any-return]
            log_noise=jnp.logaddexp(self.log_noise, log_added)
        )

    def with_tails(self, noise: Float[ArrayLike, "*D"], weight: float) -> MFA:
        """Give every component a broad twin, which takes `weight` of its probability.

        The twin is the component `with_noise`. It answers for what lies outside all components:
        fitted to few rows, these are narrow where the rows hardly vary, and without tails a single
        such feature would decide.

        Args:
            noise: variances added, shape (D,) or one for all.
            weight: probability of the twin, between 0 and 1 (exclusive).

        Returns:
            A mixture of 2 K components, the K twins last.

        Raises:
            ConfigError: `weight` or `noise` is out of range.

        Source: Tukey, "A Survey of Sampling from Contaminated Distributions" (1960); with factor
        analyzers, Punzo, Blostein and McNicholas, "High-dimensional unsupervised classification
        via parsimonious contaminated mixtures" (2020).
        """
        if not 0.0 < weight < 1.0:
            raise ConfigError(
                f"`weight` must be between 0 and 1, exclusive; got {weight}. 0.1 is a good start."
            )
        broad = self.with_noise(noise)
        logits = log_softmax(self.logits)
        kept, taken = float(np.log1p(-weight)), float(np.log(weight))
        return MFA(
            jnp.concatenate([logits + kept, logits + taken], axis=-1),
            jnp.concatenate([self.means, self.means], axis=-2),
            jnp.concatenate([self.loadings, self.loadings], axis=-3),
            jnp.concatenate([self.log_noise, broad.log_noise], axis=-2),
        )


def _align(value: Array, other: Array) -> Array:
    """Give `value` the rank of `other` by leading axes of length one."""
    return value.reshape((1,) * (other.ndim - value.ndim) + value.shape)


def log_softmax(logits: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """Normalise log-weights, at least in float32."""
    return jax.nn.log_softmax(logits.astype(working_dtype(logits)), axis=-1)


def weighted_components(mixture: MFA) -> Components:
    """Return the components of a mixture with normalised log-weights."""
    return Components(
        log_softmax(mixture.logits), mixture.means, mixture.loadings, mixture.log_noise
    )


@partial(jax.jit, static_argnums=2)
def _log_prob(mixture: MFA, x: Array, chunk_size: int | None) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    reduce = partial(jax.nn.logsumexp, axis=-1)
    out = reduce_log_prob(reduce, rows, weighted_components(mixture), chunk_size)
    return out.reshape(x.shape[:-1])


@partial(jax.jit, static_argnums=2)
def _component_log_prob(mixture: MFA, x: Array, chunk_size: int | None) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    every = mixture.num_components
    components = weighted_components(mixture)
    out = reduce_log_prob(lambda values: values, rows, components, chunk_size, every)
    return out.reshape(*x.shape[:-1], every)


@partial(jax.jit, static_argnums=2)
@jax.default_matmul_precision("float32")
def _sample(mixture: MFA, key: Array, n: int) -> Array:
    which_key, factor_key, noise_key = jax.random.split(key, 3)
    dtype = mixture.means.dtype
    which = jax.random.categorical(which_key, mixture.logits, shape=(n,))
    factors = jax.random.normal(factor_key, (n, mixture.rank), dtype)
    noise = jax.random.normal(noise_key, (n, mixture.dim), dtype)

    def generate(rows: tuple[Array, Array, Array]) -> Array:
        k, z, e = rows
        low_rank = jnp.einsum("ndr,nr->nd", mixture.loadings[k], z)
        return mixture.means[k] + low_rank + e * jnp.exp(0.5 * mixture.log_noise[k])

    size = block_size(n, mixture.rank + 3, mixture.dim, 0, None)
    return map_blocks(generate, (which, factors, noise), size)  # type: ignore[no-any-return]


def check_parameters(mixture: MFA) -> None:
    """Raise ConfigError unless the shapes of the parameters fit each other."""
    if mixture.means.ndim != 2:
        raise ConfigError(
            f"`means` must have shape (K, D); got {mixture.means.shape}. "
            "Use `jax.vmap` for a batch of mixtures."
        )
    num_components, dim = mixture.means.shape
    expected = {
        "logits": (mixture.logits.shape, (num_components,), "(K,)"),
        "loadings": (mixture.loadings.shape[:2], (num_components, dim), "(K, D, R)"),
        "log_noise": (mixture.log_noise.shape, (num_components, dim), "(K, D)"),
    }
    for name, (got, rule, text) in expected.items():
        if got != rule or (name == "loadings" and mixture.loadings.ndim != 3):
            raise ConfigError(
                f"`{name}` must have shape {text} with K = {num_components}, D = {dim} "
                f"as in `means`; got {getattr(mixture, name).shape}."
            )


def check_features(x: ArrayLike, mixture: MFA) -> Array:
    """Return x as a float array after checking its last axis (and the mixture's shapes)."""
    check_parameters(mixture)
    x = jnp.asarray(x)
    if x.ndim == 0 or x.shape[-1] != mixture.dim:
        raise DataError(
            f"`x` must have shape (N, D) with D = {mixture.dim}, as the mixture; got {x.shape}."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(mixture.means.dtype)
    return x


def check_indices(indices: ArrayLike, dim: int) -> np.ndarray:
    """Return feature indices as an integer array after checking range and repeats."""
    array = np.asarray(indices)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(
            "`indices` must be a non-empty 1-D array of integers; "
            f"got shape {array.shape} of {array.dtype}."
        )
    if array.min() < 0 or array.max() >= dim:
        raise ConfigError(
            f"`indices` must lie in 0..{dim - 1}, the mixture's features; "
            f"got {array.min()}..{array.max()}."
        )
    if np.unique(array).size != array.size:
        raise ConfigError(f"`indices` must not repeat a feature; got {array.tolist()}.")
    return array
