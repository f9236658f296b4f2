"""A recipe: one YAML file that describes a whole run, read and checked by jsonargparse, and made into objects.

Any key can be overridden on the command line. Every unknown key is refused. What the model and the data must
agree on (resolutions, curriculum, seed, latent pyramid) is stated once and handed to both.
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser
from omegaconf.errors import OmegaConfBaseException

from nami_lightning.errors import explain
from nami_lightning.runs.old_recipes import upgrade, upgraded_arguments, upgraded_layer
from nami_lightning.runs.tensorboard import RunTensorBoard
from nami_lightning.training.curriculum import Curriculum
from nami_lightning.training.module import NamiModule
from nami_lightning.utils.environment_secrets import find_secret
from nami_lightning.utils.text_files import encoding_of, read_text

RECIPES = Path(__file__).parents[1] / "recipes"
MOST_VALUES = 100_000
"""Values of a recipe's file; the packaged ones have about a hundred."""

MOST_CHARACTERS = 200
"""Characters of a run's name: file systems take 255 bytes."""

SET_BY_THE_RUN = {
    "default_root_dir",
    "max_epochs",
    "min_epochs",
    "max_steps",
    "min_steps",
    "use_distributed_sampler",
    "check_val_every_n_epoch",
}


def make_parser() -> ArgumentParser:
    """Return the parser that knows every key of a recipe."""
    parser = ArgumentParser(
        prog="lightning run RECIPE",
        description="Train what RECIPE describes; run again to resume.",
        parser_mode="omegaconf+",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="A recipe laid over the ones before it.")
    parser.add_argument(
        "--base",
        type=str,
        help="The recipe over which this one is laid: a file beside it, or a packaged recipe's name.",
    )
    parser.add_argument("--name", type=str, required=True, help="Name of the run: its folder below output_dir.")
    parser.add_argument("--output_dir", type=str, default="runs", help="Where runs live.")
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of the weights, the order of samples, and all random numbers."
    )
    parser.add_argument(
        "--import_from",
        type=list[str],
        default=[],
        help="More folders in which Python looks for classes that the recipe names. The folders of the recipe's files "
        "and the current folder are always searched; a run's resolved recipe lists those that were needed.",
    )
    parser.add_argument(
        "--resolutions", type=list[int], required=True, help="Side in px of each stage's images, coarsest first."
    )
    parser.add_class_arguments(Curriculum, "curriculum")
    parser.add_class_arguments(NamiModule, "model")
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=True)
    parser.add_class_arguments(L.Trainer, "trainer", skip=SET_BY_THE_RUN, instantiate=False)
    parser.set_defaults({"trainer.logger": [{"class_path": "nami_lightning.RunTensorBoard"}]})
    for part in ("model", "data.init_args"):
        parser.link_arguments("curriculum", f"{part}.curriculum", apply_on="instantiate")
        parser.link_arguments("resolutions", f"{part}.resolutions")
        parser.link_arguments("seed", f"{part}.seed")
    parser.link_arguments("model.latent_pyramid", "data.init_args.latent_pyramid")
    return parser


