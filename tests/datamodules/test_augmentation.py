"""What training changes in samples: by how much, how often, and the same after any interruption."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nami_lightning.datamodules.aspect_buckets import Shape
from nami_lightning.datamodules.augmentation import Augmentation
from nami_lightning.datamodules.multi_resolution import MultiResolutionDataModule
from nami_lightning.datamodules.precomputed.records import EncodedRecord
from nami_lightning.datamodules.preparation.image_io import read_image
from nami_lightning.datamodules.stage_images import weights_by_kind
from nami_lightning.datamodules.storage.dataset import DESCRIPTION, FORMAT
from nami_lightning.datamodules.storage.shards import Record, ShardWriter
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.curriculum import Curriculum, Phase
from nami_lightning.utils.atomic_write import write_json

TEXTS = ["A short one.", "The first sentence. The second one! And a third."]


def half_and_half(side: int = 32) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (side, side), "red")
    image.paste((0, 0, 255), (side // 2, 0, side, side))
    return image


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred pictures, red on the left; one in four has a caption that says so."""
    folder = tmp_path_factory.mktemp("data") / "halves"
    data = png(half_and_half())
    for split, count in (("train", 200), ("heldout", 8)):
        writer = ShardWriter(folder / split / "32" / "32x32", 2**20)
        for index in range(count):
            captions = [*TEXTS, "red on the left"] if index % 4 == 0 else [*TEXTS, "two colours"]
            writer.write(Record(str(index), data, captions, [1.0, 0.0, 3.0], ["source", "long", "short"]).to_item())
        writer.close()
    description = {
        "format": FORMAT,
        "settings": {"resolutions": [32]},
        "samples": {"train": {"32/32x32": 200}, "heldout": {"32/32x32": 8}},
        "checksums": {},
        "captions": [{"counts": {"long": {}, "short": {}}}],
    }
    write_json(folder / DESCRIPTION, description)
    return folder


def read(folder: Path, ranks: int = 1, steps: range = range(20), **settings: Any) -> list[MicroBatch]:
    curriculum = Curriculum([Phase(20, [1, 1], 1e-3)], 10)
    data = MultiResolutionDataModule(str(folder), [16, 32], curriculum, [10, 10], **settings)
    datasets = [data.steps(rank, ranks) for rank in range(ranks)]
    return [micro for step in steps for dataset in datasets for micro in dataset[step]]


def flipped(micro: MicroBatch) -> list[bool]:
    return [bool(image[2, :, 0].float().mean() > 128) for image in micro.images]


def test_images_are_mirrored_unless_a_caption_names_sides(folder: Path) -> None:
    batches = read(folder, augmentation=Augmentation(flip=0.5))
    by_side = Counter[tuple[bool, bool]]()
    for micro in batches:
        by_side.update((int(name) % 4 == 0, turned) for name, turned in zip(micro.ids, flipped(micro), strict=True))
    assert by_side[True, True] == 0
    assert by_side[True, False] > 60
    total = by_side[False, True] + by_side[False, False]
    assert abs(by_side[False, True] / total - 0.5) < 0.1


def test_nothing_changes_by_default_nor_in_validation(folder: Path) -> None:
    assert not any(any(flipped(micro)) for micro in read(folder))
    curriculum = Curriculum([Phase(20, [1, 1], 1e-3)], 10)
    augmentation = Augmentation(flip=1, min_crop=0.5, caption_dropout=1, unflipped=[])
    data = MultiResolutionDataModule(str(folder), [16, 32], curriculum, [10, 10], augmentation=augmentation)
    heldout = data.heldout(8)
    for micro in (heldout[i] for i in range(len(heldout))):
        assert not any(flipped(micro))
        assert micro.captions == [TEXTS[0]] * len(micro.captions)


def test_changes_do_not_depend_on_ranks(folder: Path) -> None:
    settings: dict[str, Any] = {
        "augmentation": Augmentation(0.5, ["left"], 0.7, 0.5),
        "caption_weights": {"long": 1.0, "short": 1.0},
    }
    alone, shared = read(folder, **settings), read(folder, ranks=2, steps=range(7, 20), **settings)

    def by_place(batches: list[MicroBatch]) -> dict[tuple[int, int], tuple[str, bytes]]:
        return {
            (micro.step, index): (caption, image.numpy().tobytes())
            for micro in batches
            for index, caption, image in zip(micro.global_indices, micro.captions, micro.images, strict=True)
        }

    one, two = by_place(alone), by_place(shared)
    assert len(two) == 13 * 20
    assert all(one[place] == sample for place, sample in two.items())


