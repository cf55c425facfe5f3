"""What the estimators have in common: their input, and what can be told of new rows."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin, ClusterMixin, DensityMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from cpmm_jax import artifact
from cpmm_jax.errors import ConfigError, DataError, DataWarning

UNKNOWN = -1  # the label of a row whose class is not known

Array = npt.NDArray[Any]
MOST_CLUSTERS = 30  # among which n_clusters="auto" chooses


class Rows(NamedTuple):
    """Distinct training rows.

    Attributes:
        x: shape (N, D), float64.
        y: class codes, -1 where not known, shape (N,); None for a density or clusters.
        weight: for how many rows each stands, shape (N,).
        num_classes: C, of the labels or clusters.
        clusters: whether there are clusters to find.
    """

    x: Array
    y: Array | None
    weight: Array
    num_classes: int = 1
    clusters: bool = False

    @property
    def total(self) -> int:
        """Rows that these stand for."""
        return max(len(self.x), round(float(self.weight.sum())))


class Found(NamedTuple):
    """What a fit leaves: a mixture in the units of the data, and how it went."""

    mixture: artifact.Mixture
    n_iter: int
    converged: bool
    fitted: Any  # for a warm start


def distinct(x: Array, codes: Array | None, sample_weight: Array) -> Rows:
    """Return each different row once, with the weight of all its copies; without those of none.

    Raises:
        DataError: a weight is negative.
    """
    if sample_weight.min() < 0:
        raise DataError(
            f"`sample_weight` must be at least 0; got {sample_weight.min():g}; give 0 to rows that "
            "do not count."
        )
    table: Array = x if codes is None else np.column_stack([x, codes])
    kept, own = table[sample_weight > 0], sample_weight[sample_weight > 0]
    unique, inverse = np.unique(kept, axis=0, return_inverse=True)
    weight = np.bincount(np.ravel(inverse), own, len(unique))
    weight *= max(1.0, len(unique) / weight.sum())  # they count rows, unless they are relative
    if codes is None:
        return Rows(unique, None, weight)
    return Rows(np.ascontiguousarray(unique[:, :-1]), unique[:, -1].astype(np.int64), weight)


class Estimator(BaseEstimator):  # type: ignore[misc]
    """What all have in common: the input, the fit, and what can be told of new rows."""

    mixture_: artifact.Mixture

    def _train(self, rows: Rows, seed: int, begin: Any) -> Found:
        raise NotImplementedError

    def _validated(self, x: Any, y: Any, sample_weight: Any) -> tuple[Array, Any, Array]:
        settings: dict[str, Any] = {"dtype": np.float64, "ensure_min_samples": 2}
        if y is None:
            x = validate_data(self, x, **settings)
        else:
            x, y = validate_data(self, x, y, **settings)
        return x, y, _check_sample_weight(sample_weight, x, dtype=np.float64)

    def _fit(self, rows: Rows) -> None:
        if not isinstance(self.n_init, int | np.integer) or self.n_init < 1:
            raise ConfigError(f"`n_init` must be a whole number, at least 1; got {self.n_init!r}.")
        begin = getattr(self, "_fitted", None) if self.warm_start else None
        found = self._train(rows, draw_seed(self.random_state), begin)
        if not found.converged:
            warnings.warn(
                f"{type(self).__name__} had not converged after {found.n_iter} iterations; "
                "raise `max_iter`.",
                ConvergenceWarning,
                stacklevel=3,
            )
        self.mixture_, self._fitted = found.mixture, found.fitted
        self.n_iter_, self.converged_ = max(1, found.n_iter), found.converged

    def _read(self, x: Any) -> Array:
        check_is_fitted(self)
        return np.asarray(validate_data(self, x, reset=False, dtype=(np.float64, np.float32)))

    def score_samples(self, X: Any) -> Array:
        """Return log p(x) of each row, in nats in the units given, shape (N,)."""
        x = self._read(X)
        return self.mixture_.log_prob(x)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the trained model: what predicts is the mixture."""
        return {key: value for key, value in super().__getstate__().items() if key != "_fitted"}


def draw_seed(random_state: Any) -> int:
    """Return a seed from what scikit-learn takes for one; others may be counted on from it."""
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max // 2))


def in_units(fitted: Any) -> artifact.Mixture:
    """Return the light mixture in the units of the data, whose digits float32 might not hold."""
    standardizer = fitted.standardizer
    light = artifact.to_mixture(fitted.standardized)
    return light.affine(standardizer.scale, standardizer.shift)


class Density(DensityMixin, Estimator):  # type: ignore[misc]
    """What tells how likely rows are."""

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Density:
        """Fit the density of rows X, shape (N, D); `y` is not used.

        Args:
            X: training rows.
            y: not used.
            sample_weight: for how many rows each stands, shape (N,).
        """
        x, _, weight = self._validated(X, None, sample_weight)
        self._fit(distinct(x, None, weight))
        return self

    def score(self, X: Any, y: Any = None) -> float:
        """Return the mean of log p(x), in nats in the units given."""
        return float(np.mean(self.score_samples(X)))

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Array:
        """Draw rows, shape (n_samples, D)."""
        check_is_fitted(self)
        return self.mixture_.sample(np.random.default_rng(draw_seed(random_state)), n_samples)


