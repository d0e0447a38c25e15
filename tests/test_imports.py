"""Imports run one way: the floors that docs/design.md draws are those of the code."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "compress"
ENTRANCES = {"__init__", "__main__"}  # the public names, imported lazily, and `python -m compress`
INNER = {"target": PACKAGE / "tensorrt" / "target"}  # a part that lies within another
PARTS = sorted(
    {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()} | set(INNER)
)


def floors() -> dict[str, int]:
    """Read the drawing in docs/design.md: part of the package -> number of its floor."""
    section = (REPOSITORY / "docs" / "design.md").read_text("utf-8").split("## Floors")[1].split("## ")[0]
    drawing = " ".join(re.findall(r"^    (.+)$", section, re.M))
    return {name: floor for floor, names in enumerate(drawing.split("<")) for name in re.findall(r"\w+", names)}


def imported(part: str) -> set[str]:
    """Find the other parts that a part imports, at the top of a module or within a function."""
    module, folder = PACKAGE / f"{part}.py", INNER.get(part, PACKAGE / part)
    others = [inner for inner in INNER.values() if inner != folder]
    found = set()
    for path in [module] if module.is_file() else folder.rglob("*.py"):
        if path.parent in others:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "compress":
                names = [f"compress.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            found |= {part_of(name) for name in names if name.startswith("compress.")}
    return (found & set(PARTS)) - {part}


def part_of(name: str) -> str:
    """Say to which part a dotted name belongs."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return next((part for part, folder in INNER.items() if folder in (path, *path.parents)), name.split(".")[1])


def test_every_part_has_a_floor() -> None:
    assert set(floors()) == set(PARTS) - ENTRANCES


@pytest.mark.parametrize("part", sorted(set(PARTS) - ENTRANCES))
def test_a_part_uses_lower_floors_only(part: str) -> None:
    floor = floors()
    beside = {name for name in imported(part) if floor[name] >= floor[part]}
    assert not beside, f"compress.{part} imports {', '.join(sorted(beside))}, which are not on a lower floor"
