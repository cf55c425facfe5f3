"""What `fit` does with its arguments on the host, before anything is traced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from cpmm_jax.data.checks import check_enough_rows, check_examples, check_labels
from cpmm_jax.data.dataset import Dataset, split
from cpmm_jax.data.pixels import Pixels, check_pixels, noise_of
from cpmm_jax.errors import ConfigError, DataError
from cpmm_jax.mixture.checks import check_weight
from cpmm_jax.mixture.padding import pad_rows, padded_size
from cpmm_jax.training.config import TrainConfig
from cpmm_jax.training.step import Examples


class Parts(NamedTuple):
    """A model taken apart: static structure, trained arrays, and arrays that are not trained."""

    graphdef: Any
    params: Any
    fixed: Any


class Data(NamedTuple):
    """Examples on the device.

    Attributes:
        train: training examples, with rows of padding at the end.
        num_examples: training examples without them, N.
        valid: validation examples, or None.
    """

    train: Examples
    num_examples: int
    valid: Examples | None


def take_apart(model: Any) -> Parts:
    """Split a model once, on the host; `nnx.merge(*parts)` puts it together again.

    Raises:
        ConfigError: not a `flax.nnx.Module` with `read(times)`, or nothing in it to train.
    """
    if not isinstance(model, nnx.Module) or not callable(getattr(model, "read", None)):
        raise ConfigError(
            "`model` must be a flax.nnx.Module with a method `read(times)`, such as CPMM; "
            f"got {type(model).__name__}; build one first."
        )
    parts = Parts(*nnx.split(model, nnx.Param, ...))
    if not jax.tree.leaves(parts.params):
        raise ConfigError(
            f"`model` must have an nnx.Param to train; got none in {type(model).__name__}; "
            "hold what is to be learned in nnx.Param."
        )
    return parts


def prepare(
    model: Any,
    params: Any,
    x: npt.ArrayLike,
    y: npt.ArrayLike | None,
    x_valid: npt.ArrayLike | None,
    y_valid: npt.ArrayLike | None,
    config: TrainConfig,
    weight: npt.ArrayLike | None = None,
    weight_valid: npt.ArrayLike | None = None,
    pixels: Pixels | None = None,
    *,
    once: bool = False,
) -> Data:
    """Check the data, set a validation part aside, and move both parts to the device.

    With `pixels`, examples are recorded pixels: those of the training stay bytes, unless they are
    to be dequantised `once`, as those of the validation are.

    Returns:
        Training and validation examples in the dtype of the parameters.

    Raises:
        DataError: see `check_examples`, `check_labels`, `check_weight`, `check_enough_rows`.
        ConfigError: arguments that do not fit each other.
    """
    if (y_valid is not None) != (x_valid is not None and y is not None):
        raise ConfigError(
            "`y_valid` must be given exactly where `x_valid` and `y` are, since validation scores "
            f"what is trained; got {_given(y=y, x_valid=x_valid, y_valid=y_valid)}; "
            "add what is missing or leave the labels out."
        )
    if config.discriminative and y is None:
        raise ConfigError(
            f"`discriminative` must be 0 without labels; got {config.discriminative}; give `y`."
        )
    check_map(pixels)
    dtype = jnp.result_type(*jax.tree.leaves(params))
    data = Dataset("x", *_checked(model, dtype, x, y, "x", "y"))
    own = check_weight(weight, len(data.x_train))
    data = replace(data, weight_train=own)
    if x_valid is not None:
        part = _checked(model, dtype, x_valid, y_valid, "x_valid", "y_valid")
        own = check_weight(weight_valid, len(part[0]), name="weight_valid")
        data = replace(data, x_valid=part[0], y_valid=part[1], weight_valid=own)
    else:
        cut = config.valid_fraction
        data = split(data, seed=config.seed, valid_fraction=cut, test_fraction=0.0)
    check_enough_rows(
        len(data.x_train), model.num_classes * model.num_trajectories * config.num_times
    )
    if data.x_valid is None and config.patience is not None:
        raise ConfigError(
            f"`patience` must come with a validation part; got patience {config.patience} and "
            "none; give `x_valid` or a `valid_fraction` above 0."
        )
    if pixels is not None:
        data = _dequantised(data, pixels, dtype, config.seed, once=once)
    num_examples = len(data.x_train)
    parts, size = (data.x_train, data.y_train, data.weight_train), padded_size(num_examples)
    padded = [None if part is None else pad_rows(part, size) for part in parts]
    valid = None
    if data.x_valid is not None:
        valid = _on_device(dtype, data.x_valid, data.y_valid, data.weight_valid)
    return Data(_on_device(dtype, *padded), num_examples, valid)


def check_map(pixels: Any) -> None:
    """Raise ConfigError unless it is a map of pixels that a compiled step can be told apart by."""
    hashable = type(pixels).__hash__ is not None
    if pixels is not None and not (isinstance(pixels, Pixels) and hashable):
        raise ConfigError(
            "`pixels` must be a hashable map of pixels, such as AffinePixels(); got "
            f"{type(pixels).__name__}; derive it from Pixels, as a frozen dataclass."
        )


def _dequantised(data: Dataset, pixels: Pixels, dtype: Any, seed: int, *, once: bool) -> Dataset:
    """Return recorded pixels as bytes, or as examples of the model where they are to be so."""
    train, valid = check_pixels(data.x_train).astype(np.uint8), data.x_valid
    if once:
        train = pixels.carry(noise_of(seed, "train"), train, dtype)
    if valid is not None:
        valid = pixels.carry(noise_of(seed, "valid"), valid, dtype, name="x_valid")
    return replace(data, x_train=train, x_valid=valid)


def _on_device(
    dtype: Any,
    x: Any,
    y: npt.NDArray[np.int64] | None,
    weight: npt.NDArray[np.float64] | None,
) -> Examples:
    return Examples(
        jnp.asarray(x),
        None if y is None else jnp.asarray(y.astype(np.int32)),
        None if weight is None else jnp.asarray(weight / weight.mean(), dtype),
    )


def _given(**arguments: Any) -> str:
    words = {True: "missing", False: "given"}
    return ", ".join(f"{name} {words[value is None]}" for name, value in arguments.items())


def _checked(
    model: Any,
    dtype: Any,
    x: npt.ArrayLike,
    y: npt.ArrayLike | None,
    x_name: str,
    y_name: str,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64] | None]:
    examples = check_examples(x, name=x_name, dim=model.dim)
    with np.errstate(over="ignore"):
        cast = examples.astype(dtype)
    if not np.isfinite(cast).all():
        raise DataError(
            f"`{x_name}` must fit {np.dtype(dtype).name}, the type of the model; got values up to "
            f"{np.abs(examples).max():.3g}; standardise the data first."
        )
    if y is None:
        return cast, None
    # A model of one class is checked apart: "fewer classes" would be the wrong thing to say of `y`.
    several = model.num_classes > 1
    codes = check_labels(
        y,
        len(cast),
        name=y_name,
        num_classes=model.num_classes if several else None,
        require_all=y_name == "y",
        unknown=True,
    )
    if not several and codes.max() > 0:
        raise ConfigError(
            f"`model` must have as many classes as `{y_name}`; got num_classes = 1 and labels "
            f"0..{codes.max()}; build the model with num_classes={codes.max() + 1}, "
            f"or leave `{y_name}` out."
        )
    return cast, codes
