"""The mixture of factor analyzers: sampling, marginal, condition, moments, affine, wrong shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from cpmm_jax.errors import ConfigError, DataError
from cpmm_jax.mixture import MFA


@pytest.mark.parametrize(("dim", "rank"), [(1, 0), (5, 2)])
def test_log_prob_components_and_responsibilities_match_the_reference(
    rng, dim, rank, make_mixture, dense
):
    mixture = make_mixture(rng, 3, dim=dim, rank=rank)
    assert (mixture.num_components, mixture.dim, mixture.rank) == (3, dim, rank)
    x = rng.normal(size=(40, dim)).astype(np.float32)
    joint = dense.component_log_prob(mixture, x)
    assert dense.relative_error(mixture.component_log_prob(x), joint) <= 1e-5
    assert dense.relative_error(mixture.log_prob(x), dense.log_prob(mixture, x)) <= 1e-5
    got = mixture.responsibilities(x)
    np.testing.assert_allclose(got, scipy.special.softmax(joint, axis=1), atol=1e-5)
    np.testing.assert_allclose(got.sum(-1), 1.0, rtol=1e-6)


def test_any_leading_axes(rng, make_mixture):
    mixture = make_mixture(rng, 3, dim=5, rank=2)
    x = jnp.asarray(rng.normal(size=(8, 5, 5)), jnp.float32)
    for shape in ((), (0,), (8, 5)):
        rows = jnp.zeros((*shape, 5))
        assert jax.eval_shape(mixture.log_prob, rows).shape == shape
        assert jax.eval_shape(mixture.component_log_prob, rows).shape == (*shape, 3)
        assert jax.eval_shape(mixture.responsibilities, rows).shape == (*shape, 3)
    expected = mixture.log_prob(x.reshape(40, 5))
    np.testing.assert_allclose(mixture.log_prob(x).reshape(40), expected, rtol=1e-6)


def test_integers_are_examples_too(rng, make_mixture):
    mixture = make_mixture(rng, 3, dim=5, rank=2)
    x = rng.integers(-2, 3, (40, 5))
    got = mixture.log_prob(x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, mixture.log_prob(x.astype(np.float32)))


def test_is_a_pytree_of_its_four_arrays(rng, make_mixture):
    mixture = make_mixture(rng, 3, dim=2, rank=1)
    assert len(jax.tree.leaves(mixture)) == 4
    doubled = jax.jit(lambda mixture: jax.tree.map(lambda leaf: 2 * leaf, mixture))(mixture)
    assert isinstance(doubled, MFA)
    np.testing.assert_array_equal(doubled.means, 2 * mixture.means)


@pytest.mark.parametrize(("dim", "rank"), [(1, 0), (3, 2)])
def test_sample_has_the_moments_of_the_mixture(rng, dim, rank, make_mixture):
    mixture = make_mixture(rng, 3, dim=dim, rank=rank)
    n = 100_000
    x = np.asarray(mixture.sample(jax.random.key(1), n), np.float64)
    assert x.shape == (n, dim)
    mean, covariance = np.asarray(mixture.mean()), np.asarray(mixture.covariance())
    error = np.sqrt(np.diag(covariance) / n)
    assert (np.abs(x.mean(0) - mean) < 5 * error).all()
    np.testing.assert_allclose(
        np.cov(x.T, ddof=0).reshape(dim, dim), covariance, atol=0.03 * covariance.max()
    )


def test_sample_visits_components_by_their_weights(rng):
    logits = jnp.log(jnp.array([0.6, 0.3, 0.1])) + 5.0
    means = 100.0 * jnp.arange(3.0)[:, None]
    mixture = MFA(logits, means, jnp.ones((3, 1, 1)), jnp.zeros((3, 1)))
    n = 20_000
    x = np.asarray(mixture.sample(jax.random.key(2), n))[:, 0]
    which = np.rint(x / 100.0).astype(int)
    frequency = np.bincount(which, minlength=3) / n
    np.testing.assert_allclose(frequency, [0.6, 0.3, 0.1], atol=5 * np.sqrt(0.25 / n))
    for k in range(3):
        np.testing.assert_allclose(x[which == k].var(), 2.0, rtol=0.15)


def test_sample_depends_on_the_key_alone(rng, make_mixture):
    mixture = make_mixture(rng, 3, dim=2, rank=1)
    first = mixture.sample(jax.random.key(0), 5)
    np.testing.assert_array_equal(first, mixture.sample(jax.random.key(0), 5))
    assert not np.array_equal(first, mixture.sample(jax.random.key(1), 5))
    assert mixture.sample(jax.random.key(0), 0).shape == (0, 2)


@pytest.mark.parametrize("rank", [0, 2])
def test_moments_match_dense_formulas(rng, rank, make_mixture, dense):
    mixture = make_mixture(rng, 4, dim=3, rank=rank)
    weights = scipy.special.softmax(np.asarray(mixture.logits, np.float64))
    means = np.asarray(mixture.means, np.float64)
    mean = weights @ means
    second = dense.covariances(mixture) + means[:, :, None] * means[:, None, :]
    covariance = np.einsum("k,kde->de", weights, second) - np.outer(mean, mean)
    np.testing.assert_allclose(mixture.mean(), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mixture.covariance(), covariance, rtol=1e-4, atol=1e-5)


def test_covariance_far_from_the_origin(rng, make_mixture):
    mixture = make_mixture(rng, 4, dim=3, rank=2)
    far = mixture.replace(means=mixture.means + 1e4)
    np.testing.assert_allclose(far.covariance(), mixture.covariance(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("indices", [[2], [3, 0], [0, 1, 2, 3]])
def test_marginal_is_the_marginal_of_the_dense_mixture(rng, indices, rank, make_mixture, dense):
    mixture = make_mixture(rng, 3, dim=4, rank=rank)
    got = mixture.marginal(indices)
    expected = dense.covariances(mixture)[:, indices][:, :, indices]
    np.testing.assert_allclose(dense.covariances(got), expected, rtol=1e-6)
    np.testing.assert_array_equal(got.means, mixture.means[:, np.array(indices)])
    np.testing.assert_array_equal(got.logits, mixture.logits)


def test_marginal_integrates_the_other_feature_out(rng, make_mixture):
    mixture = make_mixture(rng, 3, dim=2, rank=1)
    nodes = np.linspace(-25, 25, 2001)
    x = np.stack([np.full_like(nodes, 0.7), nodes], axis=1).astype(np.float32)
    integral = np.exp(np.asarray(mixture.log_prob(x), np.float64)).sum() * (nodes[1] - nodes[0])
    marginal = mixture.marginal([0]).log_prob(jnp.array([0.7]))
    np.testing.assert_allclose(np.exp(marginal), integral, rtol=1e-4)


@pytest.mark.parametrize(
    ("dim", "rank", "seen"),
    [(2, 0, [1]), (6, 2, [4, 0, 2]), (3, 3, [2, 0])],
)
def test_chain_rule(rng, dim, rank, seen, make_mixture, dense):
    mixture = make_mixture(rng, 3, dim=dim, rank=rank)
    x = jnp.asarray(2.0 * rng.normal(size=(12, dim)), jnp.float32)
    rest = np.setdiff1d(np.arange(dim), seen)

    @jax.jit
    @jax.vmap
    def both(x):
        first, second = x[np.array(seen)], x[rest]
        conditional = mixture.condition(seen, first).log_prob(second)
        return mixture.marginal(seen).log_prob(first) + conditional

    assert dense.relative_error(both(x), dense.log_prob(mixture, x)) <= 1e-5


def test_condition_where_float32_cannot_factorise(rng, dense):
    # Noise variances from 1e-6 beside loadings of order one: a capacitance matrix near singular.
    shapes = (3,), (3, 6), (3, 6, 4), (3, 6)
    logits, means, loadings, _ = (rng.normal(size=shape) for shape in shapes)
    log_noise = np.log([1e-6, 1e-6, 1e-6, 1e-5, 1e-2, 1e2]) * np.ones((3, 1))
    parameters = logits, means, loadings, log_noise
    mixture = MFA(*(jnp.asarray(leaf, jnp.float32) for leaf in parameters))
    x = np.asarray(mixture.sample(jax.random.key(0), 8))
    seen, rest = np.array([0, 1, 2, 3]), np.array([4, 5])
    covariances, means = dense.covariances(mixture), np.asarray(mixture.means, np.float64)
    condition = jax.jit(lambda mixture, values: mixture.condition(seen, values))
    for row in x[:4]:
        got = condition(mixture, row[seen])
        for k in range(3):
            gain = np.linalg.solve(
                covariances[k][np.ix_(seen, seen)], covariances[k][np.ix_(seen, rest)]
            ).T
            expected = means[k, rest] + gain @ (row[seen] - means[k, seen])
            np.testing.assert_allclose(got.means[k], expected, rtol=1e-4, atol=1e-4)
            narrowed = (
                covariances[k][np.ix_(rest, rest)] - gain @ covariances[k][np.ix_(seen, rest)]
            )
            np.testing.assert_allclose(dense.covariances(got)[k], narrowed, rtol=1e-5, atol=1e-5)
        both = mixture.marginal(seen).log_prob(row[seen]) + got.log_prob(row[rest])
        assert dense.relative_error(both, dense.log_prob(mixture, row[None])[0]) <= 1e-5


@pytest.mark.parametrize(("dim", "rank"), [(1, 0), (5, 2)])
def test_affine_is_the_change_of_variables(rng, dim, rank, make_mixture, dense):
    mixture = make_mixture(rng, 3, dim=dim, rank=rank)
    scale, shift = np.exp(rng.normal(size=dim)), 5.0 * rng.normal(size=dim)
    scale[0] *= -1.0
    moved = mixture.affine(scale, shift)
    x = 2.0 * rng.normal(size=(40, dim))
    expected = dense.log_prob(mixture, x) - np.log(np.abs(scale)).sum()
    got = moved.log_prob((x * scale + shift).astype(np.float32))
    assert dense.relative_error(got, expected) <= 1e-5
    mean = np.asarray(mixture.mean()) * scale + shift
    np.testing.assert_allclose(moved.mean(), mean, rtol=1e-5, atol=1e-5)
    covariance = np.asarray(mixture.covariance()) * np.outer(scale, scale)
    np.testing.assert_allclose(moved.covariance(), covariance, rtol=1e-4, atol=1e-5)


def test_noise_is_that_of_the_sum_of_two_variables(rng, make_mixture, dense):
    mixture, noise = make_mixture(rng, 3, dim=3, rank=2), np.array([1.0, 2.0, 3.0])
    both = mixture.with_noise(noise)
    np.testing.assert_allclose(both.mean(), mixture.mean(), rtol=1e-6)
    expected = dense.covariances(mixture) + np.diag(noise)
    np.testing.assert_allclose(dense.covariances(both), expected, rtol=1e-5)


@pytest.mark.parametrize("noise", [4.0, np.array([1.0, 2.0, 3.0])])
def test_tails_are_a_mixture_of_each_component_and_its_broad_twin(rng, make_mixture, dense, noise):
    mixture = make_mixture(rng, 3, dim=3, rank=2)
    both = mixture.with_tails(noise, 0.2)
    assert both.num_components == 6
    broad = mixture.replace(log_noise=jnp.log(np.exp(mixture.log_noise) + noise))
    x = 3.0 * rng.normal(size=(30, 3)).astype(np.float32)
    expected = np.logaddexp(
        np.log(0.8) + dense.log_prob(mixture, x), np.log(0.2) + dense.log_prob(broad, x)
    )
    assert dense.relative_error(both.log_prob(x), expected) <= 1e-5
    np.testing.assert_allclose(both.mean(), mixture.mean(), rtol=1e-5, atol=1e-6)
    added = 0.2 * np.diag(np.broadcast_to(noise, 3))
    covariance = np.asarray(mixture.covariance()) + added
    np.testing.assert_allclose(both.covariance(), covariance, rtol=1e-4)


def parts(**shapes):
    expected = {"logits": (3,), "means": (3, 4), "loadings": (3, 4, 2), "log_noise": (3, 4)}
    return MFA(**{name: jnp.zeros(shape) for name, shape in (expected | shapes).items()})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: parts().log_prob(jnp.zeros((2, 3))), DataError, "`x` .* D = 4.*got \\(2, 3\\)"),
        (lambda: parts().log_prob(1.0), DataError, "`x` .* got \\(\\)"),
        (lambda: parts().component_log_prob(jnp.zeros(5)), DataError, "`x` .* got \\(5,\\)"),
        (lambda: parts().responsibilities(jnp.zeros(5)), DataError, "`x` .* got \\(5,\\)"),
        (lambda: parts(logits=(4,)).log_prob(jnp.zeros(4)), ConfigError, "`logits` .* \\(4,\\)"),
        (lambda: parts(means=(4,)).log_prob(jnp.zeros(4)), ConfigError, "`means` .* `jax.vmap`"),
        (lambda: parts(loadings=(3, 5, 2)).sample(jax.random.key(0), 2), ConfigError, "`loadings`"),
        (lambda: parts(loadings=(3, 4)).sample(jax.random.key(0), 2), ConfigError, "`loadings`"),
        (lambda: parts(log_noise=(3, 1)).marginal([0]), ConfigError, "`log_noise` .*\\(3, 1\\)"),
        (lambda: parts().log_prob(jnp.zeros(4), chunk_size=0), ConfigError, "`chunk_size` .* 0"),
        (lambda: parts().marginal([]), ConfigError, "`indices` must be a non-empty"),
        (lambda: parts().marginal([0.5]), ConfigError, "`indices` .* integers; .* float64"),
        (lambda: parts().marginal([4]), ConfigError, "`indices` must lie in 0..3, .* 4..4"),
        (lambda: parts().marginal([-1]), ConfigError, "`indices` must lie in 0..3, .* -1..-1"),
        (lambda: parts().marginal([1, 1]), ConfigError, "`indices` must not repeat"),
        (lambda: parts().condition([0], jnp.zeros(2)), DataError, "`values` .* \\(1,\\); got"),
        (lambda: parts().condition(range(4), jnp.zeros(4)), ConfigError, "`indices` must leave"),
        (lambda: parts().affine(jnp.ones(3), jnp.ones(4)), ConfigError, "`scale` .* \\(3,\\)"),
        (lambda: parts().affine(jnp.ones(4), 1.0), ConfigError, "`shift` .* \\(\\)"),
        (lambda: parts().with_tails(1.0, 0.0), ConfigError, "`weight` must be .* got 0.0"),
        (lambda: parts().with_tails(1.0, 1.0), ConfigError, "`weight` must be .* got 1.0"),
        (lambda: parts().with_tails(jnp.ones(3), 0.1), ConfigError, "`noise` .* D = 4.*\\(3,\\)"),
        (lambda: parts().with_tails(-1.0, 0.1), ConfigError, "`noise` .* smallest -1"),
        (lambda: parts().with_noise(0.0), ConfigError, "`noise` .* smallest 0"),
    ],
)
def test_wrong_shapes_get_one_line(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")
