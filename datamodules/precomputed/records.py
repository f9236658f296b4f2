"""Encodings in shards: the latents and text states of samples, as they are stored and as training reads them.

A record holds bfloat16 values. For each stage that can use the sample, it holds the latents of the stage's image, and
those of the same pixels at half the resolution, from which the stage's bridge starts. For a pooled latent pyramid it
holds the finest latents alone. All this is stored once for every stored crop. Latents are stored as mean and standard
deviation, so that training samples from them just as it does without encodings. A record also holds the token states of
each caption, without their padding. Where latents are pixels, the image file is stored instead. It is smaller, and it
is exact, whereas bfloat16 rounds all 8-bit values away from zero.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nami_lightning.datamodules.aspect_buckets import Aspect
from nami_lightning.datamodules.module_protocols import ShowsConfigs
from nami_lightning.datamodules.preparation.image_io import read_image
from nami_lightning.datamodules.stage_images import Choice, Sample, SampleRef, StageImages, image_bytes
from nami_lightning.datamodules.storage.dataset import Bucket, PreparedDataset
from nami_lightning.models.autoencoder import Posterior
from nami_lightning.models.encoder_revisions import check_encoders
from nami_lightning.models.text_encoder import TextStates
from nami_lightning.training.batch import Encodings


class Level(NamedTuple):
    """One kind of latents that is stored of a sample.

    Attributes:
        side: the resolution in px of the stage that uses them.
        coarse: whether they are of the stage's image at half its resolution.
    """

    side: int
    coarse: bool


def levels_of(resolutions: Sequence[int], latent_pyramid: str, resolution: int) -> list[Level]:
    """Return the kinds of latents that the stages use of a sample, in the order in which they are stored.

    Args:
        resolutions: the resolution of each stage in px.
        latent_pyramid: ``encode`` or ``pool``.
        resolution: the resolution of the sample's bucket.
    """
    if latent_pyramid == "pool":
        return [Level(side, False) for side in resolutions[-1:] if side <= resolution]
    stages = [side for side in resolutions if side <= resolution]
    return [Level(side, coarse) for side in stages for coarse in (False, True) if not coarse or side > resolutions[0]]


@dataclass(frozen=True)
class Layout:
    """The sizes that are needed to read the bytes of encodings.

    Args:
        resolutions: resolution of each stage in px.
        latent_pyramid: ``encode``: latents of every stage; ``pool``: latents of the finest stage.
        pixels: whether latents are pixels, and image files are stored instead.
        factor: px for each latent, along one side.
        channels: channels of the latents.
        tokens: rows of a text state with its padding.
        width: width of a token's state.
        pooled_width: width of the pooled state.
    """

    resolutions: list[int]
    latent_pyramid: str
    pixels: bool
    factor: int
    channels: int
    tokens: int
    width: int
    pooled_width: int

    def levels(self, resolution: int) -> list[Level]:
        """Return the kinds of latents that a sample has whose bucket has ``resolution``."""
        return [] if self.pixels else levels_of(self.resolutions, self.latent_pyramid, resolution)

    def latents_shape(self, level: Level, aspect: Aspect) -> tuple[int, ...]:
        """Return the shape ``(2, C, H/f, W/f)`` of the mean and the standard deviation of one crop's latents."""
        shape, cell = aspect.shape(level.side), self.factor * (1 + level.coarse)
        return 2, self.channels, shape.height // cell, shape.width // cell

    def sample_bytes(self, stage: int) -> int:
        """Return the bytes of one sample of ``stage`` in a micro-batch: its latents or its image, and its text."""
        text = 2 * (self.tokens * self.width + self.pooled_width)
        side = self.resolutions[-1 if self.latent_pyramid == "pool" else stage]
        if self.pixels:
            return text + image_bytes(side)
        coarse = [True] if self.latent_pyramid == "encode" and stage > 0 else []
        latents = sum(2 * 2 * self.channels * (side // (self.factor * (1 + half))) ** 2 for half in [False, *coarse])
        return text + latents

    def pack_text(self, states: TextStates) -> bytes:
        """Return the bytes of one caption's states (see :meth:`TextStates.row`), without the zeros of the padding."""
        nonzero = states.sequence.any(1).nonzero()
        tokens = int(nonzero.max()) + 1 if len(nonzero) else 0
        return as_bytes(torch.cat([states.sequence[:tokens].flatten(), states.pooled]))

    def unpack_text(self, data: bytes | memoryview) -> TextStates:
        """Return the states that :meth:`pack_text` packed, with padding."""
        states, pooled = from_bytes(data).tensor_split([-self.pooled_width])
        sequence = states.view(-1, self.width)
        return TextStates(F.pad(sequence, (0, 0, 0, self.tokens - len(sequence))), pooled)


def as_bytes(values: Tensor) -> bytes:
    """Return a tensor's values as bfloat16 bytes."""
    return values.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes | memoryview) -> Tensor:
    """Return the values that :func:`as_bytes` packed, as a flat tensor."""
    return torch.frombuffer(bytearray(data), dtype=torch.bfloat16)


def select_crop(data: bytes | memoryview, shape: Sequence[int], number: float) -> Tensor:
    """Return the crop that ``number``, uniform in [0, 1), selects from the crops in ``data``, each of ``shape``."""
    size = 2 * math.prod(shape)
    crop = int(number * (len(data) // size))
    return from_bytes(data[crop * size : (crop + 1) * size]).view(*shape)


class EncodedRecord(NamedTuple):
    """One stored sample.

    Attributes:
        id: its name.
        captions: one caption or more.
        weights: the weight of each caption; empty if all have the same weight.
        text: the packed states of each caption.
        image: the image file, where latents are pixels, and of held-out samples, which metrics compare images with;
            else empty.
        latents: the latents of each kind, see :func:`levels_of`; each holds those of all crops.
        kinds: what each caption is, see :class:`~nami_lightning.datamodules.storage.shards.Record`.
    """

    id: str
    captions: list[str]
    weights: list[float]
    text: list[bytes | memoryview]
    image: bytes | memoryview
    latents: list[bytes | memoryview]
    kinds: Sequence[str] = ()

    def to_item(self) -> tuple[Any, ...]:
        """Return the tuple that litdata stores."""
        values = [self.captions, self.weights, [len(text) for text in self.text], *([self.kinds] if self.kinds else [])]
        texts = json.dumps(values, ensure_ascii=False)
        return self.id, texts, b"".join(self.text), self.image, *self.latents

    @classmethod
    def from_item(cls, item: tuple[Any, ...]) -> "EncodedRecord":
        """Return the record that an item holds, as litdata read it."""
        name, texts, joined, image, *latents = item
        captions, weights, sizes, *kinds = json.loads(texts)
        text, first = [], 0
        for size in sizes:
            text.append(joined[first : first + size])
            first += size
        return cls(name, captions, weights, text, image, latents, *kinds)


class StageEncodings(StageImages):
    """The buckets of one split as the stages use them, of a data set of encodings; see :class:`StageImages`.

    Args:
        buckets: all buckets of the split.
        layout: the layout of their records.
        empty_prompt: the packed states of the empty prompt.
        caption_weights: how often captions of each kind are used; empty: as is stored.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        layout: Layout,
        empty_prompt: bytes,
        caption_weights: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        pooled = layout.latent_pyramid == "pool"
        super().__init__(buckets, layout.resolutions, pooled, caption_weights=caption_weights)
        self.layout, self.empty_prompt = layout, empty_prompt

    def sample_bytes(self, stage: int) -> int:
        """Return the bytes of one sample of ``stage`` in a micro-batch."""
        return self.layout.sample_bytes(stage)

    def sample(self, stage: int, aspect: Aspect, ref: SampleRef, item: Any, choice: Choice) -> Sample:
        """Return the sample that a stored item holds, as ``stage`` needs it.

        The horizontal position of the crop window selects one of the stored crops.
        """
        layout, side = self.layout, self.sides[stage]
        record = EncodedRecord.from_item(item)
        caption = self.pick_caption(record, choice)
        levels = layout.levels(self.buckets[ref.bucket].resolution)

        def latents(level: Level) -> Posterior:
            shape = layout.latents_shape(level, aspect)
            return Posterior(*select_crop(record.latents[levels.index(level)], shape, choice.window[0])[:, None])

        coarse = not layout.pixels and layout.latent_pyramid == "encode" and stage > 0
        encodings = Encodings(
            None if layout.pixels else latents(Level(side, False)),
            latents(Level(side, True)) if coarse else None,
            add_batch_dimension(layout.unpack_text(record.text[caption])),
            add_batch_dimension(layout.unpack_text(self.empty_prompt)),
        )
        return Sample(record.id, record.captions[caption], self._image(record, stage, aspect, ref, choice), encodings)

    def _image(self, record: EncodedRecord, stage: int, aspect: Aspect, ref: SampleRef, choice: Choice) -> Tensor:
        """Return the image of a record, or an empty one if the record holds none."""
        if not len(record.image):
            return torch.empty(3, 0, 0, dtype=torch.uint8)
        factor = self.buckets[ref.bucket].resolution // self.sides[stage]
        return read_image(record.image, aspect.shape(self.sides[stage]), factor, choice.window)


def add_batch_dimension(states: TextStates) -> TextStates:
    """Return the states of one caption as a batch of one."""
    return TextStates(states.sequence[None], states.pooled[None])


def layout_of(dataset: PreparedDataset, resolutions: Sequence[int], latent_pyramid: str) -> Layout:
    """Return the layout of the records of a data set of encodings.

    Raises:
        ValueError: the encodings were made for other stages.
    """
    assert dataset.encodings is not None
    layout = Layout(**dataset.encodings["layout"])
    for key, made, wanted in (
        ("resolutions", layout.resolutions, list(resolutions)),
        ("model.latent_pyramid", layout.latent_pyramid, latent_pyramid),
    ):
        if made != wanted:
            raise ValueError(
                f"{key} is {wanted} in the recipe, but the encodings in {dataset.location} were made for {made}: "
                "encode the data set again (lightning data encode)"
            )
    return layout


def check_encodings(dataset: PreparedDataset, module: ShowsConfigs) -> None:
    """Refuse encodings that a model can't be trained on.

    Raises:
        ValueError: other encoders made the encodings, or their widths are not those that the transformer takes.
    """
    assert dataset.encodings is not None
    where, encodings = dataset.location, dataset.encodings
    check_encoders(encodings["encoders"], module.text_encoder_config, module.autoencoder_config, where)
    layout = Layout(**encodings["layout"])
    widths = {
        "joint_attention_dim": layout.width,
        "pooled_projection_dim": layout.pooled_width,
        "in_channels": layout.channels,
    }
    for key, width in widths.items():
        if module.transformer_config[key] != width:
            raise ValueError(
                f"model.transformer's {key} is {module.transformer_config[key]}, but the encodings in {where} are "
                f"{width} wide"
            )
