"""Many images by ``lightning sample``: files of prompts, shards, kills, and what an image says of itself."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import TextModel, make_pipeline
from PIL import Image

from nami_lightning.cli.main import main
from nami_lightning.pipelines.image_rows import ImageRow, read_rows, read_settings

pytest_plugins = "helpers.tiny_models"


@pytest.fixture
def model(tmp_path: Path, t5: TextModel, clip: TextModel) -> str:
    """A folder with a tiny pipeline."""
    make_pipeline(t5, clip).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("0*.png"))}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, ["prompt", "seed", "height", "width", "steps", "guidance_scale", "negative_prompt"]
        )
        writer.writeheader()
        writer.writerows(rows)


ROWS: list[dict[str, Any]] = [
    {"prompt": "a red cat", "steps": "1+2"},
    {"prompt": "the house", "width": 24, "seed": 7},
    {"prompt": 'a "big", blue dog', "guidance_scale": 1.0, "negative_prompt": "a tree"},
    {"prompt": "a tree", "steps": "1+2"},
]


def test_rows_of_csv_and_json_lines_are_the_same(tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv", ROWS)
    lines = [row | ({"steps": [1, 2]} if "steps" in row else {}) for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    rows = read_rows(tmp_path / "rows.csv")
    assert rows == read_rows(tmp_path / "rows.jsonl")
    assert rows[0] == ImageRow("a red cat", steps=[1, 2])
    assert rows[1] == ImageRow("the house", seed=7, width=24)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "sed": 1}', "line 2: unknown 'sed'; known are prompt, seed"),
        ('{"prompt": " "}', "line 2: prompt must be a text that is not empty"),
        ('{"prompt": "a", "seed": 1.5}', "line 2: seed must be a whole number; got 1.5"),
        ('{"prompt": "a", "steps": "many"}', "line 2: steps must be a number, or one a stage; got 'many'"),
        ('{"prompt": "a", "height": [8, 8]}', "line 2: height must be a whole number"),
        ('["a"]', "line 2 is not a JSON object"),
        ('{"prompt": "a"', "line 2 is not JSON"),
    ],
)
def test_a_wrong_row_is_named_before_anything_runs(
    model: str, tmp_path: Path, line: str, message: str, capsys: Any
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n')
    assert main(["sample", model, "--prompts", str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{path}, {message}" in error
    assert not (tmp_path / "out").exists()


def test_rows_shards_resume_and_settings(model: str, tmp_path: Path, capsys: Any) -> None:
    write_csv(tmp_path / "rows.csv", ROWS)
    command = ["sample", model, "--prompts", str(tmp_path / "rows.csv"), "--steps", "2", "--seed", "3"]
    out, parts = tmp_path / "out", tmp_path / "parts"
    assert main([*command, "--output", str(out)]) == 0
    drawn = pixels(out)
    assert [image.shape[:2] for image in drawn.values()] == [(16, 16), (16, 24), (16, 16), (16, 16)]
    assert [settings["seed"] for settings in map(read_settings, sorted(out.glob("0*.png")))] == [3, 7, 5, 6]  # type: ignore[index]

    settings = read_settings(out / "00002.png")
    assert settings is not None
    assert (settings["prompt"], settings["negative_prompt"], settings["guidance_scale"]) == (
        'a "big", blue dog',
        "a tree",
        1.0,
    )
    index = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    assert [entry["file"] for entry in index] == list(drawn)
    assert index[2] == {"file": "00002.png"} | settings

    for shard in ("1/2", "0/2"):
        assert not (parts / "index.jsonl").exists()
        assert main([*command, "--output", str(parts), "--shard", shard]) == 0
    assert all(np.abs(image - drawn[name]).max() <= 1 for name, image in pixels(parts).items())
    assert (parts / "index.jsonl").read_text() == (out / "index.jsonl").read_text()

    times = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    (out / "00001.png").unlink()
    assert main([*command, "--output", str(out)]) == 0
    again = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    assert [name for name in times if again[name] != times[name]] == ["00001.png"]
    assert main([*command, "--output", str(out), "--solver", "heun"]) == 2
    assert "differs in solver" in capsys.readouterr().err


def test_images_that_are_not_finite_cost_only_themselves(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from nami_lightning.models.transformer import NamiTransformer2DModel

    forward = NamiTransformer2DModel.forward

    def spoil(self: Any, x: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        output = forward(self, x, *arguments, **keywords)
        output[1] = torch.nan
        return output

    monkeypatch.setattr(NamiTransformer2DModel, "forward", spoil)
    prompts = ["--prompt", "a cat", "--prompt", "a dog", "--prompt", "a tree", "--guidance_scale", "1", "--steps", "2"]
    assert main(["sample", model, *prompts, "--output", str(tmp_path / "out")]) != 0
    assert "1 image(s) were not finite and are not written: prompt 'a dog', seed 1" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.png", "00002.png"]


def test_kills_lose_no_image(model: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat\nthe house\na dog\n")
    out = tmp_path / "out"
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--images", "40", "--batch_size", "2", "--steps", "20"]
    command = [sys.executable, "-m", "nami_lightning.cli", "sample", model, *options, "--output", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for kill in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        deadline = time.monotonic() + 60
        while len(list(out.glob("0*.png"))) < 10 * (kill + 1) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        there = sorted(out.glob("0*.png"))
        assert 10 * (kill + 1) <= len(there) < 120
        assert all(read_settings(path) for path in there)
    assert main([*command[3:]]) == 0
    assert main(["sample", model, *options, "--output", str(tmp_path / "whole")]) == 0
    killed, whole = pixels(out), pixels(tmp_path / "whole")
    assert killed.keys() == whole.keys()
    assert max(np.abs(killed[name] - whole[name]).max() for name in whole) <= 1
    assert (out / "index.jsonl").read_text() == (tmp_path / "whole" / "index.jsonl").read_text()
