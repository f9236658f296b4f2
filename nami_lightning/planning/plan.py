"""What a recipe needs on given devices: operations, memory and time, to be compared with FLUX-base's.

Parameters are counted on the meta device, operations by the closed formula of ``flops``, and activations by running
each stage's micro-batch with fake tensors (``memory``). Devices that share the tokens of a sample share its activations
and its operations, but each encodes it, and each runs a student's teacher. The rest of the memory follows from the
strategy:

===============  ====================================================================================================
weights          all of them on every device, or one shard (FSDP2 cuts each parameter along its first dimension)
gradients        as many as weights; FSDP2 with ``reduce_gradients: step`` also keeps unsharded ones in ``param_dtype``
optimizer        the state that the recipe's optimizer keeps for the weights
EMA              as many as weights, if the recipe has an EMA
frozen models    the encoders; and a student's teacher, with as many weights as the student
communication    DDP: its buckets, with one process too, unless gradients are views of them, which they are only if a
                 step is one micro-batch. FSDP2: the root and three gathered blocks (the one that computes, the next
                 one, which is being gathered, and a copy), or all that have been gathered if ``reshard_after_forward``
                 is off; and the gradients of one block, which are being reduced
===============  ====================================================================================================
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import nn
from tqdm import tqdm

from nami_lightning.planning.flops import DEVICES, Flops, transformer_flops
from nami_lightning.planning.inputs import Setup
from nami_lightning.planning.memory import MicroBatchShape, measure_activations
from nami_lightning.planning.traffic import Traffic, step_traffic
from nami_lightning.training.curriculum import Phase

USABLE_MEMORY = 0.92
"""Share of a device's memory that a plan may fill; CUDA, NCCL and gaps between allocations take the rest."""

REACHED_BANDWIDTH = 0.8
"""Share of a link's bandwidth that large collectives reach."""

GATHERED_BLOCKS = 3
"""Number of gathered blocks that torch's FSDP2 holds at once: the one in use, the next one, and a flat copy of one."""


@dataclass(frozen=True)
class StagePlan:
    """What one stage needs.

    Attributes:
        resolution: resolution in px.
        image_tokens: number of image tokens of a sample.
        text_tokens: number of text tokens of a sample.
        blocks: number of double and of single blocks that run.
        parameters: number of parameters that this stage adds: its blocks and its head.
        parameters_used: number of parameters that the stage uses, with those of earlier stages and the shared ones.
        micro_batch: number of samples that go through a device at once.
        devices: number of devices that share the tokens of these samples.
        flops: operations of training on one sample.
        encoding_flops: operations of the frozen encoders for one sample.
        saved: bytes that a micro-batch keeps on a device for its backward pass, with those of the largest recomputed
            block.
        temporary: bytes that are alive in addition at the worst moment.
        communication: bytes of the communication buffers.
    """

    resolution: int
    image_tokens: int
    text_tokens: int
    blocks: tuple[int, int]
    parameters: int
    parameters_used: int
    micro_batch: int
    devices: int
    flops: Flops
    encoding_flops: int
    saved: int
    temporary: int
    communication: int


@dataclass(frozen=True)
class Memory:
    """Bytes on each device at the worst moment of a step, which a micro-batch of ``stage`` causes."""

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
        """Sum of all parts, in bytes."""
        held = self.weights + self.gradients + self.optimizer + self.ema + self.frozen
        return held + self.communication + self.activations + self.temporary


