"""A recipe's files made ready for the parser: with today's names, so that older runs still resume, and joined lists."""

from pathlib import Path
from typing import Any

import yaml

MOVED = {
    "nami_lightning.bridge.BridgeFlow": "nami_lightning.BridgeFlow",
    "nami_lightning.optimizers.MuonAdamW": "nami_lightning.MuonAdamW",
    "nami_lightning.strategies.FSDP2Strategy": "nami_lightning.FSDP2Strategy",
    "nami_lightning.transformer.NamiTransformer2DModel": "nami_lightning.NamiTransformer2DModel",
    "nami_lightning.callbacks.bridge.BridgePretraining": "nami_lightning.callbacks.BridgePretraining",
    "nami_lightning.callbacks.metrics.Metrics": "nami_lightning.callbacks.Metrics",
    "nami_lightning.callbacks.samples.ImageSamples": "nami_lightning.callbacks.ImageSamples",
    "nami_lightning.datamodules.multires.MultiResolutionDataModule": (
        "nami_lightning.datamodules.MultiResolutionDataModule"
    ),
    "nami_lightning.evidence.features.EfficientNetLite0": "nami_lightning.metrics.EfficientNetLite0",
    "nami_lightning.evidence.features.Inception": "nami_lightning.metrics.Inception",
}
"""Class paths: the old one to today's."""

RENAMED = {
    "nami_lightning.callbacks.ImageSamples": {"drawing": "sampler"},
    "nami_lightning.callbacks.Metrics": {"drawing": "sampler"},
}
"""Arguments of a class: the old name to today's."""


ADDED = {"nami_lightning.NamiTransformer2DModel": {"output_head": "per_stage"}}
"""Arguments of a class that recipes saved by earlier versions lack, and what they were then, not today's default."""


def upgrade(content: Any) -> Any:
    """Return a recipe file's content as today's parser takes it: class paths, arguments, loggers and added lists."""
    return _renamed(joined(with_default_logger(content)))


def _renamed(content: Any) -> Any:
    if isinstance(content, list):
        return [_renamed(entry) for entry in content]
    if not isinstance(content, dict):
        return MOVED.get(content, content) if isinstance(content, str) else content
    upgraded = {key: _renamed(value) for key, value in content.items()}
    class_path = upgraded.get("class_path")
    names = RENAMED.get(class_path, {}) if isinstance(class_path, str) else {}
    arguments = upgraded.get("init_args")
    if names and isinstance(arguments, dict):
        upgraded["init_args"] = {names.get(key, key): value for key, value in arguments.items()}
    return upgraded


def upgrade_saved(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe that a run saved with what later versions added, as it was when it was saved.

    A saved recipe states all that its version knew, and ``base: null``. Any other recipe stays as it is: what it leaves
    out is today's default.
    """
    model = _mapping(recipe, "model")
    transformer = _mapping(model, "transformer")
    if recipe.get("base", "") is not None:
        return recipe
    if isinstance(transformer.get("init_args"), dict):
        transformer["init_args"] = ADDED.get(str(transformer.get("class_path")), {}) | transformer["init_args"]
    if "lora" not in model:
        _count_all_stages(recipe)
    return recipe


def _count_all_stages(recipe: dict[str, Any]) -> None:
    """Turn a sampler's steps of each stage, as versions without LoRA counted them, into those of all stages."""
    callbacks, resolutions = _mapping(recipe, "trainer").get("callbacks"), recipe.get("resolutions")
    for callback in callbacks if isinstance(callbacks, list) else []:
        sampler = _mapping(_mapping(callback, "init_args"), "sampler")
        if isinstance(sampler.get("num_inference_steps"), int) and isinstance(resolutions, list):
            sampler["num_inference_steps"] *= len(resolutions) or 1


def _mapping(part: Any, key: str) -> dict[str, Any]:
    """Return the mapping at a key; an empty one if something else is there, which the parser refuses later."""
    value = part.get(key) if isinstance(part, dict) else None
    return value if isinstance(value, dict) else {}


def joined(content: Any) -> Any:
    """Return a file's content, or a part of it, in which a list ``key`` and its addition ``key+`` are one list.

    The parser would keep one of the two. Together they are the list, then what is added to it.
    """
    if isinstance(content, list):
        return [joined(entry) for entry in content]
    if not isinstance(content, dict):
        return content
    parts = {key: joined(value) for key, value in content.items()}
    for key in [key for key in parts if isinstance(key, str) and key.endswith("+") and key[:-1] in parts]:
        first, added = parts[key[:-1]], parts.pop(key)
        lists = [
            value if isinstance(value, list) else [value] for value in (first, added) if value not in (None, False)
        ]
        parts[key[:-1]] = [entry for entries in lists for entry in entries]
    return parts


def with_default_logger(content: Any) -> Any:
    """Return a recipe's content in which TensorBoard is named where ``trainer.logger`` is null or true: it is meant.

    So ``logger+`` of a later file adds to it. Resolved recipes of earlier versions say null.
    """
    trainer = content.get("trainer") if isinstance(content, dict) else None
    if not isinstance(trainer, dict) or trainer.get("logger", False) not in (None, True):
        return content
    return content | {"trainer": trainer | {"logger": [{"class_path": "nami_lightning.RunTensorBoard"}]}}


def upgraded_layer(path: str | Path) -> str:
    """Return a recipe file's path, or, if the file is of an earlier version, its upgraded content as YAML.

    Either is what the parser takes after ``--config``. What isn't a YAML file is left to the parser to refuse.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return str(path)
    upgraded = upgrade(content)
    if isinstance(upgraded, dict):
        upgraded = upgrade_saved(upgraded)
    return str(path) if upgraded == content else yaml.safe_dump(upgraded, sort_keys=False)


def upgraded_arguments(arguments: list[str]) -> list[str]:
    """Return command-line overrides with today's class paths, those in ``--config`` files included."""
    upgraded: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == "--config" and equals:
            upgraded.append(f"--config={upgraded_layer(value)}")
        elif upgraded[-1:] == ["--config"]:
            upgraded.append(upgraded_layer(argument))
        else:
            upgraded.append(f"{key}{equals}{MOVED.get(value, value)}" if equals else MOVED.get(argument, argument))
    return upgraded
