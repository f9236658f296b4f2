"""LoRA: small matrices beside the layers of a network's blocks, which are trained in place of its weights."""

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from nami_lightning.models.transformer import NamiTransformer2DModel

ADAPTER = "default"
"""Name of the adapter in a network that trains."""

BLOCKS = r"(single_)?transformer_blocks\.\d+\."

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")
TARGETS = (*ATTENTION, *TEXT_ATTENTION, *FEED_FORWARD)
"""The layers that get an adapter by default: attention and feed-forward of both kinds of blocks."""


@dataclass(frozen=True)
class LoraSettings:
    """How large the adapters are, and which layers have one.

    Args:
        rank: width of an adapter between its two matrices.
        alpha: an adapter's output is multiplied by alpha / rank; null: by 1.
        target_modules: names of linear layers inside a block, ``attn.to_q`` say; null: those of attention and
            feed-forward.

    Raises:
        ValueError: a rank or alpha that is not positive, or an empty list of layers.
    """

    rank: int = 16
    alpha: int | None = None
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or (self.alpha is not None and self.alpha <= 0):
            raise ValueError(f"model.lora needs a rank of at least 1 and alpha above 0; got {self.rank}, {self.alpha}")
        if self.target_modules == []:
            raise ValueError("model.lora.target_modules is empty: name layers of a block, attn.to_q say, or give null")

    @property
    def targets(self) -> list[str]:
        """The names inside a block of the layers that have an adapter, sorted."""
        return sorted(set(TARGETS if self.target_modules is None else self.target_modules))

    @property
    def used_alpha(self) -> int:
        """The alpha, which is the rank where none is given."""
        return self.rank if self.alpha is None else self.alpha

    def describe(self) -> dict[str, Any]:
        """Return the settings without which an adapter's weights mean something else, as plain values."""
        return {"rank": self.rank, "alpha": self.used_alpha, "target_modules": self.targets}


NO_LORA: dict[str, Any] = {"rank": None, "alpha": None, "target_modules": None}
"""What :meth:`LoraSettings.describe` would say of a model that trains no adapters."""


def add_adapter(transformer: NamiTransformer2DModel, settings: LoraSettings) -> None:
    """Put an adapter into a network, in place, and freeze all else; it changes nothing before it is trained.

    Args:
        transformer: its linear layers in blocks are wrapped by peft.
        settings: the adapter's.

    Raises:
        ValueError: the settings name a layer that no block has.
    """
    layers = [name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)]
    inside = {re.sub(f"^{BLOCKS}", "", name) for name in layers if re.match(BLOCKS, name)}
    if unknown := [name for name in settings.target_modules or () if name not in inside]:
        raise ValueError(
            f"model.lora.target_modules names {', '.join(unknown)}, which no block has: its linear layers are "
            f"{', '.join(sorted(inside))}"
        )
    pattern = f"{BLOCKS}({'|'.join(re.escape(name) for name in settings.targets)})"
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(r=settings.rank, lora_alpha=settings.used_alpha, target_modules=pattern), ADAPTER
    )


def in_adapter(name: str) -> bool:
    """Tell whether the layer or weight of that name belongs to an adapter."""
    return ".lora_" in name


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the names and parameters that training changes: those of a network's adapter, or all if it has none."""
    named = list(model.named_parameters())
    return [(name, parameter) for name, parameter in named if in_adapter(name)] or named


def leave_out_base(module: nn.Module, prefix: str) -> None:
    """Let a module's checkpoints hold an adapter's weights, but not those of the network that it is trained beside.

    Args:
        module: changed in place: its ``state_dict`` lacks them.
        prefix: of the network's weights in the module.
    """

    def drop(_: nn.Module, weights: dict[str, Any], above: str, __: Any) -> None:
        for name in [name for name in weights if name.startswith(above + prefix) and not in_adapter(name)]:
            del weights[name]

    module.register_state_dict_post_hook(drop)


def merge_adapter(transformer: NamiTransformer2DModel) -> None:
    """Add a network's adapter to the weights that it stands beside, in place: the network is a plain one then."""
    transformer.fuse_lora()
    transformer.unload_lora()


def adapter_weights(transformer: NamiTransformer2DModel) -> dict[str, Tensor]:
    """Return the weights of a network's own adapter, with the names that diffusers saves them under."""
    return dict(get_peft_model_state_dict(transformer, adapter_name=ADAPTER))


def adapter_metadata(transformer: NamiTransformer2DModel) -> dict[str, Any]:
    """Return what a file of an adapter's weights must say beside them: without it diffusers would take alpha = rank.

    No more than that: a version of peft refuses settings that it doesn't know.
    """
    config = transformer.peft_config[ADAPTER]
    return {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": config.target_modules}


def fingerprint(transformer: NamiTransformer2DModel) -> str:
    """Return a short hash that tells a network's weights from others; it reads a thousand values of each tensor."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(transformer.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.flatten()[:: max(1, weight.numel() // 1000)].float().cpu().numpy().tobytes())
    return digest.hexdigest()
