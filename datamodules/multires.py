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

import lightning as L
from torch.utils.data import DataLoader

from nami_lightning.batch import MicroBatch
from nami_lightning.curriculum import Curriculum
from nami_lightning.datamodules.dataset import DESCRIPTION, PreparedDataset, Split
from nami_lightning.datamodules.encoded import StageEncodings, check_encodings, layout_of
from nami_lightning.datamodules.parts import Preparation, fingerprint, settings_of
from nami_lightning.datamodules.prepare import prepare
from nami_lightning.datamodules.sources.base import Source
from nami_lightning.datamodules.stream import HeldoutDataset, StageImages, StepDataset, StepLoader
from nami_lightning.module import NamiModule


class MultiResolutionDataModule(L.LightningDataModule):
    """Streams image-caption shards bucketed by resolution, mixed as the curriculum says.

    Args:
        folder: a prepared data set, of images or of encodings (``lightning data encode``), on which training needs no
            autoencoder and no text encoder; or, with ``source``, where data sets are made, one folder a set of
            settings.
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
        self.folder, self.source, self.preparation = Path(folder), source, preparation
        self.resolutions, self.curriculum, self.max_micro_batch = resolutions, curriculum, max_micro_batch
        self.latent_pyramid = latent_pyramid
        self.seed, self.shuffle_window = seed, shuffle_window
        self.num_workers, self.prefetch_factor = num_workers, prefetch_factor
        self.validation_samples = validation_samples

    def prepare_data(self) -> None:
        """Make the data set if a source is given and its settings' data set isn't there."""
        if self.source is not None:
            prepare(self.source, self.dataset_folder, self.preparation, self.num_workers)

    @cached_property
    def dataset_folder(self) -> Path:
        """The folder of the prepared data set."""
        if self.source is None or (self.folder / DESCRIPTION).exists():
            return self.folder
        return self.folder / fingerprint(settings_of(self.source, self.preparation))

    @cached_property
    def dataset(self) -> PreparedDataset:
        """The prepared data set; made if it isn't there and a source is given."""
        self.prepare_data()
        return PreparedDataset(self.dataset_folder)

    def setup(self, stage: str) -> None:
        """Refuse encodings of other encoders than the model's."""
        module = None if self.trainer is None else self.trainer.lightning_module
        if self.dataset.encodings is not None and isinstance(module, NamiModule):
            check_encodings(self.dataset, module)

    def images(self, split: Split) -> StageImages:
        """A split as the stages see it."""
        buckets, encodings = self.dataset.buckets(split), self.dataset.encodings
        if encodings is None:
            return StageImages(buckets, self.resolutions, self.latent_pyramid == "pool")
        layout = layout_of(self.dataset, self.resolutions, self.latent_pyramid)
        return StageEncodings(buckets, layout, b64decode(encodings["empty_prompt"]))

    def steps(self, rank: int = 0, ranks: int = 1) -> StepDataset:
        """Step number to one rank's micro-batches; what training reads, without a trainer."""
        images = self.images("train")
        return StepDataset(self.curriculum, images, self.max_micro_batch, self.seed, self.shuffle_window, rank, ranks)

    def heldout(
        self, samples: int, rank: int = 0, ranks: int = 1, micro_batch: Sequence[int] | None = None
    ) -> HeldoutDataset:
        """The first ``samples`` held-out images of each stage, ``micro_batch`` (or ``max_micro_batch``) at once."""
        return HeldoutDataset(self.images("heldout"), samples, micro_batch or self.max_micro_batch, rank, ranks)

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
        return DataLoader(heldout, batch_size=None)
