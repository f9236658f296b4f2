"""The mathematics of bridged progressive rectified flow: pure functions on tensors.

Noise level ``sigma``: 1 is noise, 0 is data. Stage k = 0..K-1 (coarsest first) covers one window of
noise levels. Inside a window the local time ``tau`` runs from 1 (start) to 0 (end) and

    x_tau = tau * start + (1 - tau) * end,      velocity = (start - end) / duration.

The duration is the window's width, or 1 where the velocity is of local time. A window also knows the
times that the network is told. With one window this is rectified flow as FLUX trains it.

Images, latents and noise are ``(B, C, H, W)`` tensors; per-sample quantities (``tau``) are ``(B,)``. Source: NAMI,
sections 3.1 to 3.3. The residual noise of :func:`start_point` is not in the paper; without it a stage's start lacks
the detail's noise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

TimeKind = Literal["noise_level", "remaining"]
VelocityTime = Literal["global", "local"]
WindowKind = Literal["contiguous", "matched"]
Time = TypeVar("Time", float, Tensor)

TRAIN_TIMESTEPS = 1000
"""The steps that the network's time is counted in, from noise to data, as in FLUX."""


@dataclass(frozen=True)
class Window:
    """The part of the flow that one stage covers.

    Attributes:
        start: the noise level at its start, in [0, 1].
        end: the noise level at its end.
        times: the times that the network is told at the start and at the end, in [0, 1]; None: the noise levels.
        velocity_time: the time in which the velocity is measured: ``global``, the noise level, so that all stages and
            FLUX itself mean the same speed; or ``local``, the stage's own, from 1 to 0.
    """

    start: float
    end: float
    times: tuple[float, float] | None = None
    velocity_time: VelocityTime = "global"

    @property
    def width(self) -> float:
        """The noise levels that the window covers."""
        return self.start - self.end

    @property
    def duration(self) -> float:
        """How long the stage takes in the velocity's time."""
        return self.width if self.velocity_time == "global" else 1.0

    def timestep(self, tau: Time) -> Time:
        """Return the time in [0, 1] that the network is told at local time ``tau``."""
        first, last = self.times or (self.start, self.end)
        return last + tau * (first - last)


def make_windows(
    ratios: Sequence[float],
    kind: WindowKind = "contiguous",
    time: TimeKind = "noise_level",
    velocity_time: VelocityTime = "global",
) -> tuple[Window, ...]:
    """Split the noise levels 1..0 into one window a stage, coarsest (noisiest) first.

    Args:
        ratios: relative window widths, all positive; ``(1, 1, 1)`` gives the edges 1, 2/3, 1/3, 0.
        kind: ``contiguous``: a window starts where the one before ends; ``matched``: a later window starts at
            ``2s / (1 + s)``, s being the end of the one before: the noise level of an up-sampled coarse endpoint whose
            missing noise was restored (Pyramid-Flow).
        time: what the network is told: the ``noise_level``, or the share of all windows' widths that is ``remaining``.
        velocity_time: see :class:`Window`.

    Raises:
        ValueError: no ratio, or one that is not a positive number; an unknown kind.
    """
    if not ratios or not all(r > 0 and math.isfinite(r) for r in ratios):
        raise ValueError(f"window ratios must be positive numbers, one a stage; got {list(ratios)}")
    for name, value, known in (
        ("windows", kind, WindowKind),
        ("time", time, TimeKind),
        ("velocity_time", velocity_time, VelocityTime),
    ):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}; got {value!r}")
    total = sum(ratios)
    sigmas = [1 - sum(ratios[:k]) / total for k in range(len(ratios))] + [0.0]
    starts = [2 * s / (1 + s) if kind == "matched" else s for s in sigmas[:-1]]
    levels = list(zip(starts, sigmas[1:], strict=True))
    if time == "noise_level":
        return tuple(Window(start, end, None, velocity_time) for start, end in levels)
    times = remaining_times([start - end for start, end in levels])
    return tuple(Window(*level, span, velocity_time) for level, span in zip(levels, times, strict=True))


def remaining_times(widths: Sequence[float]) -> list[tuple[float, float]]:
    """Return the share of the whole path that is still to come, at the start and at the end of each window.

    It is counted in whole steps of the 1000, and the last one is 1 and not 0, as the authors' release counts
    (its scheduler is Pyramid-Flow's).

    Args:
        widths: of the windows, which the path walks through one after the other.
    """
    shares = [covered / sum(widths) for covered in accumulate(widths, initial=0.0)]
    steps = [TRAIN_TIMESTEPS - math.floor(TRAIN_TIMESTEPS * share + 1e-6) for share in shares[:-1]]
    return [(first / TRAIN_TIMESTEPS, last / TRAIN_TIMESTEPS) for first, last in pairwise([*steps, 1])]


