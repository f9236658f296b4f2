"""A prepared data set encoded once, so that training on it loads no autoencoder and no text encoder.

The encodings are a data set of their own, with the same buckets, samples and order. They are made in parts, one for
each chunk of images, like a preparation: ``OUTPUT.parts`` keeps what is finished, however often it is interrupted.

OUTPUT/dataset.json      that of the images, with the encodings' own checksums and, below ``encodings``:
    encoders             name, revision, class and settings of each
    crops                stored of each training sample
    layout               what the bytes hold, see :class:`~nami_lightning.datamodules.precomputed.records.Layout`
    empty_prompt         its states, packed like a caption's, in base64; for prompt dropout
    chunks               samples in each chunk of images, by bucket: the order of samples is made of these
"""

import json
import shutil
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from nami_lightning.datamodules.precomputed.records import EncodedRecord, Layout, Level, as_bytes, levels_of
from nami_lightning.datamodules.preparation.image_io import MIDDLE, Position, read_image
from nami_lightning.datamodules.preparation.prepare import counts_of
from nami_lightning.datamodules.preparation.prepare_parts import (
    REPORT,
    SETTINGS,
    check_settings,
    checksums,
    claim,
    fingerprint,
    finished_parts,
    part_name,
    parts_folder,
    publish,
)
from nami_lightning.datamodules.stage_images import StageImages
from nami_lightning.datamodules.storage.dataset import (
    DESCRIPTION,
    ENCODED_FORMAT,
    SKIPPED,
    SPLITS,
    Bucket,
    PreparedDataset,
    Split,
)
from nami_lightning.datamodules.storage.shards import Record, ShardWriter, join
from nami_lightning.models import flow
from nami_lightning.models.autoencoder import PIXELS, encode_posterior
from nami_lightning.models.encoder_revisions import check_identity, identify
from nami_lightning.models.text_encoder import TextStates
from nami_lightning.training.batch import pixels
from nami_lightning.training.module import NamiModule
from nami_lightning.training.rng import uniform_of
from nami_lightning.utils.atomic_write import this_process

CHUNK_BYTES = 2**29
"""Size of a chunk of encodings, unless a chunk of images makes less."""

ITEMS = "items"


class Part(NamedTuple):
    """A chunk of images: ``samples`` of a bucket from number ``first`` on."""

    split: Split
    bucket: Bucket
    first: int
    samples: int

    @property
    def home(self) -> str:
        """The folder of its bucket below the data set's."""
        return f"{self.split}/{self.bucket.name}"


class Encoding:
    """What is encoded, and by what.

    Args:
        module: its frozen encoders, resolutions and latent pyramid count; they are loaded when they are needed.
        images: a prepared data set.
        output: the encodings' folder.
        crops: stored of each training image, of which training draws one.

    Raises:
        ValueError: crops of images that were stored cropped, encodings instead of images, or nothing that a stage can
            draw.
    """

    def __init__(self, module: NamiModule, images: PreparedDataset, output: Path, crops: int = 1) -> None:
        if images.encodings is not None:
            raise ValueError(f"{images.folder} holds encodings already: give the data set of images")
        self.module, self.images, self.output, self.crops = module, images, output, crops
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
        """The latents that are stored of its samples."""
        if self.pixels:
            return []
        return levels_of(self.module.resolutions, self.module.latent_pyramid, bucket.resolution)

    def settings(self) -> dict[str, Any]:
        """All that decides what the encodings hold, but the encoders."""
        return {
            "images": fingerprint(self.images.description),
            "resolutions": list(self.module.resolutions),
            "latent_pyramid": self.module.latent_pyramid,
            "crops": self.crops,
        }

    def check(self, there: dict[str, Any], folder: Path) -> None:
        """Refuse to go on where something else was begun.

        Raises:
            ValueError: naming what is different.
        """
        check_identity(there["encoders"], self.module.text_encoder_config, self.module.autoencoder_config, str(folder))
        check_settings({key: there[key] for key in self.settings()}, self.settings(), folder)

    def is_complete(self) -> bool:
        """Whether ``output`` holds these encodings.

        Raises:
            ValueError: it holds others, or something else.
        """
        if (self.output / DESCRIPTION).exists():
            about = PreparedDataset(self.output).encodings
            if about is None:
                raise ValueError(f"{self.output} is a data set of images: choose another output")
            self.check(about, self.output)
            return True
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise ValueError(f"{self.output} exists and holds no encodings: choose another output")
        return False


# --- making the parts --------------------------------------------------------------------------


