"""Preparation: what is on disk afterwards, against the source itself; and that half of it is never taken for all."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nami_lightning.datamodules.openmoji import OpenMoji
from nami_lightning.datamodules.prepare import SourceSample, is_heldout, open_buckets, prepare


class Squares:
    """A source of coloured squares that may fail at one of them."""

    def __init__(self, count: int = 40, fails_at: int | None = None) -> None:
        self.count, self.fails_at = count, fails_at

    def settings(self) -> dict[str, Any]:
        return {"name": "squares", "count": self.count}

    def keys(self) -> list[str]:
        return [str(i) for i in range(self.count)]

    def load(self, key: str, resolutions: Sequence[int]) -> SourceSample:
        if key == str(self.fails_at):
            raise RuntimeError("no such square")
        images = {}
        for resolution in resolutions:
            file = io.BytesIO()
            Image.new("RGB", (resolution, resolution), (int(key), 0, resolution)).save(file, "PNG")
            images[resolution] = file.getvalue()
        return SourceSample(key, key, [f"square {key}"], images)


def test_everything_of_the_source_is_stored_once(tmp_path: Path) -> None:
    folder = prepare(Squares(), tmp_path, [8, 16], 20.0, workers=1)
    stored = {}
    for split in ("train", "heldout"):
        for bucket, resolution in zip(open_buckets(folder, split, [8, 16]), (8, 16), strict=True):
            for record in bucket.read(range(len(bucket))):
                assert is_heldout(record.id, 20.0) == (split == "heldout")
                stored[record.id, resolution] = record
    assert sorted(stored) == sorted((str(i), r) for i in range(40) for r in (8, 16))
    picture = Image.open(io.BytesIO(stored["7", 16].image))
    assert picture.size == (16, 16)
    assert picture.getpixel((3, 3)) == (7, 0, 16)
    assert stored["7", 16].captions == ["square 7"]


def test_it_is_made_once_and_again_for_other_settings(tmp_path: Path) -> None:
    first = prepare(Squares(), tmp_path, [8], 10.0, workers=1)
    stamp = (first / "dataset.json").stat().st_mtime_ns
    assert prepare(Squares(), tmp_path, [8], 10.0, workers=1) == first
    assert (first / "dataset.json").stat().st_mtime_ns == stamp
    others = {
        prepare(Squares(), tmp_path, [8, 16], 10.0, workers=1),
        prepare(Squares(), tmp_path, [8], 50.0, workers=1),
        prepare(Squares(30), tmp_path, [8], 10.0, workers=1),
    }
    assert len(others | {first}) == 4


def test_an_interrupted_preparation_leaves_nothing_under_a_final_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such square"):
        prepare(Squares(fails_at=33), tmp_path, [8], 10.0, workers=0)
    assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
    folder = prepare(Squares(), tmp_path, [8], 10.0, workers=1)
    assert json.loads((folder / "dataset.json").read_text())["samples"]["train"]["8"] > 0


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no images"):
        prepare(Squares(0), tmp_path, [8], 10.0, workers=1)


def test_openmoji_draws_and_captions() -> None:
    source = OpenMoji(["en", "de", "fr"])
    keys = source.keys()
    assert len(keys) > 3900
    assert len(set(keys)) == len(keys)
    apple = source.load("1F34E", [16, 64])
    assert apple.captions == ["red apple", "roter apfel", "pomme rouge"]
    picture = Image.open(io.BytesIO(apple.images[64])).convert("RGB")
    assert picture.size == (64, 64)
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    red, *others = np.asarray(picture)[40, 32]
    assert red > 150
    assert max(others) < 120
    assert source.load("1F1EB-1F1F7", [16]).captions[0] == "flag: France"
    light, dark = (source.load(f"1F44B-{tone}", [16]) for tone in ("1F3FB", "1F3FF"))
    assert light.group == dark.group
    assert light.id != dark.id


def test_openmoji_refuses_a_language_it_has_not() -> None:
    with pytest.raises(ValueError, match="tlh"):
        OpenMoji(["tlh"])
