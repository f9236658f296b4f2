"""How long a training step takes on a GPU, what it holds, and how often it waits, beside the plan and a bare loop.

The data are random encodings that lie in page-locked memory, so that nothing but the step is measured; how long a real
training waits for its data is in the emoji run.
"""

import gc
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from nami_lightning.benchmarks.gpu.section import Promise, Section, at_most
from nami_lightning.benchmarks.gpu.sizes import Sizes, Training
from nami_lightning.benchmarks.train_step import WARM_UP, BareLoop
from nami_lightning.errors import first_line
from nami_lightning.metrics.budget import sample_flops
from nami_lightning.models.autoencoder import PIXELS, Posterior
from nami_lightning.models.text_encoder import TextStates
from nami_lightning.planning.flops import find_device
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.batch import Encodings, MicroBatch
from nami_lightning.training.module import NamiModule
from nami_lightning.utils.text_table import markdown_table

CALLBACKS = ("CurriculumCallback", "EMA", "ProgressBar")
"""Those of the recipe that stay."""


def random_micro_batch(model: NamiModule, stage: int, samples: int) -> MicroBatch:
    """Return a micro-batch of random encodings, on the CPU."""
    generator = torch.Generator().manual_seed(stage)

    def posterior(px: int) -> Posterior:
        side, channels = px // model.autoencoder_config.factor, model.transformer_config["in_channels"]
        mean = torch.randn(samples, channels, side, side, generator=generator)
        return Posterior(mean, torch.full_like(mean, 0.1))

    def texts(rows: int) -> TextStates:
        width, pooled_width = model.text_dims
        sequence = torch.randn(rows, model.text_encoder_config.max_length, width, generator=generator)
        return TextStates(sequence, torch.randn(rows, pooled_width, generator=generator))

    px, pixels = model.resolutions[stage], model.autoencoder_config.name == PIXELS
    images = torch.randint(0, 256, (samples, 3, *((px, px) if pixels else (0, 0))), dtype=torch.uint8)
    coarse = posterior(px // 2) if stage and not pixels else None
    encodings = Encodings(None if pixels else posterior(px), coarse, texts(samples), texts(1))
    names = [f"{stage}/{number}" for number in range(samples)]
    return MicroBatch(0, stage, images, names, names, list(range(samples)), encodings=encodings)


class RandomSteps(L.LightningDataModule):
    """Hands out the same random micro-batches at each step.

    Args:
        model: whose recipe says how many samples of each stage a step has.
        max_micro_batch: samples of each stage that go through at once.
        steps: number of them.
        pinned: keep the tensors in page-locked memory.
    """

    def __init__(self, model: NamiModule, max_micro_batch: Sequence[int], steps: int, pinned: bool) -> None:
        super().__init__()
        self.steps = steps
        ratio, unit = model.curriculum.phases[0].ratio, model.curriculum.unit
        self.micro_batches = [
            random_micro_batch(model, stage, min(most, parts * unit - done))
            for stage, (parts, most) in enumerate(zip(ratio, max_micro_batch, strict=True))
            for done in range(0, parts * unit, most)
        ]
        if pinned:
            self.micro_batches = [micro.pin_memory() for micro in self.micro_batches]

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for step in range(self.steps):
            yield [replace(micro, step=step) for micro in self.micro_batches]

    def train_dataloader(self) -> "RandomSteps":
        """Return what goes through all steps."""
        return self


class StepClock(L.Callback):
    """Times each step from its start until the device is done, and counts in one of them how often the host waits.

    Attributes:
        seconds: of each step.
        waits: calls that waited for the device in the second step; None without a GPU.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.waits: int | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock; in the second step, let torch warn of each call that waits."""
        self.on_gpu = pl_module.device.type == "cuda"
        if self.on_gpu:
            torch.cuda.synchronize()
            if batch_idx == 1:
                self.caught = warnings.catch_warnings(record=True)
                self.warned = self.caught.__enter__()
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
        self.begin = perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock."""
        if self.on_gpu:
            if batch_idx == 1:
                torch.cuda.set_sync_debug_mode("default")
                self.caught.__exit__(None, None, None)
                places = [
                    f"{Path(one.filename).name}:{one.lineno}" for one in self.warned if "sync" in str(one.message)
                ]
                self.waits, self.places = len(places), places
            torch.cuda.synchronize()
        self.seconds.append(perf_counter() - self.begin)


@dataclass(frozen=True)
class Measured:
    """What a training's step took.

    Attributes:
        seconds: of a step, the median.
        operations: that its samples need.
        memory: most bytes that were allocated; None without a GPU.
        waits: calls that waited for the device in a step; likewise.
        places: where.
        quotient: the step's time over a bare loop's, the median; None if that was not run.
    """

    seconds: float
    operations: int
    memory: int | None
    waits: int | None
    places: list[str]
    quotient: float | None = None


def measure_training(training: Training, sizes: Sizes) -> Measured:
    """Train some steps on random encodings, alone, then in turns with a bare loop if that is asked for."""
    clock = StepClock()
    if sizes.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = _fit(training, sizes, [clock])
    memory = torch.cuda.max_memory_allocated() if sizes.device.type == "cuda" else None
    phase = model.curriculum.phases[0]
    operations = sum(
        parts * model.curriculum.unit * sample_flops(model, stage).model for stage, parts in enumerate(phase.ratio)
    )
    seconds = statistics.median(clock.seconds[WARM_UP:])
    del model
    _free()
    quotient = None
    if training.bare_loop:
        twin = _recipe(training).make_model()
        twin.bridge.fitted.fill_(True)
        twin.configure_model()
        bare = BareLoop(twin)
        _fit(training, sizes, [bare])
        quotient = statistics.median(ours / theirs for _, ours, theirs in bare.times[WARM_UP:])
        del bare, twin
        _free()
    return Measured(seconds, operations, memory, clock.waits, getattr(clock, "places", []), quotient)


def _recipe(training: Training) -> Recipe:
    recipe = Recipe(training.recipe, list(training.overrides))
    settings = recipe.config.trainer
    settings.logger, settings.enable_checkpointing, settings.limit_val_batches = False, False, 0
    settings.callbacks = [one for one in settings.callbacks if one.class_path.endswith(CALLBACKS)]
    return recipe


def _fit(training: Training, sizes: Sizes, callbacks: Sequence[L.Callback]) -> NamiModule:
    recipe = _recipe(training)
    model, _, trainer = recipe.make()
    model.bridge.fitted.fill_(True)
    trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
    most = recipe.config.data.init_args.max_micro_batch
    data = RandomSteps(model, most, WARM_UP + sizes.training_steps, sizes.device.type == "cuda")
    trainer.fit(model, data)
    return model


def _free() -> None:
    if dist.is_initialized():  # Lightning leaves it
        dist.destroy_process_group()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def planned_memory(training: Training, device: str) -> int:
    """Return the bytes that ``lightning plan`` says of one device."""
    command = [sys.executable, "-m", "nami_lightning.cli", "plan", training.recipe, *training.overrides]
    command += ["--devices", "1", "--device", device, "--stored_encodings", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    memory = json.loads(done.stdout)["memory"]
    total: int = memory["total"]
    return total


def measure_training_speed(sizes: Sizes, folder: Path) -> Section:
    """Time the steps of :attr:`Sizes.training`."""
    section = Section(
        "Training",
        "Random encodings, the finest phase's ratio of 1:2:4, the recipe's largest micro-batches; medians of "
        f"{sizes.training_steps} steps. Utilisation: the model's operations over the GPU's peak.",
    )
    known = find_device(torch.cuda.get_device_name(0)) if sizes.device.type == "cuda" else None
    rows = []
    for training in sizes.training:
        try:
            one = measure_training(training, sizes)
        except RuntimeError as error:  # out of memory, say: the others are measured all the same
            section.promises.append(Promise(training.name, f"failed: {first_line(error)[:200]}", "runs", False))
            _free()
            continue
        speed = one.operations / one.seconds
        share = f"{speed / known.peak_flops('bfloat16'):.1%}" if known else "-"
        memory = "-" if one.memory is None else f"{one.memory / 2**30:.1f}"
        rows.append([training.name, f"{one.seconds:.3f}", f"{speed / 1e12:.3g}", share, memory])
        section.promises += promises_of(training, one)
        if one.places:
            section.tables.append(f"{training.name} waits in one step at: {', '.join(one.places[:20])}.")
    header = ["training", "seconds a step", "TFLOP/s", "utilisation", "peak GiB"]
    section.tables.insert(0, markdown_table(header, rows))
    return section


def promises_of(training: Training, one: Measured) -> list[Promise]:
    """Return what is promised of a training step: a bare loop's speed, the plan's memory, one wait."""
    promises = []
    if one.quotient is not None:
        promises.append(at_most(f"{training.name}: step over a bare loop's", one.quotient, 1.05, "{:.3f}"))
    if one.memory is None or one.waits is None:
        promises.append(Promise(f"{training.name}: memory, waits", "not run: no GPU", "", None))
        return promises
    planned = planned_memory(training, "h100")
    promises.append(
        Promise(
            f"{training.name}: peak memory beside the plan's",
            f"{one.memory / 2**30:.1f} GiB, planned {planned / 2**30:.1f}",
            "within 10%",
            abs(one.memory / planned - 1) <= 0.1,
        )
    )
    promises.append(at_most(f"{training.name}: waits for the device in a step", one.waits, 1, "{:d}"))
    return promises
