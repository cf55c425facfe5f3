"""Parts as they were read -> `Dataset`: checked, flattened, labels coded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmm_jax.data.checks import check_examples, check_length, row_words
from cpmm_jax.data.dataset import Dataset, Part
from cpmm_jax.data.labels import encode_labels
from cpmm_jax.errors import DataError, DataWarning


@dataclass(frozen=True, eq=False)
class RawPart:
    """One part as it was read: arrays and what to call them in a message."""

    part: Part
    x: npt.NDArray[Any]
    y: npt.NDArray[Any] | None
    x_name: str
    y_name: str


def assemble(
    name: str,
    parts: list[RawPart],
    *,
    labels: bool,
    row: Callable[[int], str] = row_words,
) -> Dataset:
    """Check and flatten the parts (the training part first) and code their labels."""
    fields: dict[str, Any] = {}
    shape, dtype = parts[0].x.shape[1:], parts[0].x.dtype
    for raw in parts:
        x = raw.x
        if x.ndim > 2:
            if x.shape[1:] != shape:
                raise DataError(
                    f"`{raw.x_name}` must hold examples of shape {shape}, as `{parts[0].x_name}`; "
                    f"got {x.shape[1:]}; bring the parts to one shape."
                )
            if (x.dtype.kind == "f") != (dtype.kind == "f"):  # 0..255 in one, 0..1 in the other
                raise DataError(
                    f"`{raw.x_name}` must hold pixels on the scale of `{parts[0].x_name}`, of "
                    f"dtype {dtype}; got dtype {x.dtype}; bring the parts to one scale and dtype."
                )
            x = x.reshape(len(x), -1) if x.size else x.reshape(len(x), 0)
        dim = fields["x_train"].shape[1] if "x_train" in fields else None
        fields[f"x_{raw.part}"] = check_examples(x, name=raw.x_name, dim=dim)
        if raw.y is not None:
            y = raw.y[:, 0] if raw.y.ndim == 2 and raw.y.shape[1] == 1 else raw.y
            check_length(y, len(x), name=raw.y_name)
            fields[f"y_{raw.part}"] = y
    fields.update(_coded(parts, fields, labels=labels, row=row))
    return Dataset(name, event_shape=tuple(shape) if len(shape) > 1 else None, **fields)


def _coded(
    parts: list[RawPart],
    fields: dict[str, Any],
    *,
    labels: bool,
    row: Callable[[int], str],
) -> dict[str, Any]:
    """Return the `y_*` fields as codes, and `class_names`; all None without usable labels."""
    given = [raw for raw in parts if f"y_{raw.part}" in fields]
    if not given:
        return {}
    try:
        if given[0].part != "train":
            raise DataError(
                f"`{given[0].y_name}` must come with labels of the training part, which define the "
                "classes; got none; add them."
            )
        named = [(raw.y_name, np.asarray(fields[f"y_{raw.part}"])) for raw in given]
        codes, class_names = encode_labels(named, row=row)
    except DataError as error:
        if labels:
            raise
        warnings.warn(f"labels are left out: {error}", DataWarning, stacklevel=5)
        return {f"y_{raw.part}": None for raw in given}
    coded: dict[str, Any] = {f"y_{raw.part}": code for raw, code in zip(given, codes, strict=True)}
    return {**coded, "class_names": class_names}
