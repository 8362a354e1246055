"""The doors between rooms, and names that must not be shadowed."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

from tests.tools import REPOSITORY

DOORS: dict[str, set[str]] = {
    "attention": set(),
    "engine": set(),
    "shards": {"attention", "engine"},
    "teacher": {"attention", "engine", "shards"},
    "pretrain": {"attention", "engine", "shards"},
    "downstream": {"attention", "engine", "shards", "pretrain"},
}


def python_files(room: str) -> list[Path]:
    return sorted((REPOSITORY / room).rglob("*.py"))


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports, anywhere in it: a lazy import goes through the door too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the door"
            found.add((node.module or "").split(".")[0])
    return found & DOORS.keys()


@pytest.mark.parametrize("room", sorted(DOORS))
def test_rooms_import_only_through_their_doors(room: str) -> None:
    for path in python_files(room):
        forbidden = imported_rooms(path) - DOORS[room] - {room}
        assert not forbidden, f"{path.relative_to(REPOSITORY)} imports {sorted(forbidden)}"


def test_no_module_shadows_the_standard_library_or_a_dependency() -> None:
    """`python pretrain/main.py` puts `pretrain/` first on the path: `pretrain/random.py` would replace `random`."""
    taken = set(sys.stdlib_module_names)
    for name, distributions in importlib.metadata.packages_distributions().items():
        if "saccade" not in distributions:
            taken.add(name)
    ours = {path.stem: path for room in DOORS for path in python_files(room) if path.parent.name == room}
    ours |= {path.name: path for room in DOORS for path in (REPOSITORY / room).glob("*/") if path.is_dir()}
    ours.pop("__init__", None)
    clashes = {name: str(path.relative_to(REPOSITORY)) for name, path in ours.items() if name in taken}
    clashes.pop("__pycache__", None)
    assert not clashes


def test_the_shadow_check_would_find_a_shadow() -> None:
    assert "random" in sys.stdlib_module_names and "datasets" not in {p.stem for p in python_files("shards")}
