"""Estimators by CPMM."""

from __future__ import annotations

from typing import Any

from cpmm_jax.estimators.base import Classifier, Cluster, Density, Estimator, Found, Rows, in_units


class _Continuous(Estimator):
    """Fit by a CPMM."""

    discriminative = 0.0

    def __init__(
        self,
        n_components: int | None = None,
        *,
        n_trajectories: int | None = None,
        rank: int | None = None,
        curriculum: str | None = None,
        max_iter: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        n_init: int = 1,
        warm_start: bool = False,
        verbose: bool = False,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.n_trajectories = n_trajectories
        self.rank = rank
        self.curriculum = curriculum
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.n_init = n_init
        self.warm_start = warm_start
        self.verbose = verbose
        self.random_state = random_state

    def _train(self, rows: Rows, seed: int, begin: Any) -> Found:
        from cpmm_jax.pipeline import fit_mixture
        from cpmm_jax.recipe import recommend

        of_each = self.n_components
        best: Any = None
        for i in range(1 if begin is not None else self.n_init):
            recipe = recommend(
                len(rows.x),
                rows.x.shape[1],
                rows.num_classes,
                labelled=rows.y is not None,
                clusters=rows.num_classes if rows.clusters else None,
                components=None if of_each is None else of_each * rows.num_classes,
                trajectories=self.n_trajectories,
                rank=self.rank,
                steps=self.max_iter,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                discriminative=self.discriminative,
                curriculum=self.curriculum,
                seed=seed + i,
            )
            fitted = fit_mixture(
                rows.x,
                rows.y,
                None,
                None,
                recipe,
                weight=rows.weight,
                begin=begin,
                progress=bool(self.verbose),
            )
            score = fitted.result.best_score
            if best is None or (score is not None and score > best.result.best_score):
                best = fitted
        result = best.result
        return Found(in_units(best), result.steps, result.converged, best)


class CPMMDensity(Density, _Continuous):
    """The density of a table, as a mixture read off trajectories that share one field.

    Args:
        n_components: components, of each class or cluster where there are such; None for a number
            that follows from the rows and features.
        n_trajectories: trajectories among which they divide.
        rank: factors of a component, R.
        curriculum: "none", "interpolant" or "flow": a map to a Gaussian along which to train first;
            None for what suits the length of the trajectories.
        max_iter: training steps.
        batch_size: rows in a step.
        learning_rate: highest learning rate.
        n_init: fits from different starts, the best of which by validation is kept.
        warm_start: whether `fit` goes on from the last fit, in the same sizes and along no
            curriculum; not after loading.
        verbose: whether to show progress.
        random_state: seed of everything random.

    Attributes:
        mixture_: the components, in the units of the data: an `artifact.Mixture`.
        n_iter_: training steps done.
        converged_: whether the last tenth of them gained less than 0.01 nats by validation.
        n_features_in_: D.
        feature_names_in_: names of the columns, where X had any.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(200, 2)) * [1.0, 100.0]
        >>> density = CPMMDensity(n_trajectories=1, max_iter=400, random_state=0).fit(x)
        >>> density.score_samples(x).shape, density.sample(3, random_state=0).shape
        ((200,), (3, 2))

    Source: CPMM paper, section 3.1.
    """


class CPMMClassifier(Classifier, _Continuous):
    """Every class a mixture read off trajectories of one field; told apart by Bayes' rule.

    Args:
        n_components: of each class; this and the others as for `CPMMDensity`.
        discriminative: the share of log p(x) that is taken from the objective log p(x, y), in
            [0, 1]. Without it, what `score_samples` and `sample` tell of the rows of a class is
            better; with most of it, `predict_proba` is, and rows without a label count as much
            less as is taken away.

    Attributes:
        classes_: the labels, in the order of the columns of `predict_proba`; others as for
            `CPMMDensity`.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(200, 2))
        >>> y = np.where(x[:, 0] > 0, "right", "left")
        >>> model = CPMMClassifier(max_iter=400, random_state=0).fit(x, y)
        >>> model.predict([[-2.0, 0.0], [2.0, 0.0]]).tolist()
        ['left', 'right']

    Source: CPMM paper, section 3.2; Bouchard and Triggs, "The tradeoff between generative and
    discriminative classifiers" (2004).
    """

    def __init__(
        self,
        n_components: int | None = None,
        *,
        n_trajectories: int | None = None,
        rank: int | None = None,
        discriminative: float = 0.9,
        curriculum: str | None = None,
        max_iter: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        n_init: int = 1,
        warm_start: bool = False,
        verbose: bool = False,
        random_state: Any = None,
    ) -> None:
        super().__init__(
            n_components,
            n_trajectories=n_trajectories,
            rank=rank,
            curriculum=curriculum,
            max_iter=max_iter,
            batch_size=batch_size,
            learning_rate=learning_rate,
            n_init=n_init,
            warm_start=warm_start,
            verbose=verbose,
            random_state=random_state,
        )
        self.discriminative = discriminative


class CPMMCluster(Cluster, _Continuous):
    """Every cluster a mixture read off trajectories of one field.

    The graph of nearest neighbours is cut into clusters, or k-means finds them where it does not
    fall apart (see `mixture.grouping`); a CPMM with a class for each is trained on
    log p(x, cluster), and Bayes' rule says of which one a row is.

    Args:
        n_clusters: a number, or "auto" for what the Bayesian information criterion finds.
        n_components: of each cluster; this and the others as for `CPMMDensity`.

    Attributes:
        labels_: the cluster of each training row.
        n_clusters_: clusters that hold a row.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(60, 2)) + 9 * (np.arange(60)[:, None] // 30)
        >>> clusters = CPMMCluster(2, max_iter=400, random_state=0).fit(x)
        >>> sorted(np.bincount(clusters.labels_).tolist())
        [30, 30]

    Source: CPMM paper, section 3.2.
    """

    def __init__(
        self,
        n_clusters: int | str = 8,
        *,
        n_components: int | None = None,
        n_trajectories: int | None = None,
        rank: int | None = None,
        curriculum: str | None = None,
        max_iter: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        n_init: int = 1,
        warm_start: bool = False,
        verbose: bool = False,
        random_state: Any = None,
    ) -> None:
        super().__init__(
            n_components,
            n_trajectories=n_trajectories,
            rank=rank,
            curriculum=curriculum,
            max_iter=max_iter,
            batch_size=batch_size,
            learning_rate=learning_rate,
            n_init=n_init,
            warm_start=warm_start,
            verbose=verbose,
            random_state=random_state,
        )
        self.n_clusters = n_clusters