@dataclass(frozen=True)
class PhasePlan:
    """What one phase of the curriculum needs.

    Attributes:
        steps: number of steps.
        ratio: ratio of the stages' samples.
        samples: number of samples of each stage in a step.
        micro_batches: number of micro-batches of each stage on one device in a step.
        flops: operations of each stage in a step on all devices, with recomputed blocks and the encoders.
        encoder_seconds: seconds that a step's encoders compute, at the assumed utilisation.
        compute_seconds: seconds that a step computes in all, likewise.
        traffic: bytes that each device sends in a step.
        node_seconds: seconds that sending inside a node takes.
        network_seconds: seconds that sending to other nodes takes.
        gpu_hours: GPU-hours of the whole phase.
    """

    steps: int
    ratio: list[int]
    samples: list[int]
    micro_batches: list[int]
    flops: list[int]
    encoder_seconds: float
    compute_seconds: float
    traffic: Traffic
    node_seconds: float
    network_seconds: float
    gpu_hours: float

    @property
    def seconds_per_step(self) -> float:
        """Seconds of a step: those of what takes longest, the rest happens meanwhile."""
        return max(self.compute_seconds, self.node_seconds, self.network_seconds)

    @property
    def bound(self) -> str:
        """What a step takes longest for: ``computing``, ``links in a node`` or ``network``."""
        parts = {"computing": self.compute_seconds, "links in a node": self.node_seconds}
        parts["network"] = self.network_seconds
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class Plan:
    """What a setup needs.

    Attributes:
        setup: the setup that the plan is about.
        parameters: number of parameters of the network.
        shared_parameters: number of parameters that all stages use.
        stages: the plan of each stage.
        memory: the memory that one device needs.
        limit: bytes of a device's memory that may be filled.
        phases: the plan of each phase.
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
        """Whether the memory of a device is large enough."""
        return self.memory.total <= self.limit

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all phases together."""
        return sum(phase.gpu_hours for phase in self.phases)


