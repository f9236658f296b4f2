"""GenEval's two judges, from transformers: a Mask2Former that was trained on COCO's instances, and a CLIP.

GenEval's own detector is mmdetection's Mask2Former with a Swin-S backbone; transformers has the same network with
Facebook's weights. Scores may differ: transformers decides on masks at a quarter of the detector's resolution and
enlarges them, mmdetection at the image's own; the detector is named beside every score.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from nami_lightning.errors import first_line
from nami_lightning.evaluation.geneval.prompts import COLORS, object_names
from nami_lightning.evaluation.geneval.rules import THRESHOLD, Box, Detection
from nami_lightning.evaluation.results import need

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"
SHORTEST, LONGEST = 800, 1333
"""px of an image's sides as the detector sees it: what it is tested with on COCO, and what GenEval does."""

GREY = "#999"
BATCH = 16
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class Detector:
    """Finds objects of COCO's 80 classes.

    Args:
        name: Hugging Face name or folder of a Mask2Former for instance segmentation.
        device: to run on.
        sides: shortest and longest side of an image as it sees it, px.

    Raises:
        FileNotFoundError: it can be neither found nor fetched.
        ValueError: it knows other than 80 classes.
        ModuleNotFoundError: scipy, which transformers' Mask2Former needs, is not installed.
    """

    def __init__(self, name: str, device: torch.device | str, sides: tuple[int, int] = (SHORTEST, LONGEST)) -> None:
        need("scipy")
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        self.model = _load(Mask2FormerForUniversalSegmentation, name, "detector").to(device)
        self.processor = _load(AutoImageProcessor, name, "detector")
        self.size = {"shortest_edge": sides[0], "longest_edge": sides[1]}
        if self.model.config.num_labels != len(object_names()):
            raise ValueError(
                f"detector {name} knows {self.model.config.num_labels} classes: GenEval needs one for COCO's "
                f"{len(object_names())}, {DETECTOR} say"
            )

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> list[Detection]:
        """The objects in an image whose score may count."""
        inputs = self.processor(images=image, size=self.size, return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        found = self.processor.post_process_instance_segmentation(
            outputs, threshold=THRESHOLD, target_sizes=[(image.height, image.width)], return_binary_maps=True
        )[0]
        # Classes by number: the names that come with weights differ ("tvmonitor"), their order is COCO's.
        detections = []
        for i, about in enumerate(found["segments_info"]):
            mask = found["segmentation"][i].bool().cpu().numpy()
            detections.append(Detection(object_names()[about["label_id"]], about["score"], box_of(mask), mask))
        return detections


def box_of(mask: np.ndarray) -> Box:
    """The box around a mask ``(H, W)`` that isn't empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class ColorClassifier:
    """Names the colours of objects: CLIP without training, on the object alone, before grey.

    Args:
        name: Hugging Face name or folder of a CLIP.
        device: to run on.

    Raises:
        FileNotFoundError: it can be neither found nor fetched.
    """

    def __init__(self, name: str, device: torch.device | str) -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.model = _load(CLIPModel, name, "CLIP").to(device)
        self.processor = _load(CLIPProcessor, name, "CLIP")
        self.classifiers: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, image: Image.Image, objects: Sequence[Detection], name: str) -> list[str]:
        """The colour of each of ``objects``, all of class ``name``."""
        if name not in self.classifiers:
            self.classifiers[name] = self._classifier(name)
        colors: list[str] = []
        for first in range(0, len(objects), BATCH):
            crops = [crop(image, found) for found in objects[first : first + BATCH]]
            pixels = self.processor(images=crops, return_tensors="pt").to(self.model.device)
            features = _unit(self.model.get_image_features(**pixels).pooler_output)
            colors += [COLORS[i] for i in (features @ self.classifiers[name].T).argmax(1).tolist()]
        return colors

    def _classifier(self, name: str) -> Tensor:
        """One unit vector a colour: the mean over the templates of their unit vectors."""
        vectors = []
        for color in COLORS:
            texts = [template.format(color=color, name=name) for template in TEMPLATES]
            tokens = self.processor(text=texts, padding=True, truncation=True, return_tensors="pt")
            features = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output
            vectors.append(_unit(_unit(features).mean(0)))
        return torch.stack(vectors)


def crop(image: Image.Image, found: Detection) -> Image.Image:
    """An object cut out by its box, what isn't part of it grey."""
    image = image.convert("RGB")
    if found.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, GREY), Image.fromarray(found.mask))
    left, top, right, bottom = (round(side) for side in found.box)
    return image.crop((left, top, right, bottom))


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def _load(kind: Any, name: str, role: str) -> Any:
    try:
        if not issubclass(kind, PreTrainedModel):
            return kind.from_pretrained(name)
        model, about = kind.from_pretrained(name, output_loading_info=True)
    except OSError as error:
        raise FileNotFoundError(f"{role} {name} can't be loaded: {first_line(error)}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{name} is no {role}: {first_line(error)}") from error
    if about["missing_keys"]:  # transformers would go on with random numbers in their place
        raise ValueError(f"{name} is no {role}: it lacks the weights {sorted(about['missing_keys'])[0]}, ...")
    return model.eval().requires_grad_(False)
