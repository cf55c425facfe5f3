"""The file: everything comes back, without JAX; a save that fails leaves the older file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cpmm_jax import artifact
from cpmm_jax.artifact import file as files
from cpmm_jax.artifact.mixture import PARAMETERS
from cpmm_jax.errors import ArtifactError
from tests.artifact.golden import GOLDEN, GOLDEN_LOG_PROB, GOLDEN_X, random_mixture

ROOT = Path(__file__).resolve().parents[2]


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
    for name in PARAMETERS:
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

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(ArtifactError, match="got No space left on device"):
        artifact.save(tmp_path / "file", random_mixture(16))
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "older"
