"""Estimators by EM, or by gradient with free parameters."""

from __future__ import annotations

from typing import Any

from cpmm_jax.estimators.base import Classifier, Cluster, Density, Estimator, Found, Rows, in_units


class _Direct(Estimator):
    """Fit by EM or by gradient, with free parameters."""

    def __init__(
        self,
        n_components: int | None = None,
        *,
        rank: int | None = None,
        method: str = "em",
        max_iter: int | None = None,
        tol: float = 1e-4,
        n_init: int = 3,
        validation_fraction: float = 0.15,
        warm_start: bool = False,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.rank = rank
        self.method = method
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.validation_fraction = validation_fraction
        self.warm_start = warm_start
        self.random_state = random_state

    def _train(self, rows: Rows, seed: int, begin: Any) -> Found:
        from cpmm_jax.direct_pipeline import DirectSettings, fit_direct
        from cpmm_jax.recipe import default_rank

        rank = self.rank
        if rank is None:
            rank = default_rank(len(rows.x) / rows.num_classes, rows.x.shape[1])
        settings = DirectSettings(
            components=getattr(self, "n_components", None),  # a clustering has its own
            rank=rank,
            method=self.method,
            max_iter=self.max_iter,
            tol=self.tol,
            n_init=self.n_init,
            valid_fraction=self.validation_fraction,
            seed=seed,
        )
        fitted = fit_direct(
            rows.x,
            rows.y,
            rows.num_classes,
            settings,
            weight=rows.weight,
            clusters=rows.clusters,
            begin=begin,
        )
        return Found(in_units(fitted), fitted.iterations, fitted.converged, fitted)


class MFADensity(Density, _Direct):
    """The density of a table, as a mixture of factor analyzers.

    Args:
        n_components: K, of each class; None for a number that validation chooses.
        rank: factors of a component, R.
        method: "em", or "gradient".
        max_iter: most iterations of EM (200), or training steps (3,000).
        tol: gain in nats below which EM stops.
        n_init: starts of EM, the likeliest of which is kept.
        validation_fraction: part of the rows that chooses the number of components and how much
            noise to add, before all are fitted; 0 to choose nothing.
        warm_start: whether `fit` goes on from the last fit; not after loading.
        random_state: seed of everything random.

    Attributes:
        mixture_: the components, in the units of the data: an `artifact.Mixture`.
        n_iter_: iterations, the most of any class.
        converged_: whether they ended by `tol`.
        n_features_in_: D.
        feature_names_in_: names of the columns, where X had any.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(200, 2)) * [1.0, 100.0]
        >>> MFADensity(1, rank=1, random_state=0).fit(x).mixture_.means.shape
        (1, 1, 2)

    Source: Ghahramani and Hinton, "The EM Algorithm for Mixtures of Factor Analyzers" (1996).
    """


class MFAClassifier(Classifier, _Direct):
    """A mixture of factor analyzers for every class, told apart by Bayes' rule.

    Args and attributes as for `MFADensity`, and `classes_`.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(200, 2))
        >>> MFAClassifier(1, random_state=0).fit(x, x[:, 0] > 0).predict([[2.0, 0.0]]).tolist()
        [True]
    """


class MFACluster(Cluster, _Direct):
    """A factor analyzer for every cluster.

    Args:
        n_clusters: a number, or "auto" for what the Bayesian information criterion finds.
        rank: as for `MFADensity`, and so are the others.

    Attributes:
        labels_: the cluster of each training row.
        n_clusters_: clusters that hold a row.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(60, 2)) + 9 * (np.arange(60)[:, None] // 30)
        >>> sorted(np.bincount(MFACluster(2, random_state=0).fit_predict(x)).tolist())
        [30, 30]
    """

    def __init__(
        self,
        n_clusters: int | str = 8,
        *,
        rank: int | None = None,
        method: str = "em",
        max_iter: int | None = None,
        tol: float = 1e-4,
        n_init: int = 10,
        validation_fraction: float = 0.15,
        warm_start: bool = False,
        random_state: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.rank = rank
        self.method = method
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.validation_fraction = validation_fraction
        self.warm_start = warm_start
        self.random_state = random_state