class Classifier(ClassifierMixin, Estimator):  # type: ignore[misc]
    """What tells classes apart by Bayes' rule."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Classifier:
        """Fit a mixture to every class, and to rows without one by the classes they may be of.

        Args:
            X: training rows, shape (N, D).
            y: their labels, of any type; -1 marks a row whose class is not known, where there are
                two other classes or more.
            sample_weight: for how many rows each stands, shape (N,).
        """
        if y is None:
            raise DataError(
                f"{type(self).__name__} requires y to be passed, but the target y is None; give "
                "the labels of the rows."
            )
        x, y, weight = self._validated(X, y, sample_weight)
        check_classification_targets(y)
        known = weight > 0
        unknown = np.zeros(len(y), np.bool_)
        if y.dtype.kind in "if" and len(np.unique(y[known & (y != UNKNOWN)])) >= 2:
            unknown = y == UNKNOWN
        classes = np.unique(y[known & ~unknown])
        codes = np.where(unknown, UNKNOWN, np.searchsorted(classes, y).clip(0, len(classes) - 1))
        rows = distinct(x, codes, weight)
        assert rows.y is not None
        counts = np.bincount(rows.y[rows.y >= 0], rows.weight[rows.y >= 0], len(classes))
        if counts.min() < 2:
            raise DataError(
                f"`y` must give every class two examples or more; got {counts.min():g} of class "
                f"{classes[np.argmin(counts)]!r}; leave that class out, or find more of it."
            )
        self.classes_ = classes
        self._fit(rows._replace(num_classes=len(classes)))
        return self

    def predict_proba(self, X: Any) -> Array:
        """Return p(class | x) by Bayes' rule, shape (N, C), in the order of `classes_`."""
        x = self._read(X)
        return self.mixture_.predict_proba(x)

    def predict_log_proba(self, X: Any) -> Array:
        """Return log p(class | x), shape (N, C)."""
        x = self._read(X)
        joint = self.mixture_.class_log_prob(x)
        return joint - np.logaddexp.reduce(joint, axis=1, keepdims=True)

    def predict(self, X: Any) -> Array:
        """Return the most probable class of each row, shape (N,)."""
        x = self._read(X)
        return self.classes_[np.argmax(self.mixture_.class_log_prob(x), axis=1)]


class Cluster(ClusterMixin, Estimator):  # type: ignore[misc]
    """What finds clusters."""

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Cluster:
        """Find clusters among rows X, shape (N, D); `y` is not used.

        Args:
            X: training rows.
            y: not used.
            sample_weight: for how many rows each stands, shape (N,).
        """
        x, _, weight = self._validated(X, None, sample_weight)
        rows = distinct(x, None, weight)
        self._fit(rows._replace(num_classes=self._count(rows), clusters=True))
        codes = np.argmax(self.mixture_.class_log_prob(x), axis=1)
        kept, self.labels_ = np.unique(codes, return_inverse=True)
        if len(kept) < self.mixture_.num_classes:
            warnings.warn(
                f"{self.mixture_.num_classes - len(kept)} of {self.mixture_.num_classes} clusters "
                "hold no row and were left out; ask for fewer.",
                DataWarning,
                stacklevel=2,
            )
            self.mixture_ = self.mixture_.classes(kept)
        self.n_clusters_ = len(kept)
        return self

    def _count(self, rows: Rows) -> int:
        """Return the number of clusters, of which BIC decides where it is "auto"."""
        count = self.n_clusters
        if count == "auto":
            from cpmm_jax.direct_pipeline import count_clusters

            settings: Any = {"most": MOST_CLUSTERS, "seed": draw_seed(self.random_state)}
            return count_clusters(rows.x, weight=rows.weight, **settings)
        if not isinstance(count, int | np.integer) or not 1 <= count <= rows.total:
            raise ConfigError(
                f"`n_clusters` must be 'auto' or a whole number from 1 to {rows.total}, the "
                f"number of rows; got {count!r}; ask for fewer."
            )
        if count > len(rows.x):
            warnings.warn(
                f"{len(rows.x)} rows are different, and `n_clusters` is {count}; there will be as "
                "many clusters as different rows.",
                DataWarning,
                stacklevel=3,
            )
        return min(int(count), len(rows.x))

    def predict_proba(self, X: Any) -> Array:
        """Return p(cluster | x), shape (N, C)."""
        x = self._read(X)
        return self.mixture_.predict_proba(x)

    def predict(self, X: Any) -> Array:
        """Return the most probable cluster of each row, shape (N,)."""
        x = self._read(X)
        return np.argmax(self.mixture_.class_log_prob(x), axis=1)
