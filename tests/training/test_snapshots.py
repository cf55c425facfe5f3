"""Trainings that are stopped, killed, damaged or short of disk, and go on to the same result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cpmm_jax as cpmm
from cpmm_jax.errors import Interrupted, RunError
from cpmm_jax.training import running
from cpmm_jax.training.snapshot_file import flat, from_named, named_leaves, nested
from tests.training.stand_in import QUICK, planted, start

X, Y = planted(600)
CURRICULA: dict[str, Callable[[], cpmm.Curriculum]] = {
    "none": cpmm.NoCurriculum,
    "interpolant": lambda: cpmm.InterpolantCurriculum(stages=STAGES),
    "custom": lambda: cpmm.CustomCurriculum(lambda x, v: x / (1 + v), stages=STAGES),
}
STAGES = cpmm.Stages.linear(3, tolerance=10.0)  # each is left at its second report
TIMES = ("seconds", "examples_per_second")


def train(folder: Path | None = None, *, kind: str = "none", **settings: Any) -> Any:
    saved = None if folder is None else cpmm.Checkpoints(folder=folder, every_steps=1)
    own: dict[str, Any] = {"config": QUICK, "checkpoints": saved, **settings}
    return cpmm.fit(start(), X, Y, curriculum=CURRICULA[kind](), progress=False, **own)


def stop_at(report: int) -> Callable[[dict[str, Any]], None]:
    """Send this process the signal of a job that is taken away, at a report."""
    count = 0

    def callback(_: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if count == report:
            os.kill(os.getpid(), signal.SIGTERM)

    return callback


def assert_same(one: Any, other: Any) -> None:
    for name in ("model", "last_model"):
        leaves = zip(*(jax.tree.leaves(getattr(r, name)) for r in (one, other)), strict=True)
        assert all(np.array_equal(a, b) for a, b in leaves)
    assert (one.best_step, one.best_score, one.steps) == (
        other.best_step,
        other.best_score,
        other.steps,
    )
    bare = [
        [{k: v for k, v in report.items() if k not in TIMES} for report in result.history]
        for result in (one, other)
    ]
    assert bare[0] == bare[1]


@pytest.mark.parametrize("kind", CURRICULA)
def test_a_stopped_training_goes_on_to_the_same_result(kind: str, tmp_path: Path) -> None:
    whole = train(kind=kind)
    handler = signal.getsignal(signal.SIGTERM)
    last = 2 if kind == "none" else 4  # in the last stage
    for report in (1, last):
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM at step .* of 250") as caught:
            train(
                tmp_path,
                kind=kind,
                callback=stop_at(report),
                resume=report > 1,
            )
        assert caught.value.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is handler
    path = tmp_path / "metrics.jsonl"
    path.write_text("what a killed process wrote after its last snapshot")
    resumed = train(tmp_path, kind=kind, resume=True, metrics_path=path)
    assert_same(resumed, whole)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == list(resumed.history)
    assert_same(train(tmp_path, kind=kind, resume=True), whole)  # finished: nothing is left to do


def test_a_flow_goes_on_to_the_same_result(tmp_path: Path) -> None:
    objective = cpmm.FlowMatching(coupling=cpmm.OptimalTransportCoupling())
    config = cpmm.TrainConfig(steps=60, batch_size=32, report_every=25)
    flow = cpmm.CNF(2, widths=(8,), rngs=nnx.Rngs(0))

    def fitted(**settings: Any) -> Any:
        with pytest.warns(UserWarning, match="latent"):
            return cpmm.fit_flow(flow, X, objective=objective, config=config, **settings)

    def stop(self: Any) -> None:
        if self._run.step >= 40:
            os.kill(os.getpid(), signal.SIGINT)
        own(self)

    own = cpmm.training.keeper.Keeper._between  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpmm_jax.training.keeper.Keeper._between", stop)
        patch.setattr(running, "LOOK", 0.0)
        with pytest.raises(Interrupted, match=r"by SIGINT at step 4. of 60"):
            cpmm.fit_flow(flow, X, objective=objective, config=config, checkpoints=tmp_path)
    one, other = fitted(checkpoints=tmp_path, resume=True), fitted()
    for a, b in zip(*(jax.tree.leaves(result.flow) for result in (one, other)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [r["valid_loss"] for r in one.history] == [r["valid_loss"] for r in other.history]
    assert (one.best_loss, one.best_step) == (other.best_loss, other.best_step)


CHILD = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from cpmm_jax.training import running
from tests.training.test_snapshots import X, Y, start
import cpmm_jax as cpmm, numpy as np, jax
from flax import nnx
running.LOOK = 0.0  # a look at the clock after every step

def kept(name):
    folder = Path({folder!r}) / name
    saved = cpmm.Checkpoints(folder=folder, every_steps=20)
    return dict(checkpoints=saved, resume=folder.is_dir(), progress=False)

config = cpmm.TrainConfig(steps=200, num_times=2, batch_size=128, report_every=60)
flow = cpmm.CNF(2, widths=(8,), rngs=nnx.Rngs(0))
flow = cpmm.fit_flow(flow, X, objective=cpmm.FlowMatching(), config=config, **kept("flow"))
stages = cpmm.Stages.linear(3)
mixture = cpmm.fit(start(), X, Y, config=config, **kept("mixture"),
                   curriculum=cpmm.FlowCurriculum(flow.flow, stages=stages),
                   callback=lambda report: time.sleep(0.02))
told = [np.array([report["loss"] for report in fitted.history]) for fitted in (flow, mixture)]
models = jax.tree.leaves((flow.flow, mixture.model, mixture.last_model))
np.savez({folder!r} + "/result.npz", *told, *models)
"""