def make_plan(setup: Setup) -> Plan:
    """Return the plan of a setup.

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
    """Return the number of bytes of a device that may be filled."""
    return int(DEVICES[setup.device].memory * USABLE_MEMORY * 2**30)


def memory_without_activations(setup: Setup) -> int:
    """Return the bytes that a device needs if activations took no memory."""
    communication = max(_communication(setup, stage) for stage in range(len(setup.resolutions)))
    return sum(_constant_memory(setup).values()) + communication


def _stage(setup: Setup, stage: int) -> StagePlan:
    network, config = setup.network, setup.network.config
    used = network.groups_used(stage)
    before = network.groups_used(stage - 1) if stage else {None}
    sizes = {group: sum(p.numel() for p in parameters) for group, parameters in network.groups()}
    samples, devices = setup.micro_batch(stage), setup.curriculum.context_parallel[stage]
    activations_of = measure_activations(network.make, _shape(setup, stage, samples)) if samples else None
    doubles, singles = (list(accumulate(config[key]))[stage] for key in ("num_layers", "num_single_layers"))
    tokens = setup.image_tokens(stage)
    changed = setup.techniques.change_flops(config, stage, tokens, step=0)
    flops = transformer_flops(
        config, stage, tokens, setup.text_tokens, setup.activation_checkpointing, changed.block_tokens
    )
    return StagePlan(
        resolution=setup.resolutions[stage],
        image_tokens=tokens,
        text_tokens=setup.text_tokens,
        blocks=(doubles, singles),
        parameters=sum(sizes[group] for group in used - before),
        parameters_used=sum(sizes[group] for group in used),
        micro_batch=samples,
        devices=devices,
        flops=replace(
            flops,
            forward=flops.forward * (1 + devices * setup.teacher_calls) + changed.forward,
            backward=flops.backward + changed.backward,
        ),
        encoding_flops=devices * sum(model.flops[stage] for model in setup.frozen),
        saved=activations_of.saved // devices if activations_of else 0,
        temporary=max(activations_of.peak - activations_of.saved, 0) // devices if activations_of else 0,
        communication=_communication(setup, stage),
    )


def _shape(setup: Setup, stage: int, samples: int) -> MicroBatchShape:
    halves = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    sharded = setup.sharding.kind == "fsdp2" and setup.sharding.param_dtype != "float32"
    return MicroBatchShape(
        stage=stage,
        samples=samples,
        side=setup.resolutions[stage] // setup.factor,
        text_tokens=setup.text_tokens,
        weight_dtype=getattr(torch, setup.sharding.param_dtype) if sharded else setup.weight_dtype,
        autocast_dtype=halves.get(setup.precision),
        activation_checkpointing=setup.activation_checkpointing,
    )


def shard_numel(parameter: nn.Parameter, shards: int) -> int:
    """Return how many values of a parameter one of ``shards`` devices holds.

    FSDP2 pads the first dimension, so that every device holds as many.
    """
    return -(-parameter.shape[0] // shards) * (parameter.numel() // parameter.shape[0])


def _communication(setup: Setup, stage: int) -> int:
    """Return the bytes of communication buffers while a micro-batch of ``stage`` computes."""
    sharding, groups = setup.sharding, setup.network.groups()
    if sharding.kind == "ddp":
        phases, stages = setup.curriculum.phases, range(len(setup.resolutions))
        # Gradients of earlier micro-batches are not views: they are new in each step, and reduced with the last one's.
        one = all(sum(setup.micro_batches(phase, k)[0] for k in stages) == 1 for phase in phases)
        unneeded = (sharding.gradient_as_bucket_view and one) or (sharding.auto and setup.devices == 1)
        trained = sum(p.numel() for p in setup.network.trained.values())
        return 0 if unneeded else trained * setup.weight_dtype.itemsize
    used = setup.network.groups_used(stage)
    sizes = {group: sum(p.numel() for p in part) for group, part in groups if group in used}
    largest = max(size for group, size in sizes.items() if group is not None)
    gathered = sizes[None] + GATHERED_BLOCKS * largest
    if not sharding.reshard_after_forward:
        gathered = sum(sizes.values()) + (GATHERED_BLOCKS - 1) * largest
    param, reduced = (getattr(torch, name).itemsize for name in (sharding.param_dtype, sharding.reduce_dtype))
    return gathered * param + largest * reduced


def _constant_memory(setup: Setup) -> dict[str, int]:
    """Return the bytes that a device holds during the whole of a step, by what they hold."""
    sharding = setup.sharding
    parameters = list(setup.network.model.parameters())
    shards = setup.shards
    weights = sum(shard_numel(p, shards) for p in parameters) * setup.weight_dtype.itemsize
    trained = sum(shard_numel(p, shards) for p in setup.network.trained.values()) * setup.weight_dtype.itemsize
    gradients = trained
    if sharding.kind == "fsdp2" and not sharding.reduce_each_micro_batch:
        gradients += (
            sum(p.numel() for p in setup.network.trained.values()) * getattr(torch, sharding.param_dtype).itemsize
        )
    return {
        "weights": weights + (0 if setup.network.lora is None else trained),
        "gradients": gradients,
        "optimizer": round(trained * setup.optimizer),
        "ema": trained if setup.ema else 0,
        "frozen": sum(model.memory or 0 for model in setup.frozen) + (weights if setup.teacher_calls else 0),
    }


def _memory(setup: Setup, stages: list[StagePlan]) -> Memory:
    number = max(range(len(stages)), key=lambda k: stages[k].saved + stages[k].temporary + stages[k].communication)
    worst = stages[number]
    # Images are encoded before their micro-batch has any activations.
    encoding = max((model.peak for model in setup.frozen), default=0)
    return Memory(
        **_constant_memory(setup),
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
    reached = setup.devices * setup.utilization
    encoder_seconds = 0.0
    for model in setup.frozen:
        flops = sum(n * f * stage.devices for n, f, stage in zip(samples, model.flops, stages, strict=True))
        encoder_seconds += flops / device.peak_flops(model.dtype) / reached
    traffic = step_traffic(setup, phase)
    node, network = (1e9 * REACHED_BANDWIDTH * bandwidth for bandwidth in setup.bandwidths)
    planned = PhasePlan(
        steps=phase.steps,
        ratio=phase.ratio,
        samples=samples,
        micro_batches=[setup.micro_batches(phase, stage)[0] for stage in range(len(stages))],
        flops=[one + other for one, other in zip(trained, encoded, strict=True)],
        encoder_seconds=encoder_seconds,
        compute_seconds=encoder_seconds + sum(trained) / device.peak_flops(setup.matmul_dtype) / reached,
        traffic=traffic,
        node_seconds=traffic.node / node,
        network_seconds=traffic.network / network,
        gpu_hours=0.0,
    )
    return replace(planned, gpu_hours=phase.steps * planned.seconds_per_step * setup.devices / 3600)
