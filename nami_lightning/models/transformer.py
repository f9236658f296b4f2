"""The nested transformer: FLUX's own blocks, of which stage k uses the first m_1 + ... + m_k.

All double blocks come before all single ones, as in FLUX, so the last stage's network is FLUX's block for
block, and its parameter names are FLUX's too, unless every stage has its own output head.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import HookRegistry, PyramidAttentionBroadcastConfig
from diffusers.hooks.first_block_cache import _FBC_BLOCK_HOOK, FirstBlockCacheConfig
from diffusers.hooks.layerwise_casting import _LAYERWISE_CASTING_HOOK
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nami_lightning.models.flux_weights import FluxWeightsMixin, HeadKind, RopePositions

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines ``(text + image tokens, head width)`` of the rotary embedding."""

BlockHook = Callable[[int, Tensor, Rotary], tuple[Tensor, Rotary]]
"""Called before each block with its number, the image tokens ``(B, N, width)`` and the rotary embedding, and once more
after the last block; returns what goes on from there."""

Prediction = Literal["velocity", "clean"]
LEAST_TIME = 0.05
"""The noise level below which a predicted clean image counts as this far away (JiT)."""

SETTINGS_BEFORE = {"rope_unit_stage": None, "output_head": "per_stage", "prediction": "velocity"}
"""Settings that configs of earlier versions lack, and what they were then."""


class OutputHead(nn.Module):
    """FLUX's last two layers, for a network in which each stage has its own.

    Args:
        width: width of the transformer.
        outputs: numbers a token: out_channels * patch_size**2.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_out = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(width, outputs)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Map tokens ``(B, N, width)`` and conditioning ``(B, width)`` to ``(B, N, outputs)``."""
        return self.proj_out(self.norm_out(hidden_states, temb))


class NamiTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, FluxWeightsMixin, CacheMixin, AttentionMixin):
    """FLUX's transformer, nested: ``theta_k = m_1 + ... + m_k``. With one stage it is FLUX.

    Args:
        in_channels: channels of the latents (FLUX's autoencoder: 16).
        patch_size: side of the square of latents that makes one token.
        num_layers: double blocks that each stage adds, coarsest stage first.
        num_single_layers: single blocks that each stage adds; as long as ``num_layers``.
        attention_head_dim: width of a head.
        num_attention_heads: heads; the transformer's width is heads * head width.
        joint_attention_dim: width of the text encoder's sequence.
        pooled_projection_dim: width of the pooled text state.
        axes_dims_rope: rotary dimensions for (unused, row, column); their sum is ``attention_head_dim``.
        rope_positions: ``aligned``: a coarse token sits at the centre of the cell it covers on the finest grid;
            ``grid``: every stage counts its own tokens 0, 1, 2, ...
        rope_unit_stage: the stage whose tokens are 1 apart with ``aligned``, 0 the coarsest; null: the finest. By it
            a network that gets a finer stage keeps the positions of the others.
        output_head: one head ``shared`` by all stages, with FLUX's names, or one head ``per_stage``.
        prediction: of the finest stage's layers, which ends in data: the ``velocity``, as that of all others; or the
            ``clean`` image z of JiT (Li and He, 2025), whose velocity ``(x - z) / t`` the network then returns.

    Raises:
        ValueError: lists of different lengths, a first stage without blocks, rotary dimensions that do not fit, an
            unknown setting.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
    _repeated_blocks = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        patch_size: int = 2,
        num_layers: Sequence[int] = (19,),
        num_single_layers: Sequence[int] = (38,),
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        rope_positions: RopePositions = "aligned",
        rope_unit_stage: int | None = None,
        output_head: HeadKind = "shared",
        prediction: Prediction = "velocity",
    ) -> None:
        super().__init__()
        _check_layers(num_layers, num_single_layers)
        _check_choices(rope_positions, rope_unit_stage, output_head, prediction, len(num_layers))
        if sum(axes_dims_rope) != attention_head_dim or any(dim % 2 for dim in axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope {list(axes_dims_rope)} must be even numbers that add up to "
                f"attention_head_dim {attention_head_dim}"
            )
        width = num_attention_heads * attention_head_dim
        self.num_stages = len(num_layers)
        self.depths = list(accumulate(num_layers)), list(accumulate(num_single_layers))

        self.pos_embed = FluxPosEmbed(theta=10000, axes_dim=list(axes_dims_rope))
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(width, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.x_embedder = nn.Linear(in_channels * patch_size**2, width)
        self.transformer_blocks = nn.ModuleList(
            FluxTransformerBlock(width, num_attention_heads, attention_head_dim) for _ in range(sum(num_layers))
        )
        self.single_transformer_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(width, num_attention_heads, attention_head_dim)
            for _ in range(sum(num_single_layers))
        )
        head = OutputHead(width, in_channels * patch_size**2)
        if output_head == "shared":
            self.norm_out, self.proj_out = head.norm_out, head.proj_out
        else:
            heads = [head, *(OutputHead(width, in_channels * patch_size**2) for _ in num_layers[1:])]
            self.heads = nn.ModuleList(heads)

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        stage: int,
        joint_attention_kwargs: dict[str, Any] | None = None,
        block_hooks: Sequence[BlockHook] = (),
    ) -> Tensor:
        """Predict the velocity at a stage.

        Args:
            hidden_states: latents ``(B, C, H, W)`` at the stage's resolution; H and W multiples of the patch.
            encoder_hidden_states: text states ``(B, L, joint_attention_dim)``.
            pooled_projections: pooled text state ``(B, pooled_projection_dim)``.
            timestep: global time ``(B,)`` in [0, 1], 1 being noise.
            stage: 0 (coarsest) to K-1.
            joint_attention_kwargs: for the attention of every block, given by its name; of these ``scale`` multiplies
                the LoRAs.
            block_hooks: see, and may change, the tokens between the blocks.

        Returns:
            ``(B, C, H, W)``.
        """
        height, width = (side // self.config.patch_size for side in hidden_states.shape[-2:])
        dtype = self._computing_dtype  # time stays exact, FLUX rounds it
        x = self.x_embedder(patchify(hidden_states.to(dtype), self.config.patch_size))
        context = self.context_embedder(encoder_hidden_states.to(dtype))
        temb = self.time_text_embed(timestep.float() * 1000, pooled_projections.to(dtype))
        rotary = self.pos_embed(self._positions(stage, height, width, context.shape[1], x.device))

        for number, block in enumerate(self.blocks(stage)):
            for hook in block_hooks:
                x, rotary = hook(number, x, rotary)
            if number == self.depths[0][stage]:
                context, x = _side_by_side(context, x)
            context, x = block(x, context, temb, rotary, joint_attention_kwargs)
        for hook in block_hooks:
            x, rotary = hook(number + 1, x, rotary)
        shared = self.config.output_head == "shared"
        tokens = self.proj_out(self.norm_out(x, temb)) if shared else self.heads[stage](x, temb)
        output = unpatchify(tokens, height, width, self.config.patch_size)
        if self.config.prediction == "clean" and stage == self.num_stages - 1:
            return (hidden_states.float() - output.float()) / timestep.float().clamp(min=LEAST_TIME).view(-1, 1, 1, 1)
        return output

    def enable_cache(self, config: FirstBlockCacheConfig | PyramidAttentionBroadcastConfig) -> None:
        """Reuse what changes little from one solver step to the next, by a step cache of diffusers.

        Args:
            config: diffusers' own. The pipeline empties the cache at each stage's start.

        Raises:
            ValueError: another cache, which takes a call for one flow at one resolution; or a first-block cache of a
                network whose first stage runs one block.
        """
        if not isinstance(config, FirstBlockCacheConfig | PyramidAttentionBroadcastConfig):
            raise ValueError(
                f"{type(config).__name__} takes a call for one flow at one resolution; the caches that work for stages "
                "are FirstBlockCacheConfig and PyramidAttentionBroadcastConfig"
            )
        first_block = isinstance(config, FirstBlockCacheConfig)
        if first_block and len(self.blocks(0)) < 2:
            raise ValueError("a first-block cache needs two blocks in stage 1; this network has one")
        super().enable_cache(config)
        if first_block:  # each stage ends at another block, and the last one that runs counts
            for block in self.blocks(self.num_stages - 1)[1:]:
                HookRegistry.check_if_exists_or_initialize(block).get_hook(_FBC_BLOCK_HOOK).is_tail = True

    @property
    def _computing_dtype(self) -> torch.dtype:
        """The dtype that layers take: with layerwise casting and quantized weights it isn't that of their weights."""
        weight = self.x_embedder.weight  # under FSDP2 already that of the computation
        hooks = getattr(self.x_embedder, "_diffusers_hook", None)
        casting = hooks and hooks.get_hook(_LAYERWISE_CASTING_HOOK)
        return casting.compute_dtype if casting else weight.dtype if weight.is_floating_point() else self.dtype

    def head(self, stage: int) -> tuple[nn.Module, nn.Module]:
        """Return the last two layers of a stage: the modulated norm and the projection."""
        if self.config.output_head == "shared":
            return self.norm_out, self.proj_out
        head = self.heads[stage]
        return head.norm_out, head.proj_out  # type: ignore[return-value]

    @property
    def parts(self) -> list[nn.Module]:
        """The blocks and the stages' own heads: what is gathered one by one when the network is sharded."""
        heads: Iterable[nn.Module] = () if self.config.output_head == "shared" else self.heads
        return [*self.transformer_blocks, *self.single_transformer_blocks, *heads]

    def parts_used(self, stage: int) -> list[nn.Module]:
        """Return those of :attr:`parts` that a stage runs."""
        return [*self.blocks(stage), *([] if self.config.output_head == "shared" else [self.heads[stage]])]

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Read ``config.json``, as diffusers does; what one of an earlier version lacks is what was then."""
        config = super().load_config(*args, **kwargs)
        values = config[0] if isinstance(config, tuple) else config
        for name, value in SETTINGS_BEFORE.items():
            values.setdefault(name, value)
        return config

    def blocks(self, stage: int) -> list[nn.Module]:
        """Return the blocks of ``theta_stage`` in the order they run."""
        double, single = (depths[stage] for depths in self.depths)
        return [*self.transformer_blocks[:double], *self.single_transformer_blocks[:single]]

    def enable_gradient_checkpointing(
        self, gradient_checkpointing_func: Callable[..., Any] | None = None, every: int = 1
    ) -> None:
        """Recompute blocks in the backward pass, so that the forward pass keeps nothing but their inputs.

        This replaces a block's ``forward``, not the block: weights keep their names, and ``torch.compile`` and FSDP2
        may wrap the block afterwards.

        Args:
            gradient_checkpointing_func: calls a function so that it is recomputed; None:
                ``torch.utils.checkpoint.checkpoint``, not reentrant.
            every: recompute every so many-th block, counted from the first in each of the two lists of blocks.
        """
        recompute = gradient_checkpointing_func or partial(checkpoint, use_reentrant=False)
        for block in self.recomputed_blocks(every):
            block.forward = _recomputed(block.forward, recompute)

    def disable_gradient_checkpointing(self) -> None:
        """Keep what all blocks compute for the backward pass."""
        for block in self.blocks(self.num_stages - 1):
            block.__dict__.pop("forward", None)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any block is recomputed in the backward pass."""
        return any("forward" in block.__dict__ for block in self.blocks(self.num_stages - 1))

    def recomputed_blocks(self, every: int) -> list[nn.Module]:
        """Return the blocks that checkpointing of every so many-th block recomputes."""
        return [*self.transformer_blocks[::every], *self.single_transformer_blocks[::every]]

    def _positions(self, stage: int, height: int, width: int, text: int, device: torch.device) -> Tensor:
        """Return rotary coordinates ``(text + height * width, 3)``: text at the origin, then the image's cells."""
        unit_stage = self.num_stages - 1 if self.config.rope_unit_stage is None else self.config.rope_unit_stage
        cell = 2.0 ** (unit_stage - stage) if self.config.rope_positions == "aligned" else 1
        rows, columns = ((torch.arange(n, device=device) + 0.5) * cell - 0.5 for n in (height, width))
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
        return F.pad(grid, (1, 0, text, 0))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise the weights for training from scratch (as DiT and torchtitan's FLUX).

        Xavier for linear layers, normal for the embeddings, and zero for the modulations and the heads, so that every
        block starts as the identity.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for part in (self.time_text_embed.timestep_embedder, self.time_text_embed.text_embedder):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, AdaLayerNormZero | AdaLayerNormZeroSingle | AdaLayerNormContinuous):
                nn.init.zeros_(module.linear.weight)
        for stage in range(self.num_stages):
            nn.init.zeros_(self.head(stage)[1].weight)  # type: ignore[arg-type]


