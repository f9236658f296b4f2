"""The arguments of ``lightning data prepare --source ...``: a source, and every setting of a preparation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nami_lightning.cli.data.part_options import add_part_options

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from nami_lightning.datamodules.preparation.prepare_parts import Preparation
    from nami_lightning.datamodules.sources.base import Source

DESCRIPTION = """\
Prepare a data set from a collection of images with captions. After an interruption, run the same command again to
resume. On many machines, run the command with --shard I/N on each, and then with --merge on one of them.
If the source has changed after that, the same command prepares what changed.
`lightning data prepare RECIPE` takes the source and the settings from the data: block of a recipe."""

SOURCE = (
    "A folder of images, tars or Parquet files, or a saved Hugging Face dataset; or the class of a source "
    "(ImageFolder, OpenMoji, or your own by its class path), whose arguments follow as --source.NAME."
)
PLAN = "Only say what would be read, kept and written, by a sample of the source; write nothing."
RESCAN = (
    "Read all of the source again. Without it, a part is read again if the name, the size or the time of modification "
    "of one of its files changed."
)


def _prepare_source_parser() -> ArgumentParser:
    """Return the parser of ``lightning data prepare --source ...``, with every setting of a preparation."""
    from jsonargparse import ArgumentParser

    from nami_lightning.datamodules.preparation.prepare_parts import Preparation
    from nami_lightning.datamodules.sources.base import Source

    parser = ArgumentParser(
        prog="lightning data prepare", description=DESCRIPTION, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--source", type=Source, required=True, help=SOURCE)
    parser.add_argument("--output", type=str, required=True, help="Folder of the data set.")
    parser.add_class_arguments(Preparation, as_group=False)
    add_part_options(parser)
    parser.add_argument("--rescan", action="store_true", help=RESCAN)
    parser.add_argument("--plan", action="store_true", help=PLAN)
    return parser


def parse_source_arguments(arguments: Sequence[str]) -> tuple[Any, Source, Preparation]:
    """Return all arguments, the source and the preparation that they state.

    Raises:
        ValueError: an argument is unknown, missing or wrong.
    """
    from jsonargparse import ArgumentError

    from nami_lightning.datamodules.preparation.prepare_parts import Preparation
    from nami_lightning.errors import explain
    from nami_lightning.runs.recipe import keys

    parser = _prepare_source_parser()
    try:
        config = parser.parse_args(_expand_arguments(arguments))
        objects = parser.instantiate(config)
    except ArgumentError as error:
        raise ValueError(f"lightning data prepare: {explain(error, keys(parser))}") from error
    preparation = Preparation(**{field.name: objects[field.name] for field in fields(Preparation)})
    if not preparation.resolutions:
        raise ValueError("lightning data prepare: give --resolutions, 256 512 1024 for example")
    return config, objects.source, preparation


def _expand_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments in the form that the parser takes.

    ``--resolutions 256 512`` becomes a list, and a path given as ``--source`` becomes the class that reads it.
    """
    expanded: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, _, value = argument.partition("=")
        if name == "--resolutions":
            values = [value] if value else []
            while rest and not rest[0].startswith("-"):
                values.append(rest.pop(0))
            listed = values[0] if values[:1] and values[0].startswith("[") else f"[{', '.join(values)}]"
            expanded += ["--resolutions", listed]
        elif name == "--source":
            value = value or (rest.pop(0) if rest else "")
            expanded += _source_arguments(value)
        else:
            expanded.append(argument)
    return expanded


def _source_arguments(value: str) -> list[str]:
    from nami_lightning.datamodules.sources import find_source
    from nami_lightning.datamodules.sources.base import Source

    if re.fullmatch(r"[A-Za-z_][\w.]*", value) and not Path(value).exists():
        known = [kind.__name__ for kind in Source.__subclasses__()]
        if "." not in value and value not in known:
            raise FileNotFoundError(f"{value} is neither an existing path nor one of the sources {', '.join(known)}")
        return ["--source", value if "." in value else f"nami_lightning.datamodules.sources.{value}"]
    kind = type(find_source(value))
    return ["--source", f"{kind.__module__}.{kind.__name__}", "--source.path", value]
