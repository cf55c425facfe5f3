"""The readers on real data sets, where the folder of `CPMM_DATA_DIR` is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cpmm_jax.data import load

SHAPES = {
    "pendigits": ((7494, 16), (3498, 16), 10),
    "optdigits": ((3823, 64), (1797, 64), 10),
    "power_plant": ((7654, 5), (957, 5), None),
    "glass": ((214, 9), None, 6),
    "coil20": ((1440, 1024), None, 20),
    "mnist": ((60000, 784), (10000, 784), 10),
    "cifar10_sub": ((9000, 3072), (1000, 3072), 10),
}


@pytest.mark.parametrize("name", SHAPES)
def test_real_sets_are_read(name: str, data_dir: Path) -> None:
    path = data_dir / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"{name}.npz is not in CPMM_DATA_DIR")
    train, test, num_classes = SHAPES[name]
    data = load(path)
    assert data.x_train.shape == train
    assert (None if data.x_test is None else data.x_test.shape) == test
    assert data.num_classes == num_classes
    if data.y_train is not None:
        assert set(np.unique(data.y_train)) == set(range(num_classes))
