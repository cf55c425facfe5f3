"""The mixture file and its NumPy reader: right against dense SciPy, safe against bad files."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats

from cpmm_jax import artifact
from cpmm_jax.errors import ArtifactError, ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden" / "mixture_v1.npz"
GOLDEN_X = np.linspace(-2.0, 2.0, 12).reshape(3, 4)
GOLDEN_LOG_PROB = [-6.345268744580214, -8.242187325706695, -9.640150788774443]


def make_golden(path: Path = GOLDEN) -> None:
    """Write the golden file. It was run once; a file of schema 1 must stay readable for ever.

    python -c "import sys; sys.path.insert(0, 'tests'); import test_artifact as t; t.make_golden()"
    """
    artifact.save(
        path,
        random_mixture(0, C=2, K=3, D=4, R=2, dtype=np.float32),
        class_names=["nought", "one"],
        feature_names=["a", "b", "c", "d"],
        event_shape=(2, 2),
        extra={"note": "golden"},
    )


def random_mixture(
    seed: int, C: int = 2, K: int = 3, D: int = 5, R: int = 2, dtype: Any = np.float64, **kw: Any
) -> artifact.Mixture:
    rng = np.random.default_rng(seed)
    shapes = [(C,), (C, K), (C, K, D), (C, K, D, R), (C, K, D)]
    scales = [1.0, 1.0, 2.0, 1.0, 0.7]
    parts = [rng.standard_normal(shape) * s for shape, s in zip(shapes, scales, strict=True)]
    return artifact.Mixture(*(part.astype(dtype) for part in parts), **kw)


def dense_log_joint(mixture: artifact.Mixture, x: np.ndarray) -> np.ndarray:
    """Compute log p(x, c, k) with D x D covariances, shape (N, C, K)."""
    C, K = mixture.logits.shape
    out = np.empty((len(x), C, K))
    for c in range(C):
        for k in range(K):
            loadings = mixture.loadings[c, k].astype(np.float64)
            noise = np.exp(mixture.log_noise[c, k].astype(np.float64))
            covariance = loadings @ loadings.T + np.diag(noise)
            normal = scipy.stats.multivariate_normal(mixture.means[c, k], covariance)
            weight = scipy.special.log_softmax(mixture.class_logits.astype(np.float64))[c]
            weight += scipy.special.log_softmax(mixture.logits[c].astype(np.float64))[k]
            out[:, c, k] = weight + normal.logpdf(x)
    return out


def exact_log_normal(
    x: np.ndarray, mean: np.ndarray, loadings: np.ndarray, log_noise: np.ndarray
) -> float:
    """Compute one log-density in rational arithmetic: no rounding but that of exp and log."""
    D = len(x)
    to_exact = np.vectorize(lambda value: Fraction(float(value)), otypes=[object])
    L, residual = to_exact(loadings), to_exact(x) - to_exact(mean)
    rows = np.column_stack([L @ L.T + np.diag(to_exact(np.exp(log_noise))), residual])
    quadratic, log_det = Fraction(0), 0.0
    for i in range(D):  # elimination: the quadratic form is the sum of pivots' squared residuals
        pivot = rows[i][i]
        log_det += float(np.log(float(pivot)))
        quadratic += rows[i][D] ** 2 / pivot
        for j in range(i + 1, D):
            rows[j] = rows[j] - rows[j][i] / pivot * rows[i]
    return -0.5 * (float(quadratic) + log_det + D * float(np.log(2 * np.pi)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("D", "R"), [(1, 0), (1, 1), (2, 1), (5, 0), (5, 2), (40, 4), (3, 5)])
def test_log_densities_match_dense_scipy(D: int, R: int, dtype: Any) -> None:
    mixture = random_mixture(D + R, D=D, R=R, dtype=dtype)
    x = np.random.default_rng(1).standard_normal((7, D)) * 3
    joint = dense_log_joint(mixture, x)
    by_class = scipy.special.logsumexp(joint, axis=2)
    close = {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(mixture.component_log_prob(x), joint, **close)
    np.testing.assert_allclose(mixture.class_log_prob(x), by_class, **close)
    total = scipy.special.logsumexp(joint, axis=(1, 2))
    np.testing.assert_allclose(mixture.log_prob(x), total, **close)
    posterior = np.exp(joint - total[:, None, None])
    np.testing.assert_allclose(mixture.responsibilities(x), posterior, **close)
    np.testing.assert_allclose(mixture.predict_proba(x), posterior.sum(axis=2), **close)
    np.testing.assert_array_equal(mixture.predict(x), by_class.argmax(axis=1))


@pytest.mark.parametrize("shift", [0.0, 1e4, 1e8])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_extreme_components_match_rational_arithmetic(shift: float, scale: float) -> None:
    """Noise variances 1e-6 to 1e2 within a component, means far apart, all of it shifted."""
    rng = np.random.default_rng(2)
    C, K, D, R = 1, 3, 4, 2
    means = rng.standard_normal((C, K, D)) * scale + shift
    loadings = rng.standard_normal((C, K, D, R)) * np.array([1.0, 30.0])
    log_noise = np.log(10.0) * rng.permuted(np.tile([-6.0, -3.0, 0.0, 2.0], (C, K, 1)), axis=2)
    mixture = artifact.Mixture(np.zeros(C), np.zeros((C, K)), means, loadings, log_noise)
    noise = rng.standard_normal((K, D)) * np.exp(0.5 * log_noise[0])
    factors = np.einsum("kdr,kr->kd", loadings[0], rng.standard_normal((K, R)))
    x = means[0] + factors + noise
    expected = [
        [exact_log_normal(row, means[0, k], loadings[0, k], log_noise[0, k]) for k in range(K)]
        for row in x
    ]
    found = mixture.component_log_prob(x)[:, 0] + np.log(K)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_parallel_factors_and_great_distances_stay_finite() -> None:
    """A capacitance matrix singular to rounding, and squares near the end of the range."""
    loadings = np.full((1, 1, 3, 2), 1e9)
    mixture = artifact.Mixture(
        np.zeros(1), np.zeros((1, 1)), np.zeros((1, 1, 3)), loadings, np.full((1, 1, 3), -6.0)
    )
    x = np.array([[0.0, 0.0, 0.0], [1e9, 1e9, 1e9], [1e6, -1e6, 0.0], [1e100, 0.0, -1e100]])
    expected = exact_log_normal(x[0], np.zeros(3), loadings[0, 0], np.full(3, -6.0))
    found = mixture.log_prob(x)
    assert np.isfinite(found).all() and found[3] < -1e199
    np.testing.assert_allclose(found[:2], [expected, expected - 0.25], rtol=1e-6)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = random_mixture(3)
    x = np.random.default_rng(4).standard_normal((23, 5)).astype(np.float32)
    whole = mixture.component_log_prob(x)
    for elements in (1, 500):  # one example at a time; blocks that do not divide N
        monkeypatch.setattr(artifact, "_BLOCK_ELEMENTS", elements)
        np.testing.assert_allclose(mixture.component_log_prob(x), whole, rtol=1e-12)
        np.testing.assert_allclose(
            mixture.log_prob(x), scipy.special.logsumexp(whole, axis=(1, 2)), rtol=1e-12
        )
    with pytest.raises(DataError, match="row 20, column 3"):
        x[20, 3] = np.nan
        mixture.log_prob(x)


def test_no_examples_give_empty_results() -> None:
    mixture = random_mixture(5)
    x = np.empty((0, 5))
    shapes = [mixture.log_prob(x).shape, mixture.component_log_prob(x).shape]
    assert shapes == [(0,), (0, 2, 3)] and mixture.predict_proba(x).shape == (0, 2)
    assert mixture.sample(np.random.default_rng(0), 0).shape == (0, 5)


@pytest.mark.parametrize("R", [0, 2])
def test_samples_have_the_moments_of_the_mixture(R: int) -> None:
    mixture = random_mixture(6, D=3, R=R)
    draws = mixture.sample(np.random.default_rng(7), 200_000)
    weights = np.exp(
        scipy.special.log_softmax(mixture.class_logits)[:, None]
        + scipy.special.log_softmax(mixture.logits, axis=1)
    )
    mean = np.einsum("ck,ckd->d", weights, mixture.means)
    centred = mixture.means - mean
    covariance = np.einsum("ck,ckd,cke->de", weights, centred, centred)
    covariance += np.einsum("ck,ckdr,cker->de", weights, mixture.loadings, mixture.loadings)
    covariance += np.diag(np.einsum("ck,ckd->d", weights, np.exp(mixture.log_noise)))
    assert draws.shape == (200_000, 3)
    np.testing.assert_allclose(draws.mean(axis=0), mean, atol=0.05)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.15)
    again = mixture.sample(np.random.default_rng(7), 200_000)
    np.testing.assert_array_equal(draws, again)


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    mixture = random_mixture(8, C=2, D=6, dtype=np.float32)
    path = tmp_path / "m.artifact"  # no suffix is added
    artifact.save(
        path,
        mixture,
        class_names=np.array(["no", "yes"]),
        feature_names=list("abcdef"),
        event_shape=[2, 3],
        extra={"steps": 10},
    )
    assert os.listdir(tmp_path) == ["m.artifact"]
    found = artifact.load(path)
    for name in artifact._PARAMETERS:
        np.testing.assert_array_equal(getattr(found, name), getattr(mixture, name))
        assert getattr(found, name).dtype == np.float32
    assert (found.class_names, found.event_shape) == (("no", "yes"), (2, 3))
    assert (found.feature_names, found.extra) == (tuple("abcdef"), {"steps": 10})
    assert (found.num_classes, found.num_components, found.dim, found.rank) == (2, 3, 6, 2)
    images = np.random.default_rng(0).standard_normal((4, 2, 3))
    np.testing.assert_array_equal(found.log_prob(images), found.log_prob(images.reshape(4, 6)))
    assert set(found.predict(images).tolist()) <= {"no", "yes"}
    artifact.save(tmp_path / "again.npz", found, extra={})
    again = artifact.load(tmp_path / "again.npz")
    assert (again.class_names, again.event_shape, again.extra) == (("no", "yes"), (2, 3), {})


def test_one_class_mixture_is_stored_with_one_class(tmp_path: Path) -> None:
    whole = random_mixture(9, C=1)
    mfa = SimpleNamespace(
        logits=whole.logits[0],
        means=whole.means[0],
        loadings=whole.loadings[0],
        log_noise=whole.log_noise[0],
    )
    hierarchy = SimpleNamespace(
        class_logits=whole.class_logits,
        components=SimpleNamespace(
            logits=whole.logits,
            means=whole.means,
            loadings=whole.loadings,
            log_noise=whole.log_noise,
        ),
    )
    x = np.random.default_rng(0).standard_normal((4, 5))
    for number, mixture in enumerate([mfa, hierarchy]):
        artifact.save_mixture(tmp_path / f"{number}.npz", mixture)
        found = artifact.load(tmp_path / f"{number}.npz")
        assert found.num_classes == 1 and found.means.dtype == np.float64
        np.testing.assert_array_equal(found.log_prob(x), whole.log_prob(x))


def test_jax_containers_go_there_and_back(tmp_path: Path) -> None:
    import jax
    import jax.numpy as jnp

    path = tmp_path / "m.npz"
    artifact.save(path, random_mixture(10, dtype=np.float32))
    hierarchy = artifact.load_mixture(path)
    assert hierarchy.components.means.dtype == jnp.float32
    x = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    light = artifact.load(path)
    np.testing.assert_allclose(hierarchy.log_prob(x), light.log_prob(x), rtol=1e-5)
    np.testing.assert_allclose(hierarchy.class_log_prob(x), light.class_log_prob(x), rtol=1e-5)
    artifact.save(tmp_path / "same.npz", hierarchy)
    assert (tmp_path / "same.npz").read_bytes() == path.read_bytes()
    artifact.save(tmp_path / "flat.npz", hierarchy.flatten())
    flat = artifact.load(tmp_path / "flat.npz")
    assert (flat.num_classes, flat.num_components) == (1, 6)
    np.testing.assert_allclose(flat.log_prob(x), light.log_prob(x), rtol=1e-5)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), hierarchy)
    artifact.save(tmp_path / "half.npz", half)
    assert artifact.load(tmp_path / "half.npz").means.dtype == np.float32


def test_golden_file_keeps_loading() -> None:
    mixture = artifact.load(GOLDEN)
    assert GOLDEN.stat().st_size < 5000
    assert (mixture.class_names, mixture.event_shape) == (("nought", "one"), (2, 2))
    assert (mixture.feature_names, mixture.extra) == (tuple("abcd"), {"note": "golden"})
    np.testing.assert_allclose(mixture.log_prob(GOLDEN_X), GOLDEN_LOG_PROB, rtol=1e-9)


WITHOUT_JAX = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        blocked = {"jax", "jaxlib", "flax", "diffrax", "equinox", "optax", "jaxtyping", "scipy"}
        if name.split(".")[0] in blocked:
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Refuse())
import numpy as np
from cpmm_jax import artifact
mixture = artifact.load(sys.argv[1])
x = np.array(json.loads(sys.argv[2]))
for result in mixture.log_prob(x), mixture.predict(x), mixture.sample(np.random.default_rng(0), 3):
    print(json.dumps(result.tolist()))
"""


