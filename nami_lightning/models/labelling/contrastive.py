"""How well an image and a text agree: any CLIP or SigLIP of transformers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nami_lightning.errors import first_line


class ContrastiveModel:
    """A frozen model with an encoder of images and one of texts, whose features are compared by their cosine.

    Args:
        name: hub name or folder of a CLIP, SigLIP, or another model of transformers with both encoders.
        device: the device that computes.
        dtype: the type of its weights: ``float32``, ``bfloat16`` or ``float16``.

    Attributes:
        width: the number of features.
        image_processor: makes of images what the model takes; worker processes can use it.
        max_tokens: the number of tokens of a text that the model reads; the rest of a longer text is ignored.

    Raises:
        FileNotFoundError: the model can be neither found nor downloaded.
        ValueError: it is a model of another kind.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", dtype: str = "float32") -> None:
        from transformers import AutoModel, AutoProcessor

        try:
            model = AutoModel.from_pretrained(name, dtype=getattr(torch, dtype))
            processor: Any = AutoProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"{name} can't be loaded: {first_line(error)}") from error
        if not hasattr(model, "get_text_features") or not hasattr(model, "get_image_features"):
            raise ValueError(
                f"{name} is a {type(model).__name__}, which does not compare images with texts: name a CLIP"
            )
        self.image_processor, self._tokenizer = processor.image_processor, processor.tokenizer
        self._model: Any = model.eval().requires_grad_(False).to(device)
        self.max_tokens = int(model.config.text_config.max_position_embeddings)
        # SigLIP was trained on texts that are padded to the end, and reads its last token.
        self._padding = "max_length" if model.config.model_type.startswith("siglip") else True
        self.width = int(self.text_features([""]).shape[1])

    @torch.inference_mode()
    def image_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the features ``(n, width)`` of images, each of length 1, as float32.

        Args:
            inputs: what ``image_processor(images, return_tensors="pt")`` returned.
        """
        on_device = {name: self._to_device(value) for name, value in inputs.items()}
        return F.normalize(_tensor(self._model.get_image_features(**on_device)).float(), dim=-1)

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Return the features ``(n, width)`` of texts, each of length 1, as float32."""
        tokens = self._tokenizer(
            list(texts), padding=self._padding, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        on_device = {name: value.to(self._model.device) for name, value in tokens.items() if name != "token_type_ids"}
        return F.normalize(_tensor(self._model.get_text_features(**on_device)).float(), dim=-1)

    def _to_device(self, value: Tensor) -> Tensor:
        return value.to(self._model.device, self._model.dtype if value.is_floating_point() else None)


def _tensor(output: Any) -> Tensor:
    """Return the features in an output of transformers, whose versions wrap them or not."""
    return output if isinstance(output, Tensor) else output.pooler_output
