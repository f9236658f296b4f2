"""The multi-resolution DataModule: a step's global batch as a pure function of the recipe.

One batch is one optimizer step. It is the list of the step's micro-batches, stage 1 first, each of one stage. Ranks
take slices of the same global batches, in order. So a run continues with exactly the same batches after any
interruption and on any number of ranks. The only state is the number of the step.
"""

from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from nami_lightning.datamodules.aspect_buckets import Aspect
from nami_lightning.datamodules.augmentation import NO_AUGMENTATION, Augmentation
from nami_lightning.datamodules.module_protocols import CountsSteps, ShowsConfigs, TokenizesPrompts
from nami_lightning.datamodules.precomputed.records import StageEncodings, check_encodings, layout_of
from nami_lightning.datamodules.preparation.parts_folder import OtherSettings
from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation, fingerprint, settings_of
from nami_lightning.datamodules.read_ahead import ReadAhead, largest_step, plan_read_ahead
from nami_lightning.datamodules.sources.base import Source
from nami_lightning.datamodules.stage_images import StageImages
from nami_lightning.datamodules.step_dataset import (
    Damaged,
    HeldoutDataset,
    HeldoutLoader,
    StepDataset,
    StepLoader,
)
from nami_lightning.datamodules.storage.chunk_cache import CacheSettings, parse_size
from nami_lightning.datamodules.storage.dataset import DESCRIPTION, SPLITS, PreparedDataset, Split
from nami_lightning.datamodules.storage.prefetch import HELDOUT, RemoteStepDataset, check_cache_size, max_steps_apart
from nami_lightning.datamodules.storage.remote import is_remote
from nami_lightning.models.text_encoder import PromptTokenizer
from nami_lightning.training.checks import check_shapes
from nami_lightning.training.curriculum import Curriculum