def saved(folder: Path) -> int:
    """Return the steps that are saved, of flow and mixture together."""
    names = ([p.name for p in folder.glob(f"{kind}/0*")] for kind in ("flow", "mixture"))
    return sum(max((int(name) for name in found if name.isdigit()), default=0) for found in names)


def run_to_the_end(folder: Path, kills: int, rng: np.random.Generator) -> int:
    """Train in processes that are killed at random moments; return how many were."""
    folder.mkdir()
    root = str(Path(__file__).resolve().parents[2])
    code = CHILD.format(root=root, folder=str(folder))
    killed = 0
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    while not (folder / "result.npz").exists():
        child = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code], env=environment, stderr=subprocess.PIPE
        )
        if killed < kills:
            if rng.uniform() < 0.7:  # while it trains and saves; else while it starts, too
                before = saved(folder)
                while child.poll() is None and saved(folder) <= before:
                    time.sleep(0.005)
            time.sleep(rng.uniform(0.0, 1.0))
            child.send_signal(signal.SIGKILL)
        error = child.communicate()[1].decode()
        if child.returncode == -signal.SIGKILL:
            killed += 1
        else:
            assert child.returncode == 0, error
    return killed


@pytest.mark.parametrize("kills", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_training_ends_in_the_same_bits(
    kills: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    assert run_to_the_end(tmp_path / "whole", 0, rng) == 0
    survived = runs = differing = 0
    while survived < kills:
        runs += 1
        survived += run_to_the_end(tmp_path / f"run{runs}", kills - survived, rng)
        whole, found = (np.load(tmp_path / name / "result.npz") for name in ("whole", f"run{runs}"))
        differing += not all(np.array_equal(whole[name], found[name]) for name in whole.files)
    with capsys.disabled():
        print(f"\n{survived} kills, {survived} resumes, {runs} runs, {differing} that differ")
    assert differing == 0


def test_arrays_of_every_kind_come_back() -> None:
    tree = {"key": jax.random.key(3), "value": jnp.ones(2, jnp.float32), "none": jnp.zeros((2, 0))}
    arrays = flat(nested({k: np.asarray(v) for k, v in named_leaves("top", tree).items()}))
    assert set(arrays) == {"top/key", "top/value"}
    found = from_named("top", tree, arrays)
    assert found["key"] == tree["key"] and found["none"].shape == (2, 0)
    np.testing.assert_array_equal(found["value"], tree["value"])
    with pytest.raises(RunError, match=r"hold 'top/value' as float32\[3\]; got float32\[2\]"):
        from_named("top", tree | {"value": jnp.ones(3, jnp.float32)}, arrays)
    with pytest.raises(RunError, match="got none"):
        from_named("other", tree, arrays)
