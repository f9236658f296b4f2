"""Many images by ``lightning sample``: files of prompts, shards, kills, and what an image says of itself."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from helpers.tiny_models import MakeFlux, TextModel, make_pipeline
from PIL import Image

from nami_lightning.cli.main import main
from nami_lightning.pipelines.image_rows import ImageRow, read_rows
from nami_lightning.pipelines.png_settings import read_settings
from nami_lightning.utils.atomic_write import remove_partials

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
        ('{"prompt": "a", "seed": 1.5}', "line 2: seed must be a whole number of 64 bits; got 1.5"),
        ('{"prompt": "a", "seed": 9223372036854775808}', "line 2: seed must be a whole number of 64 bits"),
        ('{"prompt": "a", "steps": "many"}', "line 2: steps must be a whole number of at least 1, or one a stage; got"),
        ('{"prompt": "a", "steps": [1, 0]}', "line 2: steps must be a whole number of at least 1, or one a stage"),
        ('{"prompt": "a", "guidance_scale": NaN}', "line 2: guidance_scale must be a number, or one a stage; got nan"),
        ('{"prompt": "a", "height": [8, 8]}', "line 2: height must be a whole number of at least 1; got [8, 8]"),
        ('{"prompt": "a", "solver": "rk4"}', "line 2: solver must be one of euler, heun, multistep; got 'rk4'"),
        ('{"prompt": "a\\u0000b"}', "line 2: prompt must be a text; got 'a\\x00b'"),
        ('{"prompt": "a", "height": 17}', "line 2: height 17 and width 16 must be multiples of 4 px for this model"),
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
    assert re.search(r"4 image\(s\) and grid.png in .*; 4 drawn in .* s, .* images/s", capsys.readouterr().out)
    drawn = pixels(out)
    assert [image.shape[:2] for image in drawn.values()] == [(16, 16), (16, 24), (16, 16), (16, 16)]
    settings = [found for path in sorted(out.glob("0*.png")) if (found := read_settings(path))]
    assert [found["drawn"]["seed"] for found in settings] == [3, 7, 5, 6]
    assert [found["asked"]["height"] for found in settings] == [None] * 4
    assert settings[2]["drawn"] == settings[2]["asked"] | {
        "prompt": 'a "big", blue dog', "negative_prompt": "a tree", "seed": 5, "height": 16, "width": 16,
        "steps": [1, 1], "guidance_scale": 1.0, "solver": "euler", "model": model,
    }  # fmt: skip
    index = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    assert [entry["file"] for entry in index] == list(drawn)
    assert index[2] == {"file": "00002.png"} | settings[2]["drawn"]
    with Image.open(out / "00000.png") as image:
        assert (image.info["prompt"], image.info["steps"], image.info["seed"]) == ("a red cat", "[1, 2]", "3")

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
    assert "(00000.png: solver None, not 'heun')" in capsys.readouterr().err


def test_overwriting_a_shard_leaves_the_others(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["sample", model, "--prompt", "a cat", "--images", "5", "--steps", "2", "--output", str(out)]
    assert main(command) == 0
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    assert main([*command, "--overwrite", "--shard", "1/2"]) == 0
    again = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    assert [name for name in sorted(times) if again[name] != times[name]] == ["00001.png", "00003.png"]
    assert main([*command[:-2], "--images", "3", "--output", str(out), "--overwrite"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"0000{i}.png" for i in range(3)),
        "grid.png",
        "index.jsonl",
    ]


def test_what_a_stopped_process_left_is_drawn_again_or_removed(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["sample", model, "--prompt", "a cat", "--images", "3", "--steps", "2", "--output", str(out)]
    assert main(command) == 0
    whole = pixels(out)
    for name, size in (("00000.png", 0), ("00002.png", -1)):
        (out / name).write_bytes((out / name).read_bytes()[:size])
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (out / f".00001.png.{socket.gethostname()}-{dead.stdout.strip()}.partial").touch()
    others = [f".00001.png.{socket.gethostname()}-{os.getppid()}.partial", ".00001.png.elsewhere-1.partial"]
    for name in others:
        (out / name).touch()
    remove_partials(out)
    assert sorted(path.name for path in out.glob(".*")) == sorted(others)
    assert main(command) == 0
    assert all(np.abs(image - whole[name]).max() <= 1 for name, image in pixels(out).items())


def test_other_weights_are_refused(model: str, tmp_path: Path, capsys: Any) -> None:
    command = ["sample", model, "--prompt", "a cat", "--steps", "2", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    os.utime(Path(model) / "transformer" / "diffusion_pytorch_model.safetensors", (1, 1))
    assert main([*command, "--images", "2"]) == 2
    assert "(00000.png: weights '" in capsys.readouterr().err


# --- other pipelines, several processes ----------------------------------------------------------


@pytest.fixture
def flux(tmp_path: Path, make_flux: MakeFlux, vae: AutoencoderKL, clip: TextModel, t5: TextModel) -> str:
    """A folder with diffusers' own FLUX pipeline, tiny."""
    network = make_flux(1, 1, guidance_embeds=True)
    FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, *clip, *t5, network).save_pretrained(tmp_path / "flux")
    return str(tmp_path / "flux")


