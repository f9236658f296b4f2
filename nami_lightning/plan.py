"""What a recipe needs on given devices, before anything is bought: operations, memory and time, beside FLUX-base's.

Parameters are counted on the network without its numbers, operations by the closed formula of ``flops.py``, activations
by running each stage's micro-batch without numbers (``memory.py``). The rest of the memory follows from the strategy:

===============  ====================================================================================================
weights          every number on every device, or its shard (FSDP2 cuts each parameter along its first dimension)
gradients        as many; FSDP2 with ``reduce_gradients: step`` keeps whole ones of ``param_dtype`` besides
optimizer        the state that the recipe's optimizer makes for a weight
EMA              as the weights, if the recipe has one
communication    DDP: its buckets, unless gradients are views of them. FSDP2: the root and three blocks gathered (the one
                 that computes, the next one on its way, and a copy), or all that were, without
                 ``reshard_after_forward``; and one block's gradients on their way
===============  ====================================================================================================
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import nn

from nami_lightning.curriculum import Curriculum, Phase
from nami_lightning.datamodules.stream import split_evenly
from nami_lightning.flops import DEVICES, Flops, number_type, transformer_flops
from nami_lightning.frozen import FrozenModel
from nami_lightning.memory import MicroBatchShape, activations
from nami_lightning.transformer import NamiTransformer2DModel

USABLE = 0.92
"""Share of a device's memory that a plan may fill; CUDA, NCCL and gaps between allocations take the rest."""

GATHERED_BLOCKS = 3
"""That FSDP2 holds at once in torch's implementation: in use, on its way, and the flat copy that either came in."""


@dataclass(frozen=True)
class Spread:
    """How the weights are spread over devices; the names are :class:`~nami_lightning.strategies.FSDP2Strategy`'s."""

    kind: Literal["ddp", "fsdp2"] = "ddp"
    replicate: int = 1
    param_dtype: str = "float32"
    reduce_dtype: str = "float32"
    reshard_after_forward: bool = True
    reduce_each_micro_batch: bool = True
    gradient_as_bucket_view: bool = False

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
    def of(cls, kind: type[NamiTransformer2DModel], config: Mapping[str, Any]) -> "Network":
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


@dataclass(frozen=True)
class StagePlan:
    """A stage.

    Attributes:
        resolution: px.
        image_tokens: of a sample.
        text_tokens: of a sample.
        blocks: double and single ones that run.
        parameters: that this stage adds: its blocks and its head.
        parameters_used: by it, with all stages before and what is shared.
        micro_batch: samples that go through a device at once.
        flops: of training on a sample.
        encoding_flops: of the frozen encoders, for a sample.
        saved: bytes that a micro-batch keeps for its backward pass, with the largest recomputed block's.
        temporary: bytes that are alive besides at the worst moment.
        communication: bytes of buffers.
    """

    resolution: int
    image_tokens: int
    text_tokens: int
    blocks: tuple[int, int]
    parameters: int
    parameters_used: int
    micro_batch: int
    flops: Flops
    encoding_flops: int
    saved: int
    temporary: int
    communication: int


@dataclass(frozen=True)
class Memory:
    """Bytes on each device at the worst moment of a step; ``stage`` is whose micro-batch that is in."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    frozen: int
    communication: int
    activations: int
    temporary: int
    stage: int

    @property
    def fixed(self) -> int:
        """Whatever the micro-batch."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.frozen

    @property
    def total(self) -> int:
        """All of it."""
        return self.fixed + self.communication + self.activations + self.temporary


@dataclass(frozen=True)
class PhasePlan:
    """A phase.

    Attributes:
        steps: how many.
        ratio: of samples.
        samples: of each stage in a step.
        micro_batches: of each stage in a step of a device.
        flops: of each stage in a step of all devices, what is recomputed and the encoders' included.
        seconds_per_step: at the stated utilisation.
        gpu_hours: of the phase.
    """

    steps: int
    ratio: list[int]
    samples: list[int]
    micro_batches: list[int]
    flops: list[int]
    seconds_per_step: float
    gpu_hours: float


@dataclass(frozen=True)
class Plan:
    """What a setup needs.

    Attributes:
        setup: of what.
        parameters: of the network.
        shared_parameters: of what all stages use.
        stages: each of them.
        memory: of a device.
        limit: bytes of it that may be filled.
        phases: each of them.
    """

    setup: Setup
    parameters: int
    shared_parameters: int
    stages: list[StagePlan]
    memory: Memory
    limit: int
    phases: list[PhasePlan]

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.memory.total <= self.limit

    @property
    def gpu_hours(self) -> float:
        """Of all phases."""
        return sum(phase.gpu_hours for phase in self.phases)


