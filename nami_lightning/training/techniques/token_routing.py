"""Token routing: in training, a share of the image tokens skips the blocks in the middle of the network (TREAD).

"TREAD: Token Routing for Efficient Architecture-agnostic Diffusion Training" (Krause and others, 2025), section 3. A
token that is routed keeps the value that it had where the route begins, and is put back where the route ends. Nothing
is routed in sampling.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nami_lightning.models.autoencoder import AutoencoderConfig
from nami_lightning.models.transformer import BlockHook, Rotary
from nami_lightning.training import rng
from nami_lightning.training.techniques.technique import ForwardPass, Technique


class TokenRouting(Technique):
    """Lets a share of a stage's image tokens skip its middle blocks.

    The finest stage is where most of the cost is, so it alone is routed by default. Which tokens skip is drawn anew for
    each step and stage, the same for all samples of it, on all ranks.

    Args:
        share: of the tokens, in (0, 1), that skip the blocks.
        first_block: number of blocks, from the network's start, that all tokens go through first.
        last_blocks: number of blocks, at the stage's end, that all tokens go through again.
        stages: numbers of the stages that are routed, 1 being the coarsest; null: the finest alone.
        end_step: routing is off from this step on; null: never.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        share: float = 0.5,
        first_block: int = 2,
        last_blocks: int = 1,
        stages: list[int] | None = None,
        end_step: int | None = None,
    ) -> None:
        super().__init__(end_step)
        if not 0 < share < 1 or min(first_block, last_blocks) < 0:
            raise ValueError(
                "TokenRouting needs a share between 0 and 1, and numbers of blocks that are not negative; got share "
                f"{share}, first_block {first_block}, last_blocks {last_blocks}"
            )
        self.share, self.first_block, self.last_blocks, self.stages = share, first_block, last_blocks, stages

    def prepare(self, config: Mapping[str, Any], autoencoder: AutoencoderConfig) -> None:
        """Refuse stages that do not exist, or that have no block to skip."""
        super().prepare(config, autoencoder)
        self.stages = self.chosen_stages(self.stages)
        for stage in self.stages:
            if self.first_block + self.last_blocks >= self.blocks(stage - 1):
                raise ValueError(
                    f"TokenRouting leaves no block of stage {stage} to skip: it has {self.blocks(stage - 1)} blocks, "
                    f"first_block is {self.first_block} and last_blocks {self.last_blocks}"
                )

    def routes(self, stage: int) -> bool:
        """Tell whether a stage, from 0, is routed."""
        return stage + 1 in (self.stages or ())

    def kept(self, tokens: int) -> int:
        """Return how many of a sample's image tokens go through the middle blocks."""
        return max(1, round(tokens * (1 - self.share)))

    def block_hook(self, forward: ForwardPass) -> BlockHook | None:
        """Return the hook that takes the tokens of the route out of the middle blocks, and puts them back."""
        if not self.routes(forward.micro.stage):
            return None
        rows, columns = self.grid(forward)
        kept = self._choose(forward, rows * columns)
        end = self.blocks(forward.micro.stage) - self.last_blocks
        return _Route(self.first_block, end, kept.to(forward.x.device, non_blocking=True))

    def _choose(self, forward: ForwardPass, tokens: int) -> Tensor:
        """Return the sorted positions of the tokens that go through the middle blocks."""
        generator = torch.Generator()
        generator.manual_seed(rng.derive_seed(forward.seed, forward.micro.step, forward.micro.stage, "routing"))
        return torch.randperm(tokens, generator=generator)[: self.kept(tokens)].sort().values

    def tokens_of_blocks(self, stage: int, tokens: Sequence[int]) -> Sequence[int]:
        """Return how many image tokens each block sees: fewer in the middle."""
        if not self.routes(stage):
            return tokens
        end = len(tokens) - self.last_blocks
        return [self.kept(n) if self.first_block <= block < end else n for block, n in enumerate(tokens)]


class _Route:
    """The hook of one pass: narrows the tokens before one block, and widens them before another."""

    def __init__(self, begin: int, end: int, kept: Tensor) -> None:
        self.begin, self.end, self.kept = begin, end, kept
        self.all_tokens: Tensor
        self.all_rotary: Rotary

    def __call__(self, block: int, tokens: Tensor, rotary: Rotary) -> tuple[Tensor, Rotary]:
        if block == self.begin:
            self.all_tokens, self.all_rotary = tokens, rotary
            text = torch.arange(len(rotary[0]) - tokens.shape[1], device=tokens.device)
            seen = torch.cat([text, self.kept + len(text)])
            return tokens[:, self.kept], (rotary[0][seen], rotary[1][seen])
        if block == self.end:
            return self.all_tokens.index_copy(1, self.kept, tokens), self.all_rotary
        return tokens, rotary