def test_captions_are_drawn_by_their_weights(folder: Path) -> None:
    def drawn(**settings: Any) -> Counter[str]:
        return Counter(text for micro in read(folder, **settings) for text in micro.captions)

    stored, long, mixed = (
        drawn(),
        drawn(caption_weights={"long": 2.0}),
        drawn(caption_weights={"source": 1.0, "long": 3.0}),
    )
    assert abs(stored[TEXTS[0]] / 400 - 0.25) < 0.08
    assert not stored[TEXTS[1]]
    assert long == {TEXTS[1]: 400}
    assert set(mixed) == set(TEXTS)
    assert abs(mixed[TEXTS[1]] / 400 - 0.75) < 0.08
    cut = drawn(caption_weights={"long": 1.0}, augmentation=Augmentation(caption_dropout=0.5))
    assert set(cut) == {TEXTS[1], "The first sentence.", "The first sentence. The second one!"}
    assert abs(cut[TEXTS[1]] / 400 - 0.5) < 0.1
    with pytest.raises(ValueError, match="has no captions medium, but source, long, short"):
        drawn(caption_weights={"medium": 1.0})


def test_weights_of_kinds_are_shared() -> None:
    record = Record("x", b"", list("abcd"), [1.0, 3.0, 0.0, 0.0], ["source", "source", "long", "long"])
    assert weights_by_kind(record, {}) == [1, 3, 0, 0]
    assert weights_by_kind(record, {"source": 2, "long": 1}) == [0.5, 1.5, 0.5, 0.5]
    assert weights_by_kind(record, {"short": 1}) == [1, 3, 0, 0]
    assert weights_by_kind(Record("x", b"", ["a"], []), {"source": 2}) == [2]


def test_kinds_are_stored_with_encodings_and_may_be_missing() -> None:
    record = EncodedRecord("x", ["a", "b"], [1.0, 3.0], [b"12", b"345"], b"", [b"6"], ["source", "long"])
    assert EncodedRecord.from_item(record.to_item()) == record
    plain = record._replace(kinds=())
    assert EncodedRecord.from_item(plain.to_item()) == plain
    assert len(json.loads(plain.to_item()[1])) == 3
    image = Record("x", b"1", ["a"], [])
    assert json.loads(image.to_item()[2]) == [["a"], []]
    assert Record.from_item(image.to_item()) == image


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_a_crop_shows_its_share(factor: int) -> None:
    side = 32 * factor
    ramp = np.broadcast_to(np.linspace(0, 255, side)[None, :, None], (side, side, 3)).astype(np.uint8)
    data = png(Image.fromarray(np.ascontiguousarray(ramp)))
    shown = read_image(data, Shape(32, 32), factor, (0.5, 0.5), share=0.75).float()
    assert shown.shape == (3, 32, 32)
    values = shown[0].mean(0)
    assert values.min() == pytest.approx(32, abs=8)
    assert values.max() == pytest.approx(223, abs=8)
    whole = read_image(data, Shape(32, 32), factor)
    assert torch.equal(read_image(data, Shape(32, 32), factor, share=1.0, flip=True), whole.flip(2))


def test_words_of_sides_in_many_languages() -> None:
    flip = Augmentation(flip=1)
    for text in ("A cat on the LEFT.", "right-hand side", "links ein Hund", "猫在左边", "слева дом", "왼쪽에 고양이"):
        assert not flip.flips(0.0, ["a cat", text]), text
    for text in ("brightly lit", "leftovers", "a copyright", "猫"):
        assert flip.flips(0.0, [text]), text
    assert Augmentation(flip=1, unflipped=[]).flips(0.0, ["left"])
    assert not Augmentation(flip=0.3).flips(0.3, ["a cat"])


def test_bad_settings_are_refused() -> None:
    for settings, message in (({"flip": 1.5}, "flip must be"), ({"min_crop": 0}, "min_crop must be")):
        with pytest.raises(ValueError, match=message):
            Augmentation(**settings)
