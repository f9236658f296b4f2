"""BridgeFlow: the linear maps that join one stage of the flow to the next (NAMI, section 3.3).

The paper up-samples the endpoint of a stage and applies ``W x + B``. Parametrised on the coarse grid,
that is a small convolution followed by a pixel shuffle. It is linear least squares, so
:class:`LeastSquares` fits it in closed form from streamed sums; :func:`fit_by_gradient` does as the
paper does, and reaches the same outputs. Once fitted it is frozen, and saved with the model.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from nami_lightning.models import flow
from nami_lightning.models.float32_model import Float32Model

BridgeKind = Literal["shuffle", "channels", "affine", "matched"]


class BridgeFlow(Float32Model, ConfigMixin):
    """The K windows of the flow and the K-1 bridges between them; it stays float32 in half precision.

    Args:
        window_ratios: relative widths of the stages' windows, coarsest first; their number is K.
        channels: channels of the latents.
        kind: ``shuffle`` (C -> 4C on the coarse grid, then a pixel shuffle), ``channels`` (the paper's C -> C
            on the up-sampled endpoint), ``affine`` (a scale and a shift for each channel of the up-sampled endpoint,
            the authors' release), or ``matched`` (Pyramid-Flow's: a fixed scale and a restored noise level, nothing
            to fit).
        kernel_size: neighbourhood that ``shuffle`` sees, 1 or 3 (borders replicated).
        residual_noise: add back the noise that down-sampling removed; False: as written in the paper.
        shift: use FLUX's resolution-dependent time shift in training and sampling.
        base_shift: that shift at 256 image tokens.
        max_shift: that shift at 4096 image tokens.
        affine_size: height and width of the finest stage's latents, if ``affine`` has a shift for each position too,
            as the release has; it then works at that size alone. null: a shift for each channel.
        windows: ``contiguous`` or ``matched``, see :func:`~nami_lightning.models.flow.make_windows`; null: matched with
            the ``matched`` bridge, contiguous with the others.
        time: what the network is told: the ``noise_level``, or the share of the path that is ``remaining``.
        velocity_time: the time in which the velocity is measured, ``global`` or ``local``.
        timestep_spacing: of a stage's solver steps: ``even``, or ``linspace``, the authors'.

    Raises:
        ValueError: a bad window ratio, an unknown kind, a kernel that is not 1 or 3, or settings that exclude each
            other.
    """

    _keep_in_fp32_modules = ["maps"]

    @register_to_config
    def __init__(
        self,
        window_ratios: list[float],
        channels: int,
        kind: BridgeKind = "shuffle",
        kernel_size: int = 3,
        residual_noise: bool = True,
        shift: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        affine_size: list[int] | None = None,
        windows: flow.WindowKind | None = None,
        time: flow.TimeKind = "noise_level",
        velocity_time: flow.VelocityTime = "global",
        timestep_spacing: flow.SpacingKind = "even",
    ) -> None:
        super().__init__()
        windows = windows or ("matched" if kind == "matched" else "contiguous")
        _check_settings(
            kind, channels, kernel_size, affine_size, residual_noise, windows, timestep_spacing, len(window_ratios)
        )
        self.kind = kind
        self.residual_noise = residual_noise
        self.shift = (base_shift, max_shift) if shift else None
        self.windows = flow.make_windows(window_ratios, windows, time, velocity_time)
        self.maps = nn.ModuleList(
            _linear_map(kind, channels, kernel_size, size) for size in _sizes(affine_size, self.num_stages)[1:]
        )
        self.register_buffer("fitted", torch.tensor(kind == "matched" or len(self.windows) == 1))
        self.fitted: Tensor
        self.requires_grad_(False)

    @property
    def num_stages(self) -> int:
        """The number of stages, K."""
        return len(self.windows)

    def forward(self, stage: int, coarse_end: Tensor) -> Tensor:
        """Apply ``B_k``, k >= 1, to the endpoint of stage k - 1: ``(B, C, H, W)`` to ``(B, C, 2H, 2W)``.

        Where a stage starts must not be rounded: neither autocast nor TF32 touches it.
        """
        if self.kind == "matched":
            return flow.upsample(coarse_end) / (1 + self.windows[stage - 1].end)
        with torch.autocast(coarse_end.device.type, enabled=False), exact_convolutions():
            if self.kind == "affine":
                self.check_size(stage, *(2 * side for side in coarse_end.shape[-2:]))
                return self.maps[stage - 1](flow.upsample(coarse_end))
            mapped = self.maps[stage - 1](coarse_end)
        return F.pixel_shuffle(mapped, 2) if self.kind == "shuffle" else flow.upsample(mapped)

    def start(self, stage: int, coarse_end: Tensor, noise: Tensor) -> Tensor:
        """Return the start of ``stage >= 1``, given the end of the stage before and this stage's noise."""
        return flow.start_point(self(stage, coarse_end), noise, self.windows[stage], self.residual_noise)

    def endpoints(self, stage: int, latents: Tensor, coarse_latents: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the start and the end of ``stage``, given clean latents of this stage and of the one before.

        Args:
            stage: 0..K-1.
            latents: ``(B, C, H, W)`` at this stage's resolution.
            coarse_latents: ``(B, C, H/2, W/2)``; not used at stage 0.
            noise: unit noise of this stage, shaped as ``latents``.
        """
        end = flow.add_noise(latents, noise, self.windows[stage].end)
        if stage == 0:
            return noise, end
        coarse_end = flow.add_noise(coarse_latents, flow.coarsen_noise(noise), self.windows[stage - 1].end)
        return self.start(stage, coarse_end, noise), end

    def check_size(self, stage: int, height: int, width: int) -> None:
        """Refuse latents of a size that ``B_stage`` can't make.

        Raises:
            ValueError: it has a shift for each position of another size; the message names both.
        """
        map_ = self.maps[stage - 1]
        size = tuple(map_.bias.shape[-2:]) if isinstance(map_, AffineMap) else (1, 1)
        if size not in ((1, 1), (height, width)):
            raise ValueError(
                f"the bridge to stage {stage + 1} has a shift for each position of {size[0]}x{size[1]} latents, and "
                f"can't make {height}x{width}: use the size that it was made for, or another bridge (lightning convert "
                "--jump matched for the authors' release)"
            )

    def local_times(self, stage: int, steps: int, tokens: int) -> list[float]:
        """Return the ``steps + 1`` local times, from 1 to 0, of a stage's solver steps on ``tokens`` image tokens."""
        spacing = self.config.timestep_spacing
        return flow.local_times(steps, self.windows[stage], self.time_shift(tokens), spacing)

    def time_shift(self, tokens: int) -> float | None:
        """Return FLUX's ``mu`` for an image of ``tokens`` tokens, or None if the shift is off."""
        return None if self.shift is None else flow.resolution_shift(tokens, *self.shift)

    # --- fitting -----------------------------------------------------------------------------

    def fitting_pair(self, stage: int, latents: Tensor, coarse_latents: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of ``B_stage``, the end of the stage before, and its target: ``x_sigma`` at its start."""
        coarse = flow.add_noise(coarse_latents, flow.coarsen_noise(noise), self.windows[stage - 1].end)
        return coarse, flow.add_noise(latents, noise, self.windows[stage].start)

    def new_fit(self, stage: int) -> "LeastSquares | AffineLeastSquares":
        """Return empty sums of the least-squares problem of ``B_stage``."""
        map_, device = self.maps[stage - 1], self.fitted.device
        if isinstance(map_, AffineMap):
            return AffineLeastSquares(map_.bias.shape, device)
        assert isinstance(map_, nn.Conv2d)
        return LeastSquares(map_.weight[0].numel(), len(map_.weight), device)

    def rows(self, stage: int, coarse: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``B_stage``'s least squares on a pair, a row a coarse pixel: ``(n, inputs)`` and ``(n, outputs)``.

        For ``channels`` the target is the mean of each 2x2 cell: the four up-sampled copies are equal, so
        their common best fit is the fit to the mean. For ``affine`` both stay images ``(B, C, H, W)``.
        """
        if self.kind == "affine":
            self.check_size(stage, *target.shape[-2:])
            return flow.upsample(coarse), target
        kernel = self.config.kernel_size if self.kind == "shuffle" else 1
        padded = F.pad(coarse, [kernel // 2] * 4, mode="replicate") if kernel > 1 else coarse
        inputs = F.unfold(padded, kernel)
        outputs = F.pixel_unshuffle(target, 2) if self.kind == "shuffle" else flow.pool(target)
        return inputs.transpose(1, 2).flatten(0, 1), outputs.flatten(2).transpose(1, 2).flatten(0, 1)

    def load_solution(self, stage: int, weight: Tensor, bias: Tensor) -> None:
        """Set ``B_stage`` from what a fit's ``solve`` returned."""
        map_ = self.maps[stage - 1]
        map_.load_state_dict({"weight": weight.reshape_as(map_.weight), "bias": bias})  # type: ignore[arg-type]


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolve float32 numbers in float32 in a ``with`` block; by default cuDNN rounds them to TF32's ten bits."""
    settings: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # torch adds it at run time
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


class AffineMap(nn.Module):
    """``weight * x + bias``, a weight and a bias for each channel, or a bias for each channel and position.

    Args:
        channels: of ``x``.
        size: height and width, if every position has its own bias; else None.
    """

    def __init__(self, channels: int, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, *(size or (1, 1))))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        return self.weight * x + self.bias


def _check_settings(
    kind: str,
    channels: int,
    kernel_size: int,
    affine_size: list[int] | None,
    residual_noise: bool,
    windows: str,
    timestep_spacing: str,
    stages: int,
) -> None:
    """Refuse unknown settings, and combinations that can't be right."""
    choices = (("kind", kind, BridgeKind), ("timestep_spacing", timestep_spacing, flow.SpacingKind))
    for name, value, known in choices:
        if value not in get_args(known):
            raise ValueError(f"bridge {name} must be one of {', '.join(get_args(known))}; got {value!r}")
    if channels < 1:
        raise ValueError(f"bridge channels must be at least 1; got {channels}")
    if kernel_size not in (1, 3):
        raise ValueError(f"bridge kernel_size must be 1 or 3; got {kernel_size}")
    if affine_size is not None and (
        kind != "affine" or len(affine_size) != 2 or any(side < 1 or side % 2 ** (stages - 1) for side in affine_size)
    ):
        raise ValueError(
            "bridge affine_size is for kind affine, and its height and width must be multiples of "
            f"{2 ** (stages - 1)}; got {affine_size} for kind {kind}"
        )
    if kind == "matched" and windows != "matched":
        raise ValueError(
            f"bridge kind matched restores the noise of matched windows: it can't be combined with windows {windows}"
        )
    if kind == "matched" and not residual_noise:
        raise ValueError(
            "bridge kind matched without residual_noise starts its windows from a noise level that isn't there: set "
            "residual_noise: true, or fit a bridge (kind shuffle, channels or affine)"
        )


def _sizes(affine_size: list[int] | None, stages: int) -> list[tuple[int, int] | None]:
    """Return the height and width of each stage's latents, coarsest first, if the bridges depend on them."""
    if affine_size is None:
        return [None] * stages
    height, width = affine_size
    return [(height >> below, width >> below) for below in reversed(range(stages))]


def _linear_map(kind: BridgeKind, channels: int, kernel_size: int, size: tuple[int, int] | None) -> nn.Module:
    match kind:
        case "matched":
            return nn.Identity()
        case "channels":
            return nn.Conv2d(channels, channels, 1)
        case "affine":
            return AffineMap(channels, size)
    return nn.Conv2d(channels, 4 * channels, kernel_size, padding=kernel_size // 2, padding_mode="replicate")


class LeastSquares:
    """Solves a linear regression with a bias from streamed float64 sums: any number of rows in constant memory.

    Args:
        inputs: columns of X.
        outputs: columns of Y.
        device: where the sums live.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        self.xtx = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.xty = torch.zeros(inputs + 1, outputs, dtype=torch.float64, device=device)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """What ranks add up."""
        return self.xtx, self.xty

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows ``x`` ``(n, inputs)`` with their targets ``y`` ``(n, outputs)``."""
        x = F.pad(x.double(), (0, 1), value=1.0)
        self.xtx += x.T @ x
        self.xty += x.T @ y.double()

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return the minimum-norm solution: weight ``(outputs, inputs)`` and bias ``(outputs,)``, float64."""
        solution = torch.linalg.pinv(self.xtx, hermitian=True) @ self.xty
        return solution[:-1].T, solution[-1]


class AffineLeastSquares:
    """Solves ``y = weight * x + bias`` for each channel from streamed float64 sums.

    Args:
        shape: of the bias: ``(C, 1, 1)``, or ``(C, H, W)`` for one at each position; the weight is ``(C, 1, 1)``.
        device: where the sums live.
    """

    def __init__(self, shape: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.each_position = max(shape[1:]) > 1
        self.totals = torch.zeros(5, *shape, dtype=torch.float64, device=device)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """What ranks add up."""
        return (self.totals,)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add images ``x`` with their targets ``y``, both ``(B, C, H, W)``."""
        x, y = x.double(), y.double()
        over = 0 if self.each_position else (0, 2, 3)
        parts = torch.ones_like(x), x, y, x * x, x * y
        self.totals += torch.stack([part.sum(over, keepdim=not self.each_position) for part in parts]).view_as(
            self.totals
        )

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return the weight ``(C, 1, 1)`` and the bias, float64; the weight is 1 where ``x`` never varies."""
        count, x, y, xx, xy = self.totals
        covariance = (xy - x * y / count).sum((1, 2), keepdim=True)
        variance = (xx - x * x / count).sum((1, 2), keepdim=True)
        weight = torch.where(variance > 1e-12 * xx.sum((1, 2), keepdim=True), covariance / variance, 1.0)
        return weight, (y - weight * x) / count


def fit_by_gradient(
    bridge: BridgeFlow, stage: int, pairs: Iterable[tuple[Tensor, Tensor]], steps: int, learning_rate: float = 1e-3
) -> None:
    """Fit ``B_stage`` as the paper does: MSE by stochastic gradients, one step a pair.

    Adam with a cosine decay of the learning rate; the paper gives 1e-3 and 10k steps, not the optimizer.

    Args:
        bridge: changed in place.
        stage: 1..K-1.
        pairs: at least ``steps`` batches of :meth:`BridgeFlow.fitting_pair`.
        steps: optimizer steps.
        learning_rate: at the first step.
    """
    map_ = bridge.maps[stage - 1].requires_grad_(True)
    optimizer = torch.optim.Adam(map_.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for coarse, target in islice(pairs, steps):
            loss = F.mse_loss(bridge(stage, coarse), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    map_.requires_grad_(False)