class Recipe:
    """The checked values of a recipe; it makes its objects on demand.

    Args:
        path: the YAML file, or the name of one that comes with the package.
        overrides: more arguments: ``--key.path value``, ``--config OVERLAY``, ``--help``, ``--print_config``.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: an unknown key, or a value that doesn't fit.
    """

    def __init__(self, path: str | Path, overrides: Sequence[str] = ()) -> None:
        self.parser = make_parser()
        files = with_bases(find_recipe(path))
        folders = import_folders([*files, *overlays(overrides)])
        sys.path += [folder for folder in folders if folder not in sys.path]
        layers = [part for file in files for part in ("--config", upgraded_layer(file))]
        arguments = with_readable_files([*layers, *upgraded_arguments(list(overrides))])
        try:
            self.config = self.parser.parse_args(arguments)
        except (ArgumentError, OmegaConfBaseException, ValueError) as error:  # ValueError: of Python, of odd values
            message = explain(error, keys(self.parser))
            if "No module named" in message:
                message += f"; Python looked among the installed packages and in {', '.join(folders)}"
            raise ValueError(f"{path}: {message}") from error
        if self.config.base != read_layer(files[-1]).get("base"):
            raise ValueError(f"base: {self.config.base} in an overlay: only RECIPE itself can name its base")
        self.config.base = None  # resolved: the recipe now stands alone
        check_name(self.config.name)
        if "\0" in self.config.output_dir:
            raise ValueError("output_dir: a path can't hold the character NUL")
        if secret := find_secret(self.dump(), os.environ):
            raise ValueError(
                f"{path} holds the value of the environment variable {secret}, and a run writes its recipe to files, "
                "logs and loggers: leave it out; libraries read it from the environment by themselves"
            )
        self.config.import_from = [folder for folder in folders if holds_a_class(folder, self.config.as_dict())]

    @property
    def folder(self) -> Path:
        """The run's folder, ``output_dir/name``."""
        return Path(self.config.output_dir) / self.config.name

    def dump(self) -> str:
        """Return the resolved recipe as YAML."""
        return str(self.parser.dump(self.config, skip_none=False))

    def values(self) -> dict[str, Any]:
        """Return the resolved recipe as plain values, which loggers take as hyperparameters."""
        values: dict[str, Any] = yaml.safe_load(self.dump())
        return values

    def digest(self) -> str:
        """Return a short hash of the resolved recipe, without the folders of its classes: ranks may run elsewhere."""
        config = self.config.clone()
        config.import_from = []
        text = str(self.parser.dump(config, skip_none=False))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def make_model(self) -> NamiModule:
        """Make the model alone; it needs nothing of the data or the trainer."""
        config = self.config.clone()
        del config["data"], config["trainer"]
        model = self.parser.instantiate(config).model
        assert isinstance(model, NamiModule)
        return model

    def make_data(self) -> L.LightningDataModule:
        """Make the DataModule alone."""
        config = self.config.clone()
        del config["trainer"]  # not the model too: without its values, jsonargparse would make its parts from nothing
        data = self.parser.instantiate(config).data
        assert isinstance(data, L.LightningDataModule)
        return data

    def make(self) -> tuple[NamiModule, L.LightningDataModule, L.Trainer]:
        """Make the model, the DataModule and the Trainer."""
        objects = self.parser.instantiate(self.config)
        settings = dict(objects.trainer)
        if settings["logger"] in (None, True):
            settings["logger"] = RunTensorBoard()
        trainer = L.Trainer(
            **settings,
            default_root_dir=self.folder,
            max_epochs=1,  # the curriculum's steps are one pass over the DataModule's loader
            check_val_every_n_epoch=None,
            use_distributed_sampler=False,
        )
        for logger in trainer.loggers:
            if isinstance(logger, RunTensorBoard):
                logger.place(self.folder)
        return objects.model, objects.data, trainer


def check_name(name: str) -> None:
    """Check that a run's name leads to a folder below ``output_dir``.

    Raises:
        ValueError: it doesn't.
    """
    parts = name.split("/")
    if any(part.strip() in ("", ".", "..") for part in parts) or not name.isprintable() or len(name) > MOST_CHARACTERS:
        raise ValueError(
            f"name: {name[:MOST_CHARACTERS]!r} is no name of a folder below output_dir: use at most {MOST_CHARACTERS} "
            "letters, digits and the like, and no .."
        )


def keys(parser: ArgumentParser) -> list[str]:
    """Return every key that the command line takes, without the classes' own arguments."""
    return [option.removeprefix("--") for action in parser._actions for option in action.option_strings]


def with_bases(path: Path) -> list[Path]:
    """Return the recipe at ``path`` after its base (the key ``base``), that one after its own base, and so on.

    Raises:
        ValueError: a file that is not YAML, or bases that go round in a circle.
        FileNotFoundError: a base that isn't there.
    """
    layers = [path]
    while (base := read_layer(layers[0]).get("base")) is not None:
        try:
            following = find_recipe(str(base), layers[0].parent)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{layers[0]}: its base {base} isn't there: {error}") from error
        if following in layers:
            raise ValueError(f"{layers[0]}: its base {base} leads back to itself")
        layers.insert(0, following)
    return layers