def test_reading_needs_numpy_alone() -> None:
    command = [sys.executable, "-W", "error", "-c", WITHOUT_JAX, str(GOLDEN)]
    command.append(json.dumps(GOLDEN_X.tolist()))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    log_prob, names, draws = (json.loads(line) for line in done.stdout.splitlines())
    mixture = artifact.load(GOLDEN)
    np.testing.assert_allclose(log_prob, GOLDEN_LOG_PROB, rtol=1e-9)
    assert names == mixture.predict(GOLDEN_X).tolist()
    np.testing.assert_allclose(draws, mixture.sample(np.random.default_rng(0), 3), rtol=1e-12)


BAD_X: dict[str, tuple[Any, str]] = {
    "one example": (np.zeros(6), r"\(N, 6\) or \(N, \*\(2, 3\)\); got \(6,\)"),
    "other D": (np.zeros((4, 5)), r"\(N, 6\).*got \(4, 5\)"),
    "other event": (np.zeros((4, 3, 2)), r"got \(4, 3, 2\)"),
    "NaN": ([[0, 0, 0, 0, np.nan, 0]], r"nan in row 0, column 4 \(e\)"),
    "infinity": ([[0] * 6, [-np.inf] + [0] * 5], r"-inf in row 1, column 0 \(a\)"),
    "too large": ([[1e200] * 6], r"at most 1e\+100; got 1e\+200 in row 0, column 0"),
    "strings": ([["a"] * 6], "must hold numbers; got dtype <U1"),
    "objects": (np.zeros((2, 6), object), "must hold numbers; got dtype object"),
    "ragged": ([[1.0], [1.0, 2.0]], "must be an array"),
}


