"""A MkDocs hook: an API page for each room of the package, with each of its modules.

The pages are made from the folders, so a new room or module appears without an edit here or in ``mkdocs.yml``.
"""

import ast
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PACKAGE = "nami_lightning"
SECTION = "API reference"


def rooms() -> list[Path]:
    """Return the package's subpackages, in alphabetical order."""
    found = (file.parent for file in (ROOT / PACKAGE).glob("*/__init__.py"))
    return sorted(found, key=lambda folder: folder.name)


def modules(room: Path) -> list[str]:
    """Return the import names of a room's modules, those of the folders below it after its own."""
    files = sorted(room.rglob("*.py"), key=lambda file: (len(file.relative_to(room).parts), file))
    names = [file.relative_to(ROOT / PACKAGE).with_suffix("") for file in files if file.name != "__main__.py"]
    dotted = [".".join((PACKAGE, *name.parts)).removesuffix(".__init__") for name in names]
    return sorted(dotted, key=lambda name: (name.rpartition(".")[0] if name.count(".") > 2 else "", name))


def page(room: Path) -> str:
    """Return the Markdown of a room's page."""
    title = f"{PACKAGE}.{room.name}"
    lines = [f"# {title}", ""]
    for name in modules(room):
        file = ROOT.joinpath(*name.split("."))
        is_package = file.is_dir()
        source = (file / "__init__.py" if is_package else file.with_suffix(".py")).read_text(encoding="utf-8")
        if is_package and name == title:
            lines += [ast.get_docstring(ast.parse(source)) or "", ""]
        elif not is_package:
            lines += [f"::: {name}", ""]
    return "\n".join(lines)


def on_config(config: Any) -> Any:
    """Put the rooms' pages into the navigation."""
    pages: list[Any] = [{"The package": "api/index.md"}] + [{room.name: f"api/{room.name}.md"} for room in rooms()]
    config.nav = [{SECTION: pages} if SECTION in entry else entry for entry in config.nav]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site."""
    exports = (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    homes = next(
        ast.literal_eval(node.value)
        for node in ast.parse(exports).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOMES"
    )
    lines = ["# API reference", "", "One page for each package. These names are imported from the top:", ""]
    lines += ["| `from nami_lightning import` | defined in |", "| --- | --- |"]
    lines += [f"| `{name}` | [`{PACKAGE}.{home}`][{PACKAGE}.{home}] |" for name, home in sorted(homes.items())]
    lines += ["", "| package | what it is for |", "| --- | --- |"]
    for room in rooms():
        first = (ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or "").partition("\n")[0]
        lines += [f"| [`{PACKAGE}.{room.name}`]({room.name}.md) | {first} |"]
        files.append(File.generated(config, f"api/{room.name}.md", content=page(room)))
    files.append(File.generated(config, "api/index.md", content="\n".join(lines)))
    return files
