"""Find out what a source is, and write the pipeline that it becomes, completely or not at all."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from nami_lightning.conversion.add_stage import NewStage, extend_bridge, extend_transformer
from nami_lightning.conversion.flux import FIT_LATER, FluxSplit, is_flux_transformer
from nami_lightning.conversion.pipeline_folder import INDEX, OURS, PipelineFolder, text_settings_of
from nami_lightning.conversion.released import is_release
from nami_lightning.conversion.weights import local_folder, read_config
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.lora import merge_adapter
from nami_lightning.models.text_encoder import TextSettings
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.runs.load import load_module
from nami_lightning.runs.run_dir import Run, describe_runs, find_run, is_run
from nami_lightning.utils.atomic_write import publish, this_process

Kind = Literal["release", "flux", "pipeline", "run"]
Write = Callable[[PipelineFolder], list[str]]
"""Writes the parts of a pipeline, and returns notes for the user."""

PATTERNS = (
    *("*.json", "bridge*", "transformer/*", "vae/*", "scheduler/*", "text_encoder*/*", "tokenizer*/*"),
    *("mclip/*", "mt5/*", "diffusion_pytorch_model*"),
)
"""The files of a repository that a conversion reads."""


class Source(NamedTuple):
    """What is to be converted: its kind, and its folder."""

    kind: Kind
    folder: Path


def find_source(name: str) -> Source:
    """Return what a name stands for: a run, a folder, or a repository of the Hugging Face hub, which is downloaded.

    Raises:
        FileNotFoundError: there is no such thing.
        ValueError: it is none of what can be converted.
    """
    if is_run(name):
        return Source("run", find_run(name).folder)
    try:
        folder = local_folder(name, PATTERNS)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {describe_runs(name)}") from error
    if is_release(folder):
        return Source("release", folder)
    if is_flux_transformer(folder):
        return Source("flux", folder)
    found = read_config(folder / INDEX).get("_class_name") if (folder / INDEX).is_file() else None
    if found == "FluxPipeline":
        return Source("flux", folder)
    if found == NamiPipeline.__name__:
        return Source("pipeline", folder)
    raise ValueError(
        f"{name} can't be converted: it is {f'a {found}' if found else 'no pipeline'}, and neither the authors' "
        "release (transformer/pytorch_model_fsdp.bin, bridge_flow.bin), nor a FluxPipeline or FluxTransformer2DModel "
        "of diffusers, nor a run or pipeline of NAMI"
    )


@dataclass(frozen=True)
class Nami:
    """A NAMI that is to be changed, and how to write the parts that stay."""

    transformer: NamiTransformer2DModel
    bridge: BridgeFlow
    resolution: int
    text: TextSettings
    write_encoders: Callable[[PipelineFolder], None]

    def write(self, target: PipelineFolder) -> None:
        """Write all parts."""
        target.save("transformer", self.transformer, OURS)
        target.save("bridge", self.bridge, OURS)
        self.write_encoders(target)
        target.finish(self.resolution, self.text)


def load_nami(source: Source, step: int | None = None, ema: bool = True) -> Nami:
    """Load the network and the bridges of a run or a pipeline.

    Args:
        source: a run or a pipeline.
        step: of the run's checkpoint; None: the newest.
        ema: take the EMA's weights of a run, if it has them.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    if source.kind == "run":
        module = load_module(Run(source.folder), step, ema)
        if module.lora is not None:
            merge_adapter(module.transformer)
        pipeline = module.pipeline()
        return Nami(
            module.transformer,
            module.bridge,
            module.resolutions[-1],
            pipeline.text_settings,
            lambda target: target.save_encoders(pipeline),
        )
    index = read_config(source.folder / INDEX)
    return Nami(
        NamiTransformer2DModel.from_pretrained(source.folder, subfolder="transformer"),
        BridgeFlow.from_pretrained(source.folder, subfolder="bridge"),
        index["resolution"],
        text_settings_of(index),
        lambda target: target.copy_encoders(source.folder),
    )


def add_stage(nami: Nami, stage: NewStage, target: PipelineFolder) -> list[str]:
    """Write a NAMI with one finer stage, and return notes for the user.

    Raises:
        ValueError: the stage doesn't fit the model.
    """
    stage.check(nami.resolution)
    changed = replace(
        nami,
        transformer=extend_transformer(nami.transformer, stage),
        bridge=extend_bridge(nami.bridge, stage),
        resolution=stage.resolution,
    )
    changed.write(target)
    notes = [FIT_LATER]
    if nami.bridge.config.time == "remaining":
        notes.append("The network is told the share of the path that remains, which the new window makes longer.")
    return notes


def split_stages(nami: Nami, split: FluxSplit, target: PipelineFolder) -> list[str]:
    """Write a NAMI of one stage (a FLUX-base) with its blocks split over several, and return notes for the user.

    Raises:
        ValueError: it has several stages already, or the split doesn't fit.
    """
    if nami.transformer.num_stages > 1:
        raise ValueError(
            f"it has {nami.transformer.num_stages} stages already: only one stage can be split over several"
        )
    config = nami.transformer.config
    transformer = NamiTransformer2DModel.from_flux(
        nami.transformer.to_flux(),
        split.num_layers,
        split.num_single_layers,
        config.patch_size,
        output_head=split.output_head,
    )
    ratios = split.ratios(transformer.num_stages)
    settings = {key: value for key, value in dict(nami.bridge.config).items() if not key.startswith("_")}
    bridge = BridgeFlow(**settings | {"window_ratios": ratios})
    replace(nami, transformer=transformer, bridge=bridge).write(target)
    return [FIT_LATER]


def write_pipeline(target: Path, write: Write) -> list[str]:
    """Make a pipeline's folder, completely or not at all, and return the notes of what wrote it.

    Args:
        target: the folder.
        write: makes its parts.

    Raises:
        FileExistsError: there is something at its place.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists: remove it, or give another --output")
    partial = target.with_name(f".{target.name}.{this_process()}.partial")
    partial.mkdir(parents=True)
    try:
        notes = write(PipelineFolder(partial))
        publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return notes
