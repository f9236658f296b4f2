"""Context parallelism: the ranks of a group train on the same samples, and share out their tokens.

Each rank takes a part of the text tokens and a part of the image tokens through the blocks. In each attention the ranks
exchange them, so that each has all tokens for its part of the heads, and back again (Ulysses). After the last block the
image tokens are gathered: every rank has the whole velocity and the same loss. Validation and drawing share nothing:
there each rank has samples of its own.

Gradients are then averaged over all ranks, as always. A rank's own are those of its tokens; so the gather multiplies
its gradient by the size of the group, and the average is that of the groups' losses.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import SeqAllToAllDim, dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn

from nami_lightning.models.text_encoder import TextStates
from nami_lightning.models.transformer import BlockHook, NamiTransformer2DModel, Rotary
from nami_lightning.training.curriculum import Curriculum
from nami_lightning.training.techniques.technique import Technique


@dataclass(frozen=True)
class TokenGroup:
    """The ranks that share the tokens of a sample, as one of them sees it.

    Attributes:
        ranks: torch's group of these processes.
        size: their number.
        rank: this one's number among them.
    """

    ranks: dist.ProcessGroup
    size: int
    rank: int

    def predict(
        self,
        transformer: NamiTransformer2DModel,
        x: Tensor,
        text: TextStates,
        timestep: Tensor,
        stage: int,
    ) -> Tensor:
        """Return the velocity ``(n, C, H, W)`` that a network predicts, computed by all ranks of the group together.

        The network must have been prepared by :func:`make_token_groups`.

        Args:
            transformer: the network.
            x: ``(n, C, H, W)``, the same on all ranks of the group; so are the others.
            text: states of n prompts.
            timestep: ``(n,)``.
            stage: 0 (coarsest) to K-1.

        Raises:
            ValueError: the tokens can't be divided by the group's size.
        """
        hook = self._hook(len(transformer.blocks(stage)))
        mine = self._part(text.sequence, 1, "text tokens")
        velocity: Tensor = transformer(x, mine, text.pooled, timestep, stage, {"ranks": self.ranks}, [hook])
        return velocity

    def _hook(self, blocks: int) -> BlockHook:
        """Return what takes this rank's part of the image tokens before the first block, and all after the last."""

        def hook(number: int, tokens: Tensor, rotary: Rotary) -> tuple[Tensor, Rotary]:
            if number == 0:
                text = len(rotary[0]) - tokens.shape[1]
                cosines, sines = (
                    torch.cat([angles[:text], self._part(angles[text:], 0, "image tokens")]) for angles in rotary
                )
                return self._part(tokens, 1, "image tokens"), (cosines, sines)
            if number == blocks:
                gathered: Tensor = _Gather.apply(tokens, self)
                return gathered, rotary
            return tokens, rotary

        return hook

    def _part(self, tokens: Tensor, dim: int, name: str) -> Tensor:
        """Return this rank's part of the tokens."""
        if tokens.shape[dim] % self.size:
            raise ValueError(
                f"curriculum.context_parallel lets {self.size} ranks share the tokens of a sample, but this one has "
                f"{tokens.shape[dim]} {name}: choose a number that divides them"
            )
        return tokens.chunk(self.size, dim)[self.rank]


class _Gather(torch.autograd.Function):
    """The tokens ``(n, N / size, width)`` of all ranks of a group in order, ``(n, N, width)``.

    Each rank has the same gradient of them; its own part, times the group's size, goes on.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, group: TokenGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(tokens, memory_format=torch.contiguous_format) for _ in range(group.size)]
        dist.all_gather(parts, tokens.contiguous(), group.ranks)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        group: TokenGroup = ctx.group
        return gradients[0].chunk(group.size, 1)[group.rank] * group.size, None


class GroupAttention(FluxAttnProcessor):
    """diffusers' attention of FLUX, over the tokens of all ranks of a group if one is given."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        ranks: dist.ProcessGroup | None = None,
    ) -> Any:
        """Return the image tokens, and before them the text tokens of a single block; of a double block, both.

        Args:
            attn: the layer.
            hidden_states: image tokens ``(n, N, width)``, with those of the text in a single block.
            encoder_hidden_states: text tokens ``(n, L, width)`` of a double block.
            attention_mask: must be None where ranks share tokens.
            image_rotary_emb: of text and image tokens.
            ranks: share the tokens; None: each rank has all tokens of its samples.
        """
        if ranks is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, attn.head_dim)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            text_query, text_key, text_value = (
                project(encoder_hidden_states).unflatten(-1, (-1, attn.head_dim)) for project in projections
            )
            query = torch.cat([attn.norm_added_q(text_query), query], 1)
            key = torch.cat([attn.norm_added_k(text_key), key], 1)
            value = torch.cat([text_value, value], 1)
        query, key = (apply_rotary_emb(part, image_rotary_emb, sequence_dim=1) for part in (query, key))
        all_tokens = [SeqAllToAllDim.apply(ranks, part.to(value.dtype), 2, 1) for part in (query, key, value)]
        attended = dispatch_attention_fn(*all_tokens, backend=self._attention_backend)
        attended = SeqAllToAllDim.apply(ranks, attended, 1, 2).flatten(2)
        if encoder_hidden_states is None:
            return attended
        length = encoder_hidden_states.shape[1]
        text, image = attended[:, :length], attended[:, length:]
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def make_token_groups(
    curriculum: Curriculum, transformer: NamiTransformer2DModel, techniques: Iterable[nn.Module]
) -> dict[int, TokenGroup]:
    """Group the ranks for the stages that share tokens, and prepare a network for it, in place; all ranks take part.

    Args:
        curriculum: says how many ranks share the tokens of a sample.
        transformer: the trained network.
        techniques: that it is trained with.

    Returns:
        This rank's group, by the number of the stage.

    Raises:
        ValueError: a technique changes the tokens between the blocks.
    """
    sizes = {stage: size for stage, size in enumerate(curriculum.context_parallel) if size > 1}
    if not sizes:
        return {}
    for technique in techniques:
        if isinstance(technique, Technique) and type(technique).block_hook is not Technique.block_hook:
            raise ValueError(
                f"{type(technique).__name__} needs all tokens of a sample on one rank, and curriculum.context_parallel "
                f"{list(curriculum.context_parallel)} shares them out: remove one of the two"
            )
    for module in transformer.modules():
        if isinstance(module, FluxAttention):
            module.set_processor(GroupAttention())
    groups = {size: dist.new_subgroups(size)[0] for size in sorted(set(sizes.values()))}
    return {stage: TokenGroup(groups[size], size, dist.get_rank() % size) for stage, size in sizes.items()}
