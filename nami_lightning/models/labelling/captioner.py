"""Texts about images: any model of transformers that takes images and text and gives text."""

from collections.abc import Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from nami_lightning.errors import first_line, one_line


class Said(NamedTuple):
    """What a model said about an image.

    Attributes:
        text: the text.
        ended: whether the model ended it by itself, before the limit of tokens.
    """

    text: str
    ended: bool


class Captioner:
    """A frozen model that answers a prompt about an image, with its likeliest token at every step.

    Args:
        name: hub name or folder of an image-text-to-text model: LLaVA, Qwen-VL, SmolVLM, PaliGemma, ...
        device: the device that computes.
        dtype: the type of its weights: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        FileNotFoundError: the model can be neither found nor downloaded.
        ModuleNotFoundError: it needs a package that is not installed.
        ValueError: it is a model of another kind.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", dtype: str = "float32") -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=getattr(torch, dtype))
            self._processor: Any = AutoProcessor.from_pretrained(name)
        except ImportError as error:
            raise ModuleNotFoundError(f"{name} needs a package more: {one_line(error)}") from error
        except OSError as error:
            raise FileNotFoundError(f"{name} can't be loaded: {first_line(error)}") from error
        except (ValueError, KeyError) as error:
            raise ValueError(f"{name} is no model that takes images and gives text: {first_line(error)}") from error
        self._model: Any = model.eval().requires_grad_(False).to(device)
        self._tokenizer = self._processor.tokenizer
        self._tokenizer.padding_side = "left"  # a text is continued at its end
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        ends = model.generation_config.eos_token_id
        self._ends = torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends])

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], max_tokens: int) -> list[Said]:
        """Return what the model says about each image, asked with the prompt beside it.

        Args:
            images: the images.
            prompts: one for each image.
            max_tokens: the largest number of tokens of an answer.
        """
        inputs = self._inputs(images, prompts).to(self._model.device, self._model.dtype)
        written = self._model.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=self._tokenizer.pad_token_id
        ).cpu()
        asked = inputs["input_ids"].cpu()
        if written.shape[1] >= asked.shape[1] and bool((written[:, : asked.shape[1]] == asked).all()):
            written = written[:, asked.shape[1] :]
        texts = self._tokenizer.batch_decode(written, skip_special_tokens=True)
        return [Said(text.strip(), self._ended(row)) for text, row in zip(texts, written, strict=True)]

    def _inputs(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Any:
        """Return what the model takes: the prompts in its own form of a conversation, if it has one."""
        if getattr(self._processor, "chat_template", None) is None:
            return self._processor(images=list(images), text=list(prompts), padding=True, return_tensors="pt")
        talks = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
            for image, prompt in zip(images, prompts, strict=True)
        ]
        template = self._processor.apply_chat_template
        padding: dict[str, Any] = {"padding": True}
        if "processor_kwargs" in signature(template).parameters:  # later versions of transformers
            padding = {"processor_kwargs": padding}
        return template(
            talks, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **padding
        )

    def _ended(self, tokens: Tensor) -> bool:
        return bool(torch.isin(tokens, self._ends).any())
