"""Start a training from a network that was trained or converted before, and from its bridges where they fit."""

from pathlib import Path
from typing import Any

import torch

from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.transformer import NamiTransformer2DModel

POSITIONS = ("rope_positions", "rope_unit_stage")
"""Settings of a network that change what its weights mean, and not their shapes."""

CONVENTIONS = ("window_ratios", "windows", "kind", "time", "velocity_time", "residual_noise")
"""Settings of the flow that a network was trained with."""


def load_pretrained(
    source: str, transformer: NamiTransformer2DModel, bridge: BridgeFlow, weights: bool = True
) -> list[str]:
    """Load a network's weights, and the bridges beside it if they are of the same kind and windows.

    Args:
        source: folder or hub name of a NamiPipeline, or the folder of a NamiTransformer2DModel alone.
        transformer: changed in place: it gives up its weights, and takes over those that are loaded.
        bridge: changed in place, if the pipeline's is fitted and has the same settings.
        weights: whether to load the network's weights, and not only to check its config.

    Returns:
        Lines that say in which conventions the recipe differs from what the weights were trained with.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is of another shape than the recipe's network; the message names the recipe key and both values.
    """
    alone = (Path(source) / "config.json").is_file()
    try:
        config = NamiTransformer2DModel.load_config(source, subfolder=None if alone else "transformer")
    except OSError as error:
        raise FileNotFoundError(
            f"model.pretrained {source} is neither a pipeline's folder nor a NamiTransformer2DModel's, and can't be "
            f"fetched from the hub: {str(error).splitlines()[0]}"
        ) from error
    notes = compare_networks(source, config, dict(transformer.config))
    if weights:
        transformer.to("meta")  # what it held makes way: memory holds one network, not two
        loaded = NamiTransformer2DModel.from_pretrained(
            source, subfolder=None if alone else "transformer", torch_dtype=torch.float32
        )
        transformer.load_state_dict(loaded.state_dict(), assign=True)
    if alone:
        return notes
    return notes + load_bridge(source, bridge)


def compare_networks(source: str, pretrained: dict[str, Any], recipe: dict[str, Any]) -> list[str]:
    """Refuse a network of another shape, and return lines on other positions."""
    notes = []
    for key, value in recipe.items():
        was, now = (list(one) if isinstance(one, tuple) else one for one in (pretrained.get(key), value))
        if key.startswith("_") or was == now:
            continue
        if key not in POSITIONS:
            raise ValueError(
                f"model.transformer.{key} is {now} in the recipe, but {was} in model.pretrained {source}: make them "
                "equal"
            )
        notes.append(f"The weights of {source} were trained with {key} {was}; the recipe has {now}.")
    return notes


def load_bridge(source: str, bridge: BridgeFlow) -> list[str]:
    """Take over fitted bridges of the same settings; return lines on settings that differ."""
    pretrained = BridgeFlow.from_pretrained(source, subfolder="bridge")
    was, now = (dict(one.config) for one in (pretrained, bridge))
    if _levels(pretrained) == _levels(bridge):
        was["window_ratios"] = now["window_ratios"]  # 1:1:1 is 333:333:333
    differing = [key for key in now if not key.startswith("_") and was.get(key) != now[key]]
    if not differing:
        bridge.load_state_dict(pretrained.state_dict())
    return [
        f"The weights of {source} were trained with bridge {key} {was.get(key)}; the recipe has {now[key]}."
        for key in CONVENTIONS
        if key in differing
    ]


def _levels(bridge: BridgeFlow) -> list[float]:
    """Return the noise levels at which the windows end, rounded beyond what arithmetic changes."""
    return [round(window.end, 9) for window in bridge.windows]
