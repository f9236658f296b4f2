"""The bytes that each device sends in a step, over the links of its node and over the network between nodes.

A collective over n devices that holds S bytes on each afterwards sends (n-1)/n * S from each device if it gathers or
scatters, and twice that if it is an all-reduce (the ring's count, and the least that is possible).

==========  =======================================================================================================
DDP         an all-reduce of the gradients
FSDP2       gathers of the parameters that a stage uses, forward and backward, in ``param_dtype``; a reduce-scatter of
            their gradients in ``reduce_dtype``; and, over replicas, an all-reduce of the shards' gradients
attention   where devices share the tokens of a sample, all-to-alls of queries, keys, values and results in each block,
            forward and backward
==========  =======================================================================================================

Gradients are reduced once a step under DDP; under FSDP2 in every micro-batch, or once if it says so. Shards that have
room in a node are sent over its links; whatever leaves a node is counted on the network, which is slower.
"""

from dataclasses import dataclass

import torch

from nami_lightning.planning.inputs import Setup
from nami_lightning.training.curriculum import Phase


@dataclass(frozen=True)
class Traffic:
    """Bytes that each device sends in a step.

    Attributes:
        node: to other devices of its node.
        network: to other nodes.
    """

    node: int = 0
    network: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.node + other.node, self.network + other.network)


def step_traffic(setup: Setup, phase: Phase) -> Traffic:
    """Return what each device sends in a step of a phase."""
    counts = [setup.micro_batches(phase, stage)[0] for stage in range(len(phase.ratio))]
    trained = [stage for stage, count in enumerate(counts) if count]
    total = Traffic()
    for stage in trained:
        total += _sent(setup, counts[stage] * _gathered(setup, stage), setup.shards)
        total += _exchanged(setup, phase, stage)
    if setup.sharding.kind == "fsdp2" and setup.sharding.reduce_each_micro_batch:
        for stage in trained:
            total += _reductions(setup, stage, counts[stage])
        return total
    return total + _reductions(setup, trained[-1], 1)


def _sent(setup: Setup, held: float, devices: int) -> Traffic:
    """Return what a gather over so many neighbouring devices sends from each, which then holds so many bytes."""
    sent = round(held * (devices - 1) / devices)
    return Traffic(node=sent) if devices <= setup.devices_per_node else Traffic(network=sent)


def _gathered(setup: Setup, stage: int) -> int:
    """Return the bytes of the parameters that one micro-batch of a stage gathers, forward and backward."""
    sharding = setup.sharding
    if sharding.kind == "ddp":
        return 0
    used = setup.network.groups_used(stage)
    sizes = {group: sum(p.numel() for p in part) for group, part in setup.network.groups() if group in used}
    times = {group: 2 if group is None or sharding.reshard_after_forward else 1 for group in sizes}
    values = sum(size * times[group] for group, size in sizes.items())
    return values * int(getattr(torch, sharding.param_dtype).itemsize)


def _exchanged(setup: Setup, phase: Phase, stage: int) -> Traffic:
    """Return what the devices that share the tokens of a stage's samples send each other in a step."""
    devices = setup.curriculum.context_parallel[stage]
    micro_batches, samples = setup.micro_batches(phase, stage)
    model, every = setup.network.model, setup.activation_checkpointing
    blocks = {id(block) for block in model.blocks(stage)}
    recomputed = blocks & {id(block) for block in model.recomputed_blocks(every)} if every else set()
    image, text = setup.image_tokens(stage), setup.text_tokens
    tokens = (image + text) // devices * 4 * (2 * len(blocks) + len(recomputed))
    width = setup.network.config["num_attention_heads"] * setup.network.config["attention_head_dim"]
    size = micro_batches * samples * width * getattr(torch, setup.matmul_dtype).itemsize
    return _sent(setup, size * (tokens + image), devices)  # the image tokens are gathered for the head


def _reductions(setup: Setup, stage: int, times: int) -> Traffic:
    """Return what so many reductions of the gradients of a stage's micro-batch send."""
    sharding, trained = setup.sharding, setup.network.trained
    numbers = sum(p.numel() for p in trained.values())
    if sharding.kind == "ddp":
        return _all_reduced(setup, 2 * times * numbers * setup.weight_dtype.itemsize, setup.devices)
    if setup.network.lora is None:
        used = setup.network.groups_used(stage)
        numbers = sum(p.numel() for group, part in setup.network.groups() if group in used for p in part)
    size = times * numbers * int(getattr(torch, sharding.reduce_dtype).itemsize)
    replicas = setup.devices // setup.shards
    return _sent(setup, size, setup.shards) + _all_reduced(setup, 2 * size / setup.shards, replicas)


def _all_reduced(setup: Setup, held: float, devices: int) -> Traffic:
    """Return what an all-reduce over devices sends that are spread over all nodes."""
    sent = round(held * (devices - 1) / devices)
    return Traffic(network=sent) if setup.nodes > 1 else Traffic(node=sent)
