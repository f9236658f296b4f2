"""A NAMI with one finer stage: the new stage starts as a copy of the finest one, its new blocks as the identity."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.transformer import NamiTransformer2DModel


@dataclass(frozen=True)
class NewStage:
    """The stage to add.

    Attributes:
        resolution: px of its images, twice those of the finest stage so far.
        num_layers: double blocks that it adds.
        num_single_layers: single blocks that it adds.
        window_ratio: the width of its window, with the ratios that the model has; None: half of the finest one's, which
            keeps the other half.
    """

    resolution: int
    num_layers: int = 0
    num_single_layers: int = 0
    window_ratio: float | None = None

    def check(self, resolution: int) -> None:
        """Refuse a resolution that is not twice the model's.

        Raises:
            ValueError: naming both.
        """
        if self.resolution != 2 * resolution:
            raise ValueError(
                f"--add_stage {self.resolution}: the finest stage has {resolution} px, so that the next one has "
                f"{2 * resolution}"
            )


def extend_transformer(model: NamiTransformer2DModel, stage: NewStage, seed: int = 0) -> NamiTransformer2DModel:
    """Return the network with one stage more; its old weights are the model's own tensors.

    Args:
        model: the network so far.
        stage: to add.
        seed: of the new blocks' weights, which do nothing until they are trained: their gates are zero.

    Raises:
        ValueError: the network predicts clean images, which a stage before the finest can't.
    """
    config = dict(model.config)
    if config["prediction"] == "clean":
        raise ValueError(
            "this network's finest stage predicts clean images, and would not be the finest: only a network of "
            "prediction velocity can get a finer stage"
        )
    last = model.num_stages - 1
    changes: dict[str, Any] = {
        "num_layers": [*config["num_layers"], stage.num_layers],
        "num_single_layers": [*config["num_single_layers"], stage.num_single_layers],
        "rope_unit_stage": last if config["rope_unit_stage"] is None else config["rope_unit_stage"],
    }
    settings = {key: value for key, value in config.items() if not key.startswith("_")} | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        extended = NamiTransformer2DModel(**settings)
        extended.init_weights()
    weights: dict[str, Tensor] = model.state_dict()
    weights |= {
        name.replace(f"heads.{last}.", f"heads.{last + 1}."): tensor.clone()
        for name, tensor in weights.items()
        if name.startswith(f"heads.{last}.")
    }
    new = {name: tensor.to(model.dtype) for name, tensor in extended.state_dict().items() if name not in weights}
    extended.load_state_dict(weights | new, assign=True)
    return extended


def extend_bridge(bridge: BridgeFlow, stage: NewStage) -> BridgeFlow:
    """Return the windows with one more at the end, and the bridges with one more, which is to be fitted.

    The new window takes its part of the finest one's noise levels; all other windows stay as they are.

    Raises:
        ValueError: the new window leaves nothing of the finest one's.
    """
    config = {key: value for key, value in dict(bridge.config).items() if not key.startswith("_")}
    *before, finest = config["window_ratios"]
    new = finest / 2 if stage.window_ratio is None else stage.window_ratio
    if not 0 < new < finest:
        raise ValueError(
            f"--window_ratio {new}: the new stage takes a part of the finest one's window, whose ratio is {finest}"
        )
    size = config.get("affine_size")
    changes = {"window_ratios": [*before, finest - new, new], "affine_size": size and [2 * side for side in size]}
    extended = BridgeFlow(**config | changes)
    extended.load_state_dict(bridge.state_dict() | {"fitted": extended.fitted}, strict=False)
    return extended