# --- the pyramids ------------------------------------------------------------------------------


def pool(x: Tensor) -> Tensor:
    """Average each 2x2 cell: ``(B, C, 2H, 2W)`` to ``(B, C, H, W)``. Pooling twice is a 4x4 mean."""
    return F.avg_pool2d(x, 2)


def upsample(x: Tensor) -> Tensor:
    """Up-sample by nearest neighbour: ``(B, C, H, W)`` to ``(B, C, 2H, 2W)``."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def detail(x: Tensor) -> Tensor:
    """Return what :func:`pool` removes from ``x``; it is orthogonal to all that pooling keeps."""
    return x - upsample(pool(x))


def coarsen_noise(noise: Tensor) -> Tensor:
    """Halve the resolution of noise and keep its unit variance: ``2 * avg_pool2(noise)``."""
    return 2 * pool(noise)


def pyramid(finest: Tensor, levels: int, coarsen: Callable[[Tensor], Tensor] = pool) -> list[Tensor]:
    """Return ``levels`` tensors, coarsest first; each is the ``coarsen`` of the next.

    Latents by default; ``coarsen=coarsen_noise`` gives the noise shared across stages.
    """
    tensors = [finest]
    for _ in range(levels - 1):
        tensors.insert(0, coarsen(tensors[0]))
    return tensors


# --- one stage of the flow ---------------------------------------------------------------------


def add_noise(latents: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return ``x_sigma = sigma * eps + (1 - sigma) * z`` (NAMI, eq. 2): a stage's end at its window's end."""
    return sigma * noise + (1 - sigma) * latents


def start_point(bridged: Tensor, noise: Tensor, window: Window, residual_noise: bool = True) -> Tensor:
    """Return the start of a stage after the first: the bridged coarse endpoint, plus the noise that pooling removed.

    Args:
        bridged: ``B_k(end of the stage before)`` at this stage's resolution.
        noise: this stage's unit noise; in sampling, fresh noise has the same law, since only the part
            that is orthogonal to the coarse grid is used.
        window: this stage's window.
        residual_noise: False is as written in the paper: the start then lies on a quarter of the dimensions
            and the flow can reach only the mean of what the coarse image does not determine.
    """
    return bridged + window.start * detail(noise) if residual_noise else bridged


def interpolate(start: Tensor, end: Tensor, tau: Tensor) -> Tensor:
    """Return ``tau * start + (1 - tau) * end`` (NAMI, eq. 3), ``tau`` of shape ``(B,)`` in [0, 1]."""
    tau = tau.view(-1, 1, 1, 1).to(start.dtype)
    return tau * start + (1 - tau) * end


def velocity_target(start: Tensor, end: Tensor, window: Window) -> Tensor:
    """Return the velocity from ``end`` to ``start``, in the window's own unit of time."""
    return (start - end) / window.duration


def clean_estimate(x: Tensor, velocity: Tensor, tau: float | Tensor, window: Window) -> Tensor:
    """Return the clean latents to which ``x`` at local time ``tau``, a number or ``(B,)``, and a velocity there point.

    A stage moves along ``sigma * eps + (1 - sigma) * z``, so ``z`` lies ``sigma`` further the same way. That is exact
    for a straight flow of stage 1, and the last stage's end is its own estimate; at the start of the other stages the
    bridge's image stands for ``z``.
    """
    sigma = window.end + tau * (window.start - window.end)
    if isinstance(sigma, Tensor):
        sigma = sigma.view(-1, 1, 1, 1)
    return x - sigma * window.duration / (window.start - window.end) * velocity


# --- local time --------------------------------------------------------------------------------

TauKind = Literal["logit_normal", "uniform", "mixture"]


def sample_tau(
    kind: TauKind, normal: Tensor, uniform: Tensor, mean: float = 0.0, std: float = 1.0, uniform_share: float = 0.1
) -> Tensor:
    """Return local times, given random numbers, so that they are a pure function of a sample's own generator.

    Args:
        kind: ``logit_normal`` as SD3; ``uniform``; or ``mixture``, uniform with probability
            ``uniform_share`` and logit-normal otherwise: every stage is sampled from tau = 1, which a
            logit-normal alone hardly trains (P(tau > 0.95) = 0.002).
        normal: ``(B,)`` standard normal numbers.
        uniform: ``(B, 2)`` uniform numbers in [0, 1): the choice of the mixture's part, and its value.
        mean: mean of the logit.
        std: standard deviation of the logit.
        uniform_share: weight of the uniform part of the mixture, in [0, 1].

    Returns:
        ``(B,)`` in [0, 1].

    Raises:
        ValueError: an unknown kind.
    """
    choice, value = uniform.unbind(-1)
    logit_normal = torch.sigmoid(mean + std * normal)
    match kind:
        case "logit_normal":
            return logit_normal
        case "uniform":
            return value
        case "mixture":
            return torch.where(choice < uniform_share, value, logit_normal)
    raise ValueError(f"tau must be one of {get_args(TauKind)}; got {kind!r}")


