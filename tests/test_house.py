"""The house rules: who may import whom, what stays out of the library, how long a file may get."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "cpmm_jax"
ROOMS = [
    "errors",
    "mixture",
    "dynamics",
    "models",
    "curriculum",
    "data",
    "files",
    "training",
    "artifact",
    "evaluate",
    "bins",
    "plotting",
    "recipe",
    "starts",
    "pipeline",
    "direct_pipeline",
    "solver_study",
    "run",
    "estimators",
    "commands",
    "cli",
]
MAX_LINES = 400
CODE = ("cpmm_jax", "experiments", "benchmarks", "tests")


@cache
def modules() -> dict[str, Path]:
    """Map every module's dotted name to its file."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def absolute(node: ast.ImportFrom, name: str, path: Path) -> str:
    """Return the dotted name of the module that a `from ... import` names."""
    if not node.level:
        return node.module or ""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    base = package[: len(package) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])


def imported_from(source: ast.Module, name: str, path: Path, known: set[str]) -> set[str]:
    """Return the package's modules that `source` imports anywhere: lazily and for types too.

    `from cpmm_jax.a import b` counts as `cpmm_jax.a.b` if that is a module, else as `cpmm_jax.a`.
    """
    targets: set[str] = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, name, path)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                # The version is a plain constant: whoever reads it asks for no room.
                if inner != f"{PACKAGE}.__version__":
                    targets.add(inner if inner in known else base)
    return {t for t in targets if t == PACKAGE or t.startswith(f"{PACKAGE}.")}


@cache
def graph() -> dict[str, set[str]]:
    """Map every module but the package's own `__init__` to the modules that it imports."""
    known = set(modules())
    return {
        name: imported_from(tree(path), name, path, known)
        for name, path in modules().items()
        if name != PACKAGE
    }


def room(module: str) -> str:
    return module.split(".")[1]


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Return one line for each import that the order of the rooms forbids."""
    order = {name: i for i, name in enumerate(ROOMS)}
    wrong = []
    for name, targets in sorted(edges.items()):
        for target in sorted(targets):
            if target == PACKAGE:
                wrong.append(f"{name} imports the package itself: name the module instead")
            elif order[room(target)] > order[room(name)]:
                wrong.append(f"{name} imports {target}, which is above it")
    return wrong


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """Return the modules along one circle of imports; empty if there is none."""
    try:
        list(graphlib.TopologicalSorter(edges).static_order())
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` for a chain of attributes; the empty string for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield node.lineno, dotted(node.func)


def names(path: Path) -> set[str]:
    """Return every identifier that the code of a file uses (its strings and comments aside)."""
    used: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.alias):
            used |= set(node.name.split("."))
    return used


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tracked() -> list[Path]:
    """Return the files that git tracks or would track; skip where this is no git checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_every_module_has_a_room() -> None:
    strangers = {name for name in graph() if room(name) not in ROOMS}
    assert not strangers, f"give these a place in ROOMS: {sorted(strangers)}"


def test_imports_only_point_down() -> None:
    assert upward({n: t for n, t in graph().items() if room(n) in ROOMS}) == []


def test_no_circular_imports() -> None:
    assert cycle(graph()) == []


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("import cpmm_jax.cli", "cpmm_jax.cli"),
        ("def f():\n    from cpmm_jax import cli", "cpmm_jax.cli"),
        ("if TYPE_CHECKING:\n    from .. import cli", "cpmm_jax.cli"),
        ("from ..cli import main", "cpmm_jax.cli"),
        ("import cpmm_jax", "cpmm_jax"),
    ],
)
def test_forbidden_imports_are_seen(source: str, target: str) -> None:
    name, path = "cpmm_jax.mixture.mfa", Path("cpmm_jax/mixture/mfa.py")
    edges = {name: imported_from(ast.parse(source), name, path, {"cpmm_jax", "cpmm_jax.cli"})}
    assert edges[name] == {target}
    assert len(upward(edges)) == 1


def test_cycles_are_seen() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) in (["b", "c", "b"], ["c", "b", "c"])
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_import_pulls_in_nothing_heavy() -> None:
    code = f"import sys, {PACKAGE}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    listing = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"orbax", "sklearn", "matplotlib"}
    assert PACKAGE in listing.stdout.split()
    assert not heavy & set(listing.stdout.split())


def test_only_solve_calls_diffeqsolve() -> None:
    users = [relative(path) for path in modules().values() if "diffeqsolve" in names(path)]
    assert set(users) <= {"cpmm_jax/dynamics/solve.py"}


def test_library_changes_no_configuration() -> None:
    for path in modules().values():
        found = [line for line, name in calls(path) if name.endswith("config.update")]
        assert not found, f"{relative(path)} calls jax.config.update in line {found[0]}"


def test_library_does_not_print() -> None:
    for path in modules().values():
        if relative(path) not in ("cpmm_jax/cli.py", "cpmm_jax/commands.py"):
            found = [line for line, name in calls(path) if name == "print"]
            assert not found, f"{relative(path)} calls print in line {found[0]}: use the logger"


def test_files_stay_short() -> None:
    lengths = {
        relative(path): len(path.read_text(encoding="utf-8").splitlines())
        for folder in CODE
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_no_paths_of_a_machine() -> None:
    absolute_path = re.compile(r"(?<![\w.~)}])/(?:home|root|work|Users)/\w")
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not text
        for number, line in enumerate(text.splitlines(), start=1):
            assert not absolute_path.search(line), f"{relative(path)}:{number}: {line.strip()}"


def test_constraints_hold_names_and_versions_only() -> None:
    pin = re.compile(r'[a-z0-9-]+==[\w.]+(; python_version (<|>=) "3\.\d+")?')
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [x for x in lines if not x.startswith("#") and not pin.fullmatch(x)] == []
