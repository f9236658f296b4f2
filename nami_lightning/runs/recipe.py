"""A recipe: one YAML file that describes a whole run, read and checked by jsonargparse, and made into objects.

Any key can be overridden on the command line. Every unknown key is refused. What the model and the data must
agree on (resolutions, curriculum, seed, latent pyramid) is stated once and handed to both.
"""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger

from nami_lightning.errors import explain
from nami_lightning.runs.old_recipes import upgraded_arguments, upgraded_layer
from nami_lightning.training.curriculum import Curriculum
from nami_lightning.training.module import NamiModule

RECIPES = Path(__file__).parents[1] / "recipes"
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
    )
    parser.add_argument("--config", action=ActionConfigFile, help="A recipe laid over the ones before it.")
    parser.add_argument("--base", type=str, help="A recipe beside this one, over which this one is laid.")
    parser.add_argument("--name", type=str, required=True, help="Name of the run: its folder below output_dir.")
    parser.add_argument("--output_dir", type=str, default="runs", help="Where runs live.")
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of the weights, the order of samples, and all random numbers."
    )
    parser.add_argument(
        "--resolutions", type=list[int], required=True, help="Side in px of each stage's images, coarsest first."
    )
    parser.add_class_arguments(Curriculum, "curriculum")
    parser.add_class_arguments(NamiModule, "model")
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=True)
    parser.add_class_arguments(L.Trainer, "trainer", skip=SET_BY_THE_RUN, instantiate=False)
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
        layers = [part for layer in with_bases(find_recipe(path)) for part in ("--config", upgraded_layer(layer))]
        try:
            self.config = self.parser.parse_args([*layers, *upgraded_arguments(list(overrides))])
        except ArgumentError as error:
            raise ValueError(f"{path}: {explain(error, keys(self.parser))}") from error
        self.config.base = None  # resolved: the recipe now stands alone

    @property
    def folder(self) -> Path:
        """The run's folder, ``output_dir/name``."""
        return Path(self.config.output_dir) / self.config.name

    def dump(self) -> str:
        """Return the resolved recipe as YAML."""
        return str(self.parser.dump(self.config, skip_none=False))

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
            settings["logger"] = TensorBoardLogger(self.config.output_dir, self.config.name, version="")
        trainer = L.Trainer(
            **settings,
            default_root_dir=self.folder,
            max_epochs=1,  # the curriculum's steps are one pass over the DataModule's loader
            check_val_every_n_epoch=None,
            use_distributed_sampler=False,
        )
        return objects.model, objects.data, trainer


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
    while True:
        try:
            content = yaml.safe_load(layers[0].read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{layers[0]} is not YAML: {' '.join(str(error).split())}") from error
        base = content.get("base") if isinstance(content, dict) else None
        if base is None:
            return layers
        following = layers[0].parent / base
        if not following.is_file():
            raise FileNotFoundError(f"{layers[0]}: its base {following} isn't there")
        if following in layers:
            raise ValueError(f"{layers[0]}: its base {base} leads back to itself")
        layers.insert(0, following)


def find_recipe(path: str | Path) -> Path:
    """Return the recipe at ``path``, or the packaged one of that name.

    Raises:
        FileNotFoundError: naming the recipes that there are.
    """
    path = Path(path)
    for candidate in (path, RECIPES / path.name, RECIPES / f"{path.name}.yaml"):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
    raise FileNotFoundError(f"no recipe {path}; give a YAML file, or one of: {known}; options and keys come after it")