def resolution_shift(tokens: int, base_shift: float = 0.5, max_shift: float = 1.15) -> float:
    """Return FLUX's ``mu``: linear in the number of image tokens, ``base_shift`` at 256 and ``max_shift`` at 4096."""
    return base_shift + (max_shift - base_shift) * (tokens - 256) / (4096 - 256)


def shift_tau(tau: Tensor, mu: float) -> Tensor:
    """Move local times towards noise: ``e^mu tau / (1 + (e^mu - 1) tau)``, which keeps 0 and 1 (SD3, FLUX)."""
    scale = math.exp(mu)
    return scale * tau / (1 + (scale - 1) * tau)


# --- the loss of a step ------------------------------------------------------------------------

LossWeighting = Literal["ratio", "uniform", "balanced"]


def loss_weights(kind: LossWeighting, ratio: Tensor, running_losses: Tensor) -> Tensor:
    """Return the weights of the stages' losses in one step; they sum to 1, and a stage without samples has 0.

    Args:
        kind: ``ratio`` (each stage's share of the samples), ``uniform`` over the stages trained, or
            ``balanced`` (in inverse proportion to a running mean of each stage's own loss).
        ratio: ``(K,)`` the phase's sampling ratio, float.
        running_losses: ``(K,)`` positive; used by ``balanced`` alone.

    Returns:
        ``(K,)``.

    Raises:
        ValueError: an unknown kind.
    """
    match kind:
        case "ratio":
            weights = ratio
        case "uniform":
            weights = (ratio > 0).float()
        case "balanced":
            weights = (ratio > 0) / running_losses
        case _:
            raise ValueError(f"loss_weighting must be one of {get_args(LossWeighting)}; got {kind!r}")
    return weights / weights.sum()


# --- solvers -----------------------------------------------------------------------------------

SolverKind = Literal["euler", "heun", "multistep"]
SpacingKind = Literal["even", "linspace"]
Velocity = Callable[[Tensor, Time], Tensor]


def local_times(steps: int, window: Window, mu: float | None = None, spacing: SpacingKind = "even") -> list[float]:
    """Return ``steps + 1`` local times from 1 to 0: the ends of a stage's solver steps.

    Args:
        steps: at least 1.
        window: of the stage.
        mu: FLUX's shift towards noise, see :func:`resolution_shift`; None: no shift.
        spacing: ``even`` in local time; or ``linspace``, which spreads the times evenly over the N of the 1000
            timesteps that lie in the window, and adds the 0: the last step is 1 / N long (the authors' release).
    """
    if spacing == "even":
        tau = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    else:
        timesteps = round(TRAIN_TIMESTEPS * (window.timestep(1.0) - window.timestep(0.0)))
        tau = F.pad(torch.linspace(1, 1 / timesteps, steps, dtype=torch.float64), (0, 1))
    return (tau if mu is None else shift_tau(tau, mu)).tolist()


class SolverStep(NamedTuple):
    """The state after a step: ``x``, and the velocity and step length that the multistep solver uses next."""

    x: Tensor
    velocity: Tensor
    length: float | Tensor


def solver_step(
    kind: SolverKind,
    velocity: Velocity[Time],
    x: Tensor,
    tau: Time,
    tau_next: Time,
    duration: float,
    previous: SolverStep | None,
) -> SolverStep:
    """Solve ``dx/dtau = duration * v(x, tau)`` for one step from ``tau`` down to ``tau_next``.

    Args:
        kind: ``euler`` (as in the paper), ``heun`` (second order, two calls a step), or ``multistep``
            (two-step Adams-Bashforth: second order at one call a step, Euler at a stage's first).
        velocity: ``v(x, tau)``.
        x: the state at ``tau``.
        tau: local time now: a number, or ``(B, 1, 1, 1)``.
        tau_next: local time after the step, below ``tau``; likewise.
        duration: of the stage, in the velocity's time.
        previous: the result of the stage's last step, or None at a stage's start.

    Raises:
        ValueError: an unknown kind.
    """
    length = (tau_next - tau) * duration
    v = velocity(x, tau)
    match kind:
        case "euler":
            slope = v
        case "heun":
            slope = (v + velocity(x + length * v, tau_next)) / 2
        case "multistep":
            slope = v if previous is None else v + length / previous.length / 2 * (v - previous.velocity)
        case _:
            raise ValueError(f"solver must be one of {get_args(SolverKind)}; got {kind!r}")
    return SolverStep(x + length * slope, v, length)
