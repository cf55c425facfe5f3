"""The trained model on disk: it comes back to the last bit, or it is said why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from cpmm_jax.dynamics.flow import CNF
from cpmm_jax.dynamics.solve import SolverConfig
from cpmm_jax.errors import ConfigError, RunError
from cpmm_jax.models.cpmm import CPMM
from cpmm_jax.training.checkpoint import build_solver, describe_solver, load_model, save_model
from tests.models.small import QUICK, small, uneven

TSIT5 = diffrax.Tsit5()


def filled(**settings: Any) -> CPMM:
    """Return a small model of other settings, with numbers that took no compiling."""
    shapes = jax.eval_shape(lambda: small(**settings))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "model"
    save_model(folder, uneven(small()))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"evolve_weights": True, "field_per_class": True, "widths": (5, 3), "activation": "tanh"},
        {"rank": 0, "augmented": 0, "noise_floor": np.array([0.1, 0.2])},  # arrays without entries
        {"param_dtype": jnp.bfloat16},
        {"dim": None, "event_shape": (4, 5, 2), "coarse_widths": (3,), "compute_dtype": "bfloat16"},
    ],
)
def test_a_model_comes_back_to_the_last_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    model = filled(**settings)
    save_model(tmp_path / "model", model)
    again = load_model(tmp_path / "model")
    assert jax.tree.structure(again) == jax.tree.structure(model)  # static settings included
    for mine, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        assert isinstance(mine, jax.Array) and mine.dtype == theirs.dtype
        assert not mine.committed  # else it could not meet arrays of another device
        np.testing.assert_array_equal(mine, theirs)


def test_a_stored_model_reads_the_same_mixture(stored: Path) -> None:
    read = jax.jit(lambda model, times: model.mixture(times))
    times = jnp.array([0.1, 0.6])
    mine, theirs = read(load_model(stored), times), read(uneven(small()), times)
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)


def test_double_precision_is_kept_or_refused(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        model = filled(param_dtype=jnp.float64)
        save_model(tmp_path / "model", model)
        np.testing.assert_array_equal(load_model(tmp_path / "model").means[...], model.means[...])
    refused = pytest.raises(RunError, match=r"got float64 with JAX in 32 bits.*enable_x64")
    with jax.enable_x64(False), refused:
        load_model(tmp_path / "model")


def test_names_in_the_file_are_the_models(stored: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(stored / "parameters").item_metadata.tree
    assert tree["field"]["layers"]["0"]["kernel"].shape == (2 * 3 + 4, 8)
    assert set(tree) >= {"means", "loadings", "log_noise", "augmented", "class_logits"}
    assert json.loads((stored / "model.json").read_text())["model"]["widths"] == [8]


@pytest.mark.parametrize(
    "config",
    [
        SolverConfig(),
        SolverConfig(solver=TSIT5, num_steps=None, rtol=1e-5, atol=1e-7, max_steps=100),
        SolverConfig(adjoint=diffrax.BacksolveAdjoint(solver=TSIT5)),
        SolverConfig(adjoint=diffrax.RecursiveCheckpointAdjoint(checkpoints=4)),
        SolverConfig(adjoint=diffrax.DirectAdjoint()),
    ],
)
def test_solvers_are_described(config: SolverConfig) -> None:
    assert build_solver(json.loads(json.dumps(describe_solver(config)))) == config


class Own(diffrax.Euler):
    """A solver that diffrax does not have."""


@pytest.mark.parametrize(
    "config",
    [
        SolverConfig(solver=Own()),
        SolverConfig(solver=diffrax.Kvaerno5(root_finder=diffrax.VeryChord(rtol=1e-3, atol=1e-3))),
        SolverConfig(controller=diffrax.ConstantStepSize()),
        SolverConfig(adjoint=diffrax.BacksolveAdjoint(dt0=-0.1)),
    ],
)
def test_other_solvers_are_refused_before_anything_is_written(
    config: SolverConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"`solver` must be .* got SolverConfig.*keep the param"):
        save_model(tmp_path / "model", filled(solver=config))
    assert not any(tmp_path.iterdir())


def _rewrite(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / "model.json").read_text())
        change(content)
        (folder / "model.json").write_text(json.dumps(content))

    return spoil


def _truncate(folder: Path) -> None:
    path = max((folder / "parameters" / "d").iterdir(), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "must be the folder of a trained model.*no such folder.*cpmm fit"),
        (lambda f: (f / "model.json").unlink(), "with model.json; got one without"),
        (lambda f: (f / "model.json").write_text("{"), "undamaged model; got JSONDecodeError"),
        (lambda f: (f / "model.json").write_text("[]"), "undamaged model; got TypeError"),
        (lambda f: shutil.rmtree(f / "parameters"), "files that are not those written"),
        (_truncate, "files that are not those written"),
        (_rewrite(lambda c: c["model"].update(rank=2)), "files that are not those written"),
        (_rewrite(lambda c: c.pop("checksum")), "got KeyError: 'checksum'"),
        (_rewrite(lambda c: c.update(schema=9)), "schema 1; got schema 9"),
    ],
)
def test_what_is_not_a_model_gets_one_line(
    spoil: Callable[[Path], Any], message: str, stored: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stored, folder)
    spoil(folder)
    with pytest.raises(RunError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_flow_comes_back_to_the_last_bit(stored: Path, tmp_path: Path) -> None:
    solver = SolverConfig(solver=TSIT5, num_steps=4)
    flow = CNF(3, widths=(5, 4), solver=solver, output_scale=1.0, rngs=nnx.Rngs(0))
    save_model(tmp_path / "flow", flow)
    again = load_model(tmp_path / "flow", CNF)
    assert jax.tree.structure(again) == jax.tree.structure(flow)
    for mine, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(flow), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(RunError, match="must hold a CPMM; got a CNF"):
        load_model(tmp_path / "flow")
    with pytest.raises(RunError, match="must hold a CNF; got a CPMM"):
        load_model(stored, CNF)


def test_nothing_is_written_over(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"must be a new folder.*got File exists"):
        save_model(stored, filled())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="must be a new folder"):
        save_model(tmp_path / "file" / "model", filled())


def test_a_loaded_model_is_a_model(stored: Path) -> None:
    model = load_model(stored)
    assert isinstance(model, CPMM) and model.solver == QUICK
    doubled = jax.tree.map(lambda leaf: 2 * leaf, model)
    np.testing.assert_array_equal(doubled.means[...], 2 * model.means[...])
    assert len(jax.tree.leaves(nnx.state(model))) == len(jax.tree.leaves(model))