def encode_parts(encoding: Encoding, batch_size: int, workers: int, shard: tuple[int, int] = (0, 1)) -> None:
    """Make the parts that are not there yet, of every ``shard[1]``-th from ``shard[0]`` on.

    Args:
        encoding: what is to be made.
        batch_size: images, and captions, that go through an encoder at once.
        workers: processes that read and decode.
        shard: this process's share.

    Raises:
        ValueError: the parts that are there are of other images, encoders or settings.
    """
    folder = parts_folder(encoding.output)
    layout = _claim(encoding, folder)
    mine = range(shard[0], len(encoding.parts), shard[1])
    missing = [number for number in mine if not (folder / part_name(number)).exists()]
    if len(missing) < len(mine):
        print(f"{len(mine) - len(missing)} of {len(mine)} parts are done already.")
    batches = RawBatches(encoding, missing, batch_size)
    loader = DataLoader(batches, batch_size=None, num_workers=workers)
    with tqdm(desc="encoding", total=sum(encoding.parts[number].samples for number in missing), unit="image") as bar:
        for number, of_part in groupby(loader, key=lambda raw: raw.part):
            target = folder / part_name(number)
            partial = target.with_name(f".{target.name}.{this_process()}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            writer = ShardWriter(partial / ITEMS, CHUNK_BYTES)
            for raw in of_part:
                for record in encode_batch(encoding.module, layout, raw, batch_size):
                    writer.write(record.to_item())
                    bar.update()
            writer.close()
            (partial / REPORT).write_text(json.dumps({"checksums": checksums(partial / ITEMS)}))
            publish(partial, target, REPORT)


def _claim(encoding: Encoding, folder: Path) -> Layout:
    """Start a folder of parts, or go on with one; how its records are laid out."""
    file = folder / SETTINGS
    if file.exists():
        encoding.check(json.loads(file.read_text()), folder)
        return Layout(**json.loads(file.read_text())["layout"])
    module = encoding.module
    text, vae = module.text_encoder, module.vae
    empty = text([""]).row(0)
    layout = Layout(
        resolutions=list(module.resolutions),
        latent_pyramid=module.latent_pyramid,
        pixels=encoding.pixels,
        factor=module.autoencoder_config.factor,
        channels=module.transformer_config["in_channels"],
        tokens=empty.sequence.shape[0],
        width=text.dims[0],
        pooled_width=text.dims[1],
    )
    encoders = identify(module.text_encoder_config, module.autoencoder_config)
    for about, model in zip(encoders.values(), (text.sequence, text.pooled, vae), strict=True):
        if about is not None:
            about["class"] = type(model).__name__
    claim(
        folder,
        encoding.settings()
        | {
            "encoders": encoders,
            "layout": asdict(layout),
            "empty_prompt": b64encode(layout.pack_text(empty)).decode(),
        },
    )
    return _claim(encoding, folder)


class RawBatch(NamedTuple):
    """Some samples of a part, decoded.

    Attributes:
        part: its number.
        records: what is stored of them; with their image files only where these are kept.
        images: uint8 ``(n, crops, 3, H, W)`` by resolution.
        levels: of the latents that are to be made.
    """

    part: int
    records: list[Record]
    images: dict[int, Tensor]
    levels: list[Level]


class RawBatches(Dataset[RawBatch]):
    """Reads and decodes the samples of parts, in worker processes.

    Args:
        encoding: what is to be made.
        parts: numbers of those that are read, in order.
        batch_size: samples at once; a batch is of one part.
    """

    def __init__(self, encoding: Encoding, parts: list[int], batch_size: int) -> None:
        self.parts, self.crops, self.pixels = encoding.parts, encoding.crops, encoding.pixels
        self.levels = {part.bucket.resolution: encoding.levels(part.bucket) for part in encoding.parts}
        self.batches = [
            (number, first, min(batch_size, self.parts[number].samples - first))
            for number in parts
            for first in range(0, self.parts[number].samples, batch_size)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> RawBatch:
        if not 0 <= index < len(self.batches):
            raise IndexError(index)
        number, first, count = self.batches[index]
        part = self.parts[number]
        first += part.first
        records = [Record.from_item(item) for item in part.bucket.shards.read(range(first, first + count))]
        levels = self.levels[part.bucket.resolution]
        kept = self.pixels or part.split == "heldout"
        return RawBatch(
            number,
            [record if kept else record._replace(image=b"") for record in records],
            {side: self._images(records, part, side) for side in {level.side for level in levels}},
            levels,
        )

    def _images(self, records: list[Record], part: Part, side: int) -> Tensor:
        """``(n, crops, 3, H, W)``."""
        shape, factor = part.bucket.aspect.shape(side), part.bucket.resolution // side
        return torch.stack(
            [
                torch.stack([read_image(record.image, shape, factor, window) for window in self._windows(record, part)])
                for record in records
            ]
        )

    def _windows(self, record: Record, part: Part) -> list[Position]:
        return [MIDDLE] if part.split == "heldout" else [crop_of(record.id, number) for number in range(self.crops)]


def crop_of(sample: str, number: int) -> Position:
    """Where the ``number``-th stored crop of a sample lies, where there is a choice; the same on every machine."""
    return uniform_of("crop", sample, number, "left"), uniform_of("crop", sample, number, "top")


def encode_batch(module: NamiModule, layout: Layout, raw: RawBatch, batch_size: int) -> Iterator[EncodedRecord]:
    """Records of decoded samples."""
    latents = [_encode_images(module, raw.images[level.side], level.coarse, batch_size) for level in raw.levels]
    texts = list(dict.fromkeys(caption for record in raw.records for caption in record.captions))
    packed: dict[str, bytes | memoryview] = {}
    for first in range(0, len(texts), batch_size):
        some = texts[first : first + batch_size]
        states = TextStates(*(field.to("cpu", torch.bfloat16) for field in module.text_encoder(some)))
        packed |= {text: layout.pack_text(states.row(i)) for i, text in enumerate(some)}
    for i, (name, image, captions, weights) in enumerate(raw.records):
        text = [packed[caption] for caption in captions]
        yield EncodedRecord(name, captions, weights, text, image, [as_bytes(of_level[i]) for of_level in latents])


def _encode_images(module: NamiModule, images: Tensor, coarse: bool, batch_size: int) -> Tensor:
    """``(n, crops, 3, H, W)`` to ``(n, crops, 2, C, h, w)``: means and standard deviations."""
    encoded = []
    for some in images.flatten(0, 1).split(batch_size):
        whole = pixels(some.to(module.device))
        mean, std = encode_posterior(module.vae, flow.pool(whole) if coarse else whole)
        assert std is not None
        encoded.append(torch.stack([mean, std], 1).to("cpu", torch.bfloat16))
    return torch.cat(encoded).unflatten(0, images.shape[:2])


# --- joining them ------------------------------------------------------------------------------


def merge(encoding: Encoding) -> None:
    """Join the parts of ``output``, give the whole its name, and remove the parts.

    Raises:
        ValueError: parts are missing, or they are of something else.
    """
    output = encoding.output
    partial = output.with_name(f".{output.name}.merging-{this_process()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        parts = finished_parts(output, len(encoding.parts))
        about = json.loads((parts_folder(output) / SETTINGS).read_text())
        encoding.check(about, parts_folder(output))
        description = _join(encoding, parts, partial, about)
        if encoding.images.cache:
            encoding.images.cache.metadata(SKIPPED)
        shutil.copyfile(encoding.images.folder / SKIPPED, partial / SKIPPED)
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
        publish(partial, output, DESCRIPTION)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        if not (output / DESCRIPTION).exists():  # else another process has done it
            raise
    shutil.rmtree(parts_folder(output), ignore_errors=True)


def _join(encoding: Encoding, parts: list[Path], target: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Make the buckets of ``target``; its description."""
    sums: dict[str, str] = {}
    counts: dict[str, int] = {}
    chunks: dict[str, list[int]] = {}
    for home, numbers in groupby(range(len(parts)), key=lambda number: encoding.parts[number].home):
        of_bucket = list(numbers)
        folders, names = [parts[number] / ITEMS for number in of_bucket], [parts[number].name for number in of_bucket]
        counts[home] = join(folders, names, target / home)
        chunks[home] = [encoding.parts[number].samples for number in of_bucket]
        for number in of_bucket:
            of_part = json.loads((parts[number] / REPORT).read_text())["checksums"]
            sums |= {f"{home}/{parts[number].name}-{file}": value for file, value in of_part.items()}
    images = encoding.images.description
    left_out = sum(map(sum, (of_split.values() for of_split in images["samples"].values()))) - sum(counts.values())
    return images | {
        "format": ENCODED_FORMAT,
        "samples": {split: counts_of(counts, split) for split in SPLITS},
        "removed": images["removed"] | ({"too small for any stage": left_out} if left_out else {}),
        "checksums": sums,
        "encodings": about | {"chunks": chunks},
    }
