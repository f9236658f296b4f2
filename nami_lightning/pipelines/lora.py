"""LoRAs in a pipeline: diffusers' own loader, which here refuses a LoRA of another model before it loads anything."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor

from nami_lightning.errors import first_line
from nami_lightning.models.lora import adapter_metadata, adapter_weights
from nami_lightning.models.transformer import NamiTransformer2DModel

PLACE = re.compile(r"transformer\.(.+)\.lora_(?:A\.weight|B\.weight|B\.bias)")
"""The name of a LoRA's weight, with that of its layer."""

SHOWN = 3
"""Most names that a message lists."""


class NamiLoraLoaderMixin(FluxLoraLoaderMixin):
    """Loads, weights, fuses, unloads and saves LoRAs, as a ``FluxPipeline`` does; all are the transformer's."""

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA, which is active from then on; :meth:`set_adapters` weights several.

        Args:
            pretrained_model_name_or_path_or_dict: folder, file or hub name of ``pytorch_lora_weights.safetensors``, or
                its weights by name; in the names of diffusers, or of FLUX's LoRAs that diffusers converts.
            adapter_name: what it is called from then on; None: ``default_0``, ``default_1``, ...
            hotswap: put it in the place of the adapter of that name.
            kwargs: diffusers' own, ``weight_name`` say.

        Raises:
            ValueError: it is a LoRA of another model, or no LoRA; nothing is loaded then.
        """
        source = pretrained_model_name_or_path_or_dict
        low_memory = {name: kwargs.pop(name) for name in ("low_cpu_mem_usage",) if name in kwargs}
        weights, alphas, metadata = self.lora_state_dict(
            source.copy() if isinstance(source, dict) else source,
            return_alphas=True,
            return_lora_metadata=True,
            **kwargs,
        )
        check_lora("the given LoRA" if isinstance(source, dict) else str(source), weights, self.transformer)
        self.load_lora_into_transformer(
            weights,
            network_alphas=alphas,
            transformer=self.transformer,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=self,
            hotswap=hotswap,
            **low_memory,
        )


def save_lora(folder: str | Path, transformer: NamiTransformer2DModel) -> None:
    """Write the adapter of a network that was trained with one as ``pytorch_lora_weights.safetensors``."""
    NamiLoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers=adapter_weights(transformer),
        transformer_lora_adapter_metadata=adapter_metadata(transformer),
    )


def check_lora(name: str, weights: Mapping[str, Tensor], transformer: NamiTransformer2DModel) -> None:
    """Refuse a LoRA that isn't one of this network.

    Args:
        name: of the LoRA, for people.
        weights: by name, in the names of diffusers: ``transformer.LAYER.lora_A.weight`` and ``lora_B``.
        transformer: the network that it should fit.

    Raises:
        ValueError: naming weights that have no place in the network, or the first that has another width.
    """
    layers = {layer: module for layer, module in transformer.named_modules() if hasattr(module, "in_features")}
    places = {key: place[1] if (place := PLACE.fullmatch(key)) else None for key in weights}
    if unknown := [key for key, layer in places.items() if layer not in layers]:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise ValueError(
            f"{name} is not a LoRA of this model: the transformer has no place for its {', '.join(unknown[:SHOWN])}"
            f"{more}"
        )
    if not places:
        raise ValueError(f"{name} is not a LoRA: it holds no weights")
    for layer in sorted(set(filter(None, places.values()))):
        pair = [weights.get(f"transformer.{layer}.lora_{part}.weight") for part in "AB"]
        if pair[0] is None or pair[1] is None:
            raise ValueError(f"{name} is not whole: {layer} needs both lora_A.weight and lora_B.weight")
        if not (pair[0].ndim == pair[1].ndim == 2 and pair[0].shape[0] == pair[1].shape[1] > 0):
            raise ValueError(
                f"{name} is damaged: the matrices of {layer} have the shapes {list(pair[0].shape)} and "
                f"{list(pair[1].shape)}, which don't go together"
            )
        theirs = pair[0].shape[-1], pair[1].shape[0]
        ours = layers[layer].in_features, layers[layer].out_features
        if theirs != ours:
            raise ValueError(
                f"{name} is a LoRA of another model: its {layer} maps {theirs[0]} numbers to {theirs[1]}, this model's "
                f"{ours[0]} to {ours[1]}"
            )


def load_loras(pipeline: Any, loras: Sequence[str]) -> list[str]:
    """Load several LoRAs beside those that are active already, which keep weight 1.

    Args:
        pipeline: of diffusers, with its LoRA methods.
        loras: ``FOLDER``, or ``FOLDER:WEIGHT`` with a number; a file or a hub name may stand for the folder.

    Returns:
        The names of the new adapters, ``lora_1`` and so on.

    Raises:
        FileNotFoundError: a LoRA that is neither on the disk nor can be fetched.
        ValueError: a LoRA of another model, or a pipeline that takes none. None of the LoRAs is loaded then.
    """
    if not loras:
        return []
    if not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(f"a {type(pipeline).__name__} takes no LoRA")
    before = list(pipeline.get_active_adapters())
    known = {name for names in pipeline.get_list_adapters().values() for name in names}
    added: list[str] = []
    weights: list[float] = []
    try:
        for source, weight in map(split_weight, loras):
            name = next(name for n in range(1, len(known) + len(loras) + 1) if (name := f"lora_{n}") not in known)
            load_from(pipeline, source, name)
            known.add(name)
            added.append(name)
            weights.append(weight)
    except Exception:
        pipeline.delete_adapters(added)
        if before:
            pipeline.set_adapters(before)
        raise
    pipeline.set_adapters([*before, *added], [*([1.0] * len(before)), *weights])
    return added


def load_from(pipeline: Any, source: str, name: str) -> None:
    """Load one LoRA under a name.

    Raises:
        FileNotFoundError: it is neither on the disk nor can be fetched.
        ValueError: it is a LoRA of another model.
    """
    file = {} if Path(source).exists() else {"weight_name": LORA_WEIGHT_NAME_SAFE}  # offline, the hub needs a name
    try:
        pipeline.load_lora_weights(source, adapter_name=name, **file)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(
            f"no LoRA at {source}: it is neither a folder with {LORA_WEIGHT_NAME_SAFE}, nor such a file, nor can it be "
            f"fetched from the hub: {first_line(error)}"
        ) from error


def split_weight(text: str) -> tuple[str, float]:
    """Split ``FOLDER:WEIGHT`` into its parts; without a weight it is 1."""
    match = re.fullmatch(r"(.+):([-+]?\d*\.?\d+)", text)
    return (match[1], float(match[2])) if match else (text, 1.0)