def test_a_flux_is_sampled_and_refuses_what_only_a_nami_knows(flux: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a cat", "seed": 3}\n{"prompt": "a dog", "width": 24}\n')
    command = ["sample", flux, "--prompts", str(tmp_path / "rows.jsonl"), "--height", "16", "--output", str(out)]
    for option, message in (
        (["--solver", "heun"], f"FluxPipeline of {flux} does not take solver"),
        (["--steps", "2", "1"], "has only one stage: give --steps a single number"),
        (["--negative_prompt", "a tree"], "a negative prompt would change nothing"),
    ):
        assert main([*command, "--width", "16", *option]) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    assert main([*command, "--width", "16", "--steps", "2"]) == 0
    settings = read_settings(out / "00001.png")
    assert settings is not None
    assert settings["drawn"] == settings["asked"] | {"seed": 1, "width": 24, "guidance_scale": 3.5}
    pipeline = FluxPipeline.from_pretrained(flux)
    expected = pipeline(
        "a cat", height=16, width=16, num_inference_steps=2, generator=torch.Generator().manual_seed(3)
    ).images[0]
    assert np.abs(pixels(out)["00000.png"] - np.asarray(expected).astype(int)).max() <= 1


def test_two_processes_draw_what_one_draws(model: str, tmp_path: Path, capfd: Any) -> None:
    write_csv(tmp_path / "rows.csv", ROWS)
    command = ["sample", model, "--prompts", str(tmp_path / "rows.csv"), "--images", "2", "--steps", "2"]
    assert main([*command, "--output", str(tmp_path / "one")]) == 0
    assert main([*command, "--output", str(tmp_path / "two"), "--processes", "2", "--batch_size", "2"]) == 0
    one, two = pixels(tmp_path / "one"), pixels(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(np.abs(image - two[name]).max() <= 1 for name, image in one.items())
    assert (tmp_path / "one" / "index.jsonl").read_text() == (tmp_path / "two" / "index.jsonl").read_text()
    capfd.readouterr()
    assert main([*command, "--output", str(tmp_path / "not"), "--processes", "2", "--height", "17"]) == 2
    error = capfd.readouterr().err
    assert error.splitlines()[-1] == "error: height 17 and width 16 must be multiples of 4 px for this model"
    assert "Traceback" not in error
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_kills_lose_no_image(model: str, tmp_path: Path, processes: str) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat\nthe house\na dog\n")
    out = tmp_path / "out"
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--images", "20", "--batch_size", "2", "--steps", "20"]
    command = [sys.executable, "-m", "nami_lightning.cli", "sample", model, *options, "--output", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [*command, "--processes", processes]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        deadline = time.monotonic() + 120
        while len(list(out.glob("0*.png"))) < 10 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    time.sleep(1)  # the processes end with their parent
    there = sorted(out.glob("0*.png"))
    assert 10 <= len(there) < 60
    assert all(read_settings(path) for path in there)
    times = [path.stat().st_mtime_ns for path in there]
    time.sleep(0.5)
    assert sorted(out.glob("0*.png")) == there
    assert main([*command[3:]]) == 0
    assert [path.stat().st_mtime_ns for path in there] == times
    assert main(["sample", model, *options, "--output", str(tmp_path / "whole")]) == 0
    killed, whole = pixels(out), pixels(tmp_path / "whole")
    assert killed.keys() == whole.keys()
    assert max(np.abs(killed[name] - whole[name]).max() for name in whole) <= 1
    assert (out / "index.jsonl").read_text() == (tmp_path / "whole" / "index.jsonl").read_text()
    assert not list(out.glob(".*"))
