"""A plan as tables for people, or as JSON for programs."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nami_lightning.planning.encoder_memory import FrozenModel
from nami_lightning.planning.flops import DEVICES
from nami_lightning.planning.plan import REACHED_BANDWIDTH, USABLE_MEMORY, Memory, Plan
from nami_lightning.planning.suggestions import Suggestion
from nami_lightning.utils.text_table import table

MEMORY_ROWS = ("weights", "gradients", "optimizer", "ema", "frozen", "communication", "activations", "temporary")
MEMORY_NAMES = {"ema": "EMA", "frozen": "frozen models"}


@dataclass(frozen=True)
class TrainingImages:
    """How many images there are for training.

    Attributes:
        origin: where the numbers come from: a data set's folder, or an option.
        images: number of images, by the resolution that they are stored at.
    """

    origin: str
    images: dict[int, int]


def samples_by_resolution(plan: Plan, data: TrainingImages) -> dict[int, list[float]]:
    """Return how many samples of each stage use images of each resolution.

    A stage uses the images of its own resolution and of higher ones, in proportion to their numbers.
    """
    drawn: dict[int, list[float]] = {}
    for side in data.images:
        drawn[side] = []
        for stage, samples in zip(plan.stages, total_samples(plan), strict=True):
            usable = sum(n for other, n in data.images.items() if other >= stage.resolution)
            share = data.images[side] / usable if usable and side >= stage.resolution else 0.0
            drawn[side].append(samples * share)
    return drawn


def total_samples(plan: Plan) -> list[int]:
    """Return the number of samples of each stage in all phases together."""
    return [sum(phase.steps * phase.samples[k] for phase in plan.phases) for k in range(len(plan.stages))]


def as_json(
    plan: Plan, base: Plan | None, suggestion: Suggestion | None, data: TrainingImages | None
) -> dict[str, Any]:
    """Return all figures of a plan as JSON values: bytes, operations, seconds and hours."""
    return {
        **_figures(plan),
        "flux_base": None if base is None else _figures(base),
        "remedy": None if suggestion is None else {"settings": suggestion.settings, **_figures(suggestion.plan)},
        "data": None
        if data is None
        else {"origin": data.origin, "images": data.images, "samples_by_stage": samples_by_resolution(plan, data)},
    }


def _figures(plan: Plan) -> dict[str, Any]:
    setup = plan.setup
    return {
        "name": setup.name,
        "devices": setup.devices,
        "device": setup.device,
        "number_type": setup.matmul_dtype,
        "peak_flops": DEVICES[setup.device].peak_flops(setup.matmul_dtype),
        "utilization": setup.utilization,
        "strategy": asdict(setup.sharding),
        "activation_checkpointing": setup.activation_checkpointing,
        "max_micro_batch": setup.max_micro_batch,
        "parameters": plan.parameters,
        "shared_parameters": plan.shared_parameters,
        "stages": [asdict(stage) for stage in plan.stages],
        "memory": asdict(plan.memory) | {"total": plan.memory.total, "limit": plan.limit},
        "fits": plan.fits,
        "phases": [
            asdict(phase) | {"seconds_per_step": phase.seconds_per_step, "bound": phase.bound} for phase in plan.phases
        ],
        "node_bandwidth": setup.bandwidths[0],
        "network_bandwidth": setup.bandwidths[1],
        "devices_per_node": setup.devices_per_node,
        "shards": setup.shards,
        "read_ahead": setup.read_ahead,
        "samples": total_samples(plan),
        "gpu_hours": plan.gpu_hours,
        "frozen": [_frozen_model(model) for model in setup.frozen],
    }


def _frozen_model(model: FrozenModel) -> dict[str, Any]:
    figures = asdict(model)
    return figures | {"number_type": figures.pop("dtype")}


def as_text(plan: Plan, base: Plan | None, suggestion: Suggestion | None, data: TrainingImages | None) -> list[str]:
    """Return a plan as lines for the terminal."""
    setup, device = plan.setup, DEVICES[plan.setup.device]
    sharding = setup.sharding
    how = "copied to each device" if sharding.kind == "ddp" else f"sharded over {setup.shards}"
    if setup.shards > 1 and setup.shards < setup.devices:
        how += f", {setup.devices // setup.shards} copies"
    rate = device.peak_flops(setup.matmul_dtype) / 1e12
    lines = [
        f"{setup.name} on {setup.devices} x {setup.device}, weights {how} ({sharding.kind}), computing in "
        f"{setup.matmul_dtype}",
        f"Times are at {setup.utilization:.0%} of {rate:g} TFLOP/s per device (--utilization). All work counts, "
        "and waiting for data is included.",
        "",
        *_stages(plan, base),
        "",
        *_memory(plan, base),
        "",
        *_phases(plan, base),
        "",
        *_bounds(plan),
        "",
        *_samples(plan, data),
        "",
        *_verdict(plan, suggestion),
        *_read_ahead(plan),
        f"Host memory to convert, export or load the network's weights: {_gib(4 * plan.parameters)} in float32, "
        f"{_gib(2 * plan.parameters)} in bfloat16.",
    ]
    return [*lines, *(f"Not counted: {note}" for note in _uncounted(plan))]


def _stages(plan: Plan, base: Plan | None) -> list[str]:
    stages = [*plan.stages, *(base.stages if base else [])]
    names = [*(f"stage {k + 1}" for k in range(len(plan.stages))), *(["FLUX-base"] if base else [])]
    rows = [["", *names]]

    def row(name: str, cell: Callable[[Any], str]) -> None:
        rows.append([name, *(cell(stage) for stage in stages)])

    row("resolution", lambda s: f"{s.resolution} px")
    row("tokens, image + text", lambda s: f"{s.image_tokens:,} + {s.text_tokens:,}")
    row("blocks, double + single", lambda s: f"{s.blocks[0]} + {s.blocks[1]}")
    row("parameters added", lambda s: f"{s.parameters:,}")
    row("parameters used", lambda s: f"{s.parameters_used:,}")
    row("TFLOP per sample", lambda s: f"{s.flops.model / 1e12:,.3g}")
    row("  recomputed, in addition", lambda s: f"{s.flops.recomputed / 1e12:,.3g}")
    row("  encoders, in addition", lambda s: f"{s.encoding_flops / 1e12:,.3g}")
    row("micro-batch, samples", lambda s: str(s.micro_batch))
    if any(stage.devices > 1 for stage in stages):
        row("  devices that share them", lambda s: str(s.devices))
    row("  its activations", lambda s: _gib(s.saved))
    row("  temporary, at its peak", lambda s: _gib(s.temporary))
    total = f"parameters: {plan.parameters:,}, of which {plan.shared_parameters:,} are shared by all stages"
    if plan.setup.network.lora is not None:
        total += f"; the LoRA trains {sum(p.numel() for p in plan.setup.network.trained.values()):,}"
    return [total + (f"; FLUX-base {base.parameters:,}" if base else ""), *table(rows, "<" + ">" * len(stages))]


def _memory(plan: Plan, base: Plan | None) -> list[str]:
    plans = [plan, *([base] if base else [])]
    rows = [["memory per device", plan.setup.name, *(["FLUX-base"] if base else [])]]
    for name in MEMORY_ROWS:
        values = [getattr(one.memory, name) for one in plans]
        if any(values):
            rows.append([f"  {MEMORY_NAMES.get(name, name)}", *map(_gib, values)])
    rows.append(["  total", *(_gib(one.memory.total) for one in plans)])
    rows.append([f"  limit ({USABLE_MEMORY:.0%} of the device)", *(_gib(one.limit) for one in plans)])
    return [
        *table(rows, "<" + ">" * len(plans)),
        f"  This is the worst moment, in a micro-batch of stage {plan.memory.stage + 1}.",
    ]


def _phases(plan: Plan, base: Plan | None) -> list[str]:
    stages = [f"stage {k + 1}" for k in range(len(plan.stages))]
    rows = [["phase", "steps", "ratio", *(f"{s} PFLOP" for s in stages), "s / step", "days", "GPU-hours"]]
    if base:
        rows[0].append("FLUX-base's")
    for number, phase in enumerate(plan.phases, 1):
        cells = [str(number), f"{phase.steps:,}", ":".join(map(str, phase.ratio))]
        cells += [f"{flops / 1e15:,.4g}" for flops in phase.flops]
        cells += [f"{phase.seconds_per_step:,.3g}", _days(phase.steps * phase.seconds_per_step)]
        cells += [_hours(phase.gpu_hours)]
        rows.append(cells + ([_hours(base.phases[number - 1].gpu_hours)] if base else []))
    days = _days(sum(phase.steps * phase.seconds_per_step for phase in plan.phases))
    totals = ["all", f"{sum(phase.steps for phase in plan.phases):,}", "", *("" for _ in stages), "", days]
    rows.append([*totals, _hours(plan.gpu_hours), *([_hours(base.gpu_hours)] if base else [])])
    lines = table(rows, ">" * len(rows[0]))
    if base:
        less = 1 - plan.gpu_hours / base.gpu_hours
        lines.append(
            f"{abs(less):.1%} {'fewer' if less >= 0 else 'more'} GPU-hours than FLUX-base for as many samples."
        )
    return lines


def _bounds(plan: Plan) -> list[str]:
    """Return what each device computes and sends in a step, and which of it takes longest."""
    setup = plan.setup
    rows = [["phase", "computing, s", "sent in its node, GB", "s", "to other nodes, GB", "s", "bound by"]]
    for number, phase in enumerate(plan.phases, 1):
        sent = (phase.traffic.node, phase.node_seconds), (phase.traffic.network, phase.network_seconds)
        cells = [cell for size, seconds in sent for cell in (f"{size / 1e9:,.3g}", f"{seconds:,.3g}")]
        rows.append([str(number), f"{phase.compute_seconds:,.3g}", *cells, phase.bound])
    node, network = setup.bandwidths
    lines = table(rows, ">" * (len(rows[0]) - 1) + "<")
    lines.append(
        f"Bytes are sent at {REACHED_BANDWIDTH:.0%} of {node:g} GB/s a device in a node of {setup.devices_per_node} "
        f"(--node_bandwidth) and of {network:g} GB/s between nodes (--network_bandwidth), while the device computes."
    )
    return lines + _encoding(plan)


def _encoding(plan: Plan) -> list[str]:
    """Return what the encoders cost, in each step and once."""
    setup = plan.setup
    encoding = sum(phase.steps * phase.encoder_seconds for phase in plan.phases) * setup.devices / 3600
    if not encoding:
        return []
    device = DEVICES[setup.device]
    once = sum((max(m.flops) if m.of_text else sum(m.flops)) / device.peak_flops(m.dtype) for m in setup.frozen)
    return [
        f"Encoding in every step takes {_hours(encoding)} GPU-hours of computing. Stored encodings (lightning data "
        f"encode) take none of a step, and {_hours(once * 1e6 / setup.utilization / 3600)} GPU-hours once for a "
        "million images."
    ]


def _read_ahead(plan: Plan) -> list[str]:
    held = plan.setup.read_ahead * min(plan.setup.devices, plan.setup.devices_per_node)
    if not held:
        return []
    return [
        f"Host memory of a node for the steps that are read ahead: {_gib(held)} (data.init_args.prefetch_memory). A "
        f"container needs as much shared memory: docker run --shm-size {-(-held // 2**30)}g."
    ]


def _samples(plan: Plan, data: TrainingImages | None) -> list[str]:
    totals = total_samples(plan)
    names = [f"stage {k + 1}" for k in range(len(totals))]
    if data is None:
        rows = [["", *names], ["samples", *(f"{n:,}" for n in totals)]]
        lines = table(rows, "<" + ">" * len(totals))
        return [
            *lines,
            "The number of epochs is unknown, because the data set isn't prepared here. Give its size with --images N.",
        ]
    rows = [["images", "", *(f"samples of {name}" for name in names), "epochs"]]
    for side, drawn in samples_by_resolution(plan, data).items():
        count = data.images[side]
        seen = f"{sum(drawn) / count:,.2f}" if count else "-"
        rows.append([f"{side} px", f"{count:,}", *(f"{n:,.0f}" for n in drawn), seen])
    usable = [sum(n for side, n in data.images.items() if side >= stage.resolution) for stage in plan.stages]
    epochs = [f"{n / images:,.2f}" if images else "no image" for n, images in zip(totals, usable, strict=True)]
    rows.append(["epochs of a stage", "", *epochs, ""])
    return [*table(rows, "<" + ">" * (len(totals) + 2)), f"Images: {data.origin}."]


def _verdict(plan: Plan, suggestion: Suggestion | None) -> list[str]:
    if plan.fits:
        return [f"It fits: {_gib(plan.memory.total)} of {_gib(plan.limit)}."]
    lines = [f"It does not fit: {_gib(plan.memory.total)} of {_gib(plan.limit)}. {_largest(plan.memory)}"]
    if suggestion is None:
        return [
            *lines,
            "No change of checkpointing, micro-batches, sharding and number of devices makes it fit on this device.",
        ]
    found = suggestion.plan
    return [
        *lines,
        f"The first change with which it fits ({_gib(found.memory.total)}; {_hours(found.gpu_hours)} GPU-hours):",
        f"  {shlex.join(suggestion.settings)}",
    ]


def _largest(memory: Memory) -> str:
    name = max(MEMORY_ROWS, key=lambda row: getattr(memory, row))
    return f"The largest part: {MEMORY_NAMES.get(name, name)}, {_gib(getattr(memory, name))}."


def _uncounted(plan: Plan) -> Sequence[str]:
    unknown = [model.name for model in plan.setup.frozen if model.memory is None]
    notes = [
        f"the memory and time of {name}, because its configuration was found neither here nor on the hub"
        for name in unknown
    ]
    if any(model.memory is not None for model in plan.setup.frozen):
        notes.append("the text encoders' activations, and the workspaces of convolutions")
    if plan.setup.network.lora is not None:
        notes.append("what a LoRA saves: operations and activations are counted as if all weights were trained")
    return [
        *notes,
        "validation, sampling and checkpoints; images that aren't square, whose number of tokens differs a little",
    ]


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _days(seconds: float) -> str:
    return f"{seconds / 86400:,.2f}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:,.2g}"
