"""GenEval's two judges, models of transformers: a Mask2Former that was trained on COCO's instances, and a CLIP.

GenEval's own detector is mmdetection's Mask2Former with a Swin-S backbone; transformers has the same network with
Facebook's weights. Scores may differ: mmdetection decides on masks at the resolution of the image, transformers at a
quarter of the detector's resolution, and enlarges them afterwards. The detector is named next to every score.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from nami_lightning.errors import first_line
from nami_lightning.evaluation.geneval.prompts import COLORS, object_names
from nami_lightning.evaluation.geneval.rules import THRESHOLD, Box, Detection
from nami_lightning.evaluation.results import require_package

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"
SHORTEST_SIDE, LONGEST_SIDE = 800, 1333
"""Limits of an image's sides in px for the detector, as in its tests on COCO and in GenEval."""

BACKGROUND = "#999"
BATCH = 16
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class Detector:
    """A detector of objects of COCO's 80 classes.

    Args:
        name: Hugging Face name or folder of a Mask2Former for instance segmentation.
        device: device to run on.
        sides: the shortest and the longest side in px that an image is resized to.

    Raises:
        FileNotFoundError: the model can be neither found nor downloaded.
        ValueError: the model's number of classes is not 80.
        ModuleNotFoundError: scipy, which transformers' Mask2Former needs, is not installed.
    """

    def __init__(
        self, name: str, device: torch.device | str, sides: tuple[int, int] = (SHORTEST_SIDE, LONGEST_SIDE)
    ) -> None:
        require_package("scipy")
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        self.model = _load(Mask2FormerForUniversalSegmentation, name, "detector").to(device)
        self.processor = _load(AutoImageProcessor, name, "detector")
        self.size = {"shortest_edge": sides[0], "longest_edge": sides[1]}
        if self.model.config.num_labels != len(object_names()):
            raise ValueError(
                f"detector {name} knows {self.model.config.num_labels} classes: GenEval needs a detector of "
                f"COCO's {len(object_names())} classes, {DETECTOR} for example"
            )

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> list[Detection]:
        """Return the objects in an image whose score is high enough to count."""
        inputs = self.processor(images=image, size=self.size, return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        found = self.processor.post_process_instance_segmentation(
            outputs, threshold=THRESHOLD, target_sizes=[(image.height, image.width)], return_binary_maps=True
        )[0]
        # Use the number of a class: its name differs between weights ("tvmonitor"), but the order is always COCO's.
        detections = []
        for i, segment in enumerate(found["segments_info"]):
            mask = found["segmentation"][i].bool().cpu().numpy()
            detections.append(
                Detection(object_names()[segment["label_id"]], segment["score"], bounding_box(mask), mask)
            )
        return detections


def bounding_box(mask: np.ndarray) -> Box:
    """Return the box around a mask ``(H, W)`` that isn't empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class ColorClassifier:
    """A classifier of the colours of objects: CLIP without training, which sees each object alone on grey.

    Args:
        name: Hugging Face name or folder of a CLIP.
        device: device to run on.

    Raises:
        FileNotFoundError: the model can be neither found nor downloaded.
    """

    def __init__(self, name: str, device: torch.device | str) -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.model = _load(CLIPModel, name, "CLIP").to(device)
        self.processor = _load(CLIPProcessor, name, "CLIP")
        self.classifiers: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, image: Image.Image, objects: Sequence[Detection], name: str) -> list[str]:
        """Return the colour of each of ``objects``, which are all of the class ``name``."""
        if name not in self.classifiers:
            self.classifiers[name] = self._classifier(name)
        colors: list[str] = []
        for first in range(0, len(objects), BATCH):
            crops = [crop(image, found) for found in objects[first : first + BATCH]]
            pixels = self.processor(images=crops, return_tensors="pt").to(self.model.device)
            features = F.normalize(self.model.get_image_features(**pixels).pooler_output)
            colors += [COLORS[i] for i in (features @ self.classifiers[name].T).argmax(1).tolist()]
        return colors

    def _classifier(self, name: str) -> Tensor:
        """Return one unit vector per colour: the mean over the templates' unit vectors."""
        vectors = []
        for color in COLORS:
            texts = [template.format(color=color, name=name) for template in TEMPLATES]
            tokens = self.processor(text=texts, padding=True, truncation=True, return_tensors="pt")
            features = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output
            vectors.append(F.normalize(F.normalize(features).mean(0), dim=0))
        return torch.stack(vectors)


def crop(image: Image.Image, found: Detection) -> Image.Image:
    """Return the part of an image inside an object's box, with grey in place of what isn't part of the object."""
    image = image.convert("RGB")
    if found.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, BACKGROUND), Image.fromarray(found.mask))
    left, top, right, bottom = (round(side) for side in found.box)
    return image.crop((left, top, right, bottom))


def _load(kind: Any, name: str, role: str) -> Any:
    try:
        if not issubclass(kind, PreTrainedModel):
            return kind.from_pretrained(name)
        model, loading_info = kind.from_pretrained(name, output_loading_info=True)
    except OSError as error:
        raise FileNotFoundError(f"{role} {name} can't be loaded: {first_line(error)}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{name} is not a {role}: {first_line(error)}") from error
    if loading_info["missing_keys"]:  # transformers only warns, and initializes them at random
        raise ValueError(f"{name} is not a {role}: it lacks the weights {sorted(loading_info['missing_keys'])[0]}, ...")
    return model.eval().requires_grad_(False)
