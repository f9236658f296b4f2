"""What a recipe needs on given devices, before anything is bought: operations, memory and time, beside FLUX-base's.

Parameters are counted on the network without its numbers, operations by the closed formula of ``flops.py``, activations
by running each stage's micro-batch without numbers (``memory.py``). The rest of the memory follows from the strategy:

===============  ====================================================================================================
weights          every number on every device, or its shard (FSDP2 cuts each parameter along its first dimension)
gradients        as many; FSDP2 with ``reduce_gradients: step`` keeps whole ones of ``param_dtype`` besides
optimizer        the state that the recipe's optimizer makes for a weight
EMA              as the weights, if the recipe has one
communication    DDP: its buckets, unless gradients are views of them. FSDP2: the root and three blocks gathered (the
                 one that computes, the next one on its way, and a copy), or all that were, without
                 ``reshard_after_forward``; and one block's gradients on their way
===============  ====================================================================================================
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from tqdm import tqdm

from nami_lightning.planning.flops import DEVICES, Flops, transformer_flops
from nami_lightning.planning.inputs import Setup
from nami_lightning.planning.memory import MicroBatchShape, activations
from nami_lightning.training.curriculum import Phase

USABLE = 0.92
"""Share of a device's memory that a plan may fill; CUDA, NCCL and gaps between allocations take the rest."""

GATHERED_BLOCKS = 3
"""That FSDP2 holds at once in torch's implementation: in use, on its way, and the flat copy that either came in."""


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
    def total(self) -> int:
        """All of it."""
        held = self.weights + self.gradients + self.optimizer + self.ema + self.frozen
        return held + self.communication + self.activations + self.temporary


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
    counted = tqdm(range(len(setup.resolutions)), f"planning {setup.name}", unit="stage", leave=False, disable=None)
    stages = [_stage(setup, stage) for stage in counted]
    parameters = sum(p.numel() for p in setup.network.model.parameters())
    return Plan(
        setup=setup,
        parameters=parameters,
        shared_parameters=parameters - sum(stage.parameters for stage in stages),
        stages=stages,
        memory=_memory(setup, stages),
        limit=memory_limit(setup),
        phases=[_phase(setup, stages, phase) for phase in setup.curriculum.phases],
    )


def memory_limit(setup: Setup) -> int:
    """Bytes of a device that may be filled."""
    return int(DEVICES[setup.device].memory * USABLE * 2**30)


def least_memory(setup: Setup) -> int:
    """Bytes on a device with no activations at all."""
    communication = max(_communication(setup, stage) for stage in range(len(setup.resolutions)))
    return sum(_lasting(setup).values()) + communication


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


def _lasting(setup: Setup) -> dict[str, int]:
    """Bytes on a device for the whole of a step, by what they hold."""
    spread = setup.spread
    parameters = list(setup.network.model.parameters())
    shards = spread.shards(setup.devices)
    weights = sum(shard_numel(p, shards) for p in parameters) * setup.stored.itemsize
    gradients = weights
    if spread.kind == "fsdp2" and not spread.reduce_each_micro_batch:
        gradients += sum(p.numel() for p in parameters) * getattr(torch, spread.param_dtype).itemsize
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": round(weights * setup.optimizer),
        "ema": weights if setup.ema else 0,
        "frozen": sum(model.memory or 0 for model in setup.frozen),
    }


def _memory(setup: Setup, stages: list[StagePlan]) -> Memory:
    number = max(range(len(stages)), key=lambda k: stages[k].saved + stages[k].temporary + stages[k].communication)
    worst = stages[number]
    # Images are encoded before their micro-batch has any activations.
    encoding = max((model.peak for model in setup.frozen), default=0)
    return Memory(
        **_lasting(setup),
        communication=worst.communication,
        activations=worst.saved,
        temporary=max(worst.temporary, encoding - worst.saved),
        stage=number,
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
