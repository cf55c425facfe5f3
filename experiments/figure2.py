"""Figure 2 of the paper: data carried from a Gaussian back to themselves, the mixture with them.

    python -m experiments.figure2 [--data NAME] [--curriculum flow|interpolant] [--out FOLDER]

Trains a CPMM along the curriculum on a two-dimensional built-in set and writes `curriculum.png`,
some positions v from 1 to 0 with the components fitted there, and `curriculum.gif`, all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cpmm_jax.artifact import Mixture
from cpmm_jax.curriculum import Stages
from cpmm_jax.data import PLANAR_NAMES, Standardizer, load
from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.pipeline import build_curriculum
from cpmm_jax.plotting import plot_components
from cpmm_jax.recipe import recommend
from cpmm_jax.starts import build_model
from cpmm_jax.training.config import TrainConfig
from cpmm_jax.training.loop import fit

FOLDER = Path("docs") / "figures"
PANELS = 5
FRAME_MS = 250  # how long a stage is seen; the last one ten times as long
STAGES = Stages.linear(24, last_share=0.3)


class Frame(NamedTuple):
    """One stage: its position, the examples there, and the mixture at its end."""

    v: float
    x: np.ndarray
    mixture: Mixture


def light(mixture: HierarchicalMFA, num_times: int) -> Mixture:
    """Return a mixture as the NumPy one that figures are drawn of."""
    leaves = map(np.asarray, jax.tree.leaves(mixture))
    return Mixture(*leaves, extra={"num_times": num_times})


def train(name: str, curriculum_name: str, steps: int, seed: int) -> list[Frame]:
    """Train a CPMM of three trajectories, and keep what there is at the end of every stage."""
    data = load(name, seed=seed)
    scaler = Standardizer.fit(data.x_train)
    x, valid = scaler.transform(data.x_train), scaler.transform(data.x_valid)
    recipe = recommend(
        *x.shape,
        components=48,
        trajectories=3,
        rank=1,
        steps=steps,
        seed=seed,
        curriculum=curriculum_name,
    )
    curriculum = replace(build_curriculum(x, valid, recipe), stages=STAGES)
    model = build_model(x, None, scaler.noise_floor(), recipe, curriculum)
    frames: list[Frame] = []

    def keep(v: float, model: Any) -> None:
        moved = np.asarray(curriculum.at(jnp.asarray(x), v, jax.random.key(seed)))
        frames.append(Frame(v, moved, light(model.extract(recipe.num_times), recipe.num_times)))

    config = TrainConfig(
        steps=steps,
        num_times=recipe.train_times,
        valid_times=recipe.num_times,
        report_every=50,
        seed=seed,
    )
    fit(model, x, config=config, curriculum=curriculum, x_valid=valid, stage_callback=keep)
    return frames


def draw(frame: Frame, ax: Any, limit: float) -> None:
    """Draw one stage."""
    plot_components(frame.mixture, frame.x, ax=ax)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], xlabel="", ylabel="")
    ax.set_title(f"v = {frame.v:.2g}")


def write(frames: Sequence[Frame], folder: Path) -> list[Path]:
    """Write the row of panels and the animation."""
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation, PillowWriter

    folder.mkdir(parents=True, exist_ok=True)
    limit = max(3.0, float(np.quantile(np.abs(frames[-1].x), 0.999)) + 0.3)
    chosen = np.unique(np.linspace(0, len(frames) - 1, PANELS).round().astype(int))
    figure, axes = plt.subplots(1, len(chosen), figsize=(2.6 * len(chosen), 2.9), squeeze=False)
    for ax, i in zip(axes[0], chosen, strict=True):
        draw(frames[i], ax, limit)
    figure.tight_layout()
    still = folder / "curriculum.png"
    figure.savefig(still, dpi=110)
    plt.close(figure)

    figure, ax = plt.subplots(figsize=(3.6, 3.8), layout="constrained")

    def show(i: int) -> list[Any]:
        ax.clear()
        draw(frames[min(i, len(frames) - 1)], ax, limit)
        return []

    moving = folder / "curriculum.gif"
    animation = FuncAnimation(figure, show, frames=len(frames) + 9, interval=FRAME_MS)
    animation.save(moving, writer=PillowWriter(fps=round(1000 / FRAME_MS)), dpi=80)
    plt.close(figure)
    return [still, moving]


def main(argv: Sequence[str] | None = None) -> None:
    """Train, draw, and say where the figures are."""
    parser = argparse.ArgumentParser(prog="python -m experiments.figure2")
    parser.add_argument("--data", choices=PLANAR_NAMES, default="pinwheel")
    parser.add_argument("--curriculum", choices=("flow", "interpolant"), default="flow")
    parser.add_argument("--steps", type=int, default=6000, help="training steps of the mixture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args(argv)
    start = time.perf_counter()
    frames = train(given.data, given.curriculum, given.steps, given.seed)
    for path in write(frames, given.out):
        print(f"written: {path} (after {time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
