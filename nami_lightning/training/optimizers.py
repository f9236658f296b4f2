"""Muon for the blocks' matrices and AdamW for all else, as the one optimizer that a recipe names."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

from nami_lightning.models.transformer import is_hidden_layer


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Move a matrix ``U S V'`` towards ``U V'``, whose singular values are one, by Newton-Schulz iterations.

    In bfloat16 on a GPU, in float32 on a CPU: one without instructions for bfloat16 multiplies in it 35 times slower.
    A matrix that is sharded is gathered once, in that dtype; every rank iterates on all of it and keeps its shard.

    Args:
        matrix: ``(m, n)``.
        coefficients: a, b, c of an iteration: a singular value s becomes ``a s + b s^3 + c s^5``.
        steps: iterations.
    """
    x = matrix.to(torch.float32 if matrix.device.type == "cpu" else torch.bfloat16)
    if isinstance(x, DTensor):
        whole = orthogonalize(x.full_tensor(), coefficients, steps)
        return distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None)
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)  # no singular value is above one then
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Muon):
    """torch's Muon with updates of the size of AdamW's; on a CPU it computes in float32, see :func:`orthogonalize`.

    The size is that of "Muon is scalable for LLM training", torch's ``match_rms_adamw``.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the weights by the orthogonalised Nesterov momentum."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                update = orthogonalize(parameter.grad.lerp(mean, momentum), group["ns_coefficients"], group["ns_steps"])
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update, alpha=-lr * 0.2 * max(parameter.shape) ** 0.5)


class MuonAdamW(Optimizer):
    """Muon and AdamW behind one learning rate.

    Muon orthogonalises the momentum of a matrix: on the demo's first stage it reached in 300 steps a loss that AdamW
    did not reach in 400. It is for matrices between hidden features; embedders, heads, modulations, norms and biases
    are AdamW's. Updates of both are of one size, so both take the curriculum's rate.

    Args:
        params: names and parameters of a NamiTransformer2DModel.
        lr: of both.
        weight_decay: of both.
        momentum: Muon's, in [0, 1).
        betas: AdamW's.

    Raises:
        ValueError: parameters without names, or none that is a block's matrix.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        named = list(params)
        if not all(isinstance(pair, tuple) for pair in named):
            raise ValueError("MuonAdamW takes named_parameters(): it tells the blocks' matrices by their names")
        matrices = [pair for pair in named if is_hidden_matrix(*pair)]
        others = [pair for pair in named if not is_hidden_matrix(*pair)]
        if not matrices:
            raise ValueError("MuonAdamW found no block's matrix among the parameters: use AdamW")
        self.parts: list[Optimizer] = [Muon(matrices, lr, weight_decay, momentum)]
        if others:  # a LoRA has matrices alone
            self.parts.append(AdamW(others, lr, betas, weight_decay=weight_decay, fused=True))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let Muon and AdamW work on this optimizer's groups and state."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state; ``load_state_dict`` ends with this."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step of Muon and one of AdamW."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Tell whether a parameter is a block's matrix between hidden features, which Muon updates."""
    return parameter.ndim == 2 and is_hidden_layer(name)
