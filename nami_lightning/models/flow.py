"""The mathematics of bridged progressive rectified flow: pure functions on tensors.

Noise level ``sigma``: 1 is noise, 0 is data. Stage k = 0..K-1 (coarsest first) covers one window of
noise levels. Inside a window the local time ``tau`` runs from 1 (start) to 0 (end) and

    x_tau = tau * start + (1 - tau) * end,      velocity = (start - end) / width.

With one window this is rectified flow as FLUX trains it. Images, latents and noise are ``(B, C, H, W)``
tensors; per-sample quantities (``tau``) are ``(B,)``. Source: NAMI, sections 3.1 to 3.3. The residual
noise of :func:`start_point` is not in the paper; without it a stage's start lacks the detail's noise.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor


class Window(NamedTuple):
    """The noise levels of one stage, from ``start`` down to ``end``, both in [0, 1]."""

    start: float
    end: float

    @property
    def width(self) -> float:
        """The length of the window in global time."""
        return self.start - self.end


def make_windows(ratios: Sequence[float], matched: bool = False) -> tuple[Window, ...]:
    """Split the noise levels 1..0 into one window a stage, coarsest (noisiest) first.

    Args:
        ratios: relative window widths, all positive; ``(1, 1, 1)`` gives the edges 1, 2/3, 1/3, 0.
        matched: let every later window start at ``2s / (1 + s)``, s being the end of the one before:
            the noise level of an up-sampled coarse endpoint whose missing noise was restored
            (the ``matched`` bridge).

    Raises:
        ValueError: no ratio, or one that is not a positive number.
    """
    if not ratios or not all(r > 0 and math.isfinite(r) for r in ratios):
        raise ValueError(f"window ratios must be positive numbers, one a stage; got {list(ratios)}")
    total = sum(ratios)
    sigmas = [1 - sum(ratios[:k]) / total for k in range(len(ratios))] + [0.0]
    starts = [2 * s / (1 + s) if matched else s for s in sigmas[:-1]]
    return tuple(Window(start, end) for start, end in zip(starts, sigmas[1:], strict=True))


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
    """Return the velocity in global time, so that all stages and FLUX itself mean the same speed."""
    return (start - end) / window.width


def global_time(tau: Tensor, window: Window) -> Tensor:
    """Return ``t = end + tau * width`` in [0, 1], the time that the network is told."""
    return window.end + tau * window.width


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
Velocity = Callable[[Tensor, float], Tensor]


def time_grid(steps: int, window: Window, mu: float | None = None) -> list[float]:
    """Return ``steps + 1`` global times from the window's start to its end, even in tau, then shifted by ``mu``."""
    tau = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if mu is not None:
        tau = shift_tau(tau, mu)
    return global_time(tau, window).tolist()


class SolverStep(NamedTuple):
    """The state after a step: ``x``, and the velocity and step length that the multistep solver uses next."""

    x: Tensor
    velocity: Tensor
    length: float


def solver_step(
    kind: SolverKind, velocity: Velocity, x: Tensor, t: float, t_next: float, previous: SolverStep | None
) -> SolverStep:
    """Solve ``dx/dt = v(x, t)`` for one step from ``t`` down to ``t_next``.

    Args:
        kind: ``euler`` (as in the paper), ``heun`` (second order, two calls a step), or ``multistep``
            (two-step Adams-Bashforth: second order at one call a step, Euler at a stage's first).
        velocity: ``v(x, t)``.
        x: the state at ``t``.
        t: global time now.
        t_next: global time after the step, below ``t``.
        previous: the result of the stage's last step, or None at a stage's start.

    Raises:
        ValueError: an unknown kind.
    """
    length = t_next - t
    v = velocity(x, t)
    match kind:
        case "euler":
            slope = v
        case "heun":
            slope = (v + velocity(x + length * v, t_next)) / 2
        case "multistep":
            slope = v if previous is None else v + length / previous.length / 2 * (v - previous.velocity)
        case _:
            raise ValueError(f"solver must be one of {get_args(SolverKind)}; got {kind!r}")
    return SolverStep(x + length * slope, v, length)
