"""Properties that hold for every text, number and file that hypothesis can think of."""

import contextlib
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nami_lightning.datamodules.preparation.image_io import BadImage, open_image
from nami_lightning.datamodules.sources import Columns, Skipped, SourceSample
from nami_lightning.datamodules.sources.fields import printable
from nami_lightning.datamodules.storage.shards import Record
from nami_lightning.errors import MOST_CHARACTERS, explain
from nami_lightning.evaluation.prompts import check_id
from nami_lightning.pipelines.image_rows import read_rows
from nami_lightning.pipelines.png_settings import read_settings, save_with_settings
from nami_lightning.utils.text_files import is_text, parse_json, read_text, split_lines

ANY = st.text()
GOOD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(ANY, values, max_size=3),
    max_leaves=8,
)
HERE = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@HERE
@given(st.binary(max_size=300))
def test_bytes_are_an_image_or_a_bad_one(data: bytes) -> None:
    with contextlib.suppress(BadImage):
        assert open_image(data).mode == "RGB"


@HERE
@given(st.dictionaries(st.sampled_from(["caption", "text", "txt", "prompt", "similarity", "aesthetic"]), JSON))
def test_a_row_is_a_sample_or_says_why_not(row: dict[str, Any]) -> None:
    found = Columns().sample("a", b"", row)
    if isinstance(found, Skipped):
        assert found.reason
        return
    assert isinstance(found, SourceSample)
    assert found.captions
    for caption in found.captions:
        assert caption == caption.strip() != ""
        caption.encode()
    assert all(abs(score) < float("inf") for score in found.scores.values())


@HERE
@given(ANY, st.binary(max_size=50), st.lists(GOOD, min_size=1, max_size=3))
def test_a_record_is_stored_as_it_is(name: str, image: bytes, captions: list[str]) -> None:
    record = Record(printable(name), image, captions, [1.0] * len(captions))
    assert Record.from_item(record.to_item()) == record
    record.id.encode()


@HERE
@given(GOOD, st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_a_text_is_read_in_every_encoding(tmp_path: Path, text: str, encoding: str) -> None:
    text = text.lstrip("\ufeff\ufffe")
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert read_text(tmp_path / "a.txt") == text
    assert "\n".join(split_lines(text)) == text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


@HERE
@given(st.lists(GOOD, max_size=4), st.sampled_from([".txt", ".jsonl", ".csv"]))
def test_each_prompt_of_a_file_is_one_image(tmp_path: Path, prompts: list[str], kind: str) -> None:
    prompts = [prompt for prompt in prompts if prompt.strip()]
    path = tmp_path / f"prompts{kind}"
    if kind == ".txt":
        prompts = [line for prompt in prompts for line in split_lines(prompt) if line.strip()]
        text = "\n".join(prompts)
        prompts = [prompt.strip() for prompt in prompts]
    elif kind == ".jsonl":
        text = "\n".join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts)
    else:
        table = io.StringIO()
        csv.writer(table).writerows([["prompt"], *([prompt] for prompt in prompts)])
        text = table.getvalue()
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [row.prompt for row in read_rows(path)] == prompts


@HERE
@given(GOOD, st.integers(-(2**63), 2**63 - 1))
def test_an_image_keeps_its_settings(tmp_path: Path, prompt: str, seed: int) -> None:
    asked = {"prompt": prompt, "seed": seed, "steps": [1, 2]}
    save_with_settings(Image.new("RGB", (2, 2)), tmp_path / "a.png", asked, {"prompt": prompt})
    found = read_settings(tmp_path / "a.png")
    assert found is not None
    assert found["asked"] == asked


@HERE
@given(ANY)
def test_an_id_that_is_taken_is_a_folder_in_place(name: str) -> None:
    with contextlib.suppress(ValueError):
        taken = check_id(name, "line 1")
        assert (Path("/out") / taken).resolve().parent == Path("/out")
        assert is_text(taken)


@HERE
@given(JSON)
def test_json_is_a_value_or_an_error(value: Any) -> None:
    text = json.dumps(value)
    assert json.dumps(parse_json(text)) == text
    for broken in (text[:-1] + "\x00", "[" * 100_000, "9" * 5000):
        with pytest.raises(ValueError):  # noqa: PT011
            parse_json(broken)


@HERE
@given(ANY, st.integers(0, 100_000))
def test_a_message_fits_on_a_screen(text: str, times: int) -> None:
    message = explain(ValueError(text * times))
    assert len(message) <= MOST_CHARACTERS + 10
