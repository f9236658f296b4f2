"""Seconds and operations of a drawing's stages, beside those of FLUX-base, as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nami_lightning.models.autoencoder import autoencoder_factor
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.planning.flops import transformer_flops
from nami_lightning.serving.drawing import Settings

NOTE = (
    "FLUX-base is an estimate: the same network as one stage, all its blocks at {size} px in every step, with as many "
    "steps, guided alike. Its seconds are its operations at the speed of the last stage here. Encoding the prompt and "
    "decoding the image are not counted."
)
COLUMNS = ("", "px", "steps", "guidance", "operations", "seconds", "FLUX-base: operations", "seconds (estimate)")


@dataclass(frozen=True)
class StageCost:
    """What a stage costs by formula.

    Attributes:
        size: width and height in px.
        operations: of its steps.
        flux_base: operations of as many steps of FLUX-base.
    """

    size: tuple[int, int]
    operations: int
    flux_base: int


def stage_costs(pipeline: NamiPipeline, settings: Settings) -> list[StageCost]:
    """Return what each stage costs with these settings, coarsest first.

    FLUX-base is the same network with one stage: all blocks at the finest resolution in every step.
    """
    config: dict[str, Any] = dict(pipeline.transformer.config)
    all_blocks = config | {key: [sum(config[key])] for key in ("num_layers", "num_single_layers")}
    side = autoencoder_factor(pipeline.vae) * config["patch_size"]  # px of a token
    text_tokens = pipeline.config.max_sequence_length
    last = len(settings.steps) - 1
    sizes = [(settings.width >> last - stage, settings.height >> last - stage) for stage in range(last + 1)]
    tokens = [(width // side) * (height // side) for width, height in sizes]
    base = transformer_flops(all_blocks, 0, tokens[-1], text_tokens).forward
    costs = []
    for stage, steps in enumerate(settings.steps):
        calls = steps * (2 if settings.solver == "heun" else 1) * (2 if settings.guidance_scale[stage] > 1 else 1)
        own = transformer_flops(config, stage, tokens[stage], text_tokens).forward
        costs.append(StageCost(sizes[stage], calls * own, calls * base))
    return costs


def cost_table(settings: Settings, costs: Sequence[StageCost], seconds: Sequence[float]) -> str:
    """Return the table as HTML; it holds numbers only.

    Args:
        settings: of the drawing.
        costs: of all stages.
        seconds: of the stages that are done.
    """
    whole = len(seconds) == len(costs)
    speed = costs[-1].operations / seconds[-1] if whole and seconds[-1] else None
    rows = []
    for stage, cost in enumerate(costs):
        rows.append(
            [
                f"stage {stage + 1}",
                f"{cost.size[0]} x {cost.size[1]}",
                str(settings.steps[stage]),
                f"{settings.guidance_scale[stage]:g}",
                _large(cost.operations),
                f"{seconds[stage]:.2f}" if stage < len(seconds) else "…",
                _large(cost.flux_base),
                f"{cost.flux_base / speed:.2f}" if speed else "…",
            ]
        )
    own, base = (sum(getattr(cost, name) for cost in costs) for name in ("operations", "flux_base"))
    rows.append(["all", "", str(sum(settings.steps)), "", _large(own), f"{sum(seconds):.2f}" if whole else "…"])
    rows[-1] += [_large(base), f"{base / speed:.2f}" if speed else "…"]
    text = f"<b>{own / base:.0%} of FLUX-base's operations"
    text += f", {sum(seconds) / (base / speed):.0%} of its time.</b> " if speed else ".</b> "
    return (
        f"<table class='costs'><thead>{_cells('th', COLUMNS)}</thead><tbody>"
        f"{''.join(_cells('td', row) for row in rows)}</tbody></table>"
        f"<p class='note'>{text}{NOTE.format(size=' x '.join(map(str, costs[-1].size)))}</p>"
    )


def _cells(kind: str, values: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{kind}>{value}</{kind}>" for value in values) + "</tr>"


def _large(number: float) -> str:
    """Return a number of operations in the unit that fits."""
    for unit in ("M", "G", "T", "P"):
        number /= 1000 if unit != "M" else 1e6
        if number < 1000:
            break
    return f"{number:.3g} {unit}"
