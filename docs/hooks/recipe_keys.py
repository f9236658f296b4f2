"""A MkDocs hook: the tables of all recipe keys, made from the classes that a recipe configures.

The parser that reads recipes says the type, default and meaning of each key; so the page can't go stale.
"""

import importlib
import re
import types
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, Literal, Union, get_args, get_origin

import yaml

MARKER = "<!-- the tables of all keys -->"
Row = tuple[str, str, str, str]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace the marker in ``recipes.md``."""
    return markdown.replace(MARKER, render()) if MARKER in markdown else markdown


def render() -> str:
    """Return the Markdown of all tables."""
    import lightning as L
    from torch import nn
    from torch.optim import Optimizer

    from nami_lightning import BridgeFlow, Curriculum, NamiTransformer2DModel, Phase
    from nami_lightning.datamodules.sources import Source
    from nami_lightning.models.image_features import ImageEncoder
    from nami_lightning.models.lora import LoraSettings
    from nami_lightning.runs.recipe import make_parser
    from nami_lightning.training.paths.rectified import DistillationSettings
    from nami_lightning.training.techniques.technique import Technique

    parser = make_parser()
    links = {action.target[0] for action in parser._links_group._group_actions}  # type: ignore[attr-defined]
    rows = rows_of(parser, links)

    def below(prefix: str) -> list[Row]:
        found = (row for row in rows if row[0].startswith(prefix))
        return [(key.removeprefix(prefix), kind, default, text) for key, kind, default, text in found]

    def classes(key: str, base: type, package: str) -> list[str]:
        prefix = f"{key}.init_args."
        hidden = {link.removeprefix(prefix) for link in links if link.startswith(prefix)}
        return [part for cls in exported(base, package) for part in class_section(cls, hidden, package)]

    top = [row for row in rows if "." not in row[0] and row[0] not in ("data", "config")]
    sections = [
        "## The run", table(top),
        "## curriculum", doc(Curriculum), table(below("curriculum.")),
        "### A phase", doc(Phase), table(rows_of_class(Phase)),
        "## model", table(below("model.")),
        "### model.transformer", *class_section(NamiTransformer2DModel, set(), "nami_lightning", heading=False),
        "### model.bridge", *class_section(BridgeFlow, set(), "nami_lightning", heading=False),
        "### model.lora", doc(LoraSettings), table(rows_of_class(LoraSettings)),
        "### model.distillation", doc(DistillationSettings), table(rows_of_class(DistillationSettings)),
        "### model.optimizer", "Any optimizer of torch by its class path, or:",
        *classes("model.optimizer", Optimizer, "nami_lightning"),
        "### model.techniques", "Those of [Techniques](techniques.md), or yours:",
        *classes("model.techniques", Technique, "nami_lightning"),
        "### Image encoders", "The values of a technique's key `encoder`:",
        *classes("encoder", ImageEncoder, "nami_lightning.models"),
        "## data", *classes("data", L.LightningDataModule, "nami_lightning.datamodules"),
        "### Sources", "The values of `data.init_args.source`:",
        *classes("data.init_args.source", Source, "nami_lightning.datamodules"),
        "## trainer", "These keys are Lightning's own; its documentation explains them in full.",
        table(below("trainer.")),
        "### trainer.strategy", "Lightning's names (`ddp`, ...), `fsdp2`, or:",
        *classes("trainer.strategy", L.pytorch.strategies.Strategy, "nami_lightning"),
        "### trainer.callbacks", "Any callback of Lightning or of yours by its class path, and these:",
        *classes("trainer.callbacks", L.Callback, "nami_lightning.callbacks"),
        "### Features", "The values of the callback `Metrics`' key `features`:",
        *classes("features", nn.Module, "nami_lightning.metrics"),
    ]  # fmt: skip
    return "\n\n".join(sections)


def exported(base: type, package: str) -> list[type]:
    """Return the classes that a package exports and that are subclasses of ``base``."""
    module = importlib.import_module(package)
    values = (getattr(module, name) for name in sorted(module.__all__))
    return [value for value in values if isinstance(value, type) and issubclass(value, base) and value is not base]


def class_section(cls: type, hidden: set[str], package: str, heading: bool = True) -> list[str]:
    """Return the heading, first sentence and table of one class."""
    rows = rows_of_class(cls, hidden)
    title = [f"#### {cls.__name__}"] if heading else []
    path = f"`class_path: {package}.{cls.__name__}`. {doc(cls)}"
    return [*title, path, table(rows) if rows else "It takes no `init_args`."]


def rows_of_class(cls: type, hidden: Set[str] = frozenset()) -> list[Row]:
    """Return a row for each argument of a class."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip={*hidden, "params"}, fail_untyped=False)
    return rows_of(parser, set())


def rows_of(parser: Any, links: set[str]) -> list[Row]:
    """Return (key, type, default, meaning) of each key that a parser knows."""
    rows = []
    for action in parser._actions:
        if not action.option_strings or action.dest.endswith((".help", "help", "print_config")) or action.dest in links:
            continue
        if "file" in str(action.help) and action.default == "==SUPPRESS==":  # the group that holds nested keys
            continue
        default = "required" if action.required else code(yaml_value(action.default))
        kind = type_name(getattr(action, "_typehint", None) or action.type)
        rows.append((action.dest, kind, default, plain(action.help or "")))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table."""
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| `{key}` | {kind} | {default} | {text} |" for key, kind, default, text in rows]
    return "\n".join(lines)


def doc(cls: type) -> str:
    """Return the first paragraph of a class's docstring."""
    return plain((cls.__doc__ or "").strip().partition("\n\n")[0])


def plain(text: str) -> str:
    """Return docstring text as one line of Markdown for a table's cell, without the default at its end."""
    text = re.split(r"\s*Default:", text)[0]
    text = re.sub(r":\w+:`~?([^`<]*?)(?:\s*<[^`]*>)?`", r"`\1`", text)
    text = " ".join(text.replace("``", "`").split()).replace("|", r"\|").replace("==SUPPRESS==", "")
    return text[:1].upper() + text[1:]


def code(text: str) -> str:
    """Return text in code style for a table's cell."""
    return f"`{text}`".replace("|", r"\|") if text else ""


def yaml_value(value: Any) -> str:
    """Return a default as a recipe would state it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple | dict):
        plain_value = list(value) if isinstance(value, tuple) else value
        return yaml.safe_dump(plain_value, default_flow_style=True).strip()
    return str(value)


def type_name(kind: Any) -> str:
    """Return a type in words."""
    if kind is None or kind is type(None):
        return "null"
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(code(str(value)) for value in arguments)
    if origin in (Union, types.UnionType):
        names = list(dict.fromkeys(type_name(part) for part in arguments))
        return " or ".join([name for name in names if name != "null"] + ["null"] * ("null" in names))
    if origin is Callable or str(origin) == "<class 'collections.abc.Callable'>":
        return f"class of `{arguments[-1].__name__}`"
    if origin in (list, Iterable, Sequence, tuple) or str(origin).endswith(("Sequence'>", "Iterable'>")):
        part = type_name(arguments[0]) if arguments else ""
        return f"list of {part}{'s' * part.isalpha()}" if part else "list"
    if origin is dict:
        return "mapping"
    simple = {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}
    name = getattr(kind, "__name__", str(kind))
    return simple.get(name, f"`{name}`")
