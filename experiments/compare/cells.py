"""A cell, one data set x method x seed, and its file: there whole, or not there."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all cells of one comparison have in common.

    Attributes:
        preset: its name.
        budget: seconds in which each method may search.
        components: K of every mixture; None to search.
        rank: R of every mixture; None to search.
        steps: training steps of the methods that train; None for each method's own number.
    """

    preset: str
    budget: float
    components: int | None = None
    rank: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Cell:
    """One fit: which data set (split by the seed), which method, and under what settings."""

    dataset: str
    method: str
    seed: int
    settings: Settings

    def __str__(self) -> str:
        return f"{self.dataset}/{self.method}/{self.seed}"

    @property
    def config(self) -> Record:
        """What a record must have been made with to stand for this cell."""
        return asdict(self)

    def path(self, folder: Path) -> Path:
        """Return its file; of other settings the same, so that a folder holds one comparison."""
        return folder / "cells" / f"{self.dataset}.{self.method}.{self.seed}.json"

    def failed(self, error: str) -> Record:
        """Return the record of a failure, with its reason in one line."""
        return {"config": self.config, "status": "failed", "error": error}


def read(folder: Path, cell: Cell) -> Record | None:
    """Return the record of a cell; None where there is none, or one of other settings."""
    try:
        record: Record = json.loads(cell.path(folder).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record if record.get("config") == cell.config else None


def write(folder: Path, cell: Cell, record: Record) -> None:
    """Write the record of a cell; killed at any point, this leaves the old file or the new one."""
    path = cell.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    with unfinished.open("w") as file:
        json.dump(record, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())  # the name must not reach the disk before the content
    unfinished.replace(path)


def is_done(record: Record | None) -> bool:
    """Whether a cell need not be run again."""
    return record is not None and record["status"] == "done"