def make_plan(setup: Setup) -> Plan:
    """Plan a setup.

    Raises:
        ValueError: a step's samples can't be split evenly over the devices.
    """
    stages = [_stage(setup, stage) for stage in range(len(setup.resolutions))]
    parameters = sum(p.numel() for p in setup.network.model.parameters())
    return Plan(
        setup=setup,
        parameters=parameters,
        shared_parameters=parameters - sum(stage.parameters for stage in stages),
        stages=stages,
        memory=_memory(setup, stages),
        limit=int(DEVICES[setup.device].memory * USABLE * 2**30),
        phases=[_phase(setup, stages, phase) for phase in setup.curriculum.phases],
    )


def _stage(setup: Setup, stage: int) -> StagePlan:
    network, config = setup.network, setup.network.config
    used = network.used(stage)
    before = network.used(stage - 1) if stage else {None}
    sizes = {group: sum(p.numel() for p in parameters) for group, parameters in network.groups()}
    samples = setup.micro_batch(stage)
    activations_of = activations(network.make, _shape(setup, stage, samples)) if samples else None
    doubles, singles = (list(accumulate(config[key]))[stage] for key in ("num_layers", "num_single_layers"))
    tokens = setup.image_tokens(stage)
    return StagePlan(
        resolution=setup.resolutions[stage],
        image_tokens=tokens,
        text_tokens=setup.text_tokens,
        blocks=(doubles, singles),
        parameters=sum(sizes[group] for group in used - before),
        parameters_used=sum(sizes[group] for group in used),
        micro_batch=samples,
        flops=transformer_flops(config, stage, tokens, setup.text_tokens, setup.activation_checkpointing),
        encoding_flops=sum(model.flops[stage] for model in setup.frozen),
        saved=activations_of.saved if activations_of else 0,
        temporary=max(activations_of.peak - activations_of.saved, 0) if activations_of else 0,
        communication=_communication(setup, stage),
    )


def _shape(setup: Setup, stage: int, samples: int) -> MicroBatchShape:
    halves = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    sharded = setup.spread.kind == "fsdp2" and setup.spread.param_dtype != "float32"
    return MicroBatchShape(
        stage=stage,
        samples=samples,
        side=setup.resolutions[stage] // setup.factor,
        text_tokens=setup.text_tokens,
        weights=getattr(torch, setup.spread.param_dtype) if sharded else setup.stored,
        autocast=halves.get(setup.precision),
        activation_checkpointing=setup.activation_checkpointing,
    )


def shard_numel(parameter: nn.Parameter, shards: int) -> int:
    """Numbers of a parameter on one of ``shards`` devices, with FSDP2's padding along the first dimension."""
    return -(-parameter.shape[0] // shards) * (parameter.numel() // parameter.shape[0])


def _communication(setup: Setup, stage: int) -> int:
    """Bytes of buffers while a micro-batch of ``stage`` computes."""
    spread, groups = setup.spread, setup.network.groups()
    if spread.kind == "ddp":
        unneeded = setup.devices == 1 or spread.gradient_as_bucket_view
        return 0 if unneeded else sum(p.numel() for _, part in groups for p in part) * setup.stored.itemsize
    used = setup.network.used(stage)
    sizes = {group: sum(p.numel() for p in part) for group, part in groups if group in used}
    largest = max(size for group, size in sizes.items() if group is not None)
    gathered = sizes[None] + GATHERED_BLOCKS * largest
    if not spread.reshard_after_forward:
        gathered = sum(sizes.values()) + (GATHERED_BLOCKS - 1) * largest
    param, reduced = (getattr(torch, name).itemsize for name in (spread.param_dtype, spread.reduce_dtype))
    return gathered * param + largest * reduced


def _memory(setup: Setup, stages: list[StagePlan]) -> Memory:
    spread = setup.spread
    parameters = list(setup.network.model.parameters())
    shards = spread.shards(setup.devices)
    weights = sum(shard_numel(p, shards) for p in parameters) * setup.stored.itemsize
    gradients = weights
    if spread.kind == "fsdp2" and not spread.reduce_each_micro_batch:
        gradients += sum(p.numel() for p in parameters) * getattr(torch, spread.param_dtype).itemsize
    worst = max(range(len(stages)), key=lambda k: stages[k].saved + stages[k].temporary + stages[k].communication)
    temporary = stages[worst].temporary
    # Images are encoded before the micro-batch that they are for has any activations.
    encoding = max((model.peak for model in setup.frozen), default=0)
    temporary = max(temporary, encoding - stages[worst].saved)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=round(weights * setup.optimizer),
        ema=weights if setup.ema else 0,
        frozen=sum(model.memory or 0 for model in setup.frozen),
        communication=stages[worst].communication,
        activations=stages[worst].saved,
        temporary=temporary,
        stage=worst,
    )


