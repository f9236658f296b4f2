"""The release of the paper's authors: their layout and conventions, as a pipeline of ours.

Source: github.com/360CVGroup/NAMI-T2I, of March 2026; the weights are ``qihoo360/NAMI-T2I`` on the hub. A folder has

transformer/pytorch_model_fsdp.bin   the network, with FLUX's names; a config.json beside it may state its settings
bridge_flow.bin                      the jumps: scale (K-1,), shift.0, shift.1, ... (1, C, H, W)
vae/                                 a FLUX autoencoder
mclip/tokenizer, mclip/clip_text_encoder   HunyuanDiT's BERT, which makes the pooled state
mt5/                                 mT5-xxl
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nami_lightning.conversion.pipeline_folder import OURS, PipelineFolder
from nami_lightning.conversion.weights import assign, read_config, read_weights_file
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.text_encoder import TextSettings
from nami_lightning.models.transformer import NamiTransformer2DModel

WEIGHTS = Path("transformer", "pytorch_model_fsdp.bin")
BRIDGE = Path("bridge_flow.bin")

PATCH_SIZE = 2
SINGLE_LAYERS = [1, 7, 6]
"""The single blocks that each stage of the release adds; all double blocks run at every stage."""

TEXT = TextSettings(
    max_length=256, pooled_max_length=77, attention_mask=False, zero_padding=False, pooling="first_token"
)

GUIDANCE_SCALE = 3.0
"""The authors' guidance, with 10 Euler steps a stage."""

Jump = Literal["released", "matched"]


@dataclass(frozen=True)
class ReleaseLayout:
    """What the weights alone don't say.

    Attributes:
        num_single_layers: the single blocks that each stage adds; None: the release's 1, 7 and 6.
        axes_dims_rope: rotary dimensions; None: FLUX's shares of the head's width.
    """

    num_single_layers: Sequence[int] | None = None
    axes_dims_rope: Sequence[int] | None = None


def read_layout(
    folder: Path, num_single_layers: Sequence[int] | None, axes_dims_rope: Sequence[int] | None
) -> ReleaseLayout:
    """Return what the user says of the network, or else a ``config.json`` of the authors' class beside the weights."""
    file = folder / WEIGHTS.parent / "config.json"
    config = read_config(file) if file.is_file() else {}
    if num_single_layers is None and (depths := config.get("stage_singleblock_index")):
        num_single_layers = [after - before for before, after in pairwise([0, *depths])]
    return ReleaseLayout(num_single_layers, axes_dims_rope or config.get("axes_dims_rope"))


def is_release(folder: Path) -> bool:
    """Tell whether a folder has the layout of the authors' release."""
    return (folder / WEIGHTS).is_file() or (folder / BRIDGE).is_file()


def convert_release(folder: Path, target: PipelineFolder, jump: Jump, layout: ReleaseLayout) -> list[str]:
    """Write the authors' release as a pipeline.

    Args:
        folder: of the release.
        target: the pipeline's.
        jump: ``released``: their scale and shift for each position, at one size alone, without noise; ``matched``: the
            restored noise that their windows were made for, at any size.
        layout: of a network of another size than theirs.

    Returns:
        Notes for the user.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a key is missing, surplus, or of another shape; or the layout doesn't fit.
    """
    bridge_weights = read_weights_file(folder / BRIDGE)
    transformer = make_transformer(folder, read_weights_file(folder / WEIGHTS), layout)
    bridge = make_bridge(folder / BRIDGE, bridge_weights, jump, transformer.config.in_channels)
    factor = 2 ** (len(read_config(folder / "vae" / "config.json")["block_out_channels"]) - 1)
    shift = bridge_weights[f"shift.{bridge.num_stages - 2}"]
    target.save("transformer", transformer, OURS)
    target.save("bridge", bridge, OURS)
    del transformer
    notes = save_encoders(folder, target)
    target.finish(shift.shape[-1] * factor, TEXT, guidance_scale=GUIDANCE_SCALE)
    return notes