class MultiResolutionDataModule(L.LightningDataModule):
    """Streams shards of image-caption pairs, bucketed by resolution, and mixes them as the curriculum says.

    It works with any LightningModule that counts its steps, see
    :class:`~nami_lightning.datamodules.module_protocols.CountsSteps`. It also checks that a module can take the images
    and the encodings, if the module shows its configs, see
    :class:`~nami_lightning.datamodules.module_protocols.ShowsConfigs`; other modules are not checked.

    Args:
        folder: a prepared data set, of images or of encodings (``lightning data encode``); training on encodings needs
            no autoencoder and no text encoder. With ``source``, the folder in which data sets are made, one folder for
            each set of settings. A URL (s3://, hf://, gs://, ...) is read from there, through ``cache``.
        resolutions: side in px of each stage's images, coarsest first.
        curriculum: gives the number of samples of each stage in a step.
        max_micro_batch: largest number of samples of each stage that go through the model at once; one number a stage.
        source: the source from which the data set is prepared if it does not exist yet.
        preparation: how it is prepared.
        latent_pyramid: the same as the model's; with ``pool`` every stage reads images of the finest resolution.
        seed: seed of the order of samples.
        num_workers: number of processes that read and decode; 0 for none.
        prefetch_factor: number of steps that each of these processes prepares ahead.
        prefetch_memory: the most bytes that the steps prepared ahead may take on a rank, for example 2GB; fewer
            processes read, and fewer steps ahead, where they would take more. A validation has what they leave.
        shuffle_window: number of chunks whose samples are shuffled together.
        validation_samples: number of held-out samples of each stage in a validation.
        cache: where chunks of a remote data set are kept, and how many bytes of them.
        damaged: ``error``: a damaged sample is an error; ``skip``: the next readable sample in the order of its bucket
            replaces it, the same one on every rank.
        augmentation: what training changes in samples at random.
        caption_weights: how often training uses captions of each kind, ``{source: 1, long: 3}`` for example; kinds that
            are not named are not used. Empty: the weights that are stored. Samples with none of the kinds use these.

    Raises:
        ValueError: settings contradict each other.
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
        prefetch_memory: str = "2GB",
        shuffle_window: int = 64,
        validation_samples: int = 64,
        cache: CacheSettings = CacheSettings(),
        damaged: Damaged = "error",
        augmentation: Augmentation = NO_AUGMENTATION,
        caption_weights: dict[str, float] | None = None,
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
                "folder, copy that folder to the remote one, and remove data.source from the recipe"
            )
        self.folder, self.source, self.preparation = folder, source, preparation
        self.cache, self.damaged = cache, damaged
        self.augmentation, self.caption_weights = augmentation, caption_weights or {}
        if any(weight < 0 for weight in self.caption_weights.values()):
            raise ValueError(f"data.caption_weights must not be negative; got {self.caption_weights}")
        self.resolutions, self.curriculum, self.max_micro_batch = resolutions, curriculum, max_micro_batch
        self.latent_pyramid = latent_pyramid
        self.seed, self.shuffle_window = seed, shuffle_window
        self.num_workers, self.prefetch_factor = num_workers, prefetch_factor
        self.prefetch_limit = parse_size(prefetch_memory, "data.prefetch_memory")
        self.validation_samples = validation_samples
        self.keep_prepared = False
        """Whether a prepared data set stays as it is if its source changed: a run that resumes was trained on it."""

    def prepare_data(self) -> None:
        """Prepare the data set if a source is given, or what changed in the source after that unless it is kept.

        Raises:
            ValueError: the folder is a data set of another source or of other settings.
        """
        if self.source is None:
            return
        self._check_aspects(self.preparation.aspects)
        try:
            prepare(self.source, self.dataset_folder, self.preparation, self.num_workers, keep=self.keep_prepared)
        except OtherSettings as error:
            raise ValueError(
                f"data.folder and data.source don't belong together: {error}, or train on this one as it is with "
                "--data.init_args.source null"
            ) from error

    def setup(self, stage: str) -> None:
        """Refuse a data set whose images or encodings the model can't take."""
        module = self.trainer.lightning_module if self.trainer else None
        if self.dataset.encodings is not None and isinstance(module, ShowsConfigs):
            check_encodings(self.dataset, module)
        self._check_aspects([bucket.aspect for split in SPLITS for bucket in self.dataset.buckets(split)])

    def _check_aspects(self, aspects: Sequence[Aspect]) -> None:
        module = self.trainer.lightning_module if self.trainer else None
        if isinstance(module, ShowsConfigs):
            coarsest = self.resolutions[0]
            shapes = sorted({(aspect.width * coarsest, aspect.height * coarsest) for aspect in aspects})
            shared = self.curriculum.context_parallel
            check_shapes(shapes, coarsest, module.transformer_config, module.autoencoder_config, shared)

    @cached_property
    def dataset_folder(self) -> Path:
        """The folder of the prepared data set, if that is local."""
        folder = Path(self.folder)
        if self.source is None or (folder / DESCRIPTION).exists():
            return folder
        return folder / fingerprint(settings_of(self.source, self.preparation))

    @cached_property
    def dataset(self) -> PreparedDataset:
        """The prepared data set, which is prepared first if a source is given.

        With a trainer, Lightning has done so in one process before; another must not do it while others read.
        """
        if is_remote(self.folder):
            return PreparedDataset(self.folder, self.cache)
        if self.trainer is None or not (self.dataset_folder / DESCRIPTION).exists():
            self.prepare_data()
        return PreparedDataset(self.dataset_folder)

    @property
    def identity(self) -> str:
        """A short hash of the data set's content; a checkpoint keeps it, and another one is not trained on unasked."""
        return self.dataset.identity

    def images(self, split: Split) -> StageImages:
        """Return the buckets of a split as the stages use them; only training changes samples and weights captions.

        Raises:
            ValueError: encodings can't be changed, or the data set has no captions of a kind.
        """
        buckets, encodings = self.dataset.buckets(split), self.dataset.encodings
        weights = self.caption_weights if split == "train" else {}
        if unknown := [kind for kind in weights if kind not in self.dataset.caption_kinds]:
            kinds = ", ".join(self.dataset.caption_kinds)
            raise ValueError(f"data.caption_weights: {self.dataset.location} has no captions {unknown[0]}, but {kinds}")
        if encodings is None:
            augmentation = self.augmentation if split == "train" else NO_AUGMENTATION
            return StageImages(buckets, self.resolutions, self.latent_pyramid == "pool", augmentation, weights)
        if self.augmentation.changes:
            raise ValueError(
                f"data.augmentation changes images and captions, but {self.dataset.location} holds their encodings: "
                "train on the images, or without augmentation (several crops: lightning data encode --crops)"
            )
        layout = layout_of(self.dataset, self.resolutions, self.latent_pyramid)
        return StageEncodings(buckets, layout, b64decode(encodings["empty_prompt"]), weights)

    def steps(
        self, rank: int = 0, ranks: int = 1, seed: int | None = None, tokenize: PromptTokenizer | None = None
    ) -> StepDataset:
        """Return what training reads, without a trainer: a map from the number of a step to one rank's micro-batches.

        Args:
            rank: the number of the process.
            ranks: the number of all processes.
            seed: replaces the seed of the DataModule; None: it doesn't.
            tokenize: tokenizes captions; None: it is not needed.

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
            "tokenize": tokenize,
        }
        cache = self.dataset.cache
        if cache is None:
            return StepDataset(**settings)
        steps = RemoteStepDataset(cache, max_steps_apart(self.num_workers, self.prefetch_factor), **settings)
        check_cache_size(steps, self.heldout(self.validation_samples).chunks())
        return steps

    def heldout(
        self, samples: int, rank: int = 0, ranks: int = 1, micro_batch: Sequence[int] | None = None
    ) -> HeldoutDataset:
        """Return ``samples`` held-out images of each stage, in micro-batches of at most ``micro_batch`` samples.

        ``micro_batch`` has one number a stage; None: the DataModule's ``max_micro_batch``.
        """
        micro_batch = micro_batch or self.max_micro_batch
        return HeldoutDataset(self.images("heldout"), samples, micro_batch, rank, ranks, self.damaged)

    def train_dataloader(self) -> StepLoader:
        """Return a loader that starts at the step that the model has reached.

        Raises:
            TypeError: the module does not count its steps.
            ValueError: see :meth:`steps`.
        """
        trainer = self.trainer
        assert trainer is not None
        module = trainer.lightning_module
        tokenize = None
        if self.dataset.encodings is None and isinstance(module, TokenizesPrompts):
            tokenize = module.prompt_tokenizer
        steps = self.steps(trainer.global_rank, trainer.world_size, tokenize=tokenize)
        if not isinstance(module, CountsSteps):
            raise TypeError(f"{type(module).__name__} has no attribute step: training must count its steps there")
        pin_memory = trainer.strategy.root_device.type == "cuda"
        ahead = self.read_ahead(trainer.world_size, steps.images.sample_bytes)
        if (ahead.workers, ahead.steps) != (self.num_workers, self.prefetch_factor):
            rank_zero_info(
                f"A step takes {ahead.step_bytes / 1e6:,.0f} MB on a rank, so that data.prefetch_memory has room for "
                f"{ahead.workers} worker(s) that read {ahead.steps} step(s) ahead."
            )
        return StepLoader(steps, module.step, ahead.workers, ahead.steps, pin_memory)

    def read_ahead(self, ranks: int, sample_bytes: Callable[[int], int]) -> ReadAhead:
        """Return how many steps the workers of one of ``ranks`` read ahead.

        ``sample_bytes`` returns the bytes of one sample of a stage.
        """
        step_bytes = largest_step(self.curriculum, ranks, sample_bytes)
        return plan_read_ahead(step_bytes, self.prefetch_limit, self.num_workers, self.prefetch_factor)

    def read_ahead_in_validation(self, ranks: int, sample_bytes: Callable[[int], int]) -> ReadAhead:
        """Return how many held-out micro-batches the workers of one of ``ranks`` read ahead.

        They have the memory that the steps of training leave: those stay where they are meanwhile.
        """
        largest = max(limit * sample_bytes(stage) for stage, limit in enumerate(self.max_micro_batch))
        left = self.prefetch_limit - self.read_ahead(ranks, sample_bytes).total
        return plan_read_ahead(largest, left, self.num_workers, prefetch_factor=1)

    def val_dataloader(self) -> HeldoutLoader:
        """Return fixed micro-batches of the held-out split."""
        trainer = self.trainer
        assert trainer is not None
        heldout = self.heldout(self.validation_samples, trainer.global_rank, trainer.world_size)
        if self.dataset.cache is not None:
            self.dataset.cache.hold(HELDOUT, heldout.chunks())
        ahead = self.read_ahead_in_validation(trainer.world_size, heldout.images.sample_bytes)
        return HeldoutLoader(heldout, ahead.workers, ahead.steps, trainer.strategy.root_device.type == "cuda")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch unchanged; with ``damaged: skip``, first log how many samples were replaced.

        The number counts from the start of the run, or from where it was resumed, over all ranks.
        """
        trainer = self.trainer
        assert trainer is not None
        if self.damaged == "skip" and trainer.training and isinstance(trainer.train_dataloader, StepLoader):
            module = trainer.lightning_module
            assert isinstance(module, CountsSteps)
            if (module.step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                count = torch.tensor(float(trainer.train_dataloader.damaged), device=module.device)
                count = trainer.strategy.reduce(count, reduce_op="sum")
                for logger in trainer.loggers:
                    logger.log_metrics({"data/damaged": float(count)}, step=module.step)
        return batch