def _phase(setup: Setup, stages: list[StagePlan], phase: Phase) -> PhasePlan:
    device = DEVICES[setup.device]
    samples = [parts * setup.curriculum.unit for parts in phase.ratio]
    trained = [count * stage.flops.hardware for count, stage in zip(samples, stages, strict=True)]
    encoded = [count * stage.encoding_flops for count, stage in zip(samples, stages, strict=True)]
    seconds = sum(trained) / device.flops(setup.number_type)
    for model in setup.frozen:
        seconds += sum(n * f for n, f in zip(samples, model.flops, strict=True)) / device.flops(model.number_type)
    seconds /= setup.devices * setup.utilization
    return PhasePlan(
        steps=phase.steps,
        ratio=phase.ratio,
        samples=samples,
        micro_batches=[setup.micro_batches(phase, stage)[0] for stage in range(len(stages))],
        flops=[one + other for one, other in zip(trained, encoded, strict=True)],
        seconds_per_step=seconds,
        gpu_hours=phase.steps * seconds * setup.devices / 3600,
    )


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


# --- what would make it fit ----------------------------------------------------------------------

MOST_DEVICES = 1024


@dataclass(frozen=True)
class Remedy:
    """Settings with which a recipe fits.

    Attributes:
        settings: options of the command ``plan``, and recipe keys that ``run`` takes too.
        plan: with them.
    """

    settings: list[str]
    plan: Plan


def find_remedy(plan: Plan) -> Remedy | None:
    """The first change that makes a plan fit, planned again with it; None if there is none.

    Tried in this order, each alone and then together: recompute every block, smaller micro-batches, FSDP2, more devices.
    """
    kinds = (_checkpointing, _smaller_micro_batches, _fsdp2, _more_devices)
    combinations = [[kind] for kind in kinds]
    combinations += [[_fsdp2, _checkpointing], [_fsdp2, _checkpointing, _smaller_micro_batches]]
    combinations += [[_fsdp2, _checkpointing, _more_devices], [_fsdp2, _checkpointing, _more_devices, _smallest]]
    for combination in combinations:
        for setup, settings in _attempts(plan.setup, combination):
            if (tried := make_plan(setup)).fits:
                return Remedy(settings, tried)
    return None


Attempt = tuple[Setup, list[str]]


def _attempts(setup: Setup, kinds: list[Callable[[Setup], Iterator[Attempt]]]) -> Iterator[Attempt]:
    """All ways to apply a combination, one after the other."""
    if not kinds:
        yield setup, []
        return
    for changed, settings in kinds[0](setup):
        for final, more in _attempts(changed, kinds[1:]):
            yield final, settings + more


def _checkpointing(setup: Setup) -> Iterator[Attempt]:
    if setup.activation_checkpointing != 1:
        yield replace(setup, activation_checkpointing=1), ["--model.activation_checkpointing", "1"]


def _smaller_micro_batches(setup: Setup) -> Iterator[Attempt]:
    limits = setup.max_micro_batch
    while max(limits) > 1:
        largest = make_plan(setup).memory.stage
        if limits[largest] == 1:
            return
        changed = largest_even(setup, largest, limits[largest] // 2)
        limits = (*limits[:largest], changed, *limits[largest + 1 :])
        setup = replace(setup, max_micro_batch=limits)
        yield setup, ["--data.init_args.max_micro_batch", str(list(limits))]


def _smallest(setup: Setup) -> Iterator[Attempt]:
    limits = tuple(1 for _ in setup.max_micro_batch)
    yield replace(setup, max_micro_batch=limits), ["--data.init_args.max_micro_batch", str(list(limits))]


def _fsdp2(setup: Setup) -> Iterator[Attempt]:
    half = setup.number_type if setup.number_type in ("bfloat16", "float16") else "float32"
    spread = Spread("fsdp2", param_dtype=half)
    if setup.spread == spread or setup.devices == 1:
        return
    strategy = "--trainer.strategy"
    settings = [strategy, "nami_lightning.strategies.FSDP2Strategy", f"{strategy}.param_dtype", half]
    yield replace(setup, spread=spread, precision="32-true"), [*settings, "--trainer.precision", "32-true"]


def _more_devices(setup: Setup) -> Iterator[Attempt]:
    while setup.devices * 2 <= MOST_DEVICES:
        setup = replace(setup, devices=setup.devices * 2)
        try:
            limits = tuple(largest_even(setup, k, limit) for k, limit in enumerate(setup.max_micro_batch))
        except ValueError:
            return
        settings = ["--devices", str(setup.devices)]
        if limits != setup.max_micro_batch:
            settings += ["--data.init_args.max_micro_batch", str(list(limits))]
        setup = replace(setup, max_micro_batch=limits)
        yield setup, settings
