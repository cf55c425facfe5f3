"""In-painting and denoising against formulas of a Gaussian, and the pictures of a run."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import cpmm_jax as cpmm
from cpmm_jax.artifact import save
from experiments import image_tasks


def gaussians(count: int) -> cpmm.MFA:
    draw = np.random.default_rng(0).standard_normal
    shapes = (count,), (count, 4), (count, 4, 2), (count, 4)
    return cpmm.MFA(*(jnp.asarray(draw(shape)) for shape in shapes))


def test_of_one_gaussian_what_is_hidden_and_what_is_clean_are_linear(x64: None) -> None:
    one, x = gaussians(1), np.random.default_rng(1).standard_normal((3, 4))
    mean, covariance = np.asarray(one.means[0]), np.asarray(one.covariance())
    for filled in image_tasks.in_paint(one, jnp.asarray(x), np.array([1, 3])):
        gain = covariance[[0, 2]][:, [1, 3]] @ np.linalg.inv(covariance[[1, 3]][:, [1, 3]])
        np.testing.assert_allclose(filled[:, [1, 3]], x[:, [1, 3]])
        expected = mean[[0, 2]] + (x - mean)[:, [1, 3]] @ gain.T
        np.testing.assert_allclose(filled[:, [0, 2]], expected, rtol=1e-8)
    gain = covariance @ np.linalg.inv(covariance + 4.0 * np.eye(4))
    np.testing.assert_allclose(
        image_tasks.denoise(one, jnp.asarray(x), 2.0), mean + (x - mean) @ gain.T, rtol=1e-8
    )


def test_of_a_mixture_they_are_averages_over_the_components(x64: None) -> None:
    mixture, y = gaussians(3), jnp.asarray(np.random.default_rng(1).standard_normal((2, 4)))
    share = mixture.with_noise(4.0).responsibilities(y)
    ones = [jax.tree.map(lambda leaf, k=k: leaf[k : k + 1], mixture) for k in range(3)]
    by_one = np.stack([image_tasks.denoise(one, y, 2.0) for one in ones])
    expected = np.einsum("nk,knd->nd", share, by_one)
    np.testing.assert_allclose(image_tasks.denoise(mixture, y, 2.0), expected, rtol=1e-8)

    seen = np.array([0, 2])
    share = np.asarray(mixture.marginal(seen).responsibilities(y[:, seen]))
    by_one = np.stack([image_tasks.in_paint(one, y, seen)[0] for one in ones])
    filled, alone = image_tasks.in_paint(mixture, y, seen)
    np.testing.assert_allclose(filled, np.einsum("nk,knd->nd", share, by_one), rtol=1e-8)
    np.testing.assert_allclose(alone, by_one[share.argmax(axis=1), [0, 1]], rtol=1e-8)


def test_images_are_cut_or_filled_around_their_centre() -> None:
    x = np.arange(12, dtype=np.uint8).reshape(1, 12)
    found = image_tasks.in_shape(x, (3, 4), (5, 2)).reshape(5, 2)
    assert found.tolist() == [[1, 2], [1, 2], [5, 6], [9, 10], [9, 10]]


def test_pictures_and_numbers_of_a_run(tmp_path: Path) -> None:
    rng, y = np.random.default_rng(0), np.arange(90) % 2
    x = rng.integers(0, 40, (90, 6, 6)) + 150 * (np.arange(6) < 2 + y[:, None, None])
    np.savez(tmp_path / "stripes.npz", x=x.astype(np.uint8), y=y)
    noisy = x.reshape(90, -1) + rng.uniform(size=(90, 36))
    mixture = cpmm.fit_em(noisy, 2, 1, noise_floor=1.0, max_iter=20).mixture
    save(tmp_path / "mixture.npz", cpmm.artifact.to_mixture(mixture, event_shape=(6, 6)))
    given = [str(tmp_path), "--set", "stripes", "--others", "stripes"]
    image_tasks.main([*given, "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")])
    for name in ("image_samples", "image_in_painting", "image_denoising"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes()[1:4] == b"PNG"
    text = (tmp_path / "out" / "image_tasks.json").read_text()
    numbers = json.loads(text)["data"]
    errors = numbers["errors"]
    assert errors["denoised"] < 0.5 * errors["noise"]
    assert errors["in-painting, all components"] < errors["in-painting, mean image"]
    assert numbers["areas"]["negatives"] == 1.0 and 0.3 < numbers["areas"]["stripes"] < 0.7
