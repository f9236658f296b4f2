"""Measures the images that a run generates, every so often: held-out captions, fixed noise, the EMA's weights.

From one set of generated images and one or more networks of features: Frechet distance, KID, CMMD's distance, precision
and recall, how near they are to training images, and how well they agree with their captions. All go to the loggers,
and to the run's ``metrics.jsonl`` with the samples, operations and seconds that the training had used by then.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from tqdm.auto import tqdm

from nami_lightning.callbacks.fit_bridges import BridgePretraining
from nami_lightning.callbacks.generation import Attempts, generate, report_failures
from nami_lightning.datamodules.multi_resolution import MultiResolutionDataModule
from nami_lightning.metrics import distances
from nami_lightning.metrics.budget import training_flops
from nami_lightning.metrics.caption_agreement import ClipScore, Probe, check_clip
from nami_lightning.metrics.features import EfficientNetLite0, metric_name
from nami_lightning.metrics.record import Entry, Evaluation, read_entries, write_entries
from nami_lightning.pipelines.checks import NonFiniteImages
from nami_lightning.pipelines.sampler_settings import SamplerSettings
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.module import NamiModule
from nami_lightning.utils.collectives import gather_objects

COPIES = 0.05
"""A generated image counts as a copy if it is nearer to a training image than this share of held-out images."""


FEWEST = 4
"""Images on either side of a distance."""


@dataclass(frozen=True)
class Reference:
    """What generated images are measured against on the features of one network; the same on all ranks.

    Attributes:
        real: features of the held-out images.
        captions: of each.
        ids: of each.
        training: features of training images, and their captions.
    """

    real: Tensor
    captions: list[str]
    ids: list[str]
    training: tuple[Tensor, list[str]]


class Metrics(L.Callback):
    """Generates images of the held-out captions and logs ``metrics/NAME_FEATURES``, every so often and at the end.

    ``frechet`` (FID on Inception), ``kid``, ``mmd`` (as CMMD), ``precision``, ``recall``; ``nearest_training``, the
    mean distance to the nearest training image as a multiple of the held-out images' (1: no nearer than unseen
    pictures), and ``copies``, the share that is nearer than the nearest 5% of those (new images: about 0.05). All
    depend on the numbers of images: compare equal ones only. Agreement with the captions is
    ``metrics/clip_score_MODEL``, or ``probe/retrieval_at_1_FEATURES`` and ``_at_5``, the share of generated images
    whose caption a probe finds among all of them.

    If a generated image is not finite, there is a warning and no measurement, and the training goes on. So it does if
    measuring fails (unless memory runs out); when the training is saved, the run then ends with an error.

    ``..._of_real`` is the same for real images in place of the generated ones: held-out ones for the probe, at most as
    many training images for the distances. It is about what a perfect model would get.

    Args:
        samples: images on either side; at most as many as are held out.
        every_n_steps: how often; the end of training always counts. 0: only the end.
        features: a network from uint8 images to ``(B, num_features)``, with a ``name``; the packaged
            EfficientNet-Lite0 if null. ``nami_lightning.metrics.Inception`` is FID's. Or a list of such, which see the
            same images: the first is that of the comparisons' margins, of ``lightning tune`` and of the probe.
        agreement: ``probe``, two linear maps on MiniLM's and the features, fitted to training images; the name or
            folder of a CLIP; or null for none.
        training_images: what the probe is fitted to and memorisation is measured against.
        sampler: how images are generated.
        batch_size: images generated at once on each rank.
        seed: of the noise, sample i using ``seed + i``, and of the choice of training images.
        shown: how many of the first generated images are kept for comparisons.

    Raises:
        ValueError: a number out of its range, or two networks of one name.
    """

    def __init__(
        self,
        samples: int = 400,
        every_n_steps: int = 0,
        features: nn.Module | list[nn.Module] | None = None,
        agreement: str | None = "probe",
        training_images: int = 1000,
        sampler: SamplerSettings = SamplerSettings(),
        batch_size: int = 16,
        seed: int = 0,
        shown: int = 16,
    ) -> None:
        if samples < FEWEST or training_images < FEWEST or every_n_steps < 0 or batch_size < 1 or shown < 0:
            raise ValueError(
                "Metrics needs samples and training_images of at least 4, batch_size of at least 1, and "
                "every_n_steps and shown not below 0"
            )
        self.features = [features] if isinstance(features, nn.Module) else list(features or ())
        names = [metric_name(network) for network in self.features]
        if len(set(names)) < len(names):
            raise ValueError(f"the networks of Metrics.features need different names; got {', '.join(names)}")
        self.samples, self.every_n_steps = samples, every_n_steps
        self.agreement, self.training_images = agreement, training_images
        self.sampler, self.batch_size, self.seed, self.shown = sampler, batch_size, seed, shown
        self.references: list[Reference] = []
        """One for each network of features."""
        self.probe: Probe | None = None
        self.clip: ClipScore | None = None
        self.seconds_before: float | None = None
        self.attempts = Attempts("Metrics")

    # --- what the training has used --------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds of training so far, from which a resumed run goes on counting."""
        return {"seconds": self.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint's seconds."""
        self.seconds_before = state_dict["seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting, forget what was measured after the checkpoint, and check what measuring will need.

        Raises:
            ValueError: too few images are held out.
            FileNotFoundError: the CLIP of ``agreement`` can be neither found nor fetched.
        """
        assert isinstance(pl_module, NamiModule)
        self._check(trainer)
        self.trainer, self.module = trainer, pl_module
        if pl_module.step == 0:
            self.seconds_before = 0.0
        elif self.seconds_before is None:
            rank_zero_warn("Metrics was not in the recipe from the start: the time of training is not recorded.")
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            entries = read_entries(folder)
            if entries:
                write_entries(folder, [entry for entry in entries if entry.step <= pl_module.step])

    def seconds(self) -> float | None:
        """Time of training so far, over all resumes, without evaluations and checkpoints; None if unknown."""
        if self.seconds_before is None:
            return None
        if self.module.device.type == "cuda":
            torch.cuda.synchronize(self.module.device)
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        fitting = sum(one.seconds for one in callbacks if isinstance(one, BridgePretraining))
        waited = self.trainer.train_dataloader.seconds_waited  # type: ignore[union-attr]
        return self.seconds_before + fitting + waited + self.module.seconds_in_steps

    # --- measuring ---------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure when it is time."""
        assert isinstance(pl_module, NamiModule)
        step = pl_module.step
        due = self.every_n_steps and step % self.every_n_steps == 0
        if due or step == pl_module.curriculum.total_steps:
            self.attempts.count += 1
            self.measure(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """End the program with an error if a measurement failed, now that the training is saved.

        Raises:
            RuntimeError: naming the steps.
        """
        if stage == "fit":
            report_failures(trainer, self.attempts)

    def _check(self, trainer: L.Trainer) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, MultiResolutionDataModule)
        last = len(data.resolutions) - 1
        images = sum(len(part.refs) for part in data.heldout(self.samples).parts if part.stage == last)
        if images < FEWEST:
            raise ValueError(
                f"Metrics needs at least {FEWEST} held-out images of the finest stage, but there are {images}: raise "
                "data.preparation.heldout_percent, or remove the callback"
            )
        if self.agreement not in (None, "probe"):
            check_clip(self.agreement)

    @torch.no_grad()
    def measure(self, trainer: L.Trainer, module: NamiModule) -> None:
        """Generate on all ranks, each its share; compute and write on the first."""
        seconds = self.seconds()
        rows: list[dict[str, Any]] = []
        with self.attempts.attempt(trainer, module, together=True):
            rows = self._gather(trainer, module)
        if rows and trainer.is_global_zero:
            with self.attempts.attempt(trainer, module):
                self._record(trainer, module, seconds, rows)

    def _gather(self, trainer: L.Trainer, module: NamiModule) -> list[dict[str, Any]]:
        """Return the rows of all generated images; none if one is not finite."""
        self.features = [network.to(module.device) for network in self.features or [EfficientNetLite0()]]
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, MultiResolutionDataModule)
        self.references = self.references or self._reference(trainer, data)
        rows = gather_rows(self._generate(trainer, module, data))
        failures = [row["failed"] for row in rows if "failed" in row]
        if failures:
            self.attempts.without_result += 1
            rank_zero_warn(
                f"No metrics at step {module.step}, since {len(failures)} of {len(rows)} images are not finite: "
                f"{failures[0]}."
            )
        return [] if failures else rows

    def _record(
        self, trainer: L.Trainer, module: NamiModule, seconds: float | None, rows: list[dict[str, Any]]
    ) -> None:
        """Compute every metric, write it to the run's files, and log it."""
        evaluations = [self._evaluate(module.step, number, rows) for number in range(len(self.features))]
        values: dict[str, float] = {}
        for evaluation, reference in zip(evaluations, self.references, strict=True):
            values |= self._summary(evaluation, reference)
        if self.probe:
            values |= self._agreement_of_real(evaluations[0].features)
        counts = module.curriculum.samples_before(module.step)
        flops = training_flops(module, module.step)
        entry = Entry(module.step, sum(counts), flops, seconds, len(rows), values)
        folder = Path(trainer.default_root_dir)
        evaluations[0].save(folder)
        write_entries(folder, [*(old for old in read_entries(folder) if old.step < entry.step), entry])
        used = {"samples": entry.samples, "flops": entry.flops, "seconds": entry.seconds}
        for logger in trainer.loggers:
            logger.log_metrics(
                values | {f"used/{name}": float(value) for name, value in used.items() if value is not None},
                step=module.step,
            )
        listing = ", ".join(f"{name.partition('/')[2]} {value:.4g}" for name, value in values.items())
        rank_zero_info(f"Step {module.step}, {len(rows)} images generated: {listing}")

    def _generate(
        self, trainer: L.Trainer, module: NamiModule, data: MultiResolutionDataModule
    ) -> list[dict[str, Any]]:
        """Generate this rank's share of the held-out captions' images, one row an image."""
        rows: list[dict[str, Any]] = []
        for micro in self._heldout(trainer, data, "generating"):
            seeds = [self.seed + index for index in micro.global_indices]
            height, width = micro.images.shape[-2:]
            try:
                images = generate(module, self.sampler, micro.captions, seeds, "pt", height, width)
            except NonFiniteImages as error:
                failed = {"failed": str(error)}
                rows += [
                    {"index": index} | (failed if i in error.origins else {})
                    for i, index in enumerate(micro.global_indices[: len(micro) - micro.padding])
                ]
                continue
            images = (images * 255).round().byte()
            features = self._features(images)
            scores = self.clip(images, micro.captions) if self.clip else [0.0] * len(micro)
            for i, index in enumerate(micro.global_indices[: len(micro) - micro.padding]):
                shown = images[i].permute(1, 2, 0).cpu().numpy() if index < self.shown else None
                row = {"index": index, "caption": micro.captions[i], "id": micro.ids[i], "seed": seeds[i]}
                rows.append(row | {"features": features[i], "clip": scores[i], "image": shown})
        return rows

    def _evaluate(self, step: int, number: int, rows: Sequence[dict[str, Any]]) -> Evaluation:
        """All that is one number a sample, on the features of one network."""
        reference, name = self.references[number], metric_name(self.features[number])
        drawn, real = torch.stack([row["features"][number] for row in rows]), reference.real
        training = reference.training[0]
        neighbours = min(3, len(drawn) - 1)
        precision, recall = distances.precision_recall(drawn, real, neighbours)
        near, near_real = (distances.nearest_neighbours(images, training)[0] for images in (drawn, real))
        of_drawn = {
            f"metrics/precision_{name}": precision,
            f"metrics/nearest_training_{name}": near / near_real.mean(),
            f"metrics/copies_{name}": (near < near_real.quantile(COPIES)).double(),
        }
        captions = [row["caption"] for row in rows]
        if number == 0 and self.clip:
            of_drawn[f"metrics/clip_score_{self.clip.name}"] = torch.tensor([row["clip"] for row in rows])
        elif number == 0 and self.probe:
            similarity = self.probe.similarity(drawn, captions)
            for k in (1, 5):
                of_drawn[f"probe/retrieval_at_{k}_{name}"] = distances.retrieval(similarity, captions, k)
        return Evaluation(
            step=step,
            features=name,
            drawn=drawn.numpy(),
            real=real.numpy(),
            captions=captions,
            seeds=[row["seed"] for row in rows],
            real_ids=reference.ids,
            of_drawn={metric: values.numpy() for metric, values in of_drawn.items()},
            of_real={f"metrics/recall_{name}": recall.numpy()},
            images=[row["image"] for row in rows if row["image"] is not None],
        )

    @staticmethod
    def _summary(evaluation: Evaluation, reference: Reference) -> dict[str, float]:
        """Every metric's value, on the features of one network."""
        drawn, real = torch.from_numpy(evaluation.drawn), torch.from_numpy(evaluation.real)
        perfect = reference.training[0][: len(drawn)]
        values = {}
        for kind, distance in distances.DISTANCES.items():
            for images, of in ((drawn, ""), (perfect, "_of_real")):
                value = distance(images, real)(distances.unit_counts(images), distances.unit_counts(real))
                values[f"metrics/{kind}_{evaluation.features}{of}"] = value
        per_sample = evaluation.of_drawn | evaluation.of_real
        return values | {name: float(np.mean(numbers)) for name, numbers in per_sample.items()}

    def _agreement_of_real(self, features: str) -> dict[str, float]:
        """Return the probe's agreement of the held-out images, whose features have that name."""
        assert self.probe is not None
        reference = self.references[0]
        similarity = self.probe.similarity(reference.real, reference.captions)
        return {
            f"probe/retrieval_at_{k}_{features}_of_real": float(
                distances.retrieval(similarity, reference.captions, k).mean()
            )
            for k in (1, 5)
        }

    # --- what is measured against ------------------------------------------------------------------

    def _heldout(self, trainer: L.Trainer, data: MultiResolutionDataModule, task: str) -> Iterator[MicroBatch]:
        """Read this rank's held-out micro-batches of the finest stage, one at a time; ``task`` names the progress."""
        last = len(data.resolutions) - 1
        rank, ranks = trainer.global_rank, trainer.world_size
        heldout = data.heldout(self.samples, rank, ranks, [self.batch_size] * (last + 1))
        numbers = [number for number, part in enumerate(heldout.parts) if part.stage == last]
        return (heldout[number] for number in tqdm(numbers, task, leave=False, disable=not trainer.is_global_zero))

    def _reference(self, trainer: L.Trainer, data: MultiResolutionDataModule) -> list[Reference]:
        """Compute the features of held-out and of training images, once, and prepare the measure of agreement.

        Where a data set stores latents alone, its images are the decoded latents.
        """
        quiet = not trainer.is_global_zero
        real = gather_rows(self._rows(self._heldout(trainer, data, "held-out images")))
        last = len(data.resolutions) - 1
        steps = data.steps(trainer.global_rank, trainer.world_size, self.seed)  # the same images whatever a run's seed
        there = sum(sum(steps.images.sizes(last, aspect)) for aspect in steps.images.aspects[last])
        wanted = min(self.training_images, there)
        batches = range(-(-wanted // (steps.max_micro_batch[last] * trainer.world_size)))
        micros = (steps.stage_batch(number, last) for number in batches)
        training = gather_rows(self._rows(tqdm(micros, "training images", len(batches), leave=False, disable=quiet)))[
            :wanted
        ]
        captions = [row["caption"] for row in training]
        if self.agreement == "probe":
            self.probe = Probe(torch.stack([row["features"][0] for row in training]), captions)
        elif self.agreement is not None:
            self.clip = ClipScore(self.agreement).to(self.module.device)
        return [
            Reference(
                real=torch.stack([row["features"][number] for row in real]),
                captions=[row["caption"] for row in real],
                ids=[row["id"] for row in real],
                training=(torch.stack([row["features"][number] for row in training]), captions),
            )
            for number in range(len(self.features))
        ]

    def _rows(self, micros: Iterable[MicroBatch]) -> list[dict[str, Any]]:
        """Return the features, captions and ids of images, one row an image."""
        rows = []
        for micro in micros:
            features = self._features(self.module.images(micro.to(self.module.device)))
            for i, index in enumerate(micro.global_indices[: len(micro) - micro.padding]):
                rows.append({"index": index, "caption": micro.captions[i], "id": micro.ids[i], "features": features[i]})
        return rows

    def _features(self, images: Tensor) -> list[tuple[Tensor, ...]]:
        """Return the features of uint8 images: for each image, those of each network."""
        return list(zip(*(network(images).float().cpu() for network in self.features), strict=True))


def gather_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of all ranks, ordered by their samples' indices: the same on any number of ranks."""
    return sorted(chain.from_iterable(gather_objects(rows)), key=lambda row: row["index"])
