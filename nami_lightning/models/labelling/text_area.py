"""How much of an image is text: any detector of objects of transformers that knows text, PP-OCR's for example."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from nami_lightning.errors import first_line, one_line


class TextDetector:
    """A frozen detector of objects; the boxes of text are those whose label holds the word "text".

    Args:
        name: hub name or folder. Its labels must name text, or be one label alone.
        device: the device that computes.
        threshold: the least score of a box that counts.

    Raises:
        FileNotFoundError: the model can be neither found nor downloaded.
        ModuleNotFoundError: it needs a package that is not installed.
        ValueError: the model does not detect text.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", threshold: float = 0.5) -> None:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        try:
            model = AutoModelForObjectDetection.from_pretrained(name)
            self._processor: Any = AutoImageProcessor.from_pretrained(name)
        except ImportError as error:  # PP-OCR's boxes are made with OpenCV
            raise ModuleNotFoundError(f"{name} needs a package more: {one_line(error)}") from error
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"{name} can't be loaded as a detector: {first_line(error)}") from error
        labels = model.config.id2label
        self._of_text = {int(i) for i, label in labels.items() if "text" in label.lower() or len(labels) == 1}
        if not self._of_text:
            raise ValueError(
                f"{name} detects no text: its labels are {', '.join(list(labels.values())[:8])}, ...: name a detector "
                "of text"
            )
        self._model: Any = model.eval().requires_grad_(False).to(device)
        self.threshold = threshold

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[float]:
        """Return the share of each image's area, from 0 to 1, that lies in boxes of text."""
        inputs = self._processor(list(images), return_tensors="pt").to(self._model.device)
        sizes = torch.tensor([(image.height, image.width) for image in images])
        found = self._processor.post_process_object_detection(
            self._model(**_only_pixels(inputs)), threshold=self.threshold, target_sizes=sizes
        )
        return [
            covered(self._boxes_of_text(one), height, width)
            for one, (height, width) in zip(found, sizes.tolist(), strict=True)
        ]

    def _boxes_of_text(self, found: dict[str, Any]) -> list[list[float]]:
        boxes, labels = found["boxes"].tolist(), found["labels"].tolist()
        return [box for box, label in zip(boxes, labels, strict=True) if label in self._of_text]


def _only_pixels(inputs: Any) -> dict[str, Any]:
    """Return what a detector takes: processors of text detectors also return the sizes of the images."""
    return {name: value for name, value in inputs.items() if name in ("pixel_values", "pixel_mask")}


def covered(boxes: Sequence[Sequence[float]], height: int, width: int) -> float:
    """Return the share of an image that lies in at least one of the boxes ``(left, top, right, bottom)`` in px."""
    inside = np.zeros((height, width), dtype=bool)
    for left, top, right, bottom in boxes:
        inside[max(0, round(top)) : max(0, round(bottom)), max(0, round(left)) : max(0, round(right))] = True
    return float(inside.mean())