def make_transformer(folder: Path, weights: dict[str, Tensor], layout: ReleaseLayout) -> NamiTransformer2DModel:
    """Return the network with the release's weights; its sizes are read from their shapes.

    Raises:
        ValueError: a key is missing, surplus, or of another shape; or the layout doesn't fit.
    """
    source = folder / WEIGHTS
    sizes = {
        name: _shape(weights, key, source)
        for name, key in (
            ("x_embedder", "x_embedder.weight"),
            ("context", "context_embedder.weight"),
            ("pooled", "time_text_embed.text_embedder.linear_1.weight"),
            ("head", "transformer_blocks.0.attn.norm_q.weight"),
        )
    }
    width, head = sizes["x_embedder"][0], sizes["head"][0]
    double, single = (_depth(weights, blocks) for blocks in ("transformer_blocks.", "single_transformer_blocks."))
    added = list(layout.num_single_layers or SINGLE_LAYERS)
    if sum(added) != single:
        raise ValueError(
            f"{source} has {single} single blocks, and --num_single_layers {' '.join(map(str, added))} add up to "
            f"{sum(added)}: state how many of them each stage adds"
        )
    with torch.device("meta"):
        model = NamiTransformer2DModel(
            in_channels=sizes["x_embedder"][1] // PATCH_SIZE**2,
            patch_size=PATCH_SIZE,
            num_layers=[double, *[0] * (len(added) - 1)],
            num_single_layers=added,
            attention_head_dim=head,
            num_attention_heads=width // head,
            joint_attention_dim=sizes["context"][1],
            pooled_projection_dim=sizes["pooled"][1],
            axes_dims_rope=list(layout.axes_dims_rope or _axes(head)),
            rope_positions="grid",
            output_head="shared",
        )
    assign(model, weights, source)
    return model


def make_bridge(source: Path, weights: dict[str, Tensor], jump: Jump, channels: int) -> BridgeFlow:
    """Return the release's windows and conventions, with its own jumps or with restored noise.

    Raises:
        ValueError: a key is missing, surplus, or of another shape.
    """
    boundaries = _shape(weights, "scale", source)[0]
    sizes = [_shape(weights, f"shift.{i}", source) for i in range(boundaries)]
    conventions: dict[str, Any] = {
        "window_ratios": _thousandths(boundaries + 1),
        "channels": channels,
        "windows": "matched",
        "time": "remaining",
        "velocity_time": "local",
        "timestep_spacing": "linspace",
    }
    if jump == "matched":
        return BridgeFlow(kind="matched", **conventions)
    bridge = BridgeFlow(kind="affine", affine_size=list(sizes[-1][-2:]), residual_noise=False, **conventions)
    named = {f"maps.{i}.weight": weights["scale"][i].expand(channels, 1, 1).contiguous() for i in range(boundaries)}
    named |= {f"maps.{i}.bias": weights[f"shift.{i}"][0] for i in range(boundaries)}
    named |= {key: tensor for key, tensor in weights.items() if key != "scale" and not key.startswith("shift.")}
    assign(bridge, named | {"fitted": torch.tensor(True)}, source)
    return bridge.float()


def save_encoders(folder: Path, target: PipelineFolder) -> list[str]:
    """Save the release's autoencoder and text encoders as parts; return notes on those that are not there."""
    from diffusers import AutoencoderKL
    from transformers import AutoConfig, AutoTokenizer, BertModel, T5EncoderModel
    from transformers import MT5EncoderModel as MT5

    vae = AutoencoderKL.from_pretrained(str(folder / "vae"))
    target.save("vae", vae, "diffusers")
    notes = []
    for part, where, tokenizer in (
        ("text_encoder", folder / "mclip" / "clip_text_encoder", folder / "mclip" / "tokenizer"),
        ("text_encoder_2", folder / "mt5", folder / "mt5"),
    ):
        if not where.is_dir():
            notes.append(
                f"{where} is not there: the pipeline has no {part}, and takes encoded prompts alone (prompt_embeds). "
                "The release's README says where to get it"
            )
            continue
        kinds: dict[str, Any] = {"mt5": MT5, "t5": T5EncoderModel, "bert": BertModel}
        kind = kinds[AutoConfig.from_pretrained(where).model_type]
        model = kind.from_pretrained(where, dtype="auto")
        if kind is BertModel:  # their BERT has no pooling layer: zeros, and not what transformers makes up for it
            torch.nn.init.zeros_(model.pooler.dense.weight)
        target.save(part, model, "transformers")
        target.save(part.replace("text_encoder", "tokenizer"), AutoTokenizer.from_pretrained(tokenizer), "transformers")
    return notes


def _shape(weights: dict[str, Tensor], key: str, source: Path) -> tuple[int, ...]:
    if key not in weights:
        raise ValueError(f"{source} doesn't fit the authors' layout: {key} is missing")
    return tuple(weights[key].shape)


def _depth(weights: dict[str, Tensor], blocks: str) -> int:
    """Return the number of blocks whose weights' names start with ``blocks``."""
    return 1 + max((int(key.split(".")[1]) for key in weights if key.startswith(blocks)), default=-1)


def _axes(head: int) -> list[int]:
    """Return rotary dimensions in FLUX's shares, 1:3.5:3.5, all even: (16, 56, 56) of 128."""
    first = next(first for first in range(2 * -(-head // 16), head, 2) if (head - first) % 4 == 0)
    return [first, (head - first) // 2, (head - first) // 2]


def _thousandths(stages: int) -> list[float]:
    """Return the widths of even windows that end on whole steps of 1000, as the release's do: 333, 333, 334."""
    edges = [1000 * stage // stages for stage in range(stages + 1)]
    return [float(after - before) for before, after in pairwise(edges)]
