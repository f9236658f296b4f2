"""A technique: a change of how a network is trained, which leaves alone how it samples and how it is validated."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nami_lightning.models.autoencoder import AutoencoderConfig
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
        loss_scale: what the squared error of this pass is multiplied by: see ``local_velocity_loss``.
        velocity: ``(n, C, H, W)`` in float32, what it gives; while it runs None.
        tokens: image tokens ``(n, N, width)`` after so many blocks, noted by techniques for their losses.
    """

    micro: MicroBatch
    seed: int
    window: Window
    x: Tensor
    tau: Tensor
    target: Tensor
    loss_scale: float = 1.0
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

    reads_after: int | None = None
    """So many blocks after which the technique reads the tokens: all image tokens must be there."""

    def __init__(self, end_step: int | None = None) -> None:
        super().__init__()
        self.class_name = type(self).__name__
        """Sharding gives the class another one."""
        if end_step is not None and end_step < 1:
            raise ValueError(f"{self.class_name}.end_step must be at least 1; got {end_step}")
        self.end_step = end_step
        self.config: Mapping[str, Any] = {}
        """Of the network, once the technique is prepared for it."""
        self.autoencoder = AutoencoderConfig()
        """Of the model, likewise."""

    @property
    def name(self) -> str:
        """The name of its loss in logs: ``perceptual`` of PerceptualLoss."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.class_name).lower().removesuffix("_loss")

    def active(self, step: int) -> bool:
        """Tell whether the technique is on at a step."""
        return self.end_step is None or step < self.end_step

    def prepare(self, config: Mapping[str, Any], autoencoder: AutoencoderConfig) -> None:
        """Check that the technique fits a model; called before anything is built.

        Args:
            config: of the NamiTransformer2DModel.
            autoencoder: of its latents.

        Raises:
            ValueError: naming the recipe key.
        """
        self.config, self.autoencoder = config, autoencoder

    def build(self) -> None:
        """Make the trained parts, if there are any; called once, after ``prepare``."""

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

    def chosen_stages(self, stages: list[int] | None) -> list[int]:
        """Return the numbers of a recipe's stages, 1 being the coarsest; the finest alone if it names none.

        Raises:
            ValueError: a stage that does not exist.
        """
        last = len(self.config["num_layers"])
        chosen = [last] if stages is None else stages
        for stage in chosen:
            if not 1 <= stage <= last:
                raise ValueError(f"{self.class_name}.stages has {stage}, and the model stages 1 to {last}")
        return chosen

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
        """Return those that are on at a step; those that read tokens come before those that change them."""
        on = [one for one in self if isinstance(one, Technique) and one.active(step)]
        return sorted(on, key=lambda one: one.reads_after is None)

    def prepare(self, config: Mapping[str, Any], autoencoder: AutoencoderConfig, seed: int) -> "Techniques":
        """Check that all fit a model and each other, make their trained parts, and return them.

        Args:
            config: see :meth:`Technique.prepare`.
            autoencoder: likewise.
            seed: of the run; the trained parts are a pure function of it.

        Raises:
            ValueError: naming the recipe key.
        """
        names = [one.class_name for one in self.active(0)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"model.techniques lists {', '.join(sorted(twice))} more than once")
        for one in self.active(0):
            one.prepare(config, autoencoder)
        for one in self.active(0):
            if one.reads_after is not None:
                self._check_all_tokens(config, one, one.reads_after)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.derive_seed(seed, "techniques"))
            for one in self.active(0):
                one.build()
        return self

    def _check_all_tokens(self, config: Mapping[str, Any], reader: Technique, depth: int) -> None:
        """Refuse a technique that reads tokens where others have taken some away."""
        for stage in range(len(config["num_layers"])):
            many = 2**20
            if self.change_flops(config, stage, many, step=0).block_tokens[depth - 1] < many:
                raise ValueError(
                    f"{reader.class_name} reads the tokens after {depth} blocks, and another technique lets some "
                    f"of stage {stage + 1} skip these: read them after fewer, or let them skip later ones"
                )

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
        return {
            one.class_name: sorted(dict(one.named_parameters())) for one in self.active(0) if list(one.parameters())
        }
