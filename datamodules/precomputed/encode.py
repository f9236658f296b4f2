"""Encode a prepared data set once, so that training on it loads no autoencoder and no text encoder.

The encodings are their own data set, with the same buckets, samples and order. Like a preparation, they are made in
parts, one for each chunk of images. ``OUTPUT.parts`` keeps the finished parts, however often the work is interrupted.

OUTPUT/dataset.json      that of the images, with the encodings' own checksums, and under ``encodings``:
    encoders             name, revision, class and settings of each encoder
    crops                the number of crops stored of each training sample
    layout               what the bytes hold, see :class:`~nami_lightning.datamodules.precomputed.records.Layout`
    empty_prompt         the states of the empty prompt, packed like a caption's, in base64; for prompt dropout
    chunks               the number of samples in each chunk of images, by bucket; the order of samples depends on these
"""

import json
import shutil
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from nami_lightning.datamodules.module_protocols import HasEncoders
from nami_lightning.datamodules.precomputed.encoding_task import EncodingTask
from nami_lightning.datamodules.precomputed.raw_batches import RawBatch, RawBatches
from nami_lightning.datamodules.precomputed.records import EncodedRecord, Layout, as_bytes
from nami_lightning.datamodules.preparation.parts_folder import (
    REPORT,
    SETTINGS,
    checksums,
    finished_parts,
    merging,
    part_name,
    parts_folder,
    set_aside,
    start_or_resume,
    unfinished_parts,
    write_description,
)
from nami_lightning.datamodules.preparation.prepare import split_counts
from nami_lightning.datamodules.storage.dataset import ENCODED_FORMAT, SKIPPED, SPLITS
from nami_lightning.datamodules.storage.shards import ShardWriter, join
from nami_lightning.models import flow
from nami_lightning.models.autoencoder import encode_posterior
from nami_lightning.models.encoder_revisions import describe_encoders
from nami_lightning.models.text_encoder import TextStates
from nami_lightning.training.batch import pixels
from nami_lightning.utils.atomic_write import publish, this_process

CHUNK_BYTES = 2**29
"""The largest size in bytes of a chunk of encodings; a part that is smaller makes one smaller chunk."""

ITEMS = "items"


# --- making the parts --------------------------------------------------------------------------