class UniqueKeys(yaml.SafeLoader):
    """Reads YAML, and refuses a key that is there twice in the same place: the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping's values by key."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def check_size(root: yaml.Node | None) -> None:
    """Check that a YAML file doesn't grow beyond measure where its aliases are replaced by what they stand for.

    Raises:
        ValueError: it does.
        RecursionError: an alias stands for something that holds it.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            children = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else []
            children = node.value if isinstance(node, yaml.SequenceNode) else children
            sizes[id(node)] = 1 + sum(map(size, children))
        return sizes[id(node)]

    if root is not None and size(root) > MOST_VALUES:
        raise ValueError(f"with its aliases replaced it has {size(root):,} values; the limit is {MOST_VALUES:,}")


def read_layer(path: Path) -> dict[str, Any]:
    """Return the keys of one file of a recipe; none if it is not a mapping, which the parser refuses later.

    Raises:
        ValueError: the file is not YAML, its encoding is neither UTF-8 nor UTF-16, or a key is there twice.
    """
    text = read_text(path)
    try:
        check_size(yaml.compose(text, yaml.SafeLoader))
        content = yaml.load(text, UniqueKeys)
    except RecursionError as error:
        raise ValueError(f"{path} is not YAML of a recipe: values are nested in values without an end") from error
    except (yaml.YAMLError, AttributeError, OverflowError, TypeError, ValueError) as error:  # 2001-99-99 is no date
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def with_readable_files(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which the content stands for each ``--config`` file in UTF-16: the parser reads UTF-8."""
    readable: list[str] = []
    for argument in arguments:
        option = "--config=" if argument.startswith("--config=") else ""
        path = argument.removeprefix(option)
        if (option or readable[-1:] == ["--config"]) and in_utf16(path):
            argument = option + yaml.safe_dump(upgrade(read_layer(Path(path))), sort_keys=False)
        readable.append(argument)
    return readable


def in_utf16(argument: str) -> bool:
    """Tell whether an argument is the path of a file in UTF-16."""
    try:
        with Path(argument).open("rb") as file:
            return encoding_of(file.read(2)) == "utf-16"
    except (OSError, ValueError):  # no path at all, but YAML
        return False


def overlays(arguments: Sequence[str]) -> list[Path]:
    """Return the files that command-line arguments lay over a recipe by ``--config``."""
    following = [path for option, path in pairwise(arguments) if option == "--config"]
    following += [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    return [path for path in map(Path, following) if path.is_file()]


def import_folders(files: Sequence[Path]) -> list[str]:
    """Return where Python looks for the classes that a recipe names, besides the installed packages.

    These are the folders of the recipe's files, the current folder, and what the files list as ``import_from``.
    """
    listed = [folder for file in files for folder in read_layer(file).get("import_from") or []]
    folders = [*(file.parent for file in reversed(files)), Path.cwd(), *listed]
    return list(dict.fromkeys(str(Path(folder).resolve()) for folder in folders))


def holds_a_class(folder: str, values: Any) -> bool:
    """Tell whether a class that the recipe names was imported from ``folder``; the project's own don't count."""
    modules = {path.partition(".")[0] for path in class_paths(values)} - {__name__.partition(".")[0]}
    for module in filter(None, map(sys.modules.get, modules)):
        origins = [module.__file__] if getattr(module, "__file__", None) else [*getattr(module, "__path__", [])]
        for origin in origins:
            path = Path(str(origin)).resolve()
            if folder == str((path.parent if path.name == "__init__.py" else path).parent):
                return True
    return False


def class_paths(values: Any) -> Iterator[str]:
    """Yield every class path in a recipe's values."""
    if isinstance(values, dict):
        if isinstance(values.get("class_path"), str):
            yield values["class_path"]
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from class_paths(value)


def find_recipe(path: str | Path, folder: Path = Path()) -> Path:
    """Return the recipe at ``path``, or the packaged one of that name.

    Args:
        path: a file, or a packaged recipe's name with or without ``.yaml``.
        folder: the folder from which a relative path leads.

    Raises:
        FileNotFoundError: naming the recipes that there are.
    """
    path = Path(path)
    packaged = [RECIPES / path.name, RECIPES / f"{path.name}.yaml"] if str(path.parent) in (".", "recipes") else []
    for candidate in (folder / path, *packaged):
        if candidate.is_file():
            return candidate
    known = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
    nearest = get_close_matches(path.stem, known, n=1)
    raise FileNotFoundError(
        f"no recipe {path}{f', did you mean {nearest[0]}?' if nearest else ';'} give a YAML file, or one of: "
        f"{', '.join(known)}; options and keys come after it"
    )
