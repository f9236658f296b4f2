"""BridgeFlow: the linear maps that join one stage of the flow to the next (NAMI, section 3.3).

The paper up-samples the endpoint of a stage and applies ``W x + B``. Parametrised on the coarse grid,
that is a small convolution followed by a pixel shuffle. It is linear least squares, so
:class:`LeastSquares` fits it in closed form from streamed sums; :func:`fit_by_gradient` does as the
paper does, and reaches the same outputs. Once fitted it is frozen, and saved with the model.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from nami_lightning.models import flow
from nami_lightning.models.float32_model import Float32Model

BridgeKind = Literal["shuffle", "channels", "matched"]


class BridgeFlow(Float32Model, ConfigMixin):
    """The K windows of the flow and the K-1 bridges between them; it stays float32 in half precision.

    Args:
        window_ratios: relative widths of the stages' windows, coarsest first; their number is K.
        channels: channels of the latents.
        kind: ``shuffle`` (C -> 4C on the coarse grid, then a pixel shuffle), ``channels`` (the paper's C -> C
            on the up-sampled endpoint), or ``matched`` (Pyramid-Flow's: a fixed scale and a restored
            noise level, nothing to fit).
        kernel_size: neighbourhood that ``shuffle`` sees, 1 or 3 (borders replicated).
        residual_noise: add back the noise that down-sampling removed; False: as written in the paper.
        shift: use FLUX's resolution-dependent time shift in training and sampling.
        base_shift: that shift at 256 image tokens.
        max_shift: that shift at 4096 image tokens.

    Raises:
        ValueError: a bad window ratio, an unknown kind, a kernel that is not 1 or 3.
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
    ) -> None:
        super().__init__()
        if kind not in ("shuffle", "channels", "matched"):
            raise ValueError(f"bridge kind must be shuffle, channels or matched; got {kind!r}")
        if kernel_size not in (1, 3):
            raise ValueError(f"bridge kernel_size must be 1 or 3; got {kernel_size}")
        self.kind = kind
        self.residual_noise = residual_noise
        self.shift = (base_shift, max_shift) if shift else None
        self.windows = flow.make_windows(window_ratios, matched=kind == "matched")
        self.maps = nn.ModuleList(_linear_map(kind, channels, kernel_size) for _ in self.windows[1:])
        self.register_buffer("fitted", torch.tensor(kind == "matched" or len(self.windows) == 1))
        self.fitted: Tensor
        self.requires_grad_(False)

    @property
    def num_stages(self) -> int:
        """The number of stages, K."""
        return len(self.windows)

    def forward(self, stage: int, coarse_end: Tensor) -> Tensor:
        """Apply ``B_k``, k >= 1, to the endpoint of stage k - 1: ``(B, C, H, W)`` to ``(B, C, 2H, 2W)``."""
        if self.kind == "matched":
            return flow.upsample(coarse_end) / (1 + self.windows[stage - 1].end)
        with torch.autocast(coarse_end.device.type, enabled=False):  # where a stage starts must not be rounded
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

    def time_shift(self, tokens: int) -> float | None:
        """Return FLUX's ``mu`` for an image of ``tokens`` tokens, or None if the shift is off."""
        return None if self.shift is None else flow.resolution_shift(tokens, *self.shift)

    # --- fitting -----------------------------------------------------------------------------

    def fitting_pair(self, stage: int, latents: Tensor, coarse_latents: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input and the target of ``B_stage``: ``x_sigma`` of both stages at the boundary's sigma."""
        sigma = self.windows[stage - 1].end
        coarse = flow.add_noise(coarse_latents, flow.coarsen_noise(noise), sigma)
        return coarse, flow.add_noise(latents, noise, sigma)

    def rows(self, coarse: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least-squares problem of a pair, one row a coarse pixel: ``(n, inputs)`` and ``(n, outputs)``.

        For ``channels`` the target is the mean of each 2x2 cell: the four up-sampled copies are equal, so
        their common best fit is the fit to the mean.
        """
        kernel = self.config.kernel_size if self.kind == "shuffle" else 1
        padded = F.pad(coarse, [kernel // 2] * 4, mode="replicate") if kernel > 1 else coarse
        inputs = F.unfold(padded, kernel)
        outputs = F.pixel_unshuffle(target, 2) if self.kind == "shuffle" else flow.pool(target)
        return inputs.transpose(1, 2).flatten(0, 1), outputs.flatten(2).transpose(1, 2).flatten(0, 1)

    def load_solution(self, stage: int, weight: Tensor, bias: Tensor) -> None:
        """Set ``B_stage`` from ``(outputs, inputs)`` and ``(outputs,)``."""
        conv = self.maps[stage - 1]
        assert isinstance(conv, nn.Conv2d)
        conv.load_state_dict({"weight": weight.reshape(conv.weight.shape), "bias": bias})


def _linear_map(kind: BridgeKind, channels: int, kernel_size: int) -> nn.Module:
    if kind == "matched":
        return nn.Identity()
    if kind == "channels":
        return nn.Conv2d(channels, channels, 1)
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

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows ``x`` ``(n, inputs)`` with their targets ``y`` ``(n, outputs)``."""
        x = F.pad(x.double(), (0, 1), value=1.0)
        self.xtx += x.T @ x
        self.xty += x.T @ y.double()

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return the minimum-norm solution: weight ``(outputs, inputs)`` and bias ``(outputs,)``, float64."""
        solution = torch.linalg.pinv(self.xtx, hermitian=True) @ self.xty
        return solution[:-1].T, solution[-1]


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
    conv = bridge.maps[stage - 1].requires_grad_(True)
    optimizer = torch.optim.Adam(conv.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for coarse, target in islice(pairs, steps):
            loss = F.mse_loss(bridge(stage, coarse), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    conv.requires_grad_(False)
