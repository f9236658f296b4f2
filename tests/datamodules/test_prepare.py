"""Preparation: what is on disk afterwards, against the source itself; and that half of it is never taken for all."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch.distributed as dist
from helpers.squares import Squares, colour, contents, kill
from PIL import Image
from torch.testing._internal.distributed.fake_pg import FakeStore

from nami_lightning.datamodules.preparation.filters import Filters
from nami_lightning.datamodules.preparation.parts_folder import parts_folder
from nami_lightning.datamodules.preparation.prepare import merge, prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation, is_heldout, prepare_parts
from nami_lightning.datamodules.sources.base import Skipped, SourceSample
from nami_lightning.datamodules.storage.dataset import SPLITS, PreparedDataset
from nami_lightning.datamodules.storage.shards import Record, Shards, ShardWriter

PREPARATION = Preparation([16, 32], heldout_percent=20, aspect_step=4, widest_aspect=2, format="png", chunk_mib=1)


def records(folder: Path) -> dict[str, tuple[str, str, Record]]:
    """id to (split, bucket, record); each id once."""
    found: dict[str, tuple[str, str, Record]] = {}
    for split in SPLITS:
        for bucket in PreparedDataset(folder).buckets(split):
            for item in bucket.shards.read(range(len(bucket))):
                record = Record.from_item(item)
                assert record.id not in found
                found[record.id] = (split, bucket.name, record)
    return found


def test_each_image_goes_once_to_the_highest_bucket_that_it_fills(tmp_path: Path) -> None:
    found = records(prepare(Squares(), tmp_path / "out", PREPARATION, workers=2))
    assert sorted(found) == sorted(str(i) for i in range(60))
    expected = {0: "32/32x32", 1: "32/40x24", 2: "32/24x40", 3: "16/16x16", 4: "32/24x40"}
    for name, (split, bucket, record) in found.items():
        assert bucket == expected[int(name) % 5]
        assert split == ("heldout" if is_heldout(name, 20) else "train")
        image = Image.open(io.BytesIO(record.image))
        assert f"{image.width}x{image.height}" == bucket.split("/")[1]
        assert image.getpixel((3, 3)) == colour(int(name))
        assert record.captions == [f"square {name}"]


def test_squares_alone_and_random_crops_keep_the_rest_of_the_image(tmp_path: Path) -> None:
    settings = dataclasses.replace(PREPARATION, aspect_step=None, crop="random")
    found = records(prepare(Squares(), tmp_path / "out", settings, workers=1))
    sizes = [Image.open(io.BytesIO(found[str(i)][2].image)).size for i in range(5)]
    assert sizes == [(32, 32), (51, 32), (32, 51), (16, 16), (32, 58)]


def test_it_is_made_once_and_other_settings_are_refused(tmp_path: Path) -> None:
    out = prepare(Squares(), tmp_path / "out", PREPARATION, workers=1)
    stamp = (out / "dataset.json").stat().st_mtime_ns
    assert prepare(Squares(), out, PREPARATION, workers=1) == out
    assert (out / "dataset.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"quality was 95 and is 80 now.*choose another output"):
        prepare(Squares(), out, dataclasses.replace(PREPARATION, quality=80), workers=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="exists and is not a data set"):
        prepare(Squares(), tmp_path / "mine", PREPARATION, workers=1)


def test_a_failure_leaves_no_data_set_and_its_finished_parts_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="no such square"):
        prepare(Squares(fails_at=33), out, PREPARATION, workers=1)
    assert not out.exists()
    kept = {part: part.stat().st_mtime_ns for part in parts_folder(out).iterdir() if part.name.isdigit()}
    assert 3 <= len(kept) < 6
    prepare_parts(Squares(), out, PREPARATION, workers=1)
    assert all(part.stat().st_mtime_ns == stamp for part, stamp in kept.items())
    merge(Squares(), out, PREPARATION)
    assert len(records(out)) == 60
    assert list(tmp_path.iterdir()) == [out]


def test_shards_of_many_machines_join_to_what_one_would_have_made(tmp_path: Path) -> None:
    alone = prepare(Squares(), tmp_path / "alone", PREPARATION, workers=1)
    out = tmp_path / "out"
    for share in (2, 0):
        prepare_parts(Squares(), out, PREPARATION, workers=1, shard=(share, 3))
    with pytest.raises(ValueError, match=r"2 of 6 parts are missing .*000001, 000004"):
        merge(Squares(), out, PREPARATION)
    assert not out.exists()
    prepare_parts(Squares(), out, PREPARATION, workers=1, shard=(1, 3))
    merge(Squares(), out, PREPARATION)
    assert contents(out) == contents(alone)


KILLS = int(os.environ.get("NAMI_KILLS", "3"))
SCRIPT = """
import sys
from pathlib import Path
from helpers.squares import Squares
from test_prepare import PREPARATION
from nami_lightning.datamodules.preparation.prepare import prepare
print("ready", flush=True)
sys.stdin.readline()
prepare(Squares(pause=0.01), Path(sys.argv[1]), PREPARATION, workers=2)
"""


def test_kill_9_at_random_points_neither_loses_nor_doubles_a_sample(tmp_path: Path) -> None:
    alone = prepare(Squares(), tmp_path / "alone", PREPARATION, workers=1)
    out = tmp_path / "out"
    for number in range(KILLS):
        with subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).parent)])},
        ) as process:
            assert process.stdin
            assert process.stdout
            process.stdout.readline()
            process.stdin.write(b"\n")
            process.stdin.flush()
            time.sleep(Random(number).uniform(0.1, 0.5))
            kill(process.pid)
        assert not out.exists() or contents(out) == contents(alone)
    prepare(Squares(), out, PREPARATION, workers=2)
    assert contents(out) == contents(alone)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_merge_that_was_interrupted_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = prepare(Squares(), tmp_path / "alone", PREPARATION, workers=1)
    out = tmp_path / "out"
    prepare_parts(Squares(), out, PREPARATION, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr("nami_lightning.datamodules.preparation.parts_folder.publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge(Squares(), out, PREPARATION)
    assert not out.exists()
    merge(Squares(), out, PREPARATION)
    assert contents(out) == contents(alone)


def test_an_empty_source_and_one_of_which_nothing_is_left_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no images"):
        prepare(Squares(0), tmp_path / "a", PREPARATION, workers=1)
    with pytest.raises(ValueError, match=r"no sample is left: read 60, too small for the smallest bucket 60"):
        prepare(Squares(), tmp_path / "b", dataclasses.replace(PREPARATION, resolutions=[128]), workers=1)
    assert not (tmp_path / "b").exists()


class Scored(Squares):
    """Squares with scores, several captions, and some that are the same file."""

    def read(self, part: str) -> Iterator[SourceSample | Skipped]:
        for sample in super().read(part):
            assert isinstance(sample, SourceSample)
            number = int(sample.id)
            scores = {"aesthetic": float(number % 10)} if number % 7 else {}
            twin = self.sample(number - 20) if number >= 40 else sample
            captions = ["", f"square {number}", "x" * (number % 50)]
            yield dataclasses.replace(sample, image=twin.image, captions=captions, weights=[1, 1, 3], scores=scores)


def test_filters_remove_what_they_say_and_count_it(tmp_path: Path) -> None:
    filters = Filters(
        min_aesthetic=3, min_side=21, max_aspect_ratio=1.7, min_caption_length=5, max_caption_length=20,
        drop_duplicates=True,
    )  # fmt: skip
    out = prepare(Scored(), tmp_path / "out", dataclasses.replace(PREPARATION, filters=filters), workers=2)
    kept, removed = [], {"no aesthetic score": 0, "min_aesthetic": 0, "min_side": 0, "max_aspect_ratio": 0}
    seen, duplicates = set(), 0
    for number in range(60):
        original = number - 20 if number >= 40 else number
        width, height = Squares().sizes[original % 5]
        if number % 7 == 0:
            removed["no aesthetic score"] += 1
        elif number % 10 < 3:
            removed["min_aesthetic"] += 1
        elif min(width, height) < 21:
            removed["min_side"] += 1
        elif max(width, height) / min(width, height) > 1.7:
            removed["max_aspect_ratio"] += 1
        elif original in seen:
            duplicates += 1
        else:
            seen.add(original)
            kept.append(str(number))
    assert duplicates > 0
    found = records(out)
    assert sorted(found) == sorted(kept)
    about = json.loads((out / "dataset.json").read_text())
    assert about["removed"] == removed | {"duplicate": duplicates}
    for name, (_, _, record) in found.items():
        long = 5 <= int(name) % 50 <= 20
        assert record.captions == [f"square {name}", *["x" * (int(name) % 50)] * long]
        assert record.weights == ([1, 3] if long else [])


def test_captions_are_drawn_by_their_weights() -> None:
    record = Record("a", b"", ["one", "two", "three"], [1, 0.5, 2.5])
    drawn = [record.caption(i / 400) for i in range(400)]
    assert [drawn.count(text) for text in record.captions] == [100, 50, 250]
    assert Record("a", b"", ["one", "two"], []).caption(0.999) == "two"


def test_a_rank_of_several_writes_its_shards_alone(tmp_path: Path) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        writer = ShardWriter(tmp_path / "shards", 1000)
        writer.write((b"one",))
        writer.close()
    finally:
        dist.destroy_process_group()
    assert len(Shards(tmp_path / "shards")) == 1
