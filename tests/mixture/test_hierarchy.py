"""Classes over components: Bayes' rule, flattening, one class, samples, affine, wrong shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from cpmm_jax.errors import ConfigError, DataError
from cpmm_jax.mixture import MFA, HierarchicalMFA

C, K, D = 3, 2, 4


@pytest.fixture
def mixture(rng, make_mixture):
    class_logits = jnp.asarray(rng.normal(size=C), jnp.float32)
    return HierarchicalMFA(class_logits, make_mixture(rng, C, K, dim=D, rank=2))


@pytest.fixture
def x(rng):
    return jnp.asarray(2.0 * rng.normal(size=(15, D)), jnp.float32)


@pytest.fixture
def joint(mixture, x, dense):
    """Return log p(x, c), (N, C), class by class from the dense reference."""
    weights = scipy.special.log_softmax(np.asarray(mixture.class_logits, np.float64))
    columns = []
    for c in range(C):
        one = jax.tree.map(lambda leaf, c=c: leaf[c], mixture.components)
        columns.append(weights[c] + dense.log_prob(one, x))
    return np.stack(columns, axis=1)


def test_sizes(mixture):
    assert mixture.num_classes == C and mixture.num_components == K
    assert mixture.dim == D and mixture.rank == 2


def test_joint_and_marginal_density(mixture, x, joint, dense):
    assert dense.relative_error(mixture.class_log_prob(x), joint) <= 1e-5
    expected = scipy.special.logsumexp(joint, axis=1)
    assert dense.relative_error(mixture.log_prob(x), expected) <= 1e-5


def test_bayes_rule(mixture, x, joint):
    got = mixture.predict_proba(x)
    np.testing.assert_allclose(got, scipy.special.softmax(joint, axis=1), atol=1e-5)
    np.testing.assert_allclose(got.sum(-1), 1.0, rtol=1e-6)


def test_flatten_is_the_same_density_class_by_class(mixture, x, dense):
    flat = mixture.flatten()
    assert flat.means.shape == (C * K, D) and flat.loadings.shape == (C * K, D, 2)
    np.testing.assert_allclose(jax.nn.logsumexp(flat.logits), 0.0, atol=1e-6)
    np.testing.assert_array_equal(flat.means[K], mixture.components.means[1, 0])
    assert dense.relative_error(mixture.log_prob(x), dense.log_prob(flat, x)) <= 1e-5
    by_class = mixture.class_log_prob(x)
    grouped = flat.component_log_prob(x).reshape(-1, C, K)
    np.testing.assert_allclose(jax.nn.logsumexp(grouped, axis=-1), by_class, rtol=1e-5)


def test_class_logits_weight_the_classes_whatever_the_logits_inside(mixture):
    shifted = mixture.components.replace(logits=mixture.components.logits + 7.0)
    flat = HierarchicalMFA(mixture.class_logits + 3.0, shifted).flatten()
    weights = np.exp(np.asarray(flat.logits)).reshape(C, K).sum(axis=1)
    np.testing.assert_allclose(weights, jax.nn.softmax(mixture.class_logits), rtol=1e-5)


@pytest.mark.parametrize("index", [0, 2, -1])
def test_class_mixture_is_the_density_given_the_class(mixture, x, joint, index):
    one = mixture.class_mixture(index)
    assert isinstance(one, MFA) and one.means.shape == (K, D)
    weights = np.asarray(jax.nn.log_softmax(mixture.class_logits), np.float64)
    np.testing.assert_allclose(one.log_prob(x), joint[:, index] - weights[index], rtol=1e-5)


def test_one_class_of_one_trajectory_is_the_plain_mixture(rng, x, make_mixture):
    plain = make_mixture(rng, K, dim=D, rank=1)
    nested = HierarchicalMFA(
        jnp.zeros(1, jnp.float32), jax.tree.map(lambda leaf: leaf[None], plain)
    )
    np.testing.assert_allclose(nested.log_prob(x), plain.log_prob(x), rtol=1e-6)
    np.testing.assert_allclose(nested.class_log_prob(x)[:, 0], plain.log_prob(x), rtol=1e-6)


def test_narrow_floats_are_computed_in_float32(rng, x, make_mixture, dense):
    components = make_mixture(rng, C, K, dim=D, rank=1, dtype=jnp.bfloat16)
    mixture = HierarchicalMFA(jnp.asarray(rng.normal(size=C), jnp.bfloat16), components)
    got = mixture.class_log_prob(x)
    assert got.dtype == jnp.float32
    weights = scipy.special.log_softmax(np.asarray(mixture.class_logits, np.float64))
    for c in range(C):
        one = jax.tree.map(lambda leaf, c=c: leaf[c], components)
        assert dense.relative_error(got[:, c], weights[c] + dense.log_prob(one, x)) <= 1e-5


def test_joint_is_accurate_in_classes_that_are_not_the_likeliest(dense):
    # Classes far apart, a narrow one beside a wide one: see `_refine`.
    rng = np.random.default_rng(1)
    log_noise = np.linspace(-6, 2, 6)[:, None] + rng.uniform(-0.5, 0.5, (6, 2))
    means = rng.normal(size=(6, 2)) + 10.0 * np.array([[-1.0], [1.0]] * 3)
    leaves = (np.zeros(6), means, np.exp(log_noise / 2)[..., None], log_noise)
    flat = MFA(*(jnp.asarray(leaf, jnp.float32) for leaf in leaves))
    x = np.concatenate(
        [means[k] + np.exp(log_noise[k] / 2) * rng.normal(size=(10, 2)) for k in range(6)]
    ).astype(np.float32)
    components = jax.tree.map(lambda leaf: leaf.reshape(3, 2, *leaf.shape[1:]), flat)
    got = HierarchicalMFA(jnp.zeros(3, jnp.float32), components).class_log_prob(x, chunk_size=1)
    expected = dense.component_log_prob(flat, x).reshape(-1, 3, 2)
    assert dense.relative_error(got, scipy.special.logsumexp(expected, axis=-1)) <= 1e-5


def test_samples_visit_the_classes_by_their_weights():
    class_logits = jnp.log(jnp.array([0.7, 0.1, 0.2]))
    means = 100.0 * jnp.arange(6.0).reshape(3, 2, 1)
    components = MFA(jnp.zeros((3, 2)), means, jnp.zeros((3, 2, 1, 0)), jnp.zeros((3, 2, 1)))
    drawn = HierarchicalMFA(class_logits, components).sample(jax.random.key(0), 20_000)
    assert drawn.shape == (20_000, 1)
    which = np.rint(np.asarray(drawn)[:, 0] / 100.0).astype(int)
    frequency = np.bincount(which, minlength=6) / 20_000
    np.testing.assert_allclose(frequency, [0.35, 0.35, 0.05, 0.05, 0.1, 0.1], atol=0.02)


def test_affine_is_the_change_of_variables(mixture, x, joint, dense):
    scale, shift = np.array([0.5, -2.0, 1.5, 3.0]), np.array([1.0, -4.0, 0.0, 2.0])
    got = mixture.affine(scale, shift).class_log_prob(np.asarray(x) * scale + shift)
    assert dense.relative_error(got, joint - np.log(np.abs(scale)).sum()) <= 1e-5


def test_jit_vmap_and_grad(mixture, x):
    def loss(mixture, x):
        return mixture.class_log_prob(x)[:, 0].sum()

    gradients = jax.jit(jax.grad(loss))(mixture, x)
    assert jax.tree.structure(gradients) == jax.tree.structure(mixture)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    np.testing.assert_allclose(
        jax.vmap(mixture.predict_proba)(x), mixture.predict_proba(x), atol=1e-5
    )


def test_blocks_change_nothing(mixture, x):
    for method in (mixture.log_prob, mixture.class_log_prob):
        np.testing.assert_allclose(method(x, chunk_size=4), method(x), rtol=1e-5)


@pytest.mark.parametrize("method", ["log_prob", "class_log_prob", "predict_proba"])
def test_any_leading_axes(mixture, method):
    function = getattr(mixture, method)
    shape = () if method == "log_prob" else (C,)
    for leading in ((), (0,), (3, 5)):
        assert jax.eval_shape(function, jnp.zeros((*leading, D))).shape == (*leading, *shape)


def test_tails_stay_within_the_class(mixture, x):
    both = mixture.with_tails(2.0, 0.3)
    assert both.num_classes == C and both.num_components == 2 * K
    for c in range(C):
        expected = mixture.class_mixture(c).with_tails(2.0, 0.3).log_prob(x)
        np.testing.assert_allclose(both.class_mixture(c).log_prob(x), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.replace(class_logits=jnp.zeros(2)), "`class_logits` .* C = 3.* got \\(2,\\)"),
        (
            lambda h: h.replace(components=h.components.replace(logits=jnp.zeros(K))),
            "`components.logits` .* got \\(2,\\)",
        ),
        (lambda h: h.replace(components=h.flatten()), "`components.means` .* got \\(6, 4\\)"),
        (
            lambda h: h.replace(components=h.components.replace(log_noise=jnp.zeros((C, K, 1)))),
            "`log_noise` .* D = 4",
        ),
    ],
)
def test_wrong_parameters_get_one_line(mixture, x, change, message):
    with pytest.raises(ConfigError, match=message) as raised:
        change(mixture).log_prob(x)
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


def test_wrong_examples_and_classes_get_one_line(mixture, x):
    for method in (mixture.log_prob, mixture.class_log_prob, mixture.predict_proba):
        with pytest.raises(DataError, match=r"`x` .* D = 4.* got \(15, 3\)"):
            method(x[:, :3])
    for index in (3, -4):
        with pytest.raises(ConfigError, match=f"`index` must name one of the 3 .* got {index}"):
            mixture.class_mixture(index)
    with pytest.raises(ConfigError, match="`scale` must have shape"):
        mixture.affine(jnp.ones(3), jnp.zeros(4))
