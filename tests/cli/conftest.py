"""One small run for all tests of the command line, and a way to call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from cpmm_jax.cli import compilation_cache, main

# The batch is smaller than the table: the refit on more rows is then the same compiled program.
SETTINGS = ["--steps", "20", "--components", "4", "--rank", "1", "--batch-size", "16", "--quiet"]


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Cpmm = Callable[..., Answer]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the command line out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in compilation_cache(tmp_path_factory.mktemp("cache")).items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def cpmm(capsys: pytest.CaptureFixture[str]) -> Cpmm:
    def call(*arguments: object) -> Answer:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Answer(code, *capsys.readouterr())

    return call


def write_table(path: Path, rows: int = 120) -> Path:
    """Write a table with two features and a column of labels between them."""
    rng = np.random.default_rng(0)
    lines = ["left,kind,right"]
    for i in range(rows):
        kind = ("oak", "elm")[i % 2]
        x = rng.standard_normal(2) + 4.0 * (i % 2)
        lines.append(f"{x[0]:.6f},{kind},{10 * x[1]:.6f}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "trees.csv")


@pytest.fixture(scope="session")
def run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a labelled run on the table."""
    folder = tmp_path_factory.mktemp("runs") / "trees"
    assert main(["fit", str(table), "--label", "kind", "--out", str(folder), *SETTINGS]) == 0
    return folder
