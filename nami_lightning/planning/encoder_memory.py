"""Memory and operations of the frozen models, from their configurations alone: weights are neither read nor fetched."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlparse

import torch
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nami_lightning.models.autoencoder import PIXELS, AutoencoderConfig, encode_posterior
from nami_lightning.models.text_encoder import TextEncoderConfig, resolve_name, text_model_class
from nami_lightning.planning.known_encoders import AUTOENCODERS, TEXT_ENCODERS
from nami_lightning.planning.memory import LiveBytes


@dataclass(frozen=True)
class FrozenModel:
    """A frozen text encoder or autoencoder, and what it takes.

    Attributes:
        name: the model's name, as in the recipe.
        memory: bytes of its weights; None if its configuration was not found.
        flops: operations to encode one sample of each stage.
        peak: bytes that encoding the largest micro-batch needs in addition to the weights.
        dtype: name of the dtype that it computes in.
        of_text: whether it encodes prompts: once a sample, and not once a stage.
    """

    name: str
    memory: int | None
    flops: tuple[int, ...]
    peak: int
    dtype: str
    of_text: bool = False


def text_encoders(config: TextEncoderConfig, stages: int) -> list[FrozenModel]:
    """Return the models of ``text_encoder``. With a cache each prompt is encoded once, and this is not counted."""
    found = []
    pooled_length = config.pooled_max_length or config.max_length
    for name, subfolder, length in (
        (config.sequence, config.sequence_subfolder, config.max_length),
        (config.pooled, config.pooled_subfolder, pooled_length),
    ):
        if name is None:
            continue
        model = _load_without_weights(partial(_text_model, name, subfolder))
        if model is None:
            found.append(FrozenModel(name, None, (0,) * stages, 0, config.dtype, of_text=True))
            continue
        limit = getattr(model.config, "max_position_embeddings", length)
        tokens = torch.zeros(1, min(length, limit), dtype=torch.long, device="meta")
        flops = 0 if config.cache else _count(partial(model, tokens))
        found.append(FrozenModel(name, _bytes(model, config.dtype), (flops,) * stages, 0, config.dtype, of_text=True))
    return found


def autoencoder(config: AutoencoderConfig, encodes: list[list[int]], micro_batches: list[int]) -> list[FrozenModel]:
    """Return the autoencoder in a list, or an empty list if the model works on pixels.

    Args:
        config: the recipe's settings of the autoencoder.
        encodes: sides in px of the images that are encoded for one sample of each stage.
        micro_batches: number of samples of each stage that are encoded at once.
    """
    if config.name == PIXELS:
        return []
    vae = _load_without_weights(partial(_vae, config))
    if vae is None:
        return [FrozenModel(config.name, None, (0,) * len(encodes), 0, config.dtype)]
    cost = {side: _count(partial(vae.encode, _images(1, side))) for side in {s for e in encodes for s in e}}
    peak = max(
        _peak(vae.config, config.dtype, samples, max(sides))
        for samples, sides in zip(micro_batches, encodes, strict=True)
        if samples
    )
    flops = tuple(sum(cost[side] for side in sides) for sides in encodes)
    return [FrozenModel(config.name, _bytes(vae, config.dtype), flops, peak, config.dtype)]


def _load_without_weights(load: Callable[[bool], Any]) -> Any:
    """Return a model on the meta device; None if its configuration is not found.

    The configuration is read from this machine, or is that of ``known_encoders``, or is read from the hub if that can
    be reached.
    """
    for local in (True, False):
        if local or _hub_answers():
            try:
                with torch.device("meta"):
                    return load(local).eval().requires_grad_(False)
            except OSError:
                continue
    return None


def _text_model(name: str, subfolder: str | None, local: bool) -> Any:
    from transformers import AutoConfig

    known = TEXT_ENCODERS.get((name, subfolder))
    try:
        config = AutoConfig.from_pretrained(resolve_name(name), subfolder=subfolder or "", local_files_only=local)
    except OSError:
        if known is None:
            raise
        config = AutoConfig.for_model(**known)
    kind = text_model_class(config.model_type)
    return kind.from_config(config) if hasattr(kind, "from_config") else kind(getattr(config, "text_config", config))


def _vae(config: AutoencoderConfig, local: bool) -> Any:
    known = AUTOENCODERS.get((config.name, config.subfolder))
    try:
        settings = AutoencoderKL.load_config(config.name, subfolder=config.subfolder, local_files_only=local)
    except OSError:
        if known is None:
            raise
        settings = known
    return AutoencoderKL.from_config(settings)


def _hub_answers() -> bool:
    """Tell whether the hub can be reached; its own client would try for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        socket.create_connection((urlparse(constants.ENDPOINT).hostname, 443), timeout=3).close()
    except OSError:
        return False
    return True


def _bytes(model: torch.nn.Module, dtype: str) -> int:
    return sum(p.numel() for p in model.parameters()) * getattr(torch, dtype).itemsize


def _images(samples: int, side: int) -> torch.Tensor:
    return torch.empty(samples, 3, side, side, device="meta")


@torch.no_grad()
def _count(encode: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        encode()
    return counter.get_total_flops()


@torch.no_grad()
def _peak(settings: Any, dtype: str, samples: int, side: int) -> int:
    """Return the most bytes that are alive at once while so many images are encoded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with FakeTensorMode():
            vae = AutoencoderKL.from_config(settings).eval()
            images = torch.empty(samples, 3, side, side, dtype=torch.float32)
            with LiveBytes(vae) as live:
                encode_posterior(vae, images)
    finally:
        torch.set_default_dtype(before)
    return live.peak
