"""What a plan depends on: the network, the devices, and the settings of a recipe that cost memory or time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import nn

from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.planning.encoder_memory import FrozenModel
from nami_lightning.planning.flops import number_type
from nami_lightning.training.curriculum import Curriculum, Phase, split_evenly


@dataclass(frozen=True)
class Spread:
    """How the weights are spread over devices; the names are :class:`~nami_lightning.FSDP2Strategy`'s."""

    kind: Literal["ddp", "fsdp2"] = "ddp"
    replicate: int = 1
    param_dtype: str = "float32"
    reduce_dtype: str = "float32"
    reshard_after_forward: bool = True
    reduce_each_micro_batch: bool = True
    gradient_as_bucket_view: bool = False
    shard_text_encoder: bool = False

    def shards(self, devices: int) -> int:
        """Devices that share one copy of the weights."""
        return devices // self.replicate if self.kind == "fsdp2" else 1


@dataclass(frozen=True)
class Network:
    """A network without its numbers.

    Attributes:
        make: makes it.
        config: what it is made of.
    """

    make: Callable[[], NamiTransformer2DModel]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, kind: Callable[..., NamiTransformer2DModel], config: Mapping[str, Any]) -> "Network":
        """The network of a class and its configuration."""
        settings = {key: value for key, value in config.items() if not key.startswith("_")}
        return cls(partial(kind, **settings), settings)

    @cached_property
    def model(self) -> NamiTransformer2DModel:
        """On the meta device."""
        with torch.device("meta"):
            return self.make()

    def groups(self) -> list[tuple[nn.Module | None, list[nn.Parameter]]]:
        """What FSDP2 gathers together: each block, each head, and the rest, which belongs to None."""
        model = self.model
        parts: list[nn.Module] = [*model.transformer_blocks, *model.single_transformer_blocks, *model.heads]
        owned = {id(parameter) for part in parts for parameter in part.parameters()}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in owned]
        return [(None, rest), *((part, list(part.parameters())) for part in parts)]

    def used(self, stage: int) -> set[nn.Module | None]:
        """The groups that run at a stage."""
        return {None, *self.model.blocks(stage), self.model.heads[stage]}


@dataclass(frozen=True)
class Setup:
    """All that a plan depends on.

    Attributes:
        name: of the recipe.
        network: what is trained.
        resolutions: px of each stage.
        factor: px a latent's side.
        text_tokens: of a prompt.
        curriculum: phases and samples.
        max_micro_batch: of each stage.
        devices: how many.
        device: which; a key of :data:`DEVICES`.
        utilization: share of the device's peak that is reached, all work counted.
        activation_checkpointing: every so many-th block; 0 none.
        precision: Lightning's.
        spread: over the devices.
        ema: whether there is one.
        optimizer: bytes of its state for each byte of weights.
        frozen: encoders.
    """

    name: str
    network: Network
    resolutions: tuple[int, ...]
    factor: int
    text_tokens: int
    curriculum: Curriculum
    max_micro_batch: tuple[int, ...]
    devices: int
    device: str
    utilization: float
    activation_checkpointing: int
    precision: str
    spread: Spread
    ema: bool
    optimizer: float
    frozen: tuple[FrozenModel, ...] = ()

    @property
    def number_type(self) -> str:
        """In what matrices are multiplied."""
        return number_type(self.precision, self.spread.param_dtype)

    @property
    def stored(self) -> torch.dtype:
        """Number type of the weights that the optimizer steps."""
        if not self.precision.endswith("true"):
            return torch.float32
        return {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(
            self.precision, torch.float32
        )

    def image_tokens(self, stage: int) -> int:
        """Of one square sample."""
        return (self.resolutions[stage] // self.factor // self.network.config["patch_size"]) ** 2

    def micro_batches(self, phase: Phase, stage: int) -> tuple[int, int]:
        """Micro-batches of a stage in a step of a device, and samples in each.

        Raises:
            ValueError: the samples don't come out even.
        """
        samples = phase.ratio[stage] * self.curriculum.unit
        return split_evenly(samples, self.devices, self.max_micro_batch[stage], stage)

    def micro_batch(self, stage: int) -> int:
        """Samples of the largest micro-batch of a stage."""
        return max(self.micro_batches(phase, stage)[1] for phase in self.curriculum.phases)

    def flux_base(self) -> "Setup":
        """The same network with one stage: all blocks at the finest resolution, as many samples and steps."""
        config = dict(self.network.config)
        for key in ("num_layers", "num_single_layers"):
            config[key] = [sum(config[key])]
        phases = [replace(phase, ratio=[sum(phase.ratio)]) for phase in self.curriculum.phases]
        one = replace(
            self,
            name="FLUX-base",
            network=Network.of(type(self.network.model), config),
            resolutions=self.resolutions[-1:],
            curriculum=Curriculum(phases, self.curriculum.unit),
            max_micro_batch=self.max_micro_batch[-1:],
            frozen=tuple(replace(model, flops=model.flops[-1:]) for model in self.frozen),
        )
        return replace(one, max_micro_batch=(largest_even(one, 0, one.max_micro_batch[0]),))


def largest_even(setup: Setup, stage: int, limit: int) -> int:
    """The largest ``max_micro_batch`` of a stage up to ``limit`` with which every phase splits evenly.

    Raises:
        ValueError: the devices don't divide a step's samples.
    """
    for size in range(limit, 0, -1):
        limits = [*setup.max_micro_batch]
        limits[stage] = size
        tried = replace(setup, max_micro_batch=tuple(limits))
        try:
            tried.micro_batch(stage)
        except ValueError:
            if size == 1:
                raise
            continue
        return size
    raise ValueError(f"max_micro_batch[{stage}] must be at least 1; got {limit}")
