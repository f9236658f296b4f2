"""What a plan depends on: the network, the devices, and the settings of a recipe that cost memory or time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import nn

from nami_lightning.models.lora import LoraSettings, add_adapter, trained_parameters
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.planning.encoder_memory import FrozenModel
from nami_lightning.planning.flops import DEVICES, matmul_dtype
from nami_lightning.training.curriculum import Curriculum, Phase
from nami_lightning.training.techniques.technique import Techniques


@dataclass(frozen=True)
class Sharding:
    """How the weights are stored on the devices.

    :class:`~nami_lightning.FSDP2Strategy` has arguments of the same names, torch's DDP ``gradient_as_bucket_view``.

    Attributes:
        auto: the strategy is Lightning's ``auto``: DDP on several devices, and nothing around the network on one.
    """

    kind: Literal["ddp", "fsdp2"] = "ddp"
    replicate: int | None = None
    param_dtype: str = "float32"
    reduce_dtype: str = "float32"
    reshard_after_forward: bool = True
    reduce_each_micro_batch: bool = True
    gradient_as_bucket_view: bool = False
    shard_text_encoder: bool = False
    auto: bool = False


@dataclass(frozen=True)
class Network:
    """A network without the values of its parameters.

    Attributes:
        make: function that creates the network, without an adapter.
        config: the network's configuration.
        lora: the settings of the adapter that is trained; None: all weights are.
    """

    make: Callable[[], NamiTransformer2DModel]
    config: Mapping[str, Any]
    lora: LoraSettings | None = None

    @classmethod
    def from_config(
        cls,
        kind: Callable[..., NamiTransformer2DModel],
        config: Mapping[str, Any],
        lora: LoraSettings | None = None,
    ) -> "Network":
        """Return the network of a class and a configuration."""
        settings = {key: value for key, value in config.items() if not key.startswith("_")}
        return cls(partial(kind, **settings), settings, lora)

    @cached_property
    def model(self) -> NamiTransformer2DModel:
        """The network on the meta device."""
        with torch.device("meta"):
            return self.make()

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name: the adapter's if there is one, or the network's."""
        if self.lora is None:
            return dict(self.model.named_parameters())
        with torch.device("meta"):
            model = self.make()
            add_adapter(model, self.lora)
        return dict(trained_parameters(model))

    def groups(self) -> list[tuple[nn.Module | None, list[nn.Parameter]]]:
        """Return the parameters that FSDP2 gathers together: of each of the model's parts, and the rest under None."""
        model = self.model
        parts = model.parts
        owned = {id(parameter) for part in parts for parameter in part.parameters()}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in owned]
        return [(None, rest), *((part, list(part.parameters())) for part in parts)]

    def groups_used(self, stage: int) -> set[nn.Module | None]:
        """Return the groups that run at a stage; see :meth:`groups`."""
        return {None, *self.model.parts_used(stage)}


@dataclass(frozen=True)
class Setup:
    """All that a plan depends on.

    Attributes:
        name: name of the recipe.
        network: the network that is trained.
        resolutions: resolution of each stage in px.
        factor: side in px of the square that one latent position covers.
        text_tokens: number of tokens of a prompt.
        curriculum: the phases, and the samples of a step.
        max_micro_batch: largest number of samples in a micro-batch of each stage.
        devices: number of devices.
        device: kind of the devices, a key of :data:`DEVICES`.
        utilization: share of the device's peak speed that is reached, all work counted.
        activation_checkpointing: N: every N-th block is recomputed; 0: none is.
        precision: Lightning's name of the precision, ``bf16-mixed`` for example.
        sharding: how the weights are stored on the devices.
        ema: whether the run keeps an EMA of the weights.
        optimizer: bytes of the optimizer's state for each byte of trained weights.
        frozen: the frozen encoders.
        teacher_calls: forward passes of a student's frozen teacher for one sample; 0: there is none.
        devices_per_node: number of devices of a node.
        node_bandwidth: GB/s that a device sends inside its node; None: the device's data sheet's.
        network_bandwidth: GB/s that a device sends to other nodes; None: as is usual with such devices.
        read_ahead: bytes of the steps that a device's workers read ahead, on the host.
        techniques: that the network is trained with; the plan counts those that are on at the first step.
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
    sharding: Sharding
    ema: bool
    optimizer: float
    frozen: tuple[FrozenModel, ...] = ()
    teacher_calls: int = 0
    devices_per_node: int = 8
    node_bandwidth: float | None = None
    network_bandwidth: float | None = None
    read_ahead: int = 0
    techniques: Techniques = field(default_factory=Techniques)

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return -(-self.devices // self.devices_per_node)

    @property
    def shards(self) -> int:
        """Number of devices that share one copy of the weights; as the strategy's default, those of a node."""
        if self.sharding.kind == "ddp":
            return 1
        return self.devices // (self.sharding.replicate or self.nodes)

    @property
    def bandwidths(self) -> tuple[float, float]:
        """GB/s that a device can send inside its node, and to other nodes."""
        device = DEVICES[self.device]
        return self.node_bandwidth or device.node_bandwidth, self.network_bandwidth or device.network_bandwidth

    @property
    def matmul_dtype(self) -> str:
        """Name of the dtype that matrices are multiplied in."""
        return matmul_dtype(self.precision, self.sharding.param_dtype)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the weights that the optimizer updates."""
        if not self.precision.endswith("true"):
            return torch.float32
        return {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(
            self.precision, torch.float32
        )

    def image_tokens(self, stage: int) -> int:
        """Return the number of image tokens of one square sample of a stage."""
        return (self.resolutions[stage] // self.factor // self.network.config["patch_size"]) ** 2

    def micro_batches(self, phase: Phase, stage: int) -> tuple[int, int]:
        """Return how many micro-batches of a stage a device has in a step, and the number of samples in each.

        Raises:
            ValueError: the samples can't be split evenly.
        """
        return self.curriculum.split(phase, stage, self.devices, self.max_micro_batch[stage])

    def micro_batch(self, stage: int) -> int:
        """Return the number of samples in the largest micro-batch of a stage."""
        return max(self.micro_batches(phase, stage)[1] for phase in self.curriculum.phases)

    def flux_base(self) -> "Setup":
        """Return the setup of FLUX-base: one stage, all blocks at the finest resolution, as many samples and steps.

        It has no techniques: those of this setup were made for its stages.
        """
        config = dict(self.network.config)
        for key in ("num_layers", "num_single_layers"):
            config[key] = [sum(config[key])]
        phases = [replace(phase, ratio=[sum(phase.ratio)]) for phase in self.curriculum.phases]
        one = replace(
            self,
            name="FLUX-base",
            network=Network.from_config(type(self.network.model), config, self.network.lora),
            resolutions=self.resolutions[-1:],
            curriculum=Curriculum(phases, self.curriculum.unit, self.curriculum.context_parallel[-1:]),
            max_micro_batch=self.max_micro_batch[-1:],
            frozen=tuple(replace(model, flops=model.flops[-1:]) for model in self.frozen),
            techniques=Techniques(),
        )
        return replace(one, max_micro_batch=(largest_even_micro_batch(one, 0, one.max_micro_batch[0]),))


def largest_even_micro_batch(setup: Setup, stage: int, limit: int) -> int:
    """Return the largest ``max_micro_batch`` of a stage, up to ``limit``, with which every phase splits evenly.

    Raises:
        ValueError: the samples of a step can't be divided by the number of devices.
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
