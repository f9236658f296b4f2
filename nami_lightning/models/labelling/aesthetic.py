"""How good an image looks: a predictor on the features of a CLIP."""

import re
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from nami_lightning.errors import first_line

FILES = ("model.safetensors", "pytorch_model.bin")
LAYER = re.compile(r"(?:(?:layers|predictor|mlp|linear|head)\.)?(?:(\d+)\.)?(weight|bias)")
"""The names of the predictor's weights; a model that also holds the CLIP has others, which are ignored."""


class AestheticPredictor(nn.Module):
    """Linear layers in a row, from features of length 1 to a score: the form of LAION's predictors of all versions.

    Args:
        name: a file of weights (``.pth``, ``.pt``, ``.bin``, ``.safetensors``), a folder with one, or a hub name.

    Attributes:
        width: the number of features that it takes; they must come from the CLIP that it was trained on.

    Raises:
        FileNotFoundError: there is no such file, or it can't be downloaded.
        ValueError: the file holds something else.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        file = _find(name)
        weights = _read(file)
        layers: dict[int, dict[str, Tensor]] = {}
        for key, value in weights.items():
            if match := LAYER.fullmatch(key):
                layers.setdefault(int(match[1] or 0), {})[match[2]] = value.float()
        shapes = [tuple(layer["weight"].shape) for _, layer in sorted(layers.items()) if "weight" in layer]
        follow = all(before[0] == after[1] for before, after in pairwise(shapes))
        if not shapes or len(shapes) < len(layers) or not follow or shapes[-1][0] != 1:
            raise ValueError(
                f"{file} holds no aesthetic predictor: linear layers from features to one number, named "
                f"layers.N.weight or weight; it has {', '.join(list(weights)[:5]) or 'nothing'}"
            )
        self.width = shapes[0][1]
        self.layers = nn.Sequential(*(_linear(layer) for _, layer in sorted(layers.items())))
        self.requires_grad_(False)

    @torch.inference_mode()
    def forward(self, features: Tensor) -> Tensor:
        """Return the scores ``(n,)`` of features ``(n, width)`` of length 1; LAION's go from about 1 to 10."""
        scores: Tensor = self.layers(features)
        return scores.squeeze(-1)


def _linear(weights: dict[str, Tensor]) -> nn.Linear:
    rows, columns = weights["weight"].shape
    layer = nn.Linear(columns, rows, bias="bias" in weights)
    layer.load_state_dict(weights)
    return layer


def _find(name: str) -> Path:
    """Return the file of weights that a file's path, a folder or a hub name leads to."""
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", ".pth", ".pt", ".bin")]
        if len(files) != 1:
            raise FileNotFoundError(f"{name} holds {len(files)} files of weights, not one: name the file")
        return files[0]
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    problem = ""
    for file in FILES:
        try:
            return Path(hf_hub_download(name, file))
        except (OSError, HFValidationError) as error:
            problem = first_line(error)
    raise FileNotFoundError(f"the aesthetic predictor {name} is no file, and can't be downloaded: {problem}")


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is no file of weights: {first_line(error)}") from error
    try:
        weights = torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # torch.load raises errors of many classes on other files
        raise ValueError(f"{file} is no file of weights that is safe to read: {first_line(error)}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{file} holds no weights by name")
    return weights
