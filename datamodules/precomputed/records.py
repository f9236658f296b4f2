"""Encodings in shards: latents and text states of samples as they are stored, and as training reads them.

A record holds, in bfloat16, the latents of each stage that may draw the sample and those of the same pixels at half the
resolution, which its bridge starts from (for a pooled latent pyramid the finest latents alone), once for every stored
crop; and the token states of each caption without their padding. Of latents, mean and standard deviation are stored:
training draws from them just as it does without encodings. Where latents are pixels, the image file is kept instead: it
is smaller, and exact, whereas bfloat16 rounds all 8-bit values away from zero.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nami_lightning.datamodules.aspect_buckets import Aspect
from nami_lightning.datamodules.preparation.image_io import read_image
from nami_lightning.datamodules.stage_images import Choice, Place, Sample, StageImages
from nami_lightning.datamodules.storage.dataset import Bucket, PreparedDataset
from nami_lightning.datamodules.storage.shards import chosen
from nami_lightning.models.autoencoder import Posterior
from nami_lightning.models.encoder_revisions import check_identity
from nami_lightning.models.text_encoder import TextStates
from nami_lightning.training.batch import Encodings
from nami_lightning.training.module import NamiModule


class Level(NamedTuple):
    """One of the latents that are stored of a sample.

    Attributes:
        side: resolution of the stage that uses them.
        coarse: whether they are of the stage's images at half their resolution.
    """

    side: int
    coarse: bool


def levels_of(resolutions: Sequence[int], latent_pyramid: str, resolution: int) -> list[Level]:
    """The latents that stages of ``resolutions`` use of a sample of a bucket of ``resolution``, in stored order."""
    if latent_pyramid == "pool":
        return [Level(side, False) for side in resolutions[-1:] if side <= resolution]
    stages = [side for side in resolutions if side <= resolution]
    return [Level(side, coarse) for side in stages for coarse in (False, True) if not coarse or side > resolutions[0]]


@dataclass(frozen=True)
class Layout:
    """The sizes that the bytes of encodings don't tell.

    Args:
        resolutions: of the stages.
        latent_pyramid: ``encode``: latents of every stage; ``pool``: of the finest.
        pixels: whether latents are pixels, and images are stored in their place.
        factor: px a latent.
        channels: of the latents.
        tokens: rows of a text state with its padding.
        width: of a token's state.
        pooled_width: of the pooled state.
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
        """The latents that a sample of a bucket of ``resolution`` has."""
        return [] if self.pixels else levels_of(self.resolutions, self.latent_pyramid, resolution)

    def latents_shape(self, level: Level, aspect: Aspect) -> tuple[int, ...]:
        """``(2, C, H/f, W/f)``: of the mean and the standard deviation of one crop's latents."""
        shape, cell = aspect.shape(level.side), self.factor * (1 + level.coarse)
        return 2, self.channels, shape.height // cell, shape.width // cell

    def pack_text(self, states: TextStates) -> bytes:
        """One caption's states (see :meth:`TextStates.row`) without the zeros at their end, which padding brings."""
        held = states.sequence.any(1).nonzero()
        tokens = int(held.max()) + 1 if len(held) else 0
        return as_bytes(torch.cat([states.sequence[:tokens].flatten(), states.pooled]))

    def unpack_text(self, data: bytes | memoryview) -> TextStates:
        """What :meth:`pack_text` packed, padded."""
        states, pooled = from_bytes(data).tensor_split([-self.pooled_width])
        sequence = states.view(-1, self.width)
        return TextStates(F.pad(sequence, (0, 0, 0, self.tokens - len(sequence))), pooled)


def as_bytes(values: Tensor) -> bytes:
    """A tensor's values in bfloat16."""
    return values.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes | memoryview) -> Tensor:
    """What :func:`as_bytes` made, flat."""
    return torch.frombuffer(bytearray(data), dtype=torch.bfloat16)


