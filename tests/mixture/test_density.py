"""The density: accuracy in float32, gradients, hard cases, blocks, transformations, memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmm_jax.errors import ConfigError
from cpmm_jax.mixture import MFA, density, linalg, mfa

N, K = 40, 4


# One compiled program for all tests that use it at the same shapes.
gradient = jax.jit(jax.grad(lambda mixture, x: mixture.log_prob(x).sum(), (0, 1)))


def hard_mixture(rng, *, dim, rank, scale, spread, shift):
    """Return means, loadings, log-noise and examples: variances 1e-6 to 1e2 in each component."""
    log_noise = rng.uniform(np.log(1e-6), np.log(1e2), (K, dim))
    log_noise[0, :2] = np.log([1e-6, 1e2])[:dim]
    loadings = scale * rng.normal(size=(K, dim, rank))
    sd = np.sqrt(np.exp(log_noise) + np.square(loadings).sum(-1))
    unit = sd.mean(0)
    means = (spread * rng.uniform(-1, 1, (K, dim)) + shift) * unit
    which = rng.integers(K, size=N)
    x = means[which] + np.exp(log_noise[which] / 2) * rng.normal(size=(N, dim))
    x += np.einsum("ndr,nr->nd", loadings[which], rng.normal(size=(N, rank)))
    x[:5] += 1e6 * unit
    x[5:10] += 10.0 * unit
    logits = rng.normal(size=K)
    parameters = (jnp.asarray(leaf, jnp.float32) for leaf in (logits, means, loadings, log_noise))
    return MFA(*parameters), x.astype(np.float32)


CASES = [
    {"scale": scale, "spread": spread, "shift": shift}
    for scale in (0.1, 1.0)
    for spread in (0.0, 1.0, 1e3)
    for shift in (0.0, 1e4)
]


@pytest.mark.parametrize("rank", [0, 1, 4, 16])
@pytest.mark.parametrize("dim", [1, 2, 64, 784])
def test_float32_matches_dense_float64(dim, rank, dense):
    cases = CASES if dim < 784 else CASES[1::2]
    for number, case in enumerate(cases):
        rng = np.random.default_rng(number)
        mixture, x = hard_mixture(rng, dim=dim, rank=rank, **case)
        got = mixture.log_prob(x)
        assert got.dtype == jnp.float32
        assert dense.relative_error(got, dense.log_prob(mixture, x)) <= 1e-5, case
        # 1e6 standard deviations away: finite and hugely negative.
        assert np.isfinite(got).all() and (np.asarray(got[:5]) < -1e6).all(), case


@pytest.mark.parametrize(("dim", "rank"), [(1, 0), (64, 16)])
def test_float32_gradients_are_finite_everywhere(dim, rank):
    for number, case in enumerate(CASES):
        mixture, x = hard_mixture(np.random.default_rng(number), dim=dim, rank=rank, **case)
        for leaf in jax.tree.leaves(gradient(mixture, x)):
            assert np.isfinite(leaf).all(), case


@pytest.mark.parametrize(("dim", "rank"), [(1, 0), (2, 1), (64, 4)])
def test_shifting_data_and_means_together_changes_nothing(rng, dim, rank, dense):
    # Numbers on a grid of 2^-4 with standard deviations near 1: 2^14 can be added without rounding.
    def grid(*shape):
        return np.round(rng.normal(size=shape) * 48.0) / 16.0

    means, x = grid(K, dim), grid(N, dim)
    rest = (rng.normal(size=(K, dim, rank)), 0.3 * rng.normal(size=(K, dim)))
    values = []
    for shift in (0.0, 2.0**14):
        parameters = (np.zeros(K), means + shift, *rest)
        mixture = MFA(*(jnp.asarray(leaf, jnp.float32) for leaf in parameters))
        values.append(np.asarray(mixture.log_prob(np.float32(x + shift)), np.float64))
    assert dense.relative_error(values[1], values[0]) <= 1e-5


def test_every_component_is_accurate_also_the_unlikely_ones(dense):
    # Components far apart, of unequal widths: matrix products lose the digits of the unlikely ones.
    rng = np.random.default_rng(1)
    log_noise = np.linspace(-6, 2, 6)[:, None] + rng.uniform(-0.5, 0.5, (6, 2))
    means = rng.normal(size=(6, 2)) + 10.0 * np.array([[-1.0], [1.0]] * 3)
    parameters = (np.zeros(6), means, np.exp(log_noise / 2)[..., None], log_noise)
    mixture = MFA(*(jnp.asarray(leaf, jnp.float32) for leaf in parameters))
    which = rng.integers(6, size=N)
    x = (means[which] + np.exp(log_noise[which] / 2) * rng.normal(size=(N, 2))).astype(np.float32)
    # One example at a time, so that no neighbour sends its block to the residual form.
    got = mixture.component_log_prob(x, chunk_size=1)
    assert dense.relative_error(got, dense.component_log_prob(mixture, x)) <= 1e-5


@jax.jit
def both_forms(mixture, x):
    log_weights = jax.nn.log_softmax(mixture.logits)
    components = density.Components(log_weights, mixture.means, mixture.loadings, mixture.log_noise)
    factors = jax.vmap(linalg.factorise)(mixture.loadings, mixture.log_noise)
    fast = density.matrix_product_form(x, components, factors).log_prob
    return [
        jax.nn.logsumexp(form, axis=-1) for form in (fast, density.residual_form(x, components))
    ]


@pytest.fixture
def spoiled_log_prob(monkeypatch):
    """Return `log_prob`, compiled with a residual form that gives 1234, so that its use shows."""

    def residual_form(x, components):
        return jnp.full((x.shape[0], components.means.shape[0]), 1234.0, x.dtype)

    monkeypatch.setattr(density, "residual_form", residual_form)
    return jax.jit(lambda mixture, x: mfa._log_prob.__wrapped__(mixture, x, None))


HARD = {"dim": 8, "rank": 2, "scale": 1.0, "spread": 1e3, "shift": 0.0}


def test_matrix_products_alone_fail_where_the_means_lie_far_apart(rng, dense):
    mixture, x = hard_mixture(rng, **HARD)
    fast, slow = both_forms(mixture, x)
    expected = dense.log_prob(mixture, x)
    assert dense.relative_error(fast, expected) > 1e-3
    assert dense.relative_error(slow, expected) < 1e-6


def test_hard_cases_take_the_residual_form(rng, spoiled_log_prob):
    mixture, x = hard_mixture(rng, **HARD)
    assert (np.asarray(spoiled_log_prob(mixture, jnp.asarray(x))) > 1000).all()


def test_easy_cases_keep_to_matrix_products(rng, make_mixture, dense, spoiled_log_prob):
    mixture = make_mixture(rng, K, dim=8, rank=2)
    x = (2.0 * rng.normal(size=(N, 8))).astype(np.float32)
    for rows in (x, x + 100.0, 1e6 * x):
        got = spoiled_log_prob(mixture, jnp.asarray(rows))
        assert dense.relative_error(got, dense.log_prob(mixture, rows)) <= 1e-5


@pytest.mark.parametrize(("dim", "rank", "chunk_size"), [(1, 0, None), (3, 2, None), (3, 2, 4)])
def test_gradients_match_finite_differences(rng, dim, rank, chunk_size, x64, make_mixture):
    mixture = make_mixture(rng, 3, dim=dim, rank=rank, dtype=jnp.float64)
    x = jnp.asarray(rng.normal(size=(7, dim)))

    def value(arguments):
        mixture, x = arguments
        weights = jnp.arange(1.0, 8.0)
        return weights @ mixture.log_prob(x, chunk_size=chunk_size)

    point = mixture, x
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), point)
    assert_slope(value, point, direction)


def assert_slope(value, point, direction, step=1e-6):
    """Compare gradient and directional derivative with central differences."""
    both = jax.jit(jax.value_and_grad(value))
    products = jax.tree.map(np.vdot, both(point)[1], direction)
    ends = [
        both(jax.tree.map(lambda a, b, s=s: a + s * step * b, point, direction))[0] for s in (1, -1)
    ]
    slope = sum(jax.tree.leaves(products))
    np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), slope, rtol=1e-6)


def test_forward_and_reverse_mode_agree(rng, make_mixture):
    mixture = make_mixture(rng, 3, dim=3, rank=2)
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)

    def log_prob(means):
        return mixture.replace(means=means).log_prob(x)

    forward, reverse = (jax.jit(jac(log_prob)) for jac in (jax.jacfwd, jax.jacrev))
    np.testing.assert_allclose(forward(mixture.means), reverse(mixture.means), atol=1e-5)


def test_gradients_of_hard_cases_match_finite_differences(rng, x64):
    # The residual form gives the values, the matrix products the derivatives.
    mixture, x = hard_mixture(rng, **HARD)
    mixture, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (mixture, x[10:20]))
    direction = jnp.asarray(rng.normal(size=mixture.means.shape))

    def value(means):
        return mixture.replace(means=means).log_prob(x).sum()

    assert_slope(value, mixture.means, direction)


def test_float32_gradients_match_float64(rng, make_mixture):
    mixture = make_mixture(rng, 3, dim=5, rank=2)
    x = jnp.asarray(2.0 * rng.normal(size=(N, 5)), jnp.float32)
    got = gradient(mixture, x)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (mixture, x))
        expected = gradient(*wide)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("rank", [0, 2])
def test_hessian_matches_closed_form(rng, rank, x64, make_mixture, dense):
    mixture = make_mixture(rng, 1, dim=3, rank=rank, dtype=jnp.float64)
    x = jnp.asarray(rng.normal(size=3))
    expected = -np.linalg.inv(dense.covariances(mixture)[0])
    np.testing.assert_allclose(jax.hessian(mixture.log_prob)(x), expected, rtol=1e-8)


def test_hessian_in_float32(rng, make_mixture):
    mixture = make_mixture(rng, 3, dim=3, rank=2)
    x = jnp.asarray(rng.normal(size=3), jnp.float32)
    got = jax.jit(jax.hessian(mixture.log_prob))(x)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), mixture)
        expected = jax.hessian(wide.log_prob)(x.astype(jnp.float64))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dim", "rank"), [(1, 0), (2, 1)])
def test_density_integrates_to_one(rng, dim, rank, make_mixture):
    mixture = make_mixture(rng, K, dim=dim, rank=rank)
    num_nodes = 4000 if dim == 1 else 500
    axis = np.linspace(-20.0, 20.0, num_nodes)
    grid = np.stack(np.meshgrid(*[axis] * dim, indexing="ij"), axis=-1).astype(np.float32)
    values = np.exp(np.asarray(mixture.log_prob(grid), np.float64))
    assert values.shape == (num_nodes,) * dim
    np.testing.assert_allclose(values.sum() * (axis[1] - axis[0]) ** dim, 1.0, rtol=1e-4)


def test_identical_components_equal_one(rng, make_mixture, dense):
    one = make_mixture(rng, 1, dim=5, rank=2)
    same = jax.tree.map(lambda leaf: jnp.repeat(leaf, 3, axis=0), one)
    x = rng.normal(size=(N, 5)).astype(np.float32)
    assert dense.relative_error(same.log_prob(x), dense.log_prob(one, x)) <= 1e-5
    np.testing.assert_allclose(same.responsibilities(x), np.full((N, 3), 1 / 3), rtol=1e-5)


def test_blocks_change_nothing(rng, make_mixture):
    mixture = make_mixture(rng, 3, dim=5, rank=2)
    x = jnp.asarray(rng.normal(size=(N, 5)), jnp.float32)
    np.testing.assert_allclose(mixture.log_prob(x, chunk_size=7), mixture.log_prob(x), rtol=1e-6)


@pytest.mark.parametrize(("total", "block"), [(18, 3), (13, 5)])
def test_blocks_of_at_most_five_rows_divide_them_if_they_can(total, block):
    seen = set()

    def function(rows):
        seen.add(rows.shape[0])
        return jnp.exp(rows)

    rows = jnp.arange(float(total))
    np.testing.assert_allclose(density.map_blocks(function, rows, 5), jnp.exp(rows), rtol=1e-6)
    assert seen == {block}


def test_blocks_leave_gradients_alone(rng, make_mixture):
    mixture = make_mixture(rng, 3, dim=5, rank=2)
    x = jnp.asarray(rng.normal(size=(N, 5)), jnp.float32)

    in_blocks = jax.grad(lambda mixture, x: mixture.log_prob(x, chunk_size=7).sum(), (0, 1))
    got, expected = jax.jit(in_blocks)(mixture, x), gradient(mixture, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_rounding_counts_where_it_matters_to_one_of_the_sums():
    fast = jnp.array([[-1.0, -2.0, -100.0, -101.0]])
    magnitude = jnp.array([[1.0, 1.0, 1e6, 1.0]])  # 0.1 off: nothing beside -1, much in -100
    assert not density.is_spoiled(fast, magnitude, 1)
    assert density.is_spoiled(fast, magnitude, 2)
    assert density.is_spoiled(fast, magnitude[:, ::-1], 1) and density.is_spoiled(
        fast, jnp.nan * fast, 1
    )


def test_default_block_is_bounded():
    assert density.block_size(10, 3, 5, 2, None) == 10
    size = density.block_size(10**9, 100, 64, 4, None)
    assert size * (100 * 7 + 3 * 64) <= density.BLOCK_ELEMENTS
    assert density.block_size(10, 10**9, 10**9, 0, None) == 1
    with pytest.raises(ConfigError, match="`chunk_size` must be at least 1"):
        density.block_size(10, 3, 5, 2, 0)


def test_vmap_over_examples_and_over_mixtures(rng, make_mixture, dense):
    mixtures = make_mixture(rng, 2, 3, dim=5, rank=2)
    x = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    alone = [jax.tree.map(lambda leaf, i=i: leaf[i], mixtures) for i in range(2)]
    expected = np.stack([dense.log_prob(mixture, x) for mixture in alone])
    log_prob = jax.jit(jax.vmap(lambda mixture, x: mixture.log_prob(x), (0, None)))
    assert dense.relative_error(log_prob(mixtures, x), expected) <= 1e-5
    both = jax.vmap(jax.vmap(lambda mixture, x: mixture.log_prob(x), (None, 0)), (0, None))
    assert dense.relative_error(both(mixtures, x), expected) <= 1e-5


def test_vmap_keeps_the_accuracy_of_hard_cases(rng, dense):
    mixture, x = hard_mixture(rng, **HARD)
    got = jax.vmap(mixture.log_prob)(jnp.asarray(x))
    assert dense.relative_error(got, dense.log_prob(mixture, x)) <= 1e-5
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), mixture)
    got = jax.vmap(lambda mixture: mixture.log_prob(x))(batch)
    assert dense.relative_error(got[1], dense.log_prob(mixture, x)) <= 1e-5


def test_vmap_of_gradients(rng, make_mixture):
    mixtures = make_mixture(rng, 2, 3, dim=5, rank=2)
    x = jnp.asarray(rng.normal(size=(N, 5)), jnp.float32)
    batched = jax.vmap(gradient, (0, None))(mixtures, x)
    for i in range(2):
        alone = gradient(jax.tree.map(lambda leaf, i=i: leaf[i], mixtures), x)
        for a, b in zip(jax.tree.leaves(batched), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_floats_are_computed_in_float32(rng, dtype, make_mixture, dense):
    mixture = make_mixture(rng, 3, dim=5, rank=2, dtype=jnp.dtype(dtype))
    x = jnp.asarray(rng.normal(size=(N, 5)), dtype)
    got = mixture.log_prob(x)
    assert got.dtype == jnp.float32
    assert dense.relative_error(got, dense.log_prob(mixture, x)) <= 1e-5
    if dtype == "bfloat16":
        gradients = jax.tree.leaves(gradient(mixture, x))
        assert all(leaf.dtype == x.dtype and np.isfinite(leaf).all() for leaf in gradients)


def test_float64_is_computed_in_float64(rng, x64, make_mixture, dense):
    mixture = make_mixture(rng, 3, dim=5, rank=2, dtype=jnp.float64)
    x = rng.normal(size=(N, 5))
    got = mixture.log_prob(x)
    assert got.dtype == jnp.float64
    assert dense.relative_error(got, dense.log_prob(mixture, x)) <= 1e-13
