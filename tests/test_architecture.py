"""The project's imports run one way: down the floors, and never in a circle; folders and files stay small."""

import ast
from pathlib import Path

import pytest

import nami_lightning

ROOT = Path(nami_lightning.__file__).parent

FLOORS = (
    ("utils", "errors"),
    ("models",),
    ("pipelines",),
    ("training",),
    ("planning", "runs"),
    ("datamodules", "metrics", "evaluation", "conversion"),
    ("callbacks", "comparison", "benchmarks", "serving"),
    ("cli",),
)
"""The rooms, from the lowest floor up. A room imports rooms of lower floors only."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MOST_FILES = 12
MOST_LINES = 400


def source_files() -> dict[str, Path]:
    """Return every file of the package by its module's name; links to folders are followed."""
    folders = [ROOT, *(path for path in ROOT.iterdir() if path.is_symlink())]
    files = {path for folder in folders for path in folder.rglob("*.py")}
    return {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in files}


FILES = source_files()


def imports(name: str) -> set[str]:
    """Return the project's own modules that a module imports, wherever in its file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: a relative import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {module for module in found if module in FILES}


GRAPH = {name: imports(name) for name in FILES}


def room(module: str) -> str:
    """Return the room of a module; empty for the package itself."""
    return module.split(".")[1] if module.count(".") else ""


def test_the_graph_is_read() -> None:
    assert "nami_lightning.models.bridge" in GRAPH["nami_lightning.training.loss"]
    assert "nami_lightning.runs.recipe" in GRAPH["nami_lightning.cli.run"]
    assert {room(name) for name in FILES} - {"", "__init__"} == set(FLOOR)


def test_no_import_goes_up_the_floors() -> None:
    upward = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if room(name) in FLOOR and room(other) != room(name) and FLOOR[room(other)] >= FLOOR[room(name)]
    ]
    assert not upward


def test_no_files_import_each_other_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in GRAPH[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES.values()}), ids=lambda path: path.name)
def test_folders_are_small(folder: Path) -> None:
    files = list(folder.glob("*.py"))
    assert len(files) <= MOST_FILES or folder.name == "cli", f"{folder} holds {len(files)} files"


def test_files_are_short() -> None:
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in FILES.items()}
    assert {name: number for name, number in lines.items() if number > MOST_LINES} == {}


def test_every_room_lists_its_files() -> None:
    for path in FILES.values():
        if path.name == "__init__.py" and path.parent != ROOT:
            text = path.read_text(encoding="utf-8")
            listed = {other.stem for other in path.parent.glob("*.py")} - {"__init__", "__main__"}
            assert [name for name in sorted(listed) if f"``{name}``" not in text] == [], path
