"""Checkpoints, releases, pipelines and LoRAs that were changed, and what runs and images say of themselves."""

import io
import json
import random
import tempfile
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors.torch import save
from torch import nn

from helpers.fuzz.cases import require
from helpers.fuzz.mutations import TEXTS, any_value, as_json, mutated_bytes, mutated_value
from helpers.tiny_models import make_clip, make_mt5, make_pipeline, make_transformer
from nami_lightning.conversion.convert import find_source
from nami_lightning.conversion.weights import assign, read_config, read_weights
from nami_lightning.metrics.record import Entry, read_entries, write_entries
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.pipelines.lora import check_lora
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.pipelines.png_settings import read_settings, save_with_settings
from nami_lightning.runs.run_dir import Run, load_weights, read_metadata
from nami_lightning.utils.image_grid import caption_grid


def small_model() -> nn.Module:
    """Return a model of a few weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


NAMES = {name: name for name in small_model().state_dict()}


@cache
def checkpoint_files() -> dict[str, bytes]:
    """Return the files of a checkpoint in one file, and of one in shards, by name."""
    state = {"state_dict": small_model().state_dict(), "nami": {"step": 3, "model": {"a": 1}}}
    whole = io.BytesIO()
    torch.save(state, whole)
    optimizer = torch.optim.AdamW(small_model().parameters())
    with tempfile.TemporaryDirectory() as folder:
        shards = {"state_dict": small_model().state_dict(), "optimizer_0": optimizer.state_dict()}
        dcp.save(shards, checkpoint_id=folder, no_dist=True)
        torch.save({"nami": state["nami"]}, Path(folder) / "meta.pt")
        files = {f"shards/{path.name}": path.read_bytes() for path in Path(folder).iterdir()}
    return {"whole": whole.getvalue(), **files}


def check_weights(model: nn.Module) -> None:
    """Require that a model's weights are finite or as large as a changed bit can make them, and of their shapes."""
    for name, weight in small_model().state_dict().items():
        require(model.state_dict()[name].shape == weight.shape, "a weight of another shape")


def checkpoint_case(rng: random.Random, folder: Path) -> None:
    """A checkpoint in one file whose bytes or contents were changed."""
    path = folder / "checkpoints" / "step=0000003.ckpt"
    path.parent.mkdir()
    if rng.random() < 0.6:
        path.write_bytes(mutated_bytes(rng, checkpoint_files()["whole"]))
    else:
        weights: dict[str, Any] = dict(small_model().state_dict())
        name = rng.choice(list(weights))
        weights[name] = rng.choice([torch.ones(1), torch.ones(3, 3), torch.ones(0), any_value(rng), weights[name][:1]])
        if rng.random() < 0.3:
            del weights[name]
        content = rng.choice([{"state_dict": weights}, weights, {"state_dict": any_value(rng)}, any_value(rng)])
        torch.save(content, path)
    model = small_model()
    read_metadata(Run(folder).checkpoint())
    load_weights(Run(folder).checkpoint(), model, NAMES)
    check_weights(model)


def shards_case(rng: random.Random, folder: Path) -> None:
    """A checkpoint in shards of which a file was changed or is missing."""
    checkpoint = folder / "checkpoints" / "step=0000003.ckpt"
    checkpoint.mkdir(parents=True)
    changed = rng.choice([name for name in checkpoint_files() if name != "whole"])
    for name, content in checkpoint_files().items():
        if name == "whole" or (name == changed and rng.random() < 0.1):
            continue
        (checkpoint / Path(name).name).write_bytes(mutated_bytes(rng, content) if name == changed else content)
    model = small_model()
    load_weights(Run(folder).checkpoint(), model, NAMES)
    check_weights(model)


# --- weights of others -----------------------------------------------------------------------------


@cache
def network() -> tuple[dict[str, Any], bytes]:
    """Return the config and the weights of a small NAMI, as diffusers writes them."""
    with tempfile.TemporaryDirectory() as folder:
        make_transformer(2).save_pretrained(folder)
        config = json.loads(Path(folder, "config.json").read_text())
        return config, Path(folder, "diffusion_pytorch_model.safetensors").read_bytes()


def network_case(rng: random.Random, folder: Path) -> None:
    """A network's folder whose config or weights were changed: what it is, and its weights, or an error."""
    config, weights = network()
    place = folder / "transformer"
    place.mkdir()
    index: Any = {"_class_name": "NamiPipeline", "transformer": ["nami_lightning", "NamiTransformer2DModel"]}
    (folder / "model_index.json").write_bytes(as_json(rng, mutated_value(rng, index) if rng.random() < 0.5 else index))
    (place / "config.json").write_bytes(as_json(rng, mutated_value(rng, config) if rng.random() < 0.4 else config))
    suffix = rng.choice(["safetensors", "safetensors", "bin", "pt"])
    data = mutated_bytes(rng, weights) if rng.random() < 0.5 else weights
    if suffix != "safetensors" and rng.random() < 0.8:
        buffer = io.BytesIO()
        torch.save(rng.choice([make_transformer(2).state_dict(), {"a": any_value(rng)}, any_value(rng)]), buffer)
        data = mutated_bytes(rng, buffer.getvalue()) if rng.random() < 0.3 else buffer.getvalue()
    (place / f"diffusion_pytorch_model.{suffix}").write_bytes(data)
    find_source(str(folder))
    read_config(place / "config.json")
    with torch.device("meta"):
        model = make_transformer(2)
    assign(model, read_weights(place), place)


