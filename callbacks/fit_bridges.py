"""Fits the bridges before training starts, as the paper does, in closed form or by gradients."""

from collections.abc import Iterator
from time import perf_counter
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm.auto import tqdm

from nami_lightning.datamodules.multi_resolution import MultiResolutionDataModule, StepDataset
from nami_lightning.models.bridge import fit_by_gradient
from nami_lightning.training import rng
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.module import NamiModule
from nami_lightning.utils.collectives import sum_over_ranks

PRETRAINING = "bridge"


class BridgePretraining(L.Callback):
    """Fits every bridge on training images at the start of fit, then freezes it; does nothing if it is fitted already.

    Args:
        method: ``closed_form`` solves the least squares; ``gradient`` is the paper's way to the same outputs.
        samples: images of each boundary's finer stage for ``closed_form``.
        steps: optimizer steps of ``gradient``; 10,000 in the paper.
        learning_rate: of ``gradient``; 1e-3 in the paper.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(
        self,
        method: Literal["closed_form", "gradient"] = "closed_form",
        samples: int = 4096,
        steps: int = 10_000,
        learning_rate: float = 1e-3,
    ) -> None:
        if samples < 1 or steps < 1:
            raise ValueError(f"BridgePretraining needs samples and steps of at least 1; got {samples} and {steps}")
        self.method, self.samples, self.steps, self.learning_rate = method, samples, steps, learning_rate
        self.seconds = 0.0
        """How long the fitting took; 0 if nothing had to be fitted."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit the bridges that are not fitted."""
        assert isinstance(pl_module, NamiModule)
        bridge = pl_module.bridge
        if bridge.fitted:
            return
        begin = perf_counter()
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, MultiResolutionDataModule)
        for stage in range(1, bridge.num_stages):
            if self.method == "closed_form":
                # Each rank sums over its own slices of the batches; the sums are added up.
                steps = data.steps(trainer.global_rank, trainer.world_size)
                self._solve(pl_module, steps, stage, quiet=not trainer.is_global_zero)
            else:
                # Every rank walks the same path, so nothing needs to be exchanged.
                pairs = self._pairs(pl_module, data.steps(), stage)
                progress = tqdm(pairs, f"fitting bridge {stage}", self.steps, disable=not trainer.is_global_zero)
                fit_by_gradient(bridge, stage, progress, self.steps, self.learning_rate)
        bridge.fitted.fill_(True)
        self.seconds = perf_counter() - begin
        rank_zero_info(f"Fitted {bridge.num_stages - 1} bridge(s) ({self.method}).")

    def _solve(self, module: NamiModule, steps: StepDataset, stage: int, quiet: bool) -> None:
        fit = module.bridge.new_fit(stage)
        done = 0
        with tqdm(total=self.samples, desc=f"fitting bridge {stage}", unit="image", disable=quiet) as progress:
            for coarse, target in self._pairs(module, steps, stage):
                fit.update(*module.bridge.rows(stage, coarse, target))
                count = len(coarse) * steps.ranks
                done += count
                progress.update(min(count, self.samples - progress.n))
                if done >= self.samples:
                    break
        sum_over_ranks(*fit.sums)
        module.bridge.load_solution(stage, *fit.solve())

    @torch.no_grad()
    def _pairs(self, module: NamiModule, steps: StepDataset, stage: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield endless ``(coarse, target)`` batches of the boundary before ``stage``, in the data's own order."""
        number = 0
        while True:
            micro: MicroBatch = steps.stage_batch(number, stage).to(module.device)
            latents, coarse_latents = module.latents(micro, PRETRAINING)
            random = rng.sample(module.seed, PRETRAINING, micro.global_indices, latents.shape[1:], module.device)
            yield module.bridge.fitting_pair(stage, latents, coarse_latents, random.noise)
            number += 1
