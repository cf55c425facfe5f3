"""What a mixture of images is good for: pictures and numbers of one run.

    python -m experiments.image_tasks RUN --set mnist [--data-dir D] [--out FOLDER]

RUN is a folder that `cpmm fit` left, of a set of images with pixels 0..255. Of its test part, with
the mixture alone: samples of each class along pseudotime; in-painting of the lower half by its
conditional expectation given the upper half, under all components and under the likeliest alone;
denoising by the expectation of an image given the image and noise; and the area under the ROC curve
of log p against other images.

In-painting is `MFA.condition`. Denoising is Tweedie's formula (Robbins 1956; Miyasawa 1961),
E[x | y] = y + s^2 grad log p(y) for y = x + s e, where p is the density of y: `MFA.with_noise`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Float

from benchmarks.report import Report, Table
from cpmm_jax.artifact import Mixture, load, load_mixture
from cpmm_jax.data.dataset import split
from cpmm_jax.data.pixels import dequantise
from cpmm_jax.errors import DataError
from cpmm_jax.mixture.mfa import MFA
from cpmm_jax.plotting import num_times, plot_images, save_figure
from experiments.labels.sets import read_set

FOLDER = Path("bench_output") / "image_tasks"
COLUMNS, COUNT = 12, 500
NOISE = 64.0  # standard deviation, of grey levels
GREYS = (0.0, 255.0)

Images = npt.NDArray[np.floating]


def along_pseudotime(mixture: Mixture, rng: np.random.Generator, columns: int) -> Images:
    """Draw one example at each of `columns` times of every class's first trajectory.

    Returns:
        Shape (C, columns, D).
    """
    chosen = np.linspace(0, num_times(mixture) - 1, columns).round().astype(int)
    means, loadings, log_noise = (
        values[:, chosen] for values in (mixture.means, mixture.loadings, mixture.log_noise)
    )
    factors = rng.standard_normal((*loadings.shape[:2], loadings.shape[3], 1))
    noise = np.exp(0.5 * log_noise) * rng.standard_normal(means.shape)
    return means + (loadings @ factors)[..., 0] + noise


def in_paint(
    mixture: MFA, x: Float[Array, "N D"], seen: npt.NDArray[np.intp]
) -> tuple[Images, Images]:
    """Fill in what is not among the features `seen` by its conditional expectation.

    Returns:
        Under the mixture, and under the component alone that is likeliest given what is seen; each
        of the shape of x, with the seen features as they are.
    """
    rest = np.setdiff1d(np.arange(mixture.dim), seen)

    @jax.jit
    def fill(mixture: MFA, values: Array) -> tuple[Array, Array]:
        others = mixture.condition(seen, values)
        return others.mean(), others.means[jnp.argmax(others.logits)]

    filled = [np.array(x), np.array(x)]
    for i, row in enumerate(x):
        for image, values in zip(filled, fill(mixture, row[seen]), strict=True):
            image[i, rest] = values
    return filled[0], filled[1]


def denoise(mixture: MFA, y: Float[Array, "N D"], noise: float) -> Images:
    """Return E[x | y], (N, D), of x from the mixture, where y = x + e and e ~ N(0, noise^2 I)."""
    noisy = mixture.with_noise(noise**2)
    slope = jax.jit(jax.grad(lambda y, noisy: noisy.log_prob(y).sum()))
    return np.asarray(y + noise**2 * slope(y, noisy))


def in_shape(x: npt.NDArray[np.uint8], shape: Sequence[int], to: Sequence[int]) -> Images:
    """Return grey images of another size, cut or repeated at the edges around their centre.

    Args:
        x: shape (N, H W) or (N, H W channels).
        shape: (H, W) or (H, W, channels) of these.
        to: (H', W') wanted.

    Returns:
        Whole numbers, shape (N, H' W').
    """
    images = x.reshape(len(x), *shape[:2], -1).mean(axis=-1).round()
    for axis, (has, wants) in enumerate(zip(shape[:2], to[:2], strict=True), start=1):
        more, less = max(0, wants - has), max(0, has - wants)
        pad = [(more // 2, more - more // 2) if axis == i else (0, 0) for i in range(3)]
        images = np.pad(images, pad, mode="edge")
        images = np.take(images, np.arange(less // 2, less // 2 + wants), axis=axis)
    return images.reshape(len(x), -1)


def other_images(
    x: npt.NDArray[np.uint8],
    shape: Sequence[int],
    names: Sequence[str],
    rng: np.random.Generator,
    data_dir: Path | None,
) -> dict[str, Images]:
    """Return images of other kinds in the shape of these: made of them, and of other sets."""
    upright = x.reshape(len(x), *shape[:2])
    found: dict[str, Images] = {
        "negatives": 255.0 - x,
        "mirrored top to bottom": upright[:, ::-1].reshape(len(x), -1).astype(float),
        "lower and upper half of two": np.concatenate(
            [upright[:, : shape[0] // 2], np.roll(upright, 1, 0)[:, shape[0] // 2 :]], axis=1
        ).reshape(len(x), -1),
        "pixels in another order": rng.permuted(x, axis=1),
    }
    for name in names:
        data = read_set(name, data_dir)
        assert data.event_shape is not None
        rows = rng.permutation(len(data.x_train))[:COUNT]
        found[name] = in_shape(data.x_train[rows], data.event_shape, shape)
    return found


def area_under_curve(inside: npt.NDArray[np.floating], outside: npt.NDArray[np.floating]) -> float:
    """Return how often an inlier has the higher score of a pair."""
    from sklearn.metrics import roc_auc_score

    truth = np.repeat([1, 0], [len(inside), len(outside)])
    return float(roc_auc_score(truth, np.concatenate([inside, outside])))


def spread(found: Images, truth: Images) -> float:
    """Return the root mean square difference."""
    return float(np.sqrt(np.mean((found - truth) ** 2)))


def study(run: Path, name: str, others: Sequence[str], data_dir: Path | None, out: Path) -> Report:
    """Draw the pictures of a run, and return its numbers."""
    light, rng = load(run / "mixture.npz"), np.random.default_rng(0)
    mixture, shape = load_mixture(run / "mixture.npz").flatten(), light.event_shape
    if shape is None or len(shape) not in (2, 3) or (*shape, 1)[2] != 1:
        raise DataError(f"{run}: the run must be of grey images; got examples of shape {shape}.")
    data = split(read_set(name, data_dir), seed=0, test_fraction=0.2)
    rows = rng.permutation(len(data.x_test))[:COUNT]
    recorded = data.x_test[rows]
    x = jnp.asarray(dequantise(rng, recorded), jnp.float32)
    truth, shown = np.asarray(x), slice(COLUMNS)

    def tiles(*kinds: Images) -> Images:
        return np.stack([kind[shown].reshape(-1, *shape[:2]) for kind in kinds])

    drawn = along_pseudotime(light, rng, COLUMNS)
    names = light.class_names or tuple(map(str, range(light.num_classes)))
    pictures = {
        "image_samples.png": plot_images(
            drawn.reshape(*drawn.shape[:2], *shape[:2]), names=names, limits=GREYS
        )
    }

    seen = np.arange(light.dim // shape[0] * (shape[0] // 2))
    hidden = truth.copy()
    hidden[:, len(seen) :] = np.nan
    filled, alone = in_paint(mixture, x, seen)
    pictures["image_in_painting.png"] = plot_images(
        tiles(hidden, filled, alone, truth),
        names=("seen", "expected", "one component", "truth"),
        limits=GREYS,
    )
    noisy = truth + NOISE * rng.standard_normal(truth.shape)
    cleaned = denoise(mixture, jnp.asarray(noisy, jnp.float32), NOISE)
    pictures["image_denoising.png"] = plot_images(
        tiles(noisy, cleaned, truth), names=("noisy", "expected", "truth"), limits=GREYS
    )
    for file, ax in pictures.items():
        print(f"written: {save_figure(ax, out / file)}")

    mean, below = np.asarray(mixture.mean()), slice(len(seen), None)
    errors = {
        "in-painting, mean image": spread(mean[None, below], truth[:, below]),
        "in-painting, likeliest component": spread(alone[:, below], truth[:, below]),
        "in-painting, all components": spread(filled[:, below], truth[:, below]),
        "noise": spread(noisy, truth),
        "denoised": spread(cleaned, truth),
    }

    def scores(images: Images) -> npt.NDArray[np.floating]:
        noised = jnp.asarray(dequantise(rng, images.astype(np.uint8)), jnp.float32)
        return np.asarray(mixture.log_prob(noised), np.float64)

    inside = scores(recorded)
    areas = {
        kind: area_under_curve(inside, scores(images))
        for kind, images in other_images(recorded, shape, others, rng, data_dir).items()
    }
    tables = [
        Table(
            f"Root mean square error on {len(x)} test images of {name}, grey levels",
            ("", "error"),
            [(kind, f"{error:.1f}") for kind, error in errors.items()],
        ),
        Table(
            f"Area under the ROC curve of log p, {name} against other images",
            ("", "area"),
            [(kind, f"{area:.3f}") for kind, area in areas.items()],
        ),
    ]
    return Report("image_tasks", tables, {"errors": errors, "areas": areas})


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, print the tables and write them."""
    parser = argparse.ArgumentParser(prog="python -m experiments.image_tasks")
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder that cpmm fit left")
    parser.add_argument("--set", required=True, dest="name", help="what RUN was fitted to")
    parser.add_argument("--others", default="", help="sets of outliers, separated by commas")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args(argv)
    others = [name for name in given.others.split(",") if name]
    report = study(given.run, given.name, others, given.data_dir, given.out)
    for table in report.tables:
        print(f"\n{table}")
    report.write(given.out)


if __name__ == "__main__":
    main()
