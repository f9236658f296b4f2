"""How long a GPU samples: the paper's Table 2, its Figures 2 and 26, then compiled and with CUDA graphs.

The plot has the eager networks at each resolution. Utilisation is the network's operations over the peak of the GPU in
bfloat16, if that is known.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from nami_lightning.benchmarks.gpu.section import Promise, Section
from nami_lightning.benchmarks.gpu.sizes import Sampling, Sizes
from nami_lightning.benchmarks.sampling import PIPELINES, measure_resolution, move
from nami_lightning.benchmarks.sampling_report import (
    FLUX_BASE,
    Measurement,
    less_than_flux_base,
    render_tables,
    with_paper,
    write_csv,
    write_plot,
)
from nami_lightning.pipelines.cuda_graphs import CudaGraphs
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.planning.flops import find_device
from nami_lightning.runs.recipe import Recipe

Pipelines = Mapping[str, NamiPipeline]

PAPER_SIDE = 1024
"""px at which the paper states 64% less time; the operations are 60% fewer."""

GOAL = 0.60


@contextmanager
def with_cuda_graphs(pipelines: Pipelines) -> Iterator[None]:
    """Run a ``with`` block in which each network's forward pass is replayed from a CUDA graph."""
    graphs = [CudaGraphs(pipeline.transformer) for pipeline in pipelines.values()]
    try:
        yield
    finally:
        for one in graphs:
            one.remove()


@contextmanager
def compiled(pipelines: Pipelines) -> Iterator[None]:
    """Run a ``with`` block in which the networks' blocks are compiled, one graph a kind of block and shape."""
    for pipeline in pipelines.values():
        pipeline.transformer.compile_repeated_blocks(dynamic=False)
    yield


@contextmanager
def compiled_with_cuda_graphs(pipelines: Pipelines) -> Iterator[None]:
    """Run a ``with`` block in which compiled networks are replayed from CUDA graphs."""
    with compiled(pipelines), with_cuda_graphs(pipelines):
        yield


WAYS: dict[str, Callable[[Pipelines], object]] = {
    "CUDA graphs": with_cuda_graphs,
    "compiled": compiled,
    "compiled, CUDA graphs": compiled_with_cuda_graphs,
}
"""In this order: blocks stay compiled."""


def measure_sampling_speed(sizes: Sizes, folder: Path) -> Section:
    """Time the models of :attr:`Sizes.sampling`; write a CSV and a plot of each."""
    section = Section(
        "Sampling",
        f"1 image, {sizes.steps} solver steps a stage, bfloat16, random weights, no encoders, no guidance; medians of "
        f"{sizes.rounds} round(s) in which the models take turns (one round from 2,048 px on).",
    )
    for number, sampling in enumerate(sizes.sampling):
        measured, fast = measure_model(sizes, sampling)
        stem = folder / f"sampling_{sampling.name.replace('.', '_')}"
        shown = with_paper(measured)
        write_csv(shown, stem.with_suffix(".csv"))
        section.pictures.append(write_plot(shown, stem).with_suffix(".png").name)
        section.tables.append(f"### {sampling.name}\n\n```\n" + "\n\n".join(render_tables(shown)) + "\n```")
        section.tables.append(f"{utilisation(measured, sizes)}")
        for way, of_way in fast.items():
            table = render_tables(of_way)[0]
            section.tables.append(f"{sampling.name}, {way}:\n\n```\n{table}\n```")
        if number == 0:
            section.promises += promises_of(sampling, measured, fast)
    return section


def measure_model(sizes: Sizes, sampling: Sampling) -> tuple[list[Measurement], dict[str, list[Measurement]]]:
    """Return a model's measurements, eager at all sides, and at one side in each of :data:`WAYS`."""
    model = Recipe(sampling.recipe, list(sampling.overrides)).make_model()
    with sizes.device:  # random weights are made where they are used
        pipelines = {name: make(model) for name, make in PIPELINES.items()}
    for pipeline in pipelines.values():
        move(pipeline, sizes.device.type)
    options = Namespace(steps=sizes.steps, batch_size=1, rounds=sizes.rounds, warm_up=1)
    measured = []
    for side in sampling.sides:
        large = side >= 2048
        rounds = Namespace(**vars(options) | ({"rounds": 1, "warm_up": 0} if large else {}))
        measured += measure_resolution(model, pipelines, None, side, rounds)
    fast = {}
    for way, context in WAYS.items():
        if "CUDA graphs" in way and sizes.device.type != "cuda":
            continue
        with context(pipelines):  # type: ignore[attr-defined]
            fast[way] = measure_resolution(model, pipelines, None, sampling.fast_side, options)
    return measured, fast


def utilisation(measured: list[Measurement], sizes: Sizes) -> str:
    """Return a sentence on the share of the device's peak that each model reaches, by resolution."""
    known = find_device(torch.cuda.get_device_name(0)) if sizes.device.type == "cuda" else None
    if known is None:
        return "The peak of this device is not known, so no utilisation is stated."
    shares = [
        f"{one.model} {one.side} px {(one.operations or 0) / one.seconds / known.peak_flops('bfloat16'):.0%}"
        for one in measured
    ]
    return f"Share of the peak ({known.half:g} TFLOP/s): {', '.join(shares)}."


def promises_of(sampling: Sampling, measured: list[Measurement], fast: dict[str, list[Measurement]]) -> list[Promise]:
    """Return what is promised of the first model: less time than FLUX-base by as much as it has fewer operations."""
    side = PAPER_SIDE if PAPER_SIDE in sampling.sides else sampling.fast_side
    ways = {"eager": [one for one in measured if one.side == side], **fast}
    promises = []
    for way, of_side in ways.items():
        ours = next(one for one in of_side if one.model == "NAMI")
        less = less_than_flux_base(ours, of_side, "seconds")
        assert less is not None
        promises.append(
            Promise(
                f"{sampling.name} at {side} px, {way}: less time than {FLUX_BASE}",
                f"{less:.1%} ({ours.seconds:.3g} s)",
                f"at least {GOAL:.0%}",
                less >= GOAL,
            )
        )
    eager = next(one for one in ways["eager"] if one.model == "NAMI")
    if eager.overhead is not None:
        limit = 0.03
        promises.append(
            Promise(
                f"{sampling.name} at {side} px: the pipeline's time beside the network's",
                f"{eager.overhead:.1%}",
                f"at most {limit:.0%}",
                eager.overhead <= limit,
            )
        )
    return promises
