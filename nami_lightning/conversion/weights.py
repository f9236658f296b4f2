"""Read the weights of a model's folder as they are stored, mapped from the disk, and without running code of theirs."""

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nami_lightning.errors import why_unreadable
from nami_lightning.utils.text_files import parse_json

SHOWN = 4
"""The number of keys that a message shows."""


def local_folder(source: str, patterns: Iterable[str] | None = None) -> Path:
    """Return a folder itself, or the folder that a repository of the Hugging Face hub is downloaded to.

    Args:
        source: the folder or the repository's name.
        patterns: of the files that are needed; None: all.

    Raises:
        FileNotFoundError: it is neither, or the hub can't be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns) if patterns else None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{source} is no folder, and can't be fetched from the hub: {reason}") from error


def read_config(file: Path) -> dict[str, Any]:
    """Return a JSON file's content.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object.
    """
    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    return content


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a model's folder, from one or several safetensors or pickled files.

    Raises:
        FileNotFoundError: it has none.
        ValueError: a file is damaged, or holds more than tensors.
    """
    for suffix in ("*.safetensors", "*.bin", "*.pt"):
        if files := sorted(folder.glob(suffix)):
            break
    else:
        raise FileNotFoundError(f"{folder} has no weights: neither *.safetensors nor *.bin")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= read_weights_file(file)
    return weights


def read_weights_file(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, by name; a pickled one is read with ``weights_only``, so that it runs no code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds more than tensors.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read as weights: {why_unreadable(error)}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{file} is not a state dict: it must hold tensors by their names, and nothing else")
    return weights


def assign(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Give a model, which may lie on the meta device, its weights without copying them.

    Args:
        model: the model.
        weights: all its parameters and buffers, by name.
        source: where they come from, for the message.

    Raises:
        ValueError: a key is missing, is not the model's, or has another shape; the message names it.
    """
    expected = model.state_dict()
    problems = [
        *(f"{key} is missing" for key in expected if key not in weights),
        *(f"{key} is none of this model's" for key in weights if key not in expected),
        *(
            f"{key} has the shape {tuple(weights[key].shape)} and not {tuple(expected[key].shape)}"
            for key in expected
            if key in weights and weights[key].shape != expected[key].shape
        ),
    ]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(f"{source} doesn't fit the model: {'; '.join(problems[:SHOWN])}{more}")
    model.load_state_dict(weights, assign=True)
