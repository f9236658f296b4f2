"""A plan for people, as tables, and for programs, as JSON."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nami_lightning.planning.flops import DEVICES
from nami_lightning.planning.plan import USABLE, Memory, Plan
from nami_lightning.planning.suggestions import Remedy
from nami_lightning.utils.text_table import table

MEMORY_ROWS = ("weights", "gradients", "optimizer", "ema", "frozen", "communication", "activations", "temporary")
MEMORY_NAMES = {"ema": "EMA", "frozen": "frozen encoders"}


@dataclass(frozen=True)
class Data:
    """Images for training.

    Attributes:
        origin: who says so.
        images: by the resolution that they are stored at.
    """

    origin: str
    images: dict[int, int]


def draws(plan: Plan, data: Data) -> dict[int, list[float]]:
    """Samples of each stage that come from each resolution's images: in proportion, from its own or higher."""
    drawn: dict[int, list[float]] = {}
    for side in data.images:
        drawn[side] = []
        for stage, samples in zip(plan.stages, total_samples(plan), strict=True):
            usable = sum(n for other, n in data.images.items() if other >= stage.resolution)
            share = data.images[side] / usable if usable and side >= stage.resolution else 0.0
            drawn[side].append(samples * share)
    return drawn


def total_samples(plan: Plan) -> list[int]:
    """Of each stage in all phases."""
    return [sum(phase.steps * phase.samples[k] for phase in plan.phases) for k in range(len(plan.stages))]


def as_json(plan: Plan, base: Plan | None, remedy: Remedy | None, data: Data | None) -> dict[str, Any]:
    """All figures: bytes, operations, seconds, hours."""
    return {
        **_figures(plan),
        "flux_base": None if base is None else _figures(base),
        "remedy": None if remedy is None else {"settings": remedy.settings, **_figures(remedy.plan)},
        "data": None
        if data is None
        else {"origin": data.origin, "images": data.images, "samples_by_stage": draws(plan, data)},
    }


def _figures(plan: Plan) -> dict[str, Any]:
    setup = plan.setup
    return {
        "name": setup.name,
        "devices": setup.devices,
        "device": setup.device,
        "number_type": setup.number_type,
        "peak_flops": DEVICES[setup.device].flops(setup.number_type),
        "utilization": setup.utilization,
        "strategy": asdict(setup.spread),
        "activation_checkpointing": setup.activation_checkpointing,
        "max_micro_batch": setup.max_micro_batch,
        "parameters": plan.parameters,
        "shared_parameters": plan.shared_parameters,
        "stages": [asdict(stage) for stage in plan.stages],
        "memory": asdict(plan.memory) | {"total": plan.memory.total, "limit": plan.limit},
        "fits": plan.fits,
        "phases": [asdict(phase) for phase in plan.phases],
        "samples": total_samples(plan),
        "gpu_hours": plan.gpu_hours,
        "frozen": [asdict(model) for model in setup.frozen],
    }


