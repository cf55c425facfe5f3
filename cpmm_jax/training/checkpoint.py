"""The trained model on disk: its parameters in Orbax's format, its settings beside them.

A folder of one model holds

    parameters/    arrays by name (`means`, `field/layers/0/kernel`, ...), written by Orbax
    model.json     what is needed to build the model again: sizes, field, solver; and a checksum of
                   this and of `parameters/` (schema 1)

`model.json` is written last, so that a folder which has it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cpmm_jax.dynamics.flow import CNF
from cpmm_jax.dynamics.solve import SolverConfig
from cpmm_jax.errors import ConfigError, Interrupted, RunError
from cpmm_jax.models.cpmm import CPMM

Model = TypeVar("Model", CPMM, CNF)

SCHEMA = 1
_SETTINGS, _PARAMETERS = "model.json", "parameters"
_SOLVERS = ("solver", "eval_solver")
_NUMBERS = ("num_steps", "rtol", "atol", "max_steps")  # of a SolverConfig


def save_model(folder: str | os.PathLike[str], model: CPMM | CNF) -> None:
    """Write a model into a new folder, from which `load_model` builds it again.

    Args:
        folder: where to write; it must not exist, and is made with its parents.
        model: any CPMM or CNF whose solver `describe_solver` can describe.

    Raises:
        RunError: the folder exists or cannot be written.
        ConfigError: the model's solver has settings of its own, which no description holds.

    Example:
        >>> import tempfile
        >>> import cpmm_jax as cpmm
        >>> model = cpmm.CPMM(2, 1, rngs=nnx.Rngs(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(f"{folder}/model", model)
        ...     again = load_model(f"{folder}/model")
        >>> bool(jnp.all(again.means[...] == model.means[...]))
        True
    """
    import orbax.checkpoint as ocp  # not with the package: it takes its time

    content = {"schema": SCHEMA, **describe_model(model)}
    folder = Path(folder).resolve()  # Orbax wants an absolute path
    try:
        folder.mkdir(parents=True)
        with ocp.StandardCheckpointer() as checkpointer:  # leaving it awaits the writing
            checkpointer.save(folder / _PARAMETERS, _parameters(model))
        content["checksum"] = checksum(content, folder / _PARAMETERS)
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        (folder / _SETTINGS).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"{str(folder)!r} must be a new folder that can be written; "
            f"got {error.strerror or error}; choose another."
        ) from error


def load_model(folder: str | os.PathLike[str], kind: type[Model] = CPMM) -> Model:  # type: ignore[assignment]
    """Read a model that `save_model` has written; it is the same to the last bit.

    Args:
        folder: where it is.
        kind: `CPMM` or `CNF`.

    Raises:
        RunError: nothing there, another kind, damaged, of a later schema, or in 64 bits while JAX
            is not.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).resolve()
    if not (folder / _SETTINGS).is_file():
        raise RunError(
            f"{str(folder)!r} must be the folder of a trained model, with {_SETTINGS}; got "
            f"{'one without' if folder.is_dir() else 'no such folder'}; "
            "fit again: `cpmm fit` leaves the model in RUN/checkpoints/model."
        )
    try:
        content = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        schema = content["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error
    if schema != SCHEMA:
        raise RunError(
            f"{str(folder)!r} must hold a model of schema {SCHEMA}; got schema {schema!r}; "
            "read it with the version of cpmm_jax that wrote it."
        )
    if content.get("kind", CPMM.__name__) != kind.__name__:
        raise RunError(
            f"{str(folder)!r} must hold a {kind.__name__}; got a {content.get('kind')}; "
            "name the folder of the other."
        )
    try:
        if content.pop("checksum") != checksum(content, folder / _PARAMETERS):
            raise ValueError("files that are not those written")
        settings: dict[str, Any] = dict(content["model"])
        dtype = jnp.dtype(settings.pop("param_dtype"))
        settings |= {name: build_solver(content[name]) for name in _SOLVERS if name in content}
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise RunError(
                f"{str(folder)!r} must be read in the precision of its parameters; got {dtype} "
                "with JAX in 32 bits; read it within `jax.enable_x64(True)`."
            )
        build: Any = partial(kind, **settings, param_dtype=dtype)
        model = jax.eval_shape(lambda: build(rngs=nnx.Rngs(0)))  # no parameter is drawn
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(folder / _PARAMETERS, _parameters(model))
        state = nnx.state(model)
        free = jax.tree.map(lambda array: jnp.asarray(np.asarray(array)), arrays)  # of no device
        nnx.replace_by_pure_dict(state, free)
        nnx.update(model, state)
        model = jax.tree.map(_concrete, model)
    except (RunError, Interrupted):
        raise
    except Exception as error:  # Orbax and TensorStore raise of every kind
        raise _damaged(folder, error) from error
    return model


def checksum(content: dict[str, Any], folder: Path) -> str:
    """Return the SHA-256 of settings and of all files of a folder, names and contents.

    Orbax finds most damage too, but not before it has complained on stderr from its threads.
    """
    total = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(path.relative_to(folder).as_posix().encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _damaged(folder: Path, error: Exception) -> RunError:
    reason = " ".join(str(error).split())[:200]
    return RunError(
        f"{str(folder)!r} must hold an undamaged model; got {type(error).__name__}: {reason}; "
        "copy it again, or fit again."
    )


def describe_model(model: CPMM | CNF) -> dict[str, Any]:
    """Return kind, solvers and the arguments that shape a model; not those that only start it."""
    settings = {
        "dim": model.dim,
        "widths": [layer.out_features for layer in model.field.layers],
        "activation": model.field.activation,
        "param_dtype": model.field.layers[0].kernel.dtype.name,
    }
    solvers = {
        name: describe_solver(getattr(model, name)) for name in _SOLVERS if hasattr(model, name)
    }
    if isinstance(model, CPMM):
        settings |= _sizes(model)
    return {"kind": type(model).__name__, "model": settings, **solvers}


def _sizes(model: CPMM) -> dict[str, Any]:
    sizes = {
        "rank": model.rank,
        "num_classes": model.num_classes,
        "num_trajectories": model.num_trajectories,
        "augmented": model.augmented.shape[-1],
        "evolve_weights": model.logits is not None,
        "field_per_class": model.field_per_class,
    }
    if model.event_shape is None:
        return sizes
    field = model.field
    height, width, _ = model.event_shape
    dtype = field.layers[0].dtype
    return sizes | {
        "event_shape": list(model.event_shape),
        "augmented": sizes["augmented"] // (height * width),
        "coarse_widths": [layer.out_features for layer in field.down],
        "coordinates": field.coordinates,
        "compute_dtype": None if dtype is None else jnp.dtype(dtype).name,
    }


def _parameters(model: CPMM | CNF) -> dict[str, Any]:
    """Return the arrays of a model as nested dictionaries with keys of text.

    Arrays without entries (loadings of rank 0, say) are left out: Orbax refuses them.
    """

    def named(tree: dict[Any, Any]) -> dict[str, Any]:
        branches = {
            str(name): named(value) if isinstance(value, dict) else value
            for name, value in tree.items()
        }
        return {name: v for name, v in branches.items() if isinstance(v, dict) or v.size}

    return named(nnx.to_pure_dict(nnx.state(model)))


def _concrete(leaf: Any) -> jax.Array:
    """Return an array for what `_parameters` left out, other leaves as they are."""
    return jnp.zeros(leaf.shape, leaf.dtype) if leaf.size == 0 else leaf


def describe_solver(config: SolverConfig) -> dict[str, Any]:
    """Return a description of solver settings that JSON holds and `build_solver` understands.

    Raises:
        ConfigError: a solver or adjoint with settings of its own, or a controller.

    Example:
        >>> description = describe_solver(SolverConfig(solver=diffrax.Tsit5(), num_steps=4))
        >>> description["solver"], description["num_steps"], description["adjoint"]
        ('Tsit5', 4, None)
    """
    description = {
        "solver": type(config.solver).__name__,
        **{name: getattr(config, name) for name in _NUMBERS},
        "adjoint": _describe_adjoint(config.adjoint),
    }
    try:
        same = build_solver(description) == config
    except (AttributeError, TypeError):
        same = False
    if not same:
        raise ConfigError(
            "`solver` must be a solver and an adjoint of diffrax without settings of their own, "
            f"and no `controller`, to be stored with a model; got {config}; "
            "keep the parameters yourself: nnx.to_pure_dict(nnx.state(model))."
        )
    return description


def _describe_adjoint(adjoint: diffrax.AbstractAdjoint | None) -> dict[str, Any] | None:
    if adjoint is None:
        return None
    description: dict[str, Any] = {"adjoint": type(adjoint).__name__}
    if isinstance(adjoint, diffrax.RecursiveCheckpointAdjoint):
        description["checkpoints"] = adjoint.checkpoints
    elif isinstance(adjoint, diffrax.BacksolveAdjoint) and "solver" in adjoint.kwargs:
        description["solver"] = type(adjoint.kwargs["solver"]).__name__
    return description


def build_solver(description: dict[str, Any]) -> SolverConfig:
    """Build the solver settings that `describe_solver` has described."""
    adjoint = description["adjoint"]
    if adjoint is not None:
        arguments = {name: value for name, value in adjoint.items() if name != "adjoint"}
        if "solver" in arguments:
            arguments["solver"] = getattr(diffrax, arguments["solver"])()
        adjoint = getattr(diffrax, adjoint["adjoint"])(**arguments)
    return SolverConfig(
        solver=getattr(diffrax, description["solver"])(),
        adjoint=adjoint,
        **{name: description[name] for name in _NUMBERS},
    )
