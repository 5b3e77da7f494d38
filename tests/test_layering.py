"""Packages, and rooms within them, depend on each other in one direction only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "vggt": {"vggt"},
    "shards": {"shards"},
    "prep": {"prep", "shards"},
    "train": {"train", "shards", "vggt"},
}


# Each may import from itself and those before it; the files at the top of a package from all, no room from them.
ROOMS = {
    "train": ("runtime", "data", "objective", "evaluation", "report", "engine"),
    "prep": ("importers", "packing"),
}
COMMANDS = {
    "train": {"main", "evaluate", "check_data", "export", "config"},
    "prep": {"check", "cli", "info", "matches", "pack_command", "preview", "terminal", "verify"},
}


def modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported(path: Path) -> set[str]:
    return {name.split(".")[0] for name in modules(path)}


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_in_one_direction(package):
    files = sorted((ROOT / package).glob("**/*.py"))
    assert files
    for path in files:
        forbidden = imported(path) & (set(ALLOWED) - ALLOWED[package])
        assert not forbidden, f"{path} imports {forbidden}"


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_to_the_left_only(package):
    assert {path.stem for path in (ROOT / package).glob("*.py")} == COMMANDS[package] | {"__init__"}
    for number, room in enumerate(ROOMS[package]):
        files = sorted((ROOT / package / room).glob("*.py"))
        assert files
        for path in files:
            others = {name.split(".")[1] for name in modules(path) if name.startswith(f"{package}.")}
            assert others <= set(ROOMS[package][: number + 1]), f"{path} imports {others}"


def test_no_file_is_much_longer_than_250_lines():
    long = {path: len(path.read_text().splitlines()) for name in ALLOWED for path in (ROOT / name).glob("**/*.py")}
    assert {path: lines for path, lines in long.items() if lines > 300} == {}


def test_shards_and_prep_import_no_torch():
    for package in ("shards", "prep"):
        for path in sorted((ROOT / package).glob("**/*.py")):
            assert not imported(path) & {"torch", "torchdata"}, path


def test_modules_of_train_hide_no_standard_library_module():
    """torchrun train/main.py puts train/ itself first on the path."""
    import sys

    assert not {path.stem for path in (ROOT / "train").glob("*")} & set(sys.stdlib_module_names)


def test_every_make_target_is_phony():
    lines = (ROOT / "Makefile").read_text().splitlines()
    phony = set(next(line for line in lines if line.startswith(".PHONY:")).split()[1:])
    targets = {line.split(":")[0] for line in lines if line[:1].isalpha() and ":" in line and "=" not in line}
    assert targets == phony


def test_every_function_of_the_model_says_its_shapes():
    """Whatever takes or returns a tensor, in its own docstring or that of a class of which it is all."""
    silent = []
    for path in sorted((ROOT / "vggt").glob("*.py")):
        tree = ast.parse(path.read_text())
        owners = {item: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for item in node.body}
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.col_offset > 4:  # those within functions
                continue
            types = ast.unparse(node.args) + (ast.unparse(node.returns) if node.returns else "")
            if "Tensor" not in types.replace("[str, Tensor]", ""):  # weights by name have the shapes they have
                continue
            text = ast.get_docstring(node) or (ast.get_docstring(owners[node]) if node in owners else "") or ""
            if "[" not in text:
                silent.append(f"{path.name}: {node.name}")
    assert not silent