@pytest.mark.parametrize("name", BAD_X)
def test_bad_examples_are_refused_in_one_line(name: str) -> None:
    mixture = random_mixture(11, D=6, feature_names=tuple("abcdef"), event_shape=(2, 3))
    x, message = BAD_X[name]
    for method in (mixture.log_prob, mixture.predict, mixture.responsibilities):
        with pytest.raises(DataError, match=message) as caught:
            method(x)
        assert "\n" not in str(caught.value)


def test_bad_sample_arguments_are_refused() -> None:
    mixture = random_mixture(12)
    for rng, n, message in [(0, 5, "Generator; got int"), (None, -1, "0 or more; got -1")]:
        with pytest.raises(ConfigError, match=message):
            mixture.sample(np.random.default_rng(0) if rng is None else rng, n)  # type: ignore


def _as_npy(value: Any, allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asanyarray(value), allow_pickle=allow_pickle)
    return stream.getvalue()


def _header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    stream = io.BytesIO()
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


def _entries() -> dict[str, bytes]:
    with zipfile.ZipFile(GOLDEN) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zip(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


def _with(**changes: Any) -> bytes:
    """Return the golden file with some arrays replaced (bytes as they are), or left out (None)."""
    entries = _entries()
    for name, value in changes.items():
        if value is None:
            del entries[f"{name}.npy"]
        else:
            entries[f"{name}.npy"] = value if isinstance(value, bytes) else _as_npy(value)
    return _zip(entries)


def _metadata(**changes: Any) -> bytes:
    return _with(metadata=np.array(json.dumps(changes)))


def _bits_flipped() -> bytes:
    data = bytearray(GOLDEN.read_bytes())
    at = data.index(b"means.npy") + 200
    data[at] ^= 0xFF
    return bytes(data)


def _entry_claiming(size: int) -> bytes:
    """Return a file whose directory and header both claim a `means` of `size` float32 numbers."""
    header = _header((size,))
    data = bytearray(_with(means=header + b"\0" * 16))
    directory = data.rindex(b"PK\x01\x02", 0, data.rindex(b"means.npy"))
    struct.pack_into("<II", data, directory + 20, len(header) + 16, len(header) + 4 * size)
    return bytes(data)


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("unpickled",))