def as_text(plan: Plan, base: Plan | None, remedy: Remedy | None, data: Data | None) -> list[str]:
    """Lines for the terminal."""
    setup, device = plan.setup, DEVICES[plan.setup.device]
    spread = setup.spread
    how = "on each device whole" if spread.kind == "ddp" else f"sharded over {spread.shards(setup.devices)}"
    rate = device.flops(setup.number_type) / 1e12
    lines = [
        f"{setup.name} on {setup.devices} x {setup.device}, weights {how} ({spread.kind}), computing in "
        f"{setup.number_type}",
        f"Times are at {setup.utilization:.0%} of {rate:g} TFLOP/s a device (--utilization), all work counted; what "
        "waits for data or other devices is part of that share.",
        "",
        *_stages(plan, base),
        "",
        *_memory(plan, base),
        "",
        *_phases(plan, base),
        "",
        *_samples(plan, data),
        "",
        *_verdict(plan, remedy),
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
    row("TFLOP a sample", lambda s: f"{s.flops.model / 1e12:,.3g}")
    row("  recomputed besides", lambda s: f"{s.flops.recomputed / 1e12:,.3g}")
    row("  encoders besides", lambda s: f"{s.encoding_flops / 1e12:,.3g}")
    row("micro-batch, samples", lambda s: str(s.micro_batch))
    row("  its activations", lambda s: _gib(s.saved))
    row("  temporary at its peak", lambda s: _gib(s.temporary))
    total = f"parameters: {plan.parameters:,}, of which all stages share {plan.shared_parameters:,}"
    return [total + (f"; FLUX-base {base.parameters:,}" if base else ""), *table(rows, "<" + ">" * len(stages))]


def _memory(plan: Plan, base: Plan | None) -> list[str]:
    plans = [plan, *([base] if base else [])]
    rows = [["memory of a device", plan.setup.name, *(["FLUX-base"] if base else [])]]
    for name in MEMORY_ROWS:
        values = [getattr(one.memory, name) for one in plans]
        if any(values):
            rows.append([f"  {MEMORY_NAMES.get(name, name)}", *map(_gib, values)])
    rows.append(["  together", *(_gib(one.memory.total) for one in plans)])
    rows.append([f"  may be filled ({USABLE:.0%})", *(_gib(one.limit) for one in plans)])
    return [*table(rows, "<" + ">" * len(plans)), f"  At its worst in a micro-batch of stage {plan.memory.stage + 1}."]


def _phases(plan: Plan, base: Plan | None) -> list[str]:
    stages = [f"stage {k + 1}" for k in range(len(plan.stages))]
    rows = [["phase", "steps", "ratio", *(f"{s} PFLOP" for s in stages), "s a step", "days", "GPU-hours"]]
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


def _samples(plan: Plan, data: Data | None) -> list[str]:
    totals = total_samples(plan)
    names = [f"stage {k + 1}" for k in range(len(totals))]
    if data is None:
        rows = [["", *names], ["samples", *(f"{n:,}" for n in totals)]]
        lines = table(rows, "<" + ">" * len(totals))
        return [*lines, "Epochs are not known: the data set isn't prepared here. Give its size as --images N."]
    rows = [["images", "", *(f"samples of {name}" for name in names), "epochs"]]
    for side, drawn in draws(plan, data).items():
        count = data.images[side]
        seen = f"{sum(drawn) / count:,.2f}" if count else "-"
        rows.append([f"{side} px", f"{count:,}", *(f"{n:,.0f}" for n in drawn), seen])
    usable = [sum(n for side, n in data.images.items() if side >= stage.resolution) for stage in plan.stages]
    epochs = [f"{n / images:,.2f}" if images else "no image" for n, images in zip(totals, usable, strict=True)]
    rows.append(["epochs of a stage", "", *epochs, ""])
    return [*table(rows, "<" + ">" * (len(totals) + 2)), f"Images: {data.origin}."]


def _verdict(plan: Plan, remedy: Remedy | None) -> list[str]:
    if plan.fits:
        return [f"It fits: {_gib(plan.memory.total)} of {_gib(plan.limit)}."]
    lines = [f"It does not fit: {_gib(plan.memory.total)} of {_gib(plan.limit)}. {_largest(plan.memory)}"]
    if remedy is None:
        return [*lines, "No change of checkpointing, micro-batches, sharding and devices makes it fit this device."]
    found = remedy.plan
    return [
        *lines,
        f"The first change with which it fits ({_gib(found.memory.total)}; {_hours(found.gpu_hours)} GPU-hours):",
        f"  {shlex.join(remedy.settings)}",
    ]


def _largest(memory: Memory) -> str:
    name = max(MEMORY_ROWS, key=lambda row: getattr(memory, row))
    return f"The largest part: {MEMORY_NAMES.get(name, name)}, {_gib(getattr(memory, name))}."


def _uncounted(plan: Plan) -> Sequence[str]:
    unknown = [model.name for model in plan.setup.frozen if model.memory is None]
    notes = [
        f"{name}: its configuration is neither here nor within reach, so neither memory nor time" for name in unknown
    ]
    if any(model.memory is not None for model in plan.setup.frozen):
        notes.append("the text encoders' own activations, and convolutions' workspaces")
    return [*notes, "validation, drawing and checkpoints; shapes other than squares, whose tokens differ a little"]


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _days(seconds: float) -> str:
    return f"{seconds / 86400:,.2f}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:,.2g}"
