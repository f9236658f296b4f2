"""``lightning data prepare``: prepare a data set from a collection of images with captions."""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

from nami_lightning.cli.argument_types import parse_shard
from nami_lightning.cli.data.part_options import add_part_options
from nami_lightning.cli.data.source_arguments import DESCRIPTION, PLAN, RESCAN, parse_source_arguments
from nami_lightning.cli.ray_engine import run_overrides_on_ray


def add_command(commands: Any) -> None:
    """Add ``data prepare`` to the command line; it has its own parsers below, because it takes every recipe key."""
    parser = commands.add_parser(
        "prepare", help="prepare shards from images with captions", add_help=False, allow_abbrev=False
    )
    parser.set_defaults(execute=prepare, takes_keys=True)


def prepare(options: Namespace) -> None:
    """Prepare a data set from a source, or from the source of a recipe.

    Raises:
        ValueError: the arguments don't fit together.
    """
    from nami_lightning.datamodules.multi_resolution import MultiResolutionDataModule
    from nami_lightning.datamodules.preparation.plan import make_plan, plan_lines
    from nami_lightning.datamodules.preparation.prepare import is_complete, merge
    from nami_lightning.datamodules.preparation.prepare_parts import prepare_parts, survey_lines
    from nami_lightning.datamodules.storage.dataset import PreparedDataset
    from nami_lightning.datamodules.storage.inspect import outcome
    from nami_lightning.datamodules.storage.remote import is_remote
    from nami_lightning.runs.recipe import Recipe

    arguments = list(options.overrides)
    if arguments and not arguments[0].startswith("-"):
        settings, overrides = _prepare_recipe_parser().parse_known_args(arguments)
        data = Recipe(settings.recipe, overrides).make_data()
        if not isinstance(data, MultiResolutionDataModule) or data.source is None:
            raise ValueError(f"{settings.recipe} has no data.init_args.source to prepare from")
        source, output, preparation = data.source, data.dataset_folder, data.preparation
    else:
        settings, source, preparation = parse_source_arguments(arguments)
        output = settings.output if is_remote(settings.output) else Path(settings.output)
    if settings.plan:
        plan = make_plan(source, preparation)
        lines = [
            *survey_lines(source),
            *plan_lines(plan, str(output), settings.workers, preparation.filters.drop_duplicates),
        ]
        print("\n".join(lines))
        return
    if is_complete(source, output, preparation, settings.rescan):
        print(f"{output} is complete.")
    elif settings.shard is not None:
        prepare_parts(source, output, preparation, settings.workers, parse_shard(settings.shard), settings.rescan)
        print(f"Shard {settings.shard} is done. When all are done, run the command with --merge instead of --shard.")
        return
    else:
        if settings.engine == "ray" and not settings.merge:
            run_overrides_on_ray(prepare, arguments, settings)
        elif not settings.merge:
            prepare_parts(source, output, preparation, settings.workers, rescan=settings.rescan)
        merge(source, output, preparation)
    print("\n".join(outcome(PreparedDataset(output))))


def _prepare_recipe_parser() -> argparse.ArgumentParser:
    """Return the parser of the options of ``lightning data prepare RECIPE`` that aren't recipe keys."""
    parser = argparse.ArgumentParser(prog="lightning data prepare", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("recipe", metavar="RECIPE")
    add_part_options(parser)
    parser.add_argument("--rescan", action="store_true", help=RESCAN)
    parser.add_argument("--plan", action="store_true", help=PLAN)
    return parser
