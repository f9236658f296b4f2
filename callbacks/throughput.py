"""How fast a run goes, how much of its devices and of their memory it uses, and how long it waits for data."""

from time import perf_counter
from typing import Any

import lightning as L
import torch
from torch import nn

from nami_lightning.metrics.budget import sample_flops
from nami_lightning.planning.flops import find_device, matmul_dtype
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.module import NamiModule
from nami_lightning.training.strategies import FSDP2Strategy

PROGRESS_BAR = ("images_per_second", "model_flops_utilization")


class Throughput(L.Callback):
    """Logs rates over the steps since the last log, of all ranks together, without pauses for validation and sampling.

    Logged below ``throughput/``:

    - ``images_per_second`` and ``tokens_per_second``, of all stages and of each;
    - ``seconds_per_step``, ``seconds_waiting_for_data`` of it, and ``share_waiting_for_data``;
    - ``tflops_per_second``: what the model needs, on one device (recomputed blocks and frozen encoders don't count);
    - ``model_flops_utilization``: that as a share of the device's peak, if that is known;
      ``hardware_flops_utilization``: the same with what activation checkpointing recomputes, if anything;
    - ``peak_memory_gib_stageK``, on CUDA: the most that was allocated on this rank from a micro-batch of a stage to the
      next micro-batch.

    All of it is arithmetic on the host: no step waits for the device for its sake.

    Args:
        every_n_steps: how often to log; a rate is a mean over so many steps.
        peak_flops: FLOP/s that a device can do, for one that ``nami_lightning.planning.flops.DEVICES`` doesn't know.

    Raises:
        ValueError: ``every_n_steps`` below 1, or ``peak_flops`` not above 0.
    """

    def __init__(self, every_n_steps: int = 10, peak_flops: float | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Throughput.every_n_steps must be at least 1; got {every_n_steps}")
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"Throughput.peak_flops must be above 0 FLOP/s; got {peak_flops}")
        self.every_n_steps, self.peak_flops = every_n_steps, peak_flops

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting."""
        assert isinstance(pl_module, NamiModule)
        self.total_waited = self.total_worked = self.waited_before = 0.0
        self.peak = self.peak_flops or device_peak(trainer, pl_module.device)
        self.memory = StageMemory(pl_module.transformer) if pl_module.device.type == "cuda" else None
        self._reset(pl_module.num_stages)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock of a step."""
        self.begin = perf_counter()
        if self.memory is not None:
            self.memory.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: list[MicroBatch], batch_idx: int
    ) -> None:
        """Count the step; log when it is time."""
        assert isinstance(pl_module, NamiModule)
        self.worked += perf_counter() - self.begin
        self.steps += 1
        if self.memory is not None:
            self.memory.stop()
        for micro in batch:
            images = len(micro) * trainer.world_size // pl_module.curriculum.context_parallel[micro.stage]
            self.images[micro.stage] += images
            self.tokens[micro.stage] += images * pl_module.tokens(micro.stage)
        if pl_module.step % self.every_n_steps == 0:
            waited_in_all = trainer.train_dataloader.seconds_waited  # type: ignore[union-attr]
            self._log(pl_module, waited_in_all - self.waited_before)
            self.waited_before = waited_in_all

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print what was measured."""
        if self.memory is not None:
            self.memory.remove()
        total = self.total_waited + self.total_worked
        if total and trainer.is_global_zero:
            print(f"Time waiting for data: {self.total_waited / total:.1%} of {total:.0f} s of training.")

    def _log(self, module: NamiModule, waited: float) -> None:
        self.total_waited += waited
        self.total_worked += self.worked
        for name, value in self._rates(module, waited).items():
            # A tensor on the CPU: a number would be sent to the device, which waits for all that runs there.
            module.log(f"throughput/{name}", torch.tensor(value), prog_bar=name in PROGRESS_BAR)
        self._reset(module.num_stages)

    def _rates(self, module: NamiModule, waited: float) -> dict[str, float]:
        elapsed = waited + self.worked
        rates = {
            "seconds_per_step": elapsed / self.steps,
            "seconds_waiting_for_data": waited / self.steps,
            "share_waiting_for_data": waited / elapsed,
            "images_per_second": sum(self.images) / elapsed,
            "tokens_per_second": sum(self.tokens) / elapsed,
        }
        for stage, (images, tokens) in enumerate(zip(self.images, self.tokens, strict=True), 1):
            rates[f"images_per_second_stage{stage}"] = images / elapsed
            rates[f"tokens_per_second_stage{stage}"] = tokens / elapsed
        flops_of = [sample_flops(module, stage, module.step - 1) for stage in range(module.num_stages)]
        device_seconds = elapsed * module.trainer.world_size
        needed, computed = (
            sum(images * getattr(flops, kind) for images, flops in zip(self.images, flops_of, strict=True))
            / device_seconds
            for kind in ("model", "hardware")
        )
        rates["tflops_per_second"] = needed / 1e12
        if self.peak:
            rates["model_flops_utilization"] = needed / self.peak
            if computed > needed:
                rates["hardware_flops_utilization"] = computed / self.peak
        if self.memory is not None:
            rates |= {f"peak_memory_gib_stage{k + 1}": size / 2**30 for k, size in sorted(self.memory.peaks.items())}
        return rates

    def _reset(self, stages: int) -> None:
        self.worked = 0.0
        self.steps = 0
        self.images, self.tokens = [0] * stages, [0] * stages
        if self.memory is not None:
            self.memory.peaks.clear()


def device_peak(trainer: L.Trainer, device: torch.device) -> float | None:
    """Return the peak FLOP/s of the device that trains, in the dtype it trains in; None if it is not in the table."""
    if device.type != "cuda":
        return None
    strategy = trainer.strategy
    param_dtype = strategy.policy.param_dtype if isinstance(strategy, FSDP2Strategy) else torch.float32
    known = find_device(torch.cuda.get_device_name(device))
    if known is None:
        return None
    return known.peak_flops(matmul_dtype(trainer.precision, str(param_dtype).removeprefix("torch.")))


class StageMemory:
    """Notes the most memory that CUDA allocated while each stage's micro-batches ran: the allocator's own count.

    Args:
        transformer: whose forward pass begins a micro-batch.

    Attributes:
        peaks: bytes by stage, of the steps since they were last cleared.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.peaks: dict[int, int] = {}
        self.stage: int | None = None
        self.in_step = False
        self.handle = transformer.register_forward_pre_hook(self._enter, with_kwargs=True)

    def start(self) -> None:
        """Begin a step."""
        self.in_step = True
        self.stage = None

    def stop(self) -> None:
        """End a step."""
        self._close()
        self.in_step = False

    def remove(self) -> None:
        """Remove the hook from the network."""
        self.handle.remove()

    def _enter(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.in_step:
            self._close()
            self.stage = kwargs["stage"] if "stage" in kwargs else args[4]
            torch.cuda.reset_peak_memory_stats()

    def _close(self) -> None:
        if self.stage is not None:
            self.peaks[self.stage] = max(self.peaks.get(self.stage, 0), torch.cuda.max_memory_allocated())