F4 = np.float32
DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "got an empty file"),
    "text": (lambda: b"x,y\n1,2\n" * 50, "File is not a zip file"),
    "bare npy": (lambda: _as_npy(np.zeros(3)), "File is not a zip file"),
    "pickle": (lambda: pickle.dumps(_Trap()), "File is not a zip file"),
    "half": (lambda: GOLDEN.read_bytes()[:1500], "File is not a zip file"),
    "end missing": (lambda: GOLDEN.read_bytes()[:-10], "File is not a zip file"),
    "middle missing": (lambda: GOLDEN.read_bytes()[:400] + GOLDEN.read_bytes()[900:], "sound"),
    "bits flipped": (_bits_flipped, "Bad CRC-32"),
    "empty zip": (lambda: _zip({}), "schema, .*metadata, which it lacks; got nothing"),
    "data set": (
        lambda: _zip({"x_train.npy": _as_npy(np.zeros((3, 2))), "y.npy": _as_npy(np.zeros(3))}),
        "schema, class_logits.*lacks; got 'x_train', 'y'",
    ),
    "no schema": (lambda: _with(schema=None), "must hold schema, which it lacks"),
    "no loadings": (lambda: _with(loadings=None), "must hold loadings, which it lacks"),
    "no metadata": (lambda: _with(metadata=None), "must hold metadata, which it lacks"),
    "later schema": (
        lambda: _with(schema=np.int64(2), means=None),
        "later version, schema 2; this version reads up to 1; upgrade cpmm_jax",
    ),
    "schema 0": (lambda: _with(schema=np.int64(0)), "one positive integer"),
    "schema text": (lambda: _with(schema=np.array("1")), "one positive integer"),
    "schema list": (lambda: _with(schema=np.array([1, 1])), "one positive integer"),
    "objects": (
        lambda: _with(means=_as_npy(np.array([_Trap()], object), allow_pickle=True)),
        "`means` must hold plain values; got Python objects",
    ),
    "object metadata": (
        lambda: _with(metadata=_as_npy(np.array(_Trap(), object), allow_pickle=True)),
        "`metadata` must hold plain values",
    ),
    "pickled entry": (lambda: _with(means=pickle.dumps(_Trap())), "magic string"),
    "not a number": (lambda: _with(logits=np.full((2, 3), "a")), "float64; got dtype <U1"),
    "integers": (lambda: _with(means=np.zeros((2, 3, 4), int)), "`means` must be float32 or"),
    "complex": (lambda: _with(logits=np.zeros((2, 3), complex)), "got dtype complex128"),
    "other D": (
        lambda: _with(log_noise=np.zeros((2, 3, 5), F4)),
        r"`log_noise` must have shape \(2, 3, 4\).*`means` of shape \(2, 3, 4\).*got \(2, 3, 5\)",
    ),
    "other K": (lambda: _with(logits=np.zeros((2, 4), F4)), r"\(2, 3\) to go.*got \(2, 4\)"),
    "other C": (lambda: _with(class_logits=np.zeros(3, F4)), r"\(2,\) to go.*got \(3,\)"),
    "scalar loadings": (lambda: _with(loadings=F4(1)), r"\(2, 3, 4, 'R'\).*got \(\)"),
    "flat means": (lambda: _with(means=np.zeros((3, 4), F4)), r"\(C, K, D\); got \(3, 4\)"),
    "no components": (lambda: _with(means=np.zeros((2, 0, 4), F4)), r"got \(2, 0, 4\)"),
    "NaN": (lambda: _with(logits=np.full((2, 3), np.nan, F4)), r"finite.*got nan at \(0, 0\)"),
    "infinity": (
        lambda: _with(class_logits=np.array([0, -np.inf], F4)),
        r"`class_logits` must be finite.*got -inf at \(1,\)",
    ),
    "noise too small": (lambda: _with(log_noise=np.full((2, 3, 4), -1e3)), "at most 200; got -1"),
    "shape too large": (
        lambda: _with(means=_header((2**40, 2**20)) + b"\0" * 96),
        r"`means` must hold the \d+ bytes of its header's shape.*got 96",
    ),
    "shape too small": (lambda: _with(means=_header((1, 1, 1)) + b"\0" * 96), "4 bytes .*got 96"),
    "negative shape": (lambda: _with(means=_header((-2, -3, 4)) + b"\0" * 96), "sound .npz"),
    "entry too large": (
        lambda: _entry_claiming(10**9),
        r"`means` must hold at most \d+ bytes .* claims 40+128",
    ),
    "inflating": (
        lambda: _zip({**_entries(), "means.npy": b"\0" * (2**26 + 10**7)}, zipfile.ZIP_DEFLATED),
        r"`means` must hold at most \d+ bytes in a file of",
    ),
    "broken header": (lambda: _with(means=b"\x93NUMPY\x01\x00\x10\x00{'shape': (((((("), "sound"),
    "format 3": (lambda: _with(means=b"\x93NUMPY\x03\x00" + b" " * 100), "format 1 or 2; got"),
    "metadata text": (lambda: _with(metadata=np.array("{oops")), "`metadata` must be JSON; got"),
    "metadata deep": (lambda: _with(metadata=np.array("[" * 100_000)), "`metadata` must be JSON"),
    "metadata list": (lambda: _with(metadata=np.array("[1]")), "must be JSON objects"),
    "metadata bytes": (lambda: _with(metadata=np.array(b"{}")), r"one string; got .*dtype \|S2"),
    "extra list": (lambda: _metadata(extra=[]), "must be JSON objects"),
    "few names": (lambda: _metadata(class_names=["a"]), r"`class_names` must hold 2.*got 1"),
    "number names": (lambda: _metadata(class_names=[0, 1]), "`class_names` must be a list of str"),
    "feature names": (lambda: _metadata(feature_names=["a"] * 5), "`feature_names` must hold 4"),
    "event shape": (lambda: _metadata(event_shape=[3, 2]), r"D = 4 entries in all; got \(3, 2\)"),
    "negative event": (lambda: _metadata(event_shape=[-2, -2]), "`event_shape` must hold D = 4"),
    "event flags": (lambda: _metadata(event_shape=[True, 4]), "must be a list of int; got"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = DAMAGED[name]
    path = tmp_path / "mixture.npz"
    path.write_bytes(make())
    with pytest.raises(ArtifactError, match=message) as caught:
        artifact.load(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 800 and text.startswith(f"{path}: ")
    assert re.search(r"Write it again|upgrade", text)
    assert os.listdir(tmp_path) == ["mixture.npz"]  # nothing was unpickled


def test_any_flipped_byte_loads_or_is_an_artifact_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(13)
    path = tmp_path / "mixture.npz"
    good = GOLDEN.read_bytes()
    for _ in range(300):
        data = bytearray(good)
        for at in rng.integers(len(data), size=rng.integers(1, 4)):
            data[at] = rng.integers(256)
        path.write_bytes(data[: rng.integers(len(data))] if rng.random() < 0.1 else data)
        try:
            mixture = artifact.load(path)
        except ArtifactError as error:
            assert "\n" not in str(error)
        else:
            assert np.isfinite(mixture.log_prob(GOLDEN_X)).all()


def test_compressed_and_fortran_ordered_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mixture.npz"
    means = np.asfortranarray(artifact.load(GOLDEN).means.astype(">f4"))
    path.write_bytes(_zip({**_entries(), "means.npy": _as_npy(means)}, zipfile.ZIP_DEFLATED))
    np.testing.assert_allclose(artifact.load(path).log_prob(GOLDEN_X), GOLDEN_LOG_PROB, rtol=1e-9)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path, message in [(tmp_path / "no.npz", "no such file"), (tmp_path, "a folder")]:
        with pytest.raises(ArtifactError, match=f"it must be a file; got {message}"):
            artifact.load(path)


SPOILED = SimpleNamespace(**{**vars(random_mixture(0)), "logits": np.full((2, 3), np.nan)})
BAD_SAVES: dict[str, tuple[dict[str, Any], str]] = {
    "few class names": ({"class_names": ["a"]}, "`class_names` must hold 2.*got 1"),
    "class names of features": ({"feature_names": ["a", "b"]}, "`feature_names` must hold 5"),
    "a string": ({"class_names": "ab"}, "must be a sequence; got the string 'ab'"),
    "event shape": ({"event_shape": (2, 2)}, r"D = 5 entries in all; got \(2, 2\)"),
    "extra": ({"extra": {"x": np.zeros(2)}}, "`extra` must be JSON; got .*ndarray"),
    "no mixture": ({"mixture": 3}, "must be an MFA, HierarchicalMFA or Mixture; got 'int'"),
    "NaN": (
        {"mixture": SPOILED},
        r"`logits` must be finite.*got nan at \(0, 0\)",
    ),
}


@pytest.mark.parametrize("name", BAD_SAVES)
def test_bad_saves_leave_the_older_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mixture.npz"
    artifact.save(path, random_mixture(14))
    before = path.read_bytes()
    arguments, message = BAD_SAVES[name]
    with pytest.raises(ArtifactError, match=message) as caught:
        artifact.save(path, **{"mixture": random_mixture(15), **arguments})
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["mixture.npz"]


def test_interrupted_and_impossible_writes_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("older")
    for path in (tmp_path / "no" / "m.npz", tmp_path / "file" / "m.npz", tmp_path):
        with pytest.raises(ArtifactError, match="must be a file in a writable folder; got"):
            artifact.save(path, random_mixture(16))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact.os, "replace", full)
    with pytest.raises(ArtifactError, match="got No space left on device"):
        artifact.save(tmp_path / "file", random_mixture(16))
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "older"
