"""The multi-resolution DataModule: a step's global batch as a pure function of the recipe.

One batch is one optimizer step: the list of its micro-batches, stage 1 first, each of one stage. Ranks take
slices of the same global batches, in order, so a run goes on with the very same batches after any
interruption and on any number of ranks; the only position is the number of the step.
"""

from base64 import b64decode
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from nami_lightning.datamodules.aspect_buckets import Aspect
from nami_lightning.datamodules.precomputed.records import StageEncodings, check_encodings, layout_of
from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation, fingerprint, settings_of
from nami_lightning.datamodules.sources.base import Source
from nami_lightning.datamodules.stage_images import StageImages
from nami_lightning.datamodules.step_dataset import Damaged, HeldoutDataset, StepDataset, StepLoader
from nami_lightning.datamodules.storage.chunk_cache import CacheSettings
from nami_lightning.datamodules.storage.dataset import DESCRIPTION, SPLITS, PreparedDataset, Split
from nami_lightning.datamodules.storage.prefetch import HELDOUT, RemoteStepDataset, check_room, spread_of
from nami_lightning.datamodules.storage.remote import is_remote
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.checks import check_shapes
from nami_lightning.training.curriculum import Curriculum
from nami_lightning.training.module import NamiModule


class MultiResolutionDataModule(L.LightningDataModule):
    """Streams image-caption shards bucketed by resolution, mixed as the curriculum says.

    Args:
        folder: a prepared data set, of images or of encodings (``lightning data encode``), on which training needs no
            autoencoder and no text encoder; or, with ``source``, where data sets are made, one folder a set of
            settings. A URL (s3://, hf://, gs://, ...) is read from there, by way of ``cache``.
        resolutions: side in px of each stage's images, coarsest first.
        curriculum: step to samples of each stage.
        max_micro_batch: samples of each stage that go through the model at once, at most; one number a stage.
        source: prepares the data set if it isn't there yet.
        preparation: how it does.
        latent_pyramid: as the model's; ``pool`` makes every stage draw the finest bucket.
        seed: of the order.
        num_workers: processes that read and decode; 0 for none.
        prefetch_factor: steps that each of them works ahead.
        shuffle_window: chunks whose samples are shuffled together.
        validation_samples: held-out samples of each stage in a validation.
        cache: where chunks of a remote data set are kept, and how many.
        damaged: whether a damaged sample is an error; or to skip it, so that the next readable one of its bucket's
            order stands in for it, on every rank alike.

    Raises:
        ValueError: settings that don't fit together.
    """

    def __init__(
        self,
        folder: str,
        resolutions: list[int],
        curriculum: Curriculum,
        max_micro_batch: list[int],
        source: Source | None = None,
        preparation: Preparation = Preparation(),
        latent_pyramid: str = "encode",
        seed: int = 0,
        num_workers: int = 2,
        prefetch_factor: int = 4,
        shuffle_window: int = 64,
        validation_samples: int = 64,
        cache: CacheSettings = CacheSettings(),
        damaged: Damaged = "error",
    ) -> None:
        super().__init__()
        for name, values in (("resolutions", resolutions), ("data.max_micro_batch", max_micro_batch)):
            if len(values) != curriculum.num_stages:
                raise ValueError(
                    f"{name} {values} must have one number a stage; the curriculum has {curriculum.num_stages} stages"
                )
            if min(values) < 1:
                raise ValueError(f"{name} {values} must be positive")
        if not preparation.resolutions:
            preparation = replace(preparation, resolutions=resolutions)
        if source is not None and is_remote(folder):
            raise ValueError(
                f"data.folder {folder} is remote, and data sets are made on a disk: prepare data.source into a local "
                "folder, copy that there, and leave data.source out"
            )
        self.folder, self.source, self.preparation = folder, source, preparation
        self.cache, self.damaged = cache, damaged
        self.resolutions, self.curriculum, self.max_micro_batch = resolutions, curriculum, max_micro_batch
        self.latent_pyramid = latent_pyramid
        self.seed, self.shuffle_window = seed, shuffle_window
        self.num_workers, self.prefetch_factor = num_workers, prefetch_factor
        self.validation_samples = validation_samples

    def prepare_data(self) -> None:
        """Make the data set if a source is given and its settings' data set isn't there."""
        if self.source is not None:
            self._check_aspects(self.preparation.aspects)
            prepare(self.source, self.dataset_folder, self.preparation, self.num_workers)

    def setup(self, stage: str) -> None:
        """Refuse a data set whose images, or encodings, the model can't take."""
        module = self.trainer.lightning_module if self.trainer else None
        if self.dataset.encodings is not None and isinstance(module, NamiModule):
            check_encodings(self.dataset, module)
        self._check_aspects([bucket.aspect for split in SPLITS for bucket in self.dataset.buckets(split)])

    def _check_aspects(self, aspects: Sequence[Aspect]) -> None:
        module = self.trainer.lightning_module if self.trainer else None
        if isinstance(module, NamiModule):
            coarsest = self.resolutions[0]
            shapes = sorted({(aspect.width * coarsest, aspect.height * coarsest) for aspect in aspects})
            check_shapes(shapes, coarsest, module.transformer_config, module.autoencoder_config)

    @cached_property
    def dataset_folder(self) -> Path:
        """The folder of the prepared data set, if it is local."""
        folder = Path(self.folder)
        if self.source is None or (folder / DESCRIPTION).exists():
            return folder
        return folder / fingerprint(settings_of(self.source, self.preparation))

    @cached_property
    def dataset(self) -> PreparedDataset:
        """The prepared data set; made if it isn't there and a source is given."""
        if is_remote(self.folder):
            return PreparedDataset(self.folder, self.cache)
        self.prepare_data()
        return PreparedDataset(self.dataset_folder)

    def images(self, split: Split) -> StageImages:
        """A split as the stages see it."""
        buckets, encodings = self.dataset.buckets(split), self.dataset.encodings
        if encodings is None:
            return StageImages(buckets, self.resolutions, self.latent_pyramid == "pool")
        layout = layout_of(self.dataset, self.resolutions, self.latent_pyramid)
        return StageEncodings(buckets, layout, b64decode(encodings["empty_prompt"]))

    def steps(self, rank: int = 0, ranks: int = 1, seed: int | None = None) -> StepDataset:
        """Step number to one rank's micro-batches: what training reads, without a trainer; another ``seed`` if given.

        Raises:
            ValueError: see :class:`StepDataset`; or the cache is too small.
        """
        settings: dict[str, Any] = {
            "curriculum": self.curriculum,
            "images": self.images("train"),
            "max_micro_batch": self.max_micro_batch,
            "seed": self.seed if seed is None else seed,
            "shuffle_window": self.shuffle_window,
            "rank": rank,
            "ranks": ranks,
            "damaged": self.damaged,
        }
        cache = self.dataset.cache
        if cache is None:
            return StepDataset(**settings)
        steps = RemoteStepDataset(cache, spread_of(self.num_workers, self.prefetch_factor), **settings)
        check_room(steps, self.heldout(self.validation_samples).chunks())
        return steps

    def heldout(
        self, samples: int, rank: int = 0, ranks: int = 1, micro_batch: Sequence[int] | None = None
    ) -> HeldoutDataset:
        """The first ``samples`` held-out images of each stage, ``micro_batch`` (or ``max_micro_batch``) at once."""
        micro_batch = micro_batch or self.max_micro_batch
        return HeldoutDataset(self.images("heldout"), samples, micro_batch, rank, ranks, self.damaged)

    def train_dataloader(self) -> StepLoader:
        """From the step that the model has reached."""
        trainer = self.trainer
        assert trainer is not None
        steps = self.steps(trainer.global_rank, trainer.world_size)
        module = trainer.lightning_module
        assert isinstance(module, NamiModule)
        pin_memory = trainer.strategy.root_device.type == "cuda"
        return StepLoader(steps, module.step, self.num_workers, self.prefetch_factor, pin_memory)

    def val_dataloader(self) -> DataLoader[MicroBatch]:
        """Fixed micro-batches of the held-out split."""
        trainer = self.trainer
        assert trainer is not None
        heldout = self.heldout(self.validation_samples, trainer.global_rank, trainer.world_size)
        if self.dataset.cache is not None:
            self.dataset.cache.hold(HELDOUT, heldout.chunks())
        return DataLoader(heldout, batch_size=None)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """With ``damaged: skip``, log how many samples others stood in for since the run was started or resumed."""
        trainer = self.trainer
        assert trainer is not None
        if self.damaged == "skip" and trainer.training and isinstance(trainer.train_dataloader, StepLoader):
            module = trainer.lightning_module
            assert isinstance(module, NamiModule)
            if (module.step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                count = torch.tensor(float(trainer.train_dataloader.damaged), device=module.device)
                count = trainer.strategy.reduce(count, reduce_op="sum")
                for logger in trainer.loggers:
                    logger.log_metrics({"data/damaged": float(count)}, step=module.step)
        return batch