def encode_parts(task: EncodingTask, batch_size: int, workers: int, shard: tuple[int, int] = (0, 1)) -> None:
    """Encode the parts that are not finished yet.

    Args:
        task: what is to be encoded.
        batch_size: the number of images, and of captions, that go through an encoder at once.
        workers: the number of processes that read and decode.
        shard: (i, n): encode only every n-th part, from part i on, while other machines encode the others.

    Raises:
        ValueError: other machines encode other images, or with other encoders or settings.
        FetchFailed: a store can't be reached, or it refuses access.
    """
    if task.store:
        task.store.pull()
    folder = parts_folder(task.output)
    layout = _start_or_resume(task, folder, shared=shard[1] > 1 or task.store is not None)
    if task.store:
        task.store.push_settings()
    missing = unfinished_parts(folder, range(shard[0], len(task.parts), shard[1]))
    batches = RawBatches(task, missing, batch_size)
    loader = DataLoader(batches, batch_size=None, num_workers=workers)
    with tqdm(desc="encoding", total=sum(task.parts[number].samples for number in missing), unit="image") as bar:
        for number, part_batches in groupby(loader, key=lambda raw: raw.part):
            target = folder / part_name(number)
            partial = target.with_name(f".{target.name}.{this_process()}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            writer = ShardWriter(partial / ITEMS, CHUNK_BYTES)
            for raw in part_batches:
                for record in encode_batch(task.module, layout, raw, batch_size):
                    writer.write(record.to_item())
                    bar.update()
            writer.close()
            (partial / REPORT).write_text(json.dumps({"checksums": checksums(partial / ITEMS)}))
            publish(partial, target, REPORT)
            if task.store:
                task.store.push_part(number, {ITEMS: task.parts[number].bucket_folder})


def _start_or_resume(task: EncodingTask, folder: Path, shared: bool) -> Layout:
    """Start a folder of parts, or continue with the one of the same task, and return the layout of its records."""
    file = folder / SETTINGS
    if file.exists():
        try:
            task.check(json.loads(file.read_text()), folder)
        except ValueError as error:
            if shared:
                raise
            print(f"New parts are made, because {error}.")
            set_aside(folder)
    if not file.exists():
        start_or_resume(folder, _new_settings(task))
    settings = json.loads(file.read_text())
    return Layout(**settings["layout"])


def _new_settings(task: EncodingTask) -> dict[str, Any]:
    """Return what a new folder of parts says of its encodings; this loads the encoders."""
    module = task.module
    text, vae = module.text_encoder, module.vae
    empty = text([""]).row(0)
    layout = Layout(
        resolutions=list(module.resolutions),
        latent_pyramid=module.latent_pyramid,
        pixels=task.pixels,
        factor=module.autoencoder_config.factor,
        channels=module.transformer_config["in_channels"],
        tokens=empty.sequence.shape[0],
        width=text.dims[0],
        pooled_width=text.dims[1],
    )
    encoders = describe_encoders(module.text_encoder_config, module.autoencoder_config)
    for description, model in zip(encoders.values(), (text.sequence, text.pooled, vae), strict=True):
        if description is not None:
            description["class"] = type(model).__name__
    return task.settings() | {
        "encoders": encoders,
        "layout": asdict(layout),
        "empty_prompt": b64encode(layout.pack_text(empty)).decode(),
    }


def encode_batch(module: HasEncoders, layout: Layout, raw: RawBatch, batch_size: int) -> Iterator[EncodedRecord]:
    """Yield the records of a batch of decoded samples."""
    latents = [_encode_images(module, raw.images[level.side], level.coarse, batch_size) for level in raw.levels]
    texts = list(dict.fromkeys(caption for record in raw.records for caption in record.captions))
    packed: dict[str, bytes | memoryview] = {}
    for first in range(0, len(texts), batch_size):
        some_texts = texts[first : first + batch_size]
        states = TextStates(*(field.to("cpu", torch.bfloat16) for field in module.text_encoder(some_texts)))
        packed |= {text: layout.pack_text(states.row(i)) for i, text in enumerate(some_texts)}
    for i, record in enumerate(raw.records):
        text: list[bytes | memoryview] = [packed[caption] for caption in record.captions]
        stored: list[bytes | memoryview] = [as_bytes(level[i]) for level in latents]
        yield EncodedRecord(record.id, record.captions, record.weights, text, record.image, stored, record.kinds)


def _encode_images(module: HasEncoders, images: Tensor, coarse: bool, batch_size: int) -> Tensor:
    """Encode images ``(n, crops, 3, H, W)`` to means and standard deviations ``(n, crops, 2, C, h, w)``.

    With ``coarse``, the images are first reduced to half their resolution.
    """
    encoded = []
    for some_images in images.flatten(0, 1).split(batch_size):
        values = pixels(some_images.to(module.device))
        mean, std = encode_posterior(module.vae, flow.pool(values) if coarse else values)
        assert std is not None
        encoded.append(torch.stack([mean, std], 1).to("cpu", torch.bfloat16))
    return torch.cat(encoded).unflatten(0, images.shape[:2])


# --- merging them ------------------------------------------------------------------------------


def merge(task: EncodingTask) -> None:
    """Merge the parts into the data set of encodings at the task's output, and remove them.

    Raises:
        ValueError: parts are missing, or they were made for another task.
        FetchFailed: a store can't be reached, or it refuses access.
    """
    if task.store:
        task.store.pull()
    folder = parts_folder(task.output)
    with task.store.merging() if task.store else merging(task.output) as partial:
        parts = finished_parts(task.output, len(task.parts))
        settings = json.loads((folder / SETTINGS).read_text())
        task.check(settings, folder)
        description = _join_buckets(task, parts, partial, settings)
        if task.images.cache:
            task.images.cache.metadata(SKIPPED)
        shutil.copyfile(task.images.folder / SKIPPED, partial / SKIPPED)
        write_description(partial, description)


def _join_buckets(task: EncodingTask, parts: list[Path], target: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Make the buckets of ``target``, and return the description of the data set."""
    sums: dict[str, str] = {}
    counts: dict[str, int] = {}
    chunks: dict[str, list[int]] = {}
    for bucket, group in groupby(range(len(parts)), key=lambda number: task.parts[number].bucket_folder):
        numbers = list(group)
        folders, names = [parts[number] / ITEMS for number in numbers], [parts[number].name for number in numbers]
        counts[bucket] = join(folders, names, target / bucket, in_store=task.store is not None)
        chunks[bucket] = [task.parts[number].samples for number in numbers]
        for number in numbers:
            part_sums = json.loads((parts[number] / REPORT).read_text())["checksums"]
            sums |= {f"{bucket}/{parts[number].name}-{file}": value for file, value in part_sums.items()}
    images = task.images.description
    image_count = sum(sum(by_bucket.values()) for by_bucket in images["samples"].values())
    left_out = image_count - sum(counts.values())
    return images | {
        "format": ENCODED_FORMAT,
        "samples": {split: split_counts(counts, split) for split in SPLITS},
        "removed": images["removed"] | ({"too small for any stage": left_out} if left_out else {}),
        "checksums": sums,
        "encodings": settings | {"chunks": chunks},
    }