def one_crop(data: bytes | memoryview, shape: Sequence[int], chance: float) -> Tensor:
    """The one of the crops in ``data``, each of ``shape``, that ``chance``, in [0, 1), falls on."""
    size = 2 * math.prod(shape)
    number = int(chance * (len(data) // size))
    return from_bytes(data[number * size : (number + 1) * size]).view(*shape)


class EncodedRecord(NamedTuple):
    """One stored sample.

    Attributes:
        id: its name.
        captions: at least one.
        weights: of the captions; empty: all alike.
        text: each caption's states, packed.
        image: the image file where latents are pixels, and of held-out samples, for what compares pictures; else empty.
        latents: of each level, see :func:`levels_of`; each of all crops.
    """

    id: str
    captions: list[str]
    weights: list[float]
    text: list[bytes | memoryview]
    image: bytes | memoryview
    latents: list[bytes | memoryview]

    def to_item(self) -> tuple[Any, ...]:
        """What litdata stores."""
        about = json.dumps([self.captions, self.weights, [len(text) for text in self.text]], ensure_ascii=False)
        return self.id, about, b"".join(self.text), self.image, *self.latents

    @classmethod
    def from_item(cls, item: tuple[Any, ...]) -> "EncodedRecord":
        """What litdata read."""
        name, about, joined, image, *latents = item
        captions, weights, sizes = json.loads(about)
        text, first = [], 0
        for size in sizes:
            text.append(joined[first : first + size])
            first += size
        return cls(name, captions, weights, text, image, latents)


class StageEncodings(StageImages):
    """The buckets of one split as the stages see them: :class:`StageImages` of encodings.

    Args:
        buckets: all of the split.
        layout: of their records.
        empty_prompt: the packed states of the empty prompt.
    """

    def __init__(self, buckets: Sequence[Bucket], layout: Layout, empty_prompt: bytes) -> None:
        super().__init__(buckets, layout.resolutions, layout.latent_pyramid == "pool")
        self.layout, self.empty_prompt = layout, empty_prompt

    def sample(self, stage: int, aspect: Aspect, place: Place, item: Any, choice: Choice) -> Sample:
        """What a stored item holds for a stage; of its stored crops, the window's place chooses."""
        layout, side = self.layout, self.sides[stage]
        record = EncodedRecord.from_item(item)
        caption = chosen(record.weights or [1.0] * len(record.captions), choice.caption)
        levels = layout.levels(self.buckets[place.bucket].resolution)

        def latents(level: Level) -> Posterior:
            shape = layout.latents_shape(level, aspect)
            return Posterior(*one_crop(record.latents[levels.index(level)], shape, choice.window[0])[:, None])

        coarse = not layout.pixels and layout.latent_pyramid == "encode" and stage > 0
        encodings = Encodings(
            None if layout.pixels else latents(Level(side, False)),
            latents(Level(side, True)) if coarse else None,
            batch_of_one(layout.unpack_text(record.text[caption])),
            batch_of_one(layout.unpack_text(self.empty_prompt)),
        )
        return Sample(record.id, record.captions[caption], self._image(record, stage, aspect, place, choice), encodings)

    def _image(self, record: EncodedRecord, stage: int, aspect: Aspect, place: Place, choice: Choice) -> Tensor:
        """No pixels where none are stored."""
        if not len(record.image):
            return torch.empty(3, 0, 0, dtype=torch.uint8)
        factor = self.buckets[place.bucket].resolution // self.sides[stage]
        return read_image(record.image, aspect.shape(self.sides[stage]), factor, choice.window)


def batch_of_one(states: TextStates) -> TextStates:
    """The same with a batch dimension."""
    return TextStates(states.sequence[None], states.pooled[None])


def layout_of(dataset: PreparedDataset, resolutions: Sequence[int], latent_pyramid: str) -> Layout:
    """How the records of a data set of encodings are laid out.

    Raises:
        ValueError: they were made for other stages.
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


def check_encodings(dataset: PreparedDataset, module: NamiModule) -> None:
    """Refuse encodings that a model can't be trained on.

    Raises:
        ValueError: other encoders made them, or the transformer takes others' widths.
    """
    assert dataset.encodings is not None
    where, encodings = dataset.location, dataset.encodings
    check_identity(encodings["encoders"], module.text_encoder_config, module.autoencoder_config, where)
    layout = Layout(**encodings["layout"])
    widths = {
        "joint_attention_dim": layout.width,
        "pooled_projection_dim": layout.pooled_width,
        "in_channels": layout.channels,
    }
    for key, held in widths.items():
        if module.transformer_config[key] != held:
            raise ValueError(
                f"model.transformer's {key} is {module.transformer_config[key]}, but the encodings in {where} are "
                f"{held} wide"
            )
