"""The straight path of a stage, from its start to its end in the data, at random local times."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from nami_lightning.models import flow
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.flow import TauKind
from nami_lightning.models.text_encoder import TextStates
from nami_lightning.training import rng
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.frozen_encoders import EncodingModule


class PathPoint(NamedTuple):
    """Points of a path: ``x`` ``(n, C, H, W)`` at the local times ``tau`` ``(n,)``, and the ``velocity`` there."""

    x: Tensor
    tau: Tensor
    velocity: Tensor


class Path(Protocol):
    """Gives a point of each sample's path, as a pure function of its random numbers."""

    def __call__(
        self,
        encoders: EncodingModule,
        micro: MicroBatch,
        start: Tensor,
        end: Tensor,
        text: TextStates,
        random: rng.RandomNumbers,
    ) -> PathPoint:
        """Return a point of each sample's path.

        Args:
            encoders: makes the text states of the empty prompt.
            micro: n samples of one stage.
            start: ``(n, C, H, W)``, of the stage.
            end: likewise.
            text: of the samples.
            random: of the samples.
        """


@dataclass(frozen=True)
class TauDistribution:
    """The distribution of the local time in training.

    Attributes:
        kind: ``logit_normal``, ``uniform``, or a ``mixture`` of both.
        mean: mean of the logit, one number a stage.
        std: standard deviation of the logit, one number a stage.
        uniform_share: share of the uniform part of a mixture.
    """

    kind: TauKind
    mean: list[float]
    std: list[float]
    uniform_share: float

    @classmethod
    def make(
        cls, kind: TauKind, mean: float | list[float], std: float | list[float], uniform_share: float, stages: int
    ) -> "TauDistribution":
        """Return the distribution of a recipe, which gives one number for all stages, or one a stage.

        Raises:
            ValueError: a list of another length.
        """
        return cls(kind, per_stage(mean, stages), per_stage(std, stages), uniform_share)

    def sample(self, stage: int, random: rng.RandomNumbers, shift: float | None) -> Tensor:
        """Return tau ``(n,)`` of a stage's samples, moved towards noise by FLUX's ``mu`` if ``shift`` is that."""
        uniform = random.uniform[:, :2]
        tau = flow.sample_tau(self.kind, random.normal, uniform, self.mean[stage], self.std[stage], self.uniform_share)
        return tau if shift is None else flow.shift_tau(tau, shift)


@dataclass(frozen=True)
class StraightPath:
    """The line from a stage's start to its end (NAMI, eq. 3).

    Attributes:
        bridge: the windows.
        patch_size: side of the square of latents that makes one token.
        tau_distribution: of the local time.
    """

    bridge: BridgeFlow
    patch_size: int
    tau_distribution: TauDistribution

    def __call__(
        self,
        encoders: EncodingModule,
        micro: MicroBatch,
        start: Tensor,
        end: Tensor,
        text: TextStates,
        random: rng.RandomNumbers,
    ) -> PathPoint:
        """Return a point of each sample's line, and the velocity along it; see :class:`Path`."""
        shift = self.bridge.time_shift(count_tokens(start, self.patch_size))
        tau = self.tau_distribution.sample(micro.stage, random, shift)
        velocity = flow.velocity_target(start, end, self.bridge.windows[micro.stage])
        return PathPoint(flow.interpolate(start, end, tau), tau, velocity)


def count_tokens(latents: Tensor, patch_size: int) -> int:
    """Return the number of image tokens of latents ``(n, C, H, W)``."""
    return latents.shape[-2] * latents.shape[-1] // patch_size**2


def per_stage(value: float | list[float], stages: int) -> list[float]:
    """Return one number for each stage, given one for all or a list.

    Raises:
        ValueError: a list of another length.
    """
    values = [float(value)] * stages if isinstance(value, int | float) else value
    if len(values) != stages:
        raise ValueError(f"tau_mean and tau_std need one number, or {stages} (one a stage); got {value}")
    return values
