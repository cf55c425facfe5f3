"""Other people's libraries, each optional: one that is missing is reported as missing."""

from __future__ import annotations

import importlib
from types import ModuleType

INSTALL = "pip install -e '.[bench]'"


def find(name: str) -> ModuleType | None:
    """Import a peer by name; None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def missing(name: str) -> str:
    """Say that a peer is missing, for a table."""
    return f"missing ({INSTALL} brings {name})"
