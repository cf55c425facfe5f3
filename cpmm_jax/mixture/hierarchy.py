"""Classes over components: a mixture of mixtures, and Bayes' rule."""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from cpmm_jax.errors import ConfigError
from cpmm_jax.mixture.density import reduce_log_prob
from cpmm_jax.mixture.mfa import MFA, check_features, log_softmax, weighted_components


@flax.struct.dataclass
class HierarchicalMFA:
    """p(x) = sum_c lambda_c sum_k w_ck N(x; component (c, k)).

    Attributes:
        class_logits: unnormalised log class weights, shape (C,); lambda = softmax(class_logits).
        components: an `MFA` whose arrays have leading axes (C, K); its `logits` are normalised
            within each class.

    Example:
        >>> import jax.numpy as jnp
        >>> parts = MFA(jnp.zeros((2, 1)), jnp.array([[[-1.0]], [[1.0]]]), jnp.zeros((2, 1, 1, 0)),
        ...             jnp.zeros((2, 1, 1)))
        >>> HierarchicalMFA(jnp.zeros(2), parts).predict_proba(jnp.array([[0.0]])).tolist()
        [[0.5, 0.5]]

    Source: CPMM paper, section 3.2, Eq. 7.
    """

    class_logits: Float[Array, " C"]
    components: MFA

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return self.components.means.shape[0]

    @property
    def num_components(self) -> int:
        """Number of components of each class, K."""
        return self.components.means.shape[1]

    @property
    def dim(self) -> int:
        """Number of features, D."""
        return self.components.dim

    @property
    def rank(self) -> int:
        """Number of factors, R."""
        return self.components.rank

    def flatten(self) -> MFA:
        """Return the same density as one `MFA` of C * K components, class by class."""
        _check_hierarchy(self)
        flat: MFA = jax.tree.map(lambda leaf: jax.lax.collapse(leaf, 0, 2), self.components)
        log_weights = log_softmax(self.class_logits)[:, None] + log_softmax(self.components.logits)
        return flat.replace(logits=log_weights.reshape(-1))  # type: ignore[attr-defined, no-any-return]

    def class_mixture(self, index: int) -> MFA:
        """Return p(x | class `index`) as an `MFA` of K components."""
        _check_hierarchy(self)
        if not -self.num_classes <= index < self.num_classes:
            raise ConfigError(
                f"`index` must name one of the {self.num_classes} classes; got {index}."
            )
        return jax.tree.map(lambda leaf: leaf[index], self.components)  # type: ignore[no-any-return]

    def log_prob(
        self, x: Float[ArrayLike, "... D"], *, chunk_size: int | None = None
    ) -> Float[Array, "..."]:
        """Evaluate log p(x) in nats; (N, D) -> (N,)."""
        return self.flatten().log_prob(x, chunk_size=chunk_size)

    def class_log_prob(
        self, x: Float[ArrayLike, "... D"], *, chunk_size: int | None = None
    ) -> Float[Array, "... C"]:
        """Evaluate log p(x, c) = log lambda_c + log p(x | c) in nats; (N, D) -> (N, C)."""
        flat = self.flatten()
        return _class_log_prob(flat, check_features(x, flat), self.num_classes, chunk_size)

    def predict_proba(
        self, x: Float[ArrayLike, "... D"], *, chunk_size: int | None = None
    ) -> Float[Array, "... C"]:
        """Compute p(c | x) by Bayes' rule; (N, D) -> (N, C)."""
        return jax.nn.softmax(self.class_log_prob(x, chunk_size=chunk_size), axis=-1)

    def sample(self, key: Array, n: int) -> Float[Array, "n D"]:
        """Draw n examples, shape (n, D); `class_mixture(c).sample` draws from one class."""
        return self.flatten().sample(key, n)

    def affine(
        self, scale: Float[ArrayLike, " D"], shift: Float[ArrayLike, " D"]
    ) -> HierarchicalMFA:
        """Return the mixture of x * scale + shift when x follows this one (see `MFA.affine`)."""
        return HierarchicalMFA(self.class_logits, self.components.affine(scale, shift))

    def with_noise(self, noise: Float[ArrayLike, "*D"]) -> HierarchicalMFA:
        """Return the mixture of x + e, e ~ N(0, diag(noise)) (see `MFA.with_noise`)."""
        return HierarchicalMFA(self.class_logits, self.components.with_noise(noise))

    def with_tails(self, noise: Float[ArrayLike, "*D"], weight: float) -> HierarchicalMFA:
        """Give every component a broad twin within its class (see `MFA.with_tails`)."""
        return HierarchicalMFA(self.class_logits, self.components.with_tails(noise, weight))


@partial(jax.jit, static_argnums=(2, 3))
def _class_log_prob(flat: MFA, x: Array, num_classes: int, chunk_size: int | None) -> Array:
    def by_class(values: Array) -> Array:
        shape = values.shape[0], num_classes, values.shape[1] // num_classes
        return jax.nn.logsumexp(values.reshape(shape), axis=-1)

    rows = x.reshape(-1, x.shape[-1])
    out = reduce_log_prob(by_class, rows, weighted_components(flat), chunk_size, num_classes)
    return out.reshape(*x.shape[:-1], num_classes)


def _check_hierarchy(mixture: HierarchicalMFA) -> None:
    """Raise ConfigError unless the leading axes are (C, K)."""
    shape = mixture.components.means.shape
    if len(shape) != 3:
        raise ConfigError(f"`components.means` must have shape (C, K, D); got {shape}.")
    if mixture.class_logits.shape != shape[:1]:
        raise ConfigError(
            f"`class_logits` must have shape (C,) with C = {shape[0]}, the leading axis of "
            f"`components`; got {mixture.class_logits.shape}."
        )
    if mixture.components.logits.shape != shape[:2]:
        raise ConfigError(
            f"`components.logits` must have shape (C, K) = {shape[:2]}; "
            f"got {mixture.components.logits.shape}."
        )
