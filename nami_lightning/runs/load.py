"""Load a trained model, from a run's checkpoint or from a pipeline's folder, ready to sample with."""

import hashlib
import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError

from nami_lightning.errors import first_line
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.runs.recipe import Recipe
from nami_lightning.runs.run_dir import Run, describe_runs, find_run, is_run, load_weights, read_metadata
from nami_lightning.training.checks import check_pretrained_weights
from nami_lightning.training.module import NamiModule

LOADING = "Loading the weights of {} ..."
"""What is said before weights are read, which takes seconds or minutes."""


def load_module(run: Run, step: int | None = None, ema: bool = True) -> NamiModule:
    """Load a run's model on the CPU with a checkpoint's weights, from a file or shards, and nothing else of it.

    Args:
        run: the run.
        step: the checkpoint's; the newest if None.
        ema: the EMA's weights if the checkpoint has them, not the trained ones.

    Raises:
        FileNotFoundError: the run has no such checkpoint.
        ValueError: the checkpoint can't be read, or is of another model than the run's recipe.
    """
    path = run.checkpoint(step)
    rank_zero_info(LOADING.format(path))
    checkpoint = read_metadata(path)
    model = Recipe(run.recipe).make_model()
    model.identity.check(checkpoint)
    if model.lora is None:
        with torch.device("meta"):
            model.transformer = model.make_transformer()
        model.transformer.to_empty(device="cpu")
    else:
        model.transformer = model.new_transformer()
        check_pretrained_weights(checkpoint["nami"], model.pretrained, model.pretrained_weights)
    network = "ema." if ema and checkpoint["nami"]["ema"] else "transformer."
    load_weights(path, model, {name: name.replace("transformer.", network, 1) for name in model.state_dict()})
    return model.eval().requires_grad_(False)


def load_pipeline(
    source: str, dtype: str | None = None, step: int | None = None, ema: bool = True, device: str | None = None
) -> DiffusionPipeline:
    """Load a run's checkpoint, a saved NAMI pipeline, or any text-to-image pipeline of diffusers.

    Args:
        source: a run, a pipeline's folder, or its Hugging Face name.
        dtype: of the network's weights, ``bfloat16`` say; None: bfloat16 on a GPU and as it was saved elsewhere for a
            NAMI, float32 for others.
        step: of a run's checkpoint; None: the newest.
        ema: use the EMA's weights of a run's checkpoint, if it has them.
        device: of torch, ``cuda:1`` say; None: a GPU if there is one.

    Raises:
        FileNotFoundError: it is none of these, or can't be fetched; or the run has no such checkpoint.
        ValueError: a pipeline that takes no prompt, a step or weights without EMA of what is no run, a wrong device.
    """
    torch_dtype = getattr(torch, dtype) if dtype else None
    place = find_device(device)
    if is_run(source):
        pipeline: Any = load_module(find_run(source), step, ema).pipeline()
    elif step is not None or not ema:
        raise ValueError(f"{source} is not a run: --step and --no-ema choose among the weights of a run's checkpoints")
    else:
        rank_zero_info(LOADING.format(source))
        try:
            ours = DiffusionPipeline.load_config(source)["_class_name"] == NamiPipeline.__name__
            loader = NamiPipeline if ours else DiffusionPipeline
            pipeline = loader.from_pretrained(source, **({} if ours else {"torch_dtype": torch_dtype}))
        except (OSError, AttributeError, KeyError, ValueError, SafetensorError) as error:
            raise FileNotFoundError(
                f"{source} is neither a run (a folder, or a name below runs/) nor a pipeline that diffusers can load: "
                f"{first_line(error)}; {describe_runs(source)}"
            ) from error
    if isinstance(pipeline, NamiPipeline):
        # The bridges stay float32: they are small, and joints must be exact.
        pipeline.transformer.to(torch_dtype or fast_dtype(pipeline.transformer.dtype, place))
    if "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(f"{source} is a {type(pipeline).__name__}, which takes no prompt")
    return pipeline.to(place)


def fast_dtype(saved: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which a network with weights of dtype ``saved`` draws fast on ``device``."""
    return torch.bfloat16 if device.type == "cuda" and saved == torch.float32 else saved


def identify_weights(source: str, step: int | None = None, ema: bool = True) -> str:
    """Return a name of the weights that ``source`` has now.

    It is the file name of a run's checkpoint, or a digest of a file or of a folder's files by their sizes and times,
    or ``source`` itself.

    Args:
        source: a run, the folder of a pipeline or of a LoRA, a file, or a Hugging Face name.
        step: step of a run's checkpoint; None: the newest.
        ema: whether the EMA's weights are used.

    Raises:
        FileNotFoundError: the run has no such checkpoint, or the local path does not exist.
    """
    if is_run(source):
        name = find_run(source).checkpoint(step).name
        return name if ema else f"{name} without EMA"
    path = Path(source)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16] if stats else source


def find_device(name: str | None = None) -> torch.device:
    """Return the device of that name; without a name a GPU if there is one, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} can't be used on this machine: {first_line(error)}") from error
    return device