def _check_layers(num_layers: Sequence[int], num_single_layers: Sequence[int]) -> None:
    """Refuse layers that do not describe the same stages."""
    if len(num_layers) != len(num_single_layers) or not num_layers:
        raise ValueError(
            f"num_layers {list(num_layers)} and num_single_layers {list(num_single_layers)} need one number a stage"
        )
    if min(*num_layers, *num_single_layers) < 0 or num_layers[0] + num_single_layers[0] == 0:
        raise ValueError(
            f"num_layers {list(num_layers)} and num_single_layers {list(num_single_layers)} must not be negative, "
            "and the first stage needs at least one block"
        )


def _check_choices(
    rope_positions: str, rope_unit_stage: int | None, output_head: str, prediction: str, stages: int
) -> None:
    """Refuse settings that are none of their choices."""
    for name, value, known in (
        ("rope_positions", rope_positions, RopePositions),
        ("output_head", output_head, HeadKind),
        ("prediction", prediction, Prediction),
    ):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}; got {value!r}")
    if rope_unit_stage is not None and not 0 <= rope_unit_stage < stages:
        raise ValueError(f"rope_unit_stage must be a stage, 0 to {stages - 1}, or null; got {rope_unit_stage}")


def _side_by_side(context: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as views of one tensor, as single blocks return them: compiled, all of those are then one graph."""
    both = torch.cat([context, x], 1)
    return both[:, : context.shape[1]], both[:, context.shape[1] :]


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """Cut ``(B, C, H, W)`` into tokens ``(B, H/p * W/p, C * p * p)``, in FLUX's order of channels."""
    return F.pixel_unshuffle(latents, patch_size).flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """Join the tokens of a ``height`` by ``width`` grid to ``(B, C, H, W)``."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), patch_size)


def is_hidden_layer(name: str) -> bool:
    """Tell whether the layer or weight of that name lies in a block, between hidden features.

    The blocks' modulations (``norm.linear``) do not: they read the conditioning.
    """
    return "blocks." in name and ".norm" not in name


def _recomputed(forward: Callable[..., Any], recompute: Callable[..., Any]) -> Callable[..., Any]:
    def checkpointed(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        return recompute(forward, *arguments, **keywords)

    return checkpointed
