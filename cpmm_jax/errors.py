"""Exceptions and warnings; each message names the thing, the rule, what was found, a remedy."""

from __future__ import annotations

from typing import Any


class CpmmError(Exception):
    """Base of every error raised on purpose; the command line prints it as one line."""


class DataError(CpmmError, ValueError):
    """Data, labels or a data file break a rule."""


class ConfigError(CpmmError, ValueError):
    """A setting is out of its range or does not fit the others."""


class ArtifactError(CpmmError, ValueError):
    """A mixture file is damaged, foreign, or of a later schema."""


class RunError(CpmmError, OSError):
    """A run folder exists already, cannot be written, or is not a run."""


class SolverError(CpmmError, RuntimeError):
    """The ODE could not be solved: steps exhausted, or a state that is not finite."""


class TrainingError(CpmmError, RuntimeError):
    """Training could not go on; `result` holds the best model so far (a `FitResult`)."""

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


class Interrupted(CpmmError, RuntimeError):
    """Training was asked to stop (SIGTERM, SIGINT); it was saved and can go on."""

    def __init__(self, message: str, signal: int = 0) -> None:
        super().__init__(message)
        self.signal = signal


class DataWarning(UserWarning):
    """Data are usable but deserve a look (constant or duplicated columns, few rows)."""


class FlowWarning(UserWarning):
    """A flow's latent points are no standard normal: a curriculum would start elsewhere."""


class SnapshotWarning(UserWarning):
    """A snapshot of the training is missing, damaged, or could not be saved."""
