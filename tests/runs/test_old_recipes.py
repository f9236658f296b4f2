"""Recipes that earlier versions saved: their class paths and keys are read as today's."""

from importlib import import_module
from pathlib import Path

import yaml

from nami_lightning import FSDP2Strategy
from nami_lightning.callbacks import SamplerSettings
from nami_lightning.metrics import EfficientNetLite0
from nami_lightning.runs.old_recipes import MOVED, RENAMED, upgrade
from nami_lightning.runs.recipe import Recipe

OLD_STRATEGY = "nami_lightning.strategies.FSDP2Strategy"
OLD_FEATURES = "nami_lightning.evidence.features.EfficientNetLite0"


def test_every_new_path_leads_to_a_class_with_the_renamed_arguments() -> None:
    for path in [*MOVED.values(), *RENAMED]:
        module, _, name = path.rpartition(".")
        assert isinstance(getattr(import_module(module), name), type), path
    for path, names in RENAMED.items():
        made = upgrade({"class_path": path, "init_args": dict.fromkeys(names, 1)})
        assert set(made["init_args"]) == set(names.values())


def test_a_saved_recipe_is_read_with_todays_names(tiny: list[str], tmp_path: Path) -> None:
    saved = yaml.safe_load(Recipe(tiny[0], tiny[1:]).dump())
    saved["trainer"]["strategy"] = {"class_path": OLD_STRATEGY, "init_args": {"replicate": 1}}
    for callback in saved["trainer"]["callbacks"]:
        if "sampler" in callback.get("init_args", {}):
            callback["init_args"]["drawing"] = callback["init_args"].pop("sampler")
    measure = {"features": {"class_path": OLD_FEATURES}, "drawing": {"num_inference_steps": 3}}
    saved["trainer"]["callbacks"].append({"class_path": "nami_lightning.callbacks.Metrics", "init_args": measure})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(saved))

    trainer = Recipe(path).parser.instantiate(Recipe(path).config).trainer
    assert isinstance(trainer.strategy, FSDP2Strategy)
    callbacks = {type(callback).__name__: callback for callback in trainer.callbacks}
    assert callbacks["ImageSamples"].sampler == SamplerSettings(6, 2.0, "multistep")
    assert callbacks["Metrics"].sampler.num_inference_steps == 3
    assert [type(network) for network in callbacks["Metrics"].features] == [EfficientNetLite0]


def test_a_saved_recipe_without_a_newer_setting_means_what_it_meant(tiny: list[str], tmp_path: Path) -> None:
    saved = yaml.safe_load(Recipe(tiny[0], tiny[1:]).dump())
    arguments = saved["model"]["transformer"]["init_args"]
    assert arguments.pop("output_head") == "shared"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(saved))
    assert Recipe(path).config.model.transformer.init_args.output_head == "per_stage"
    del saved["base"]  # a recipe that a person wrote: today's default
    path.write_text(yaml.safe_dump(saved))
    assert Recipe(path).config.model.transformer.init_args.output_head == "shared"


def test_steps_of_each_stage_become_steps_of_all(tiny: list[str], tmp_path: Path) -> None:
    """Versions without ``model.lora`` counted the steps of each of the three stages."""
    saved = yaml.safe_load(Recipe(tiny[0], tiny[1:]).dump())
    path = tmp_path / "recipe.yaml"
    for lora, steps in (({"lora": None}, 6), ({}, 18)):
        saved["model"].pop("lora", None)
        saved["model"] |= lora
        path.write_text(yaml.safe_dump(saved))
        callbacks = {callback.class_path: callback for callback in Recipe(path).config.trainer.callbacks}
        sampler = callbacks["nami_lightning.callbacks.ImageSamples"].init_args.sampler
        assert sampler.num_inference_steps == steps


def test_an_overlay_and_an_override_are_read_so_too(tiny: list[str], tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"strategy": {"class_path": OLD_STRATEGY}}}))
    for arguments in (
        ["--config", str(overlay)],
        [f"--config={overlay}"],
        ["--trainer.strategy.class_path", OLD_STRATEGY],
        [f"--trainer.strategy.class_path={OLD_STRATEGY}"],
    ):
        config = Recipe(tiny[0], [*tiny[1:], *arguments]).config
        assert config.trainer.strategy.class_path == "nami_lightning.FSDP2Strategy"
