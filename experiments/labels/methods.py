"""The methods: ours, Gaussian mixtures, and, as context, those that only tell classes apart."""

from __future__ import annotations

from typing import Any

import numpy as np

CLASSIFIERS = ("gmm", "qda", "mfa", "cpmm", "boosting", "svm")
CLUSTERERS = ("kmeans", "gmm", "mfa", "cpmm", "spectral", "hdbscan")
OURS = ("mfa", "cpmm")  # take rows without a label
GAUSSIAN = ("gmm", "qda", "mfa")
FOLDS = 3


def make_classifier(name: str, seed: int, y: np.ndarray) -> Any:
    """Return an estimator with `fit` and `predict_proba`, settings by cross-validation within."""
    from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    import cpmm_jax as cpmm
    from experiments.labels.mixture_per_class import MixturePerClass

    folds = StratifiedKFold(
        max(2, min(FOLDS, int(np.bincount(y[y >= 0]).min()))), shuffle=True, random_state=seed
    )

    def searched(model: Any, grid: dict[str, Any]) -> Any:
        return GridSearchCV(make_pipeline(StandardScaler(), model), grid, cv=folds)

    match name:
        case "gmm":
            return make_pipeline(StandardScaler(), MixturePerClass(seed))
        case "qda":
            grid = {"quadraticdiscriminantanalysis__reg_param": (0.01, 0.03, 0.1, 0.3, 0.9)}
            return searched(QuadraticDiscriminantAnalysis(), grid)
        case "mfa":
            return cpmm.MFAClassifier(random_state=seed)
        case "cpmm":
            return cpmm.CPMMClassifier(random_state=seed)
        case "boosting":
            return HistGradientBoostingClassifier(random_state=seed)
        case "svm":
            grid = {"svc__C": (1.0, 10.0, 100.0), "svc__gamma": ("scale", 0.03, 0.3)}
            return searched(SVC(probability=True, random_state=seed), grid)
    raise ValueError(f"`name` must be one of {', '.join(CLASSIFIERS)}; got {name!r}")


def cluster(name: str, x: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return clusters of rows (N,); HDBSCAN finds their number itself."""
    from sklearn.cluster import HDBSCAN, KMeans, SpectralClustering
    from sklearn.mixture import GaussianMixture
    from sklearn.preprocessing import StandardScaler

    import cpmm_jax as cpmm

    z = StandardScaler().fit_transform(x)
    match name:
        case "kmeans":
            return KMeans(count, n_init=10, random_state=seed).fit_predict(z)
        case "gmm":
            return GaussianMixture(count, n_init=10, reg_covar=1e-3, random_state=seed).fit_predict(
                z
            )
        case "mfa":
            return cpmm.MFACluster(count, random_state=seed).fit_predict(x)
        case "cpmm":
            return cpmm.CPMMCluster(count, random_state=seed).fit_predict(x)
        case "spectral":
            return SpectralClustering(
                count, affinity="nearest_neighbors", random_state=seed
            ).fit_predict(z)
        case "hdbscan":
            return HDBSCAN(min_cluster_size=max(5, len(x) // 100), copy=True).fit_predict(z)
    raise ValueError(f"`name` must be one of {', '.join(CLUSTERERS)}; got {name!r}")
