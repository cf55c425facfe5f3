"""The light mixture file, and its reader, which needs NumPy alone.

One `.npz` holds what is extracted from a trained model (schema 1): `schema` (int64 scalar),
`class_logits` (C,), `logits` (C, K), `means` (C, K, D), `loadings` (C, K, D, R) and `log_noise`
(C, K, D) in float32 or float64 as given, and `metadata`, a string of JSON with class_names,
feature_names, event_shape, created_by and extra. It is not compressed: parameters look like noise
to a compressor (a tenth would be saved) and reading stays as fast as the disk.

Reading trusts nothing in a file: it never unpickles, allocates nothing before the sizes in the
headers agree with the size of the file, and turns every fault into an `ArtifactError` of one line.
"""

from cpmm_jax.artifact.file import SCHEMA, load, load_mixture, save, save_mixture, to_mixture
from cpmm_jax.artifact.mixture import Mixture

__all__ = ["SCHEMA", "Mixture", "load", "load_mixture", "save", "save_mixture", "to_mixture"]