def lora_case(rng: random.Random, folder: Path) -> None:
    """A LoRA with changed names and shapes fits the network, or is refused."""
    model = fitting_network()
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layer = rng.choice(layers)
    place = model.get_submodule(layer)
    weights = {
        f"transformer.{layer}.lora_A.weight": torch.zeros(2, int(place.in_features)),
        f"transformer.{layer}.lora_B.weight": torch.zeros(int(place.out_features), 2),
    }
    changes = rng.randrange(4)
    for _ in range(changes):
        name = rng.choice([*weights, *weights, "transformer.x.lora_A.weight"])
        match rng.randrange(3):
            case 0:
                weights.pop(name, None)
            case 1:
                weights[rng.choice(TEXTS)] = torch.zeros(1)
            case _:
                weights[name] = torch.zeros(rng.choice([(), (1,), (2, 3), (1, 2, 3), (0, 0)]))
    check_lora("it", weights, model)
    require(changes == 0 or all(weight.ndim == 2 for weight in weights.values()), "weights that are no matrices")
    save(weights)


@cache
def fitting_network() -> NamiTransformer2DModel:
    """Return the network that the LoRAs are for."""
    return make_transformer(2)


@cache
def pipeline() -> NamiPipeline:
    """Return a small pipeline."""
    made = make_pipeline(make_mt5(), make_clip())
    made.set_progress_bar_config(disable=True)
    return made


def drawing_case(rng: random.Random, folder: Path) -> None:
    """Any prompt and any settings give images of the size that was asked for, or are refused."""

    def prompt() -> Any:
        return rng.choice([*TEXTS, "a red cat", ["a", rng.choice(TEXTS)], any_value(rng)])

    settings: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16, "guidance_scale": 1.0}
    for _ in range(rng.randrange(3)):
        name = rng.choice([*settings, "negative_prompt", "solver", "max_sequence_length", "num_images_per_prompt"])
        settings[name] = rng.choice([any_value(rng), 1, 2, [1, 1], 8, 24, "euler"])
    large = [name for name, value in settings.items() if isinstance(value, int) and value > 64]
    settings |= dict.fromkeys(large, 24)  # what is large is drawn for long
    images = pipeline()(prompt(), generator=torch.Generator().manual_seed(1), **settings).images
    for image in images:
        require(image.size == (settings["width"], settings["height"]), f"an image of {image.size}")


def picture_case(rng: random.Random, folder: Path) -> None:
    """Any texts can stand below images, and on them."""
    count = rng.randint(1, 4)
    images = [Image.new("RGB", (rng.randint(1, 40), rng.randint(1, 40))) for _ in range(count)]
    texts = [rng.choice(TEXTS) for _ in images]
    grid = caption_grid(images, texts, rng.randint(1, 3), texts if rng.random() < 0.5 else ())
    require(grid.width >= max(image.width for image in images), "a grid that is narrower than an image")


# --- what runs and images say --------------------------------------------------------------------------


def image_settings_case(rng: random.Random, folder: Path) -> None:
    """The settings in a PNG that was changed: those that were written, none, or an error."""
    path = folder / "00000.png"
    asked: Any = {
        "prompt": rng.choice([text for text in TEXTS if "\ud800" not in text and "\0" not in text]),
        "seed": 1,
    }
    save_with_settings(Image.new("RGB", (4, 4)), path, asked, {"prompt": "a", "steps": [1, 2]})
    if rng.random() < 0.3:
        require((read_settings(path) or {})["asked"] == asked, "other settings than those that were written")
        return
    path.write_bytes(mutated_bytes(rng, path.read_bytes()))
    found = read_settings(path)
    require(found is None or isinstance(found["asked"], dict), "settings that are no object")


def metrics_case(rng: random.Random, folder: Path) -> None:
    """A run's evaluations, of which a line was changed: those that were written, or an error that names the line."""
    entries = [Entry(step, step * 8, step * 10**9, 1.5 * step, 4, {"fid": 1.0 / step}) for step in (1, 2, 3)]
    write_entries(folder, entries)
    require(read_entries(folder) == entries, "other evaluations than those that were written")
    values = [mutated_value(rng, asdict(entry)) if rng.random() < 0.5 else asdict(entry) for entry in entries]
    data = "\n".join(map(json.dumps, values)).encode("utf-8", "surrogatepass")
    (folder / "metrics.jsonl").write_bytes(mutated_bytes(rng, data) if rng.random() < 0.5 else data)
    for entry in read_entries(folder):
        require(isinstance(entry.step, int) and isinstance(entry.metrics, dict), f"an evaluation is {entry}")
