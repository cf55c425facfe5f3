"""scikit-learn estimators: densities, classifiers and clusterings, by CPMM and by EM.

What a fit leaves is the light mixture, NumPy in float64: an estimator that was pickled predicts
where there is no JAX. Rows that recur are fitted as one row of that weight, so that a weight of two
and a row given twice are the same thing to the last digit.
"""

try:
    import sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the estimators need scikit-learn; got no such package; install it with: "
        "pip install 'cpmm_jax[sklearn]'."
    ) from error

from cpmm_jax.estimators.continuous import CPMMClassifier, CPMMCluster, CPMMDensity
from cpmm_jax.estimators.direct import MFAClassifier, MFACluster, MFADensity

__all__ = [
    "CPMMClassifier",
    "CPMMCluster",
    "CPMMDensity",
    "MFAClassifier",
    "MFACluster",
    "MFADensity",
]
