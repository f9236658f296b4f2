"""Measures how long a training step takes, compared with a bare PyTorch loop over the same network, in turns."""

import statistics
from argparse import Namespace
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.checks import check_precision
from nami_lightning.training.module import NamiModule
from nami_lightning.training.strategies import FSDP2Strategy, shard_parts

WARM_UP = 3
"""Number of steps at the start of each phase that don't count."""

CALLBACKS_OF_A_STEP = ("CurriculumCallback", "BridgePretraining")
"""The callbacks that are a part of the recipe's step; all others are left out."""

STRATEGIES = {"ddp": "ddp_find_unused_parameters_true", "fsdp": "fsdp2"}


class BareLoop(L.Callback):
    """A callback that repeats each of Lightning's steps on a copy of the model in plain PyTorch, and times both.

    Lightning's time is from the end of the bare step to the end of its own: hooks, logging, the curriculum and the
    step, without the time in which :class:`UncountedReads` reads the batch. The time of the bare loop is that of the
    step alone. Both compute in the trainer's precision.

    Args:
        twin: a model of the same recipe, which gets its own optimizer.
    """

    def __init__(self, twin: NamiModule) -> None:
        self.twin = twin
        self.times: list[tuple[int, float, float]] = []
        self.autocast, self.clock = False, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shard or wrap the twin by hand, as the strategy does with its model, and start the clock."""
        self.twin.to(pl_module.device)
        self.autocast = check_precision(trainer.precision) == "bf16-mixed"
        self.network: nn.Module = self.twin.transformer
        if isinstance(trainer.strategy, FSDP2Strategy):
            shard(self.twin.transformer, trainer.strategy)
            shard_parts(self.twin.techniques, trainer.strategy)
        elif trainer.world_size > 1:
            self.network = DistributedDataParallel(self.twin.transformer, find_unused_parameters=True)
        self.optimizer = self.twin.configure_optimizers()
        self.clock = perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: list[MicroBatch], batch_idx: int
    ) -> None:
        """Record the time of Lightning's step, and do the bare step."""
        _synchronise(pl_module.device)
        lightning_done = perf_counter()
        self.step(batch)
        _synchronise(pl_module.device)
        bare_done = perf_counter()
        self.times.append((batch[0].step, lightning_done - self.clock, bare_done - lightning_done))
        self.clock = bare_done

    def step(self, batch: list[MicroBatch]) -> None:
        """Do one optimizer step as one would write it by hand."""
        twin = self.twin
        ratio = twin.curriculum.phase(batch[0].step).ratio
        for number, micro in enumerate(batch, 1):
            if isinstance(self.network, DistributedDataParallel):  # as no_sync does in all but the last
                self.network.require_backward_grad_sync = number == len(batch)
            techniques = twin.techniques.active(micro.step)
            with torch.autocast(twin.device.type, torch.bfloat16, enabled=self.autocast):
                loss, _, added = twin.flow_loss(
                    twin, self.network, micro, micro.step, twin.prompt_dropout, techniques=techniques
                )
            (sum(added.values(), loss) * ratio[micro.stage] / sum(ratio)).backward()
        if twin.gradient_clip_norm is not None:
            trained = [*twin.transformer.parameters(), *twin.techniques.parameters()]
            nn.utils.clip_grad_norm_(trained, twin.gradient_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


class UncountedReads:
    """The batches of a training, one at a time; the time in which one is read counts for neither side.

    Args:
        steps: reads the batch of a step.
        bare: holds the clock.
    """

    def __init__(self, steps: Sequence[list[MicroBatch]], bare: BareLoop) -> None:
        self.steps, self.bare = steps, bare

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for number in range(len(self.steps)):
            begin = perf_counter()
            batch = self.steps[number]
            self.bare.clock += perf_counter() - begin
            yield batch


def shard(model: NamiTransformer2DModel, strategy: FSDP2Strategy) -> None:
    """Apply FSDP2 as torch's own tutorial does: to every block, every head, and the root."""
    settings: dict[str, Any] = {"mesh": strategy.weights_mesh, "mp_policy": strategy.policy}
    for part in model.parts:
        fully_shard(part, **settings)
    fully_shard(model, **settings)


def measure_step(options: Namespace) -> None:
    """Print the step time of a recipe in each of its phases, next to a bare PyTorch loop over the same batches."""
    overrides = list(options.overrides)
    if options.recipe is None and options.devices:  # the demo's step has one sample of stage 3: make it one per device
        overrides = ["--curriculum.unit", str(options.devices), *overrides]
    if options.strategy:
        overrides += ["--trainer.strategy", STRATEGIES[options.strategy]]
    if options.devices:
        overrides += ["--trainer.devices", str(options.devices)]
    recipe = Recipe(options.recipe or "openmoji", overrides)
    for phase in recipe.config.curriculum.phases:
        phase.steps, phase.warmup_steps = options.steps + WARM_UP, 0
    settings = recipe.config.trainer
    settings.logger, settings.enable_checkpointing, settings.limit_val_batches = False, False, 0
    settings.callbacks = [c for c in settings.callbacks if c.class_path.endswith(CALLBACKS_OF_A_STEP)]
    model, data, trainer = recipe.make()
    if max(model.curriculum.context_parallel) > 1:
        raise ValueError("the bare loop has whole samples on each process: measure without curriculum.context_parallel")
    twin = recipe.make_model()
    twin.configure_model()
    bare = BareLoop(twin)
    trainer.callbacks.append(bare)  # type: ignore[attr-defined]
    reads = UncountedReads(data.steps(trainer.global_rank, trainer.world_size), bare)  # type: ignore[attr-defined]
    data.train_dataloader = lambda: reads  # type: ignore[method-assign]
    trainer.fit(model, data)
    if not trainer.is_global_zero:
        return

    print(f"\n{'phase':>5}  {'ratio':>10}  {'samples':>7}  {'Lightning':>10}  {'bare loop':>10}  {'quotient':>8}")
    for index, phase in enumerate(model.curriculum.phases):
        begin = model.curriculum.ends[index] - phase.steps + WARM_UP
        rows = [(ours, theirs) for step, ours, theirs in bare.times if begin <= step < model.curriculum.ends[index]]
        ours, theirs = (statistics.median(column) for column in zip(*rows, strict=True))
        quotient = statistics.median(one / other for one, other in rows)
        ratio = ":".join(map(str, phase.ratio))
        samples = sum(phase.ratio) * model.curriculum.unit
        print(f"{index + 1:>5}  {ratio:>10}  {samples:>7}  {ours:>8.3f} s  {theirs:>8.3f} s  {quotient:>8.3f}")
    ranks = f"{trainer.world_size} process(es) with {torch.get_num_threads()} thread(s) each"
    print(f"Medians of {options.steps} interleaved steps a phase, on {twin.device}, {ranks}.")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
