"""A technique: a change of how a network is trained, which leaves alone how it samples and how it is validated."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nami_lightning.models.flow import Window
from nami_lightning.models.transformer import BlockHook
from nami_lightning.training import rng
from nami_lightning.training.batch import MicroBatch


@dataclass
class ForwardPass:
    """A micro-batch on its way through the network, in training.

    Attributes:
        micro: n samples of one stage.
        seed: of the run.
        window: of the stage.
        x: ``(n, C, H, W)``, what the network sees.
        tau: local times ``(n,)``.
        target: ``(n, C, H, W)``, the velocity that it should give.
        velocity: ``(n, C, H, W)`` in float32, what it gives; while it runs None.
        tokens: image tokens ``(n, N, width)`` after so many blocks, noted by techniques for their losses.
    """

    micro: MicroBatch
    seed: int
    window: Window
    x: Tensor
    tau: Tensor
    target: Tensor
    velocity: Tensor | None = None
    tokens: dict[int, Tensor] = field(default_factory=dict)


class Technique(nn.Module):
    """The base of all techniques; each overrides the points where it acts.

    Its parameters, if it has any, are trained beside the network's and kept in checkpoints, not in exports.

    Args:
        end_step: the technique is off from this step on; null: it is never off.

    Raises:
        ValueError: ``end_step`` is below 1.
    """

    def __init__(self, end_step: int | None = None) -> None:
        super().__init__()
        if end_step is not None and end_step < 1:
            raise ValueError(f"{type(self).__name__}.end_step must be at least 1; got {end_step}")
        self.end_step = end_step
        self.config: Mapping[str, Any] = {}
        """Of the network, once the technique is prepared for it."""

    @property
    def name(self) -> str:
        """The name of its loss in logs: ``contrastive_flow`` of ContrastiveFlow."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def active(self, step: int) -> bool:
        """Tell whether the technique is on at a step."""
        return self.end_step is None or step < self.end_step

    def prepare(self, config: Mapping[str, Any]) -> None:
        """Check that the technique fits a network; called before anything is built.

        Args:
            config: of the NamiTransformer2DModel.

        Raises:
            ValueError: naming the recipe key.
        """
        self.config = config

    def build(self) -> None:
        """Make the trained parts, if there are any; called once, when the network is there."""

    def block_hook(self, forward: ForwardPass) -> BlockHook | None:
        """Return what is to be called between the blocks in this pass, to see or change their tokens."""

    def loss(self, forward: ForwardPass) -> Tensor | None:
        """Return what is added to the loss of this pass: a number with its gradient."""

    def grid(self, forward: ForwardPass) -> tuple[int, int]:
        """Return the rows and columns of a pass's image tokens."""
        height, width = (side // self.config["patch_size"] for side in forward.x.shape[-2:])
        return height, width

    def blocks(self, stage: int) -> int:
        """Return how many blocks a stage runs, from 0, the coarsest."""
        return count_blocks(self.config, stage)

    def tokens_of_blocks(self, stage: int, tokens: Sequence[int]) -> Sequence[int]:
        """Return how many image tokens each block of a stage sees, given how many it would see otherwise."""
        return tokens

    def extra_flops(self, stage: int, tokens: int) -> tuple[int, int]:
        """Return the operations that the technique adds to a sample of so many image tokens: forward, backward."""
        return 0, 0


def count_blocks(config: Mapping[str, Any], stage: int) -> int:
    """Return how many blocks a stage of a network runs, given the network's config; 0 is the coarsest stage."""
    return sum(sum(config[kind][: stage + 1]) for kind in ("num_layers", "num_single_layers"))


class ChangedFlops(NamedTuple):
    """What techniques change in the operations of a sample.

    Attributes:
        block_tokens: image tokens that each block sees.
        forward: operations that are added to the forward pass.
        backward: to the backward pass.
    """

    block_tokens: Sequence[int]
    forward: int
    backward: int


class Techniques(nn.ModuleList):
    """The techniques of a model, in the order of its recipe."""

    def __init__(self, techniques: Iterable[Technique] = ()) -> None:
        super().__init__(techniques)

    def active(self, step: int) -> list[Technique]:
        """Return those that are on at a step."""
        return [one for one in self if isinstance(one, Technique) and one.active(step)]

    def prepare(self, config: Mapping[str, Any]) -> "Techniques":
        """Check that all fit a network and each other, and return them; see :meth:`Technique.prepare`."""
        names = [type(one).__name__ for one in self]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"model.techniques lists {', '.join(sorted(twice))} more than once")
        for one in self.active(0):
            one.prepare(config)
        return self

    def build(self, seed: int) -> None:
        """Make the trained parts of all, as a pure function of the run's seed; see :meth:`Technique.build`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.derive_seed(seed, "techniques"))
            for one in self.active(0):
                one.build()

    def change_flops(self, config: Mapping[str, Any], stage: int, image_tokens: int, step: int) -> "ChangedFlops":
        """Return what those that are on at a step change in the operations of a sample of a stage."""
        seen: Sequence[int] = [image_tokens] * count_blocks(config, stage)
        forward = backward = 0
        for one in self.active(step):
            seen = one.tokens_of_blocks(stage, seen)
            more = one.extra_flops(stage, image_tokens)
            forward, backward = forward + more[0], backward + more[1]
        return ChangedFlops(seen, forward, backward)

    @property
    def trained(self) -> dict[str, list[str]]:
        """The names of each one's trained parts, of those that have any: a checkpoint has them too."""
        return {type(one).__name__: sorted(dict(one.named_parameters())) for one in self if list(one.parameters())}
