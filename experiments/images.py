"""Images: how well do mixtures describe them, and tell their classes apart?

    python -m experiments.images [--sets A,B] [--methods C,D] [--seeds 3] [--steps N] [--jobs 2]

Every mixture has the same components and factors (`SIZES`), for each class where there are labels.
`em` is a mixture of factor analyzers by EM for each class; `direct` the same parameters by
gradient, from k-means, for as many steps as the CPMM; `cpmm` the recipe's; `cpmm_interpolant` the
same along a curriculum; `cpmm_classifier` with most of log p(x) taken away from the objective;
`pca_gmm` full covariances on 64 principal components, for each class, which has no density of
images. Scored once on the test part: bits per dimension of the dequantised pixels (nats for each
dimension where pixels are no whole numbers), accuracy by Bayes' rule, and NDB and JS of as many
samples as there are training images, at most 10,000, in 100 bins. Cells that are done are not run
again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cpmm_jax as cpmm
from benchmarks.provenance import provenance
from benchmarks.report import Report, Table
from cpmm_jax.bins import Bins
from cpmm_jax.data import AffinePixels, bits_per_dimension
from cpmm_jax.data.dataset import Dataset, Part, split
from cpmm_jax.data.pixels import are_recorded, noise_of
from cpmm_jax.data.standardise import Standardizer
from cpmm_jax.errors import DataError
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.mixture.mfa import MFA
from cpmm_jax.models.direct import DirectMFA
from cpmm_jax.pipeline import fit_mixture
from cpmm_jax.recipe import image_shape, recommend
from experiments.ablation import shown
from experiments.compare.cells import Cell, Record, Settings, is_done, read
from experiments.compare.runner import run_cells
from experiments.labels.sets import read_set

OUTPUT = Path("bench_output") / "images"
METHODS = ("em", "direct", "cpmm", "cpmm_interpolant", "cpmm_classifier", "pca_gmm")
METRICS = ("bits_per_dimension", "accuracy", "ndb", "js")
STEPS = 4000
MOST_BINNED = 10_000  # images
BLOCK = 1000  # images scored at a time
PCA_DIM, PCA_COMPONENTS = 64, 8


class Size(NamedTuple):
    """Trajectories of each class (of all without labels), times of each, and factors."""

    trajectories: int
    times: int
    rank: int


SIZES = {
    "mnist": Size(1, 50, 6),
    "cifar10_sub": Size(2, 5, 6),
    "coil20": Size(1, 10, 4),
    "frey_faces": Size(8, 5, 6),
}


@dataclass(frozen=True)
class Images:
    """A set in three parts, and the map to standardised units.

    Attributes:
        data: recorded pixels, or what there is.
        standardizer: one shift and scale for all pixels.
        recorded: whether pixels are whole numbers, to be dequantised.
        size: of the mixtures.
    """

    data: Dataset
    standardizer: Standardizer
    recorded: bool
    size: Size

    @property
    def pixels(self) -> AffinePixels:
        """The same map for recorded pixels."""
        return AffinePixels(float(self.standardizer.shift[0]), float(self.standardizer.scale[0]))

    @property
    def floor(self) -> np.ndarray:
        """Smallest noise variance in standardised units, (D,)."""
        return self.standardizer.noise_floor()

    def standardized(self, part: Part, seed: int) -> np.ndarray:
        """Return a part in standardised units, float32, recorded pixels with noise."""
        x = self.data.part(part)[0]
        assert x is not None
        if self.recorded:
            return self.pixels.carry(noise_of(seed, part), x)
        return np.asarray(self.standardizer.transform(x), np.float32)


def image_set(name: str, seed: int, *, data_dir: Path | None = None) -> Images:
    """Return a set by name; what lacks a part gives 20 and 10 % of its rows by seed."""
    data = split(read_set(name, data_dir), seed=seed, valid_fraction=0.1, test_fraction=0.2)
    if image_shape(data.event_shape) is None:
        raise DataError(f"{name!r} must hold images; got examples of shape {data.event_shape}.")
    recorded = are_recorded(data.x_train)
    standardizer = Standardizer.fit_images(data.x_train, recorded=recorded)
    return Images(data, standardizer, recorded, SIZES[name])


def by_em(images: Images, seed: int, _: int) -> HierarchicalMFA:
    """Fit by EM, class by class."""
    return _per_class(images, seed, lambda z, count, rank: _em(images, z, count, rank, seed))


def _em(images: Images, z: np.ndarray, count: int, rank: int, seed: int) -> MFA:
    settings: Any = {"noise_floor": images.floor, "max_iter": 100, "seed": seed}
    return cpmm.fit_em(z, count, rank, **settings).mixture


def by_gradient(images: Images, seed: int, steps: int) -> HierarchicalMFA:
    """Train free parameters from k-means, for as many steps."""

    def begin(z: np.ndarray, count: int, rank: int) -> MFA:
        return cpmm.kmeans_start(z, count, rank, noise_floor=2 * images.floor, seed=seed)

    start = _per_class(images, seed, begin)
    model = DirectMFA.from_mixture(start, noise_floor=images.floor)
    data = images.data
    x, x_valid = data.x_train, data.x_valid
    given: Any = {"pixels": images.pixels}
    if not images.recorded:
        x, x_valid = images.standardized("train", seed), images.standardized("valid", seed)
        given = {}
    config = cpmm.TrainConfig(steps=steps, num_times=1, patience=10, seed=seed)
    parts: Any = {"x_valid": x_valid, "y_valid": data.y_valid, "progress": False, **given}
    return cpmm.fit(model, x, data.y_train, config=config, **parts).model.extract()


def _per_class(images: Images, seed: int, fit: Any) -> HierarchicalMFA:
    z, y = images.standardized("train", seed), images.data.y_train
    rows = [np.arange(len(z))] if y is None else [np.flatnonzero(y == c) for c in np.unique(y)]
    size = images.size
    found = [fit(z[own], size.trajectories * size.times, size.rank) for own in rows]
    weights = jnp.log(jnp.array([len(own) / len(z) for own in rows], found[0].means.dtype))
    return HierarchicalMFA(weights, jax.tree.map(lambda *leaves: jnp.stack(leaves), *found))


def by_trajectories(
    images: Images, seed: int, steps: int, *, curriculum: str = "none", discriminative: float = 0.0
) -> HierarchicalMFA:
    """Fit a CPMM by its recipe."""
    data, size = images.data, images.size
    classes = 1 if data.y_train is None else int(data.y_train.max()) + 1
    recipe = recommend(
        len(data.x_train),
        data.dim,
        classes,
        labelled=data.y_train is not None,
        components=classes * size.trajectories * size.times,
        trajectories=size.trajectories,
        rank=size.rank,
        steps=steps,
        curriculum=curriculum,
        discriminative=discriminative if classes > 1 else 0.0,
        event_shape=data.event_shape,
        dequantise=images.recorded,
        seed=seed,
    )
    parts = (data.x_train, data.y_train, data.x_valid, data.y_valid)
    return fit_mixture(*parts, recipe, progress=False).standardized


FITS: dict[str, Any] = {
    "em": by_em,
    "direct": by_gradient,
    "cpmm": by_trajectories,
    "cpmm_interpolant": partial(by_trajectories, curriculum="interpolant"),
    "cpmm_classifier": partial(by_trajectories, discriminative=0.9),
}


def measure(cell: Cell, method: str, images: Images) -> Record:
    """Fit one cell and score it on the test part, once."""
    start = time.perf_counter()
    if method == "pca_gmm":
        metrics: dict[str, float | None] = {"accuracy": _by_components(images, cell.seed)}
        seconds = time.perf_counter() - start
    else:
        mixture = FITS[method](images, cell.seed, cell.settings.steps)
        seconds = time.perf_counter() - start
        metrics = scores(mixture, images, cell.seed)
    return {
        "config": cell.config,
        "status": "done",
        "metrics": {**metrics, "seconds": seconds},
        "provenance": provenance(),
    }


def scores(mixture: HierarchicalMFA, images: Images, seed: int) -> dict[str, float | None]:
    """Return bits per dimension, accuracy, and how samples fill the bins of the training part."""
    data, scale = images.data, float(images.standardizer.scale[0])
    z = images.standardized("test", seed)
    joint = np.concatenate(
        [np.asarray(mixture.class_log_prob(z[i : i + BLOCK])) for i in range(0, len(z), BLOCK)]
    ).astype(np.float64)
    nats = np.logaddexp.reduce(joint, axis=1).mean() - data.dim * np.log(scale)
    bits = bits_per_dimension(nats, data.dim) if images.recorded else nats / data.dim
    found: dict[str, float | None] = {"bits_per_dimension": float(bits)}
    if data.y_test is not None:
        found["accuracy"] = float(np.mean(joint.argmax(axis=1) == data.y_test))
    rows = np.random.default_rng(seed).permutation(len(data.x_train))[:MOST_BINNED]
    bins = Bins.fit(images.standardized("train", seed)[rows], seed=seed)
    filled = bins.score(np.asarray(mixture.sample(jax.random.key(seed), len(rows))))
    return {**found, "ndb": filled.ndb, "js": filled.js}


def _by_components(images: Images, seed: int) -> float | None:
    """Return the accuracy of Gaussian mixtures on principal components, one for each class."""
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    data = images.data
    if data.y_train is None:
        return None
    axes = PCA(PCA_DIM, random_state=seed).fit(images.standardized("train", seed))
    train = axes.transform(images.standardized("train", seed))
    test = axes.transform(images.standardized("test", seed))
    joint = []
    for c in np.unique(data.y_train):
        rows = train[data.y_train == c]
        count = max(1, min(PCA_COMPONENTS, len(rows) // PCA_DIM))
        own = GaussianMixture(count, reg_covar=1e-2, random_state=seed).fit(rows)
        joint.append(own.score_samples(test) + np.log(len(rows) / len(train)))
    return float(np.mean(np.argmax(joint, axis=0) == data.y_test))


def method_of(cell: Cell) -> str:
    """Return the method that a cell names."""
    return cell.method


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cells that are not done and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m experiments.images")
    parser.add_argument("--sets", default=",".join(SIZES), help="separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="by gradient")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=OUTPUT)
    given = parser.parse_args(argv)
    sets, methods = given.sets.split(","), given.methods.split(",")
    settings = Settings("images", 0.0, steps=given.steps)
    cells = {
        (dataset, method, seed): Cell(dataset, method, seed, settings)
        for seed in range(given.seeds)
        for dataset in sets
        for method in methods
    }
    load = partial(image_set, data_dir=given.data_dir)
    run_cells(list(cells.values()), given.out, method_of, load, jobs=given.jobs, measure=measure)
    records = {key: read(given.out, cell) for key, cell in cells.items()}
    tables, numbers = [], {}
    for metric in METRICS:
        rows = []
        for dataset in sets:
            entries = []
            for method in methods:
                values = [
                    record["metrics"].get(metric)
                    for seed in range(given.seeds)
                    if is_done(record := records[dataset, method, seed]) and record is not None
                ]
                known = [value for value in values if value is not None]
                numbers[f"{dataset}/{method}/{metric}"] = known
                entries.append(shown(known, signed=False))
            rows.append((dataset, *entries))
        title = f"{metric.replace('_', ' ')}, mean ± 95 % interval"
        tables.append(Table(title, ("", *methods), rows))
        print(f"\n{tables[-1]}")
    Report("images", tables, numbers).write(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
