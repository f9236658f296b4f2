"""What is to be encoded: a data set of images, the encoders, and the parts that the work is divided into."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nami_lightning.datamodules.module_protocols import HasEncoders
from nami_lightning.datamodules.precomputed.records import Level, levels_of
from nami_lightning.datamodules.preparation.parts_folder import check_settings, check_unused
from nami_lightning.datamodules.preparation.prepare_parts import fingerprint
from nami_lightning.datamodules.preparation.remote_output import RemoteOutput
from nami_lightning.datamodules.stage_images import StageImages
from nami_lightning.datamodules.storage.dataset import DESCRIPTION, SPLITS, Bucket, PreparedDataset, Split
from nami_lightning.datamodules.storage.remote import is_remote
from nami_lightning.models.autoencoder import PIXELS
from nami_lightning.models.encoder_revisions import check_encoders


class Part(NamedTuple):
    """One part of the work: the samples of one chunk of images.

    Attributes:
        split: the split of the samples.
        bucket: the bucket of the samples.
        first: the index of the first sample in the bucket.
        samples: the number of samples.
    """

    split: Split
    bucket: Bucket
    first: int
    samples: int

    @property
    def bucket_folder(self) -> str:
        """The folder of the bucket, relative to the data set's folder."""
        return f"{self.split}/{self.bucket.name}"


class EncodingTask:
    """What is to be encoded, by which encoders, and where the encodings are written.

    Args:
        module: its frozen encoders, its resolutions and its latent pyramid are used; the encoders are loaded when they
            are first needed.
        images: a prepared data set of images.
        output: the folder of the encodings, or its URL.
        crops: the number of crops stored of each training image; training takes one of them at random.

    Raises:
        ValueError: several crops are asked for, but the images are already cropped; the data set holds encodings
            instead of images; or no stage can use any of its images.
    """

    def __init__(self, module: HasEncoders, images: PreparedDataset, output: Path | str, crops: int = 1) -> None:
        if images.encodings is not None:
            raise ValueError(f"{images.folder} holds encodings already: give the data set of images")
        self.module, self.images, self.crops = module, images, crops
        self.store = RemoteOutput(str(output)) if is_remote(output) else None
        self.output = self.store.local if self.store else Path(output)
        self.pixels = module.autoencoder_config.name == PIXELS
        if crops < 1:
            raise ValueError(f"--crops must be at least 1; got {crops}")
        if crops > 1 and images.description["settings"]["crop"] == "center":
            raise ValueError(
                f"--crops {crops}: {images.folder} was prepared with crop: center, so all crops would be the same; "
                "prepare it with crop: random, or store 1"
            )
        if crops > 1 and self.pixels:
            raise ValueError(
                f"--crops {crops}: where latents are pixels, whole images are stored, and cropped when they are read"
            )
        self.top_only = module.latent_pyramid == "pool"
        self.parts = list(self._parts())
        if not self.parts:
            raise ValueError(f"{images.folder} has no image that is large enough for any stage")

    def _parts(self) -> Iterator[Part]:
        for split in SPLITS:
            buckets = self.images.buckets(split)
            StageImages(buckets, self.module.resolutions, self.top_only)  # refuses resolutions that don't fit
            for bucket in buckets:
                if bucket.resolution >= self.module.resolutions[-1 if self.top_only else 0]:
                    first = 0
                    for count in bucket.chunk_sizes:
                        yield Part(split, bucket, first, count)
                        first += count

    def levels(self, bucket: Bucket) -> list[Level]:
        """Return the kinds of latents that are stored of each sample of a bucket."""
        if self.pixels:
            return []
        return levels_of(self.module.resolutions, self.module.latent_pyramid, bucket.resolution)

    def settings(self) -> dict[str, Any]:
        """Return all settings that decide what the encodings hold, except the encoders."""
        return {
            "images": fingerprint(self.images.description),
            "resolutions": list(self.module.resolutions),
            "latent_pyramid": self.module.latent_pyramid,
            "crops": self.crops,
        }

    def check(self, existing: dict[str, Any], folder: Path | str) -> None:
        """Refuse to continue in a folder that was made by other encoders or with other settings.

        Args:
            existing: the encoders and settings that the folder was made with.
            folder: the folder, for the message.

        Raises:
            ValueError: they differ; the message says what is different.
        """
        module = self.module
        check_encoders(existing["encoders"], module.text_encoder_config, module.autoencoder_config, str(folder))
        check_settings({key: existing[key] for key in self.settings()}, self.settings(), folder)

    def is_complete(self) -> bool:
        """Return whether ``output`` holds the encodings of this task.

        Raises:
            ValueError: it holds other encodings, or something else.
        """
        location = self.store.url if self.store else self.output
        if self.store.description() if self.store else (self.output / DESCRIPTION).exists():
            encodings = PreparedDataset(location).encodings
            if encodings is None:
                raise ValueError(f"{location} is a data set of images: choose another output")
            self.check(encodings, location)
            return True
        if self.store:
            return False
        check_unused(self.output, "holds no encodings")
        return False
