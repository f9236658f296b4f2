"""Encodings: training on them against training on the images that they were made of; and that they are refused."""

import dataclasses
import io
import json
import multiprocessing
import os
import re
import signal
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from helpers.squares import Squares, contents
from helpers.tiny_models import make_vae
from PIL import Image

from nami_lightning.callbacks import BridgePretraining, CurriculumCallback, Metrics
from nami_lightning.cli.main import main
from nami_lightning.datamodules.multi_resolution import MultiResolutionDataModule
from nami_lightning.datamodules.precomputed import encode as encode_module
from nami_lightning.datamodules.precomputed.encode import encode_batch, encode_parts, merge
from nami_lightning.datamodules.precomputed.encoding_task import EncodingTask
from nami_lightning.datamodules.precomputed.records import EncodedRecord, Layout
from nami_lightning.datamodules.preparation.parts_folder import parts_folder
from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation
from nami_lightning.datamodules.sources import ImageFolder
from nami_lightning.datamodules.sources.base import SourceSample
from nami_lightning.datamodules.storage.dataset import PreparedDataset
from nami_lightning.datamodules.storage.shards import ShardWriter
from nami_lightning.datamodules.storage.verify import verify
from nami_lightning.metrics.record import read_entries
from nami_lightning.models.autoencoder import decode_latents, encode_posterior
from nami_lightning.models.text_encoder import PromptEncoder, TextStates
from nami_lightning.pipelines.sampler_settings import SamplerSettings
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.batch import pixels
from nami_lightning.training.module import NamiModule

TINY = Path(__file__).parents[1] / "tiny.yaml"
COUNT = 40
STEPS = 10
RECIPE = [
    *("--curriculum.phases", f"[{{steps: {STEPS}, ratio: [2, 1, 1], learning_rate: 2.0e-3}}]"),
    *("--model.prompt_dropout", "0.3"),
    *("--model.text_encoder.max_length", "16"),
    *("--data.init_args.source", "null"),
    *("--data.init_args.num_workers", "0"),
    *("--trainer.val_check_interval", "5"),
    *("--trainer.callbacks", "null"),
    *("--trainer.logger", "false"),
    *("--trainer.enable_checkpointing", "false"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``images``: pictures of three sizes with two captions each, prepared; ``vae``: an autoencoder."""
    root = tmp_path_factory.mktemp("encode")
    (root / "source").mkdir()
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        side = (34, 40, 20)[number % 3]
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(root / "source" / f"{number}.png")
        (root / "source" / f"{number}.txt").write_text(f"picture {number}\nblotches, the {number}th of {COUNT}\n")
    source = ImageFolder(str(root / "source"), one_caption_a_line=True)
    prepare(source, root / "images", Preparation([16, 32], heldout_percent=20), workers=1)
    make_vae(seed=0).save_pretrained(root / "vae")
    return root


def with_vae(root: Path) -> list[str]:
    return [
        *("--model.autoencoder", f"{{name: {root / 'vae'}, factor: 2}}"),
        *("--model.transformer.init_args.in_channels", "4"),
        *("--model.transformer.init_args.patch_size", "2"),
        *("--model.bridge.init_args.channels", "4"),
    ]


def make_module(overrides: list[str]) -> NamiModule:
    return Recipe(TINY, [*RECIPE, *overrides]).make_model()


def encode(overrides: list[str], images: Path, output: Path, crops: int = 1) -> Path:
    encoding = EncodingTask(make_module(overrides), PreparedDataset(images), output, crops)
    encode_parts(encoding, batch_size=4, workers=0)
    merge(encoding)
    return output


class Losses(L.Callback):
    """Of every step, and of the last validation."""

    def __init__(self) -> None:
        self.of_steps: list[float] = []
        self.heldout: dict[str, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.of_steps.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        metrics = trainer.callback_metrics.items()
        self.heldout = {name: float(value) for name, value in metrics if name.startswith("val/")}


def train(overrides: list[str], folder: Path, *callbacks: L.Callback) -> tuple[Losses, NamiModule]:
    """Ten steps with all callbacks that a training needs."""
    recipe = Recipe(TINY, [*RECIPE, *overrides, "--data.init_args.folder", str(folder)])
    module, data, trainer = recipe.make()
    losses = Losses()
    trainer.callbacks += [  # type: ignore[attr-defined]
        CurriculumCallback(),
        BridgePretraining(samples=32),
        losses,
        *callbacks,
    ]
    trainer.fit(module, data)
    return losses, module


FLUX_TEXT = [
    *("--model.text_encoder.attention_mask", "false"),
    *("--model.text_encoder.zero_padding", "false"),
    *("--model.text_encoder.pooling", "first_token"),
]
"""Text states whose padding is seen and kept."""

ROUTING = "{class_path: nami_lightning.TokenRouting, init_args: {first_block: 1}}"
CONTRAST = "{class_path: nami_lightning.ContrastiveFlow}"
ALIGNMENT = (
    "{class_path: nami_lightning.RepresentationAlignment, "
    "init_args: {encoder: {class_path: helpers.tiny_models.ColourMap}}}"
)
PERCEPTUAL = (
    "{class_path: nami_lightning.PerceptualLoss, init_args: {encoder: {class_path: helpers.tiny_models.TwoMaps}}}"
)
OF_LATENTS = ["--model.techniques", f"[{ROUTING}, {CONTRAST}]"]
OF_PIXELS = ["--model.techniques", f"[{ROUTING}, {CONTRAST}, {ALIGNMENT}, {PERCEPTUAL}]"]
"""All techniques; those that see images need a data set with images, which encodings of pixels have."""


@pytest.mark.parametrize(
    ("autoencoder", "pyramid", "settings"),
    [
        ("vae", "encode", []),
        ("vae", "pool", OF_LATENTS),
        ("pixels", "encode", []),
        ("pixels", "encode", OF_PIXELS),
        ("vae", "encode", FLUX_TEXT),
    ],
)
def test_losses_with_and_without_encodings_agree(
    autoencoder: str, pyramid: str, settings: list[str], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = [*(with_vae(root) if autoencoder == "vae" else []), "--model.latent_pyramid", pyramid, *settings]
    encoded = encode(recipe, root / "images", tmp_path / "encoded")
    expected, _ = train(recipe, root / "images")

    def built(*_: Any) -> None:
        raise AssertionError("training on encodings has built an encoder")

    if autoencoder == "vae":
        monkeypatch.setattr("nami_lightning.training.frozen_encoders.load_autoencoder", built)
    monkeypatch.setattr(PromptEncoder, "load", built)
    found, module = train(recipe, encoded)
    assert vars(module).keys() & {"vae", "text_encoder"} == ({"vae"} if autoencoder == "pixels" else set())
    assert len(found.of_steps) == STEPS
    assert np.ptp(expected.of_steps) > 0.1
    np.testing.assert_allclose(found.of_steps, expected.of_steps, atol=1e-3)
    assert found.heldout.keys() == expected.heldout.keys()
    for stage in (1, 2, 3):
        name = f"val/loss_stage{stage}"
        assert found.heldout[name] == pytest.approx(expected.heldout[name], abs=1e-3)
    assert found.heldout == pytest.approx(expected.heldout, rel=1e-3)  # parts of a window too: means of a few samples


class Colours(torch.nn.Module):
    """Every number of a picture."""

    name = "colours"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).double() / 255


def test_metrics_of_latents_see_what_the_autoencoder_decodes(root: Path, tmp_path: Path) -> None:
    recipe = [*with_vae(root), "--output_dir", str(tmp_path)]
    folder = encode(recipe, root / "images", tmp_path / "encoded")
    measure = Metrics(
        samples=4, training_images=4, features=Colours(), agreement=None, sampler=SamplerSettings(num_inference_steps=3)
    )
    _, module = train(recipe, folder, measure)
    found, captions = measure.references[0].training
    data = data_of(recipe, root / "images")
    images = data.steps(seed=0).stage_batch(0, 2)
    assert captions == images.captions[:4]
    latents = encode_posterior(module.vae, pixels(images.images)).mean
    expected = (decode_latents(module.vae, latents) + 1) / 2
    np.testing.assert_allclose(found, expected.flatten(1)[:4], atol=0.02)  # encodings are bfloat16
    assert [entry.step for entry in read_entries(tmp_path / "tiny")] == [STEPS]


def test_a_remote_data_set_is_encoded_into_a_folder_that_is_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [
        "--data.init_args.folder",
        f"file://{root / 'images'}",
        "--data.init_args.cache.folder",
        f"{tmp_path}/cache",
    ]
    arguments = ["data", "encode", str(TINY), *RECIPE, *data, "--workers", "0"]
    assert main(arguments) == 2
    assert "with --output" in capsys.readouterr().err
    assert main([*arguments, "--output", str(tmp_path / "encoded")]) == 0
    assert (tmp_path / "encoded" / "skipped.jsonl").read_bytes() == (root / "images" / "skipped.jsonl").read_bytes()
    assert verify(tmp_path / "encoded", 1) == []


def data_of(overrides: list[str], folder: Path) -> MultiResolutionDataModule:
    data = Recipe(TINY, [*RECIPE, *overrides, "--data.init_args.folder", str(folder)]).make_data()
    assert isinstance(data, MultiResolutionDataModule)
    return data


def test_batches_are_those_of_the_images_and_hold_what_the_encoders_say(root: Path, tmp_path: Path) -> None:
    recipe = with_vae(root)
    encoded = data_of(recipe, encode(recipe, root / "images", tmp_path / "encoded"))
    images, module = data_of(recipe, root / "images"), make_module(recipe)
    captions = set()
    for step in range(STEPS):
        for with_images, micro in zip(images.steps()[step], encoded.steps()[step], strict=True):
            assert (micro.stage, micro.ids) == (with_images.stage, with_images.ids)
            assert micro.global_indices == with_images.global_indices
            assert micro.captions == with_images.captions
            assert micro.images.numel() == 0
            captions.update(micro.captions)
            drop = torch.arange(len(micro)) == 0
            for found, expected in zip(
                (*module.latents(micro, step), *module.text_states(micro, drop)),
                (*module.latents(with_images, step), *module.text_states(with_images, drop)),
                strict=True,
            ):
                assert found.dtype == torch.float32
                assert found.shape == expected.shape
                torch.testing.assert_close(found, expected, atol=0.02, rtol=0.01)
    assert {caption.split()[0] for caption in captions} == {"picture", "blotches,"}
    heldout = encoded.heldout(4)
    for number in range(len(heldout)):
        assert torch.equal(heldout[number].images, images.heldout(4)[number].images)


def test_encodings_in_a_store_give_the_batches_of_those_on_a_disk(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "CHUNK_BYTES", 10_000)  # several files of encodings for a chunk of images
    recipe = with_vae(root)
    folder = encode(recipe, root / "images", tmp_path / "encoded")
    here = data_of(recipe, folder)
    assert any(len(files) > 1 for bucket in here.dataset.buckets("train") for files in bucket.files)
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        there = make_remote(recipe, f"http://127.0.0.1:{server.server_port}/", tmp_path / "cache")
        for step in range(STEPS):
            for local, remote in zip(here.steps()[step], there.steps()[step], strict=True):
                assert local.ids == remote.ids
                assert local.encodings is not None
                assert remote.encodings is not None
                assert local.encodings.latents is not None
                assert remote.encodings.latents is not None
                assert torch.equal(local.encodings.latents.mean, remote.encodings.latents.mean)
                assert torch.equal(local.encodings.text.sequence, remote.encodings.text.sequence)
        server.shutdown()


def make_remote(recipe: list[str], url: str, cache: Path) -> MultiResolutionDataModule:
    settings = ["--data.init_args.folder", url, "--data.init_args.cache.folder", str(cache)]
    data = Recipe(TINY, [*RECIPE, *recipe, *settings]).make_data()
    assert isinstance(data, MultiResolutionDataModule)
    return data


def test_text_is_stored_without_its_padding(root: Path, tmp_path: Path) -> None:
    bucket = PreparedDataset(encode([], root / "images", tmp_path / "encoded")).buckets("train")[0]
    record = EncodedRecord.from_item(bucket.shards.read([0])[0])
    words = [len(re.findall(r"\w+|,", caption)) for caption in record.captions]
    tokens = [len(text) // 2 // 384 - 1 for text in record.text]
    assert all(count + 2 <= held < 16 for count, held in zip(words, tokens, strict=True))
    layout = Layout([8], "encode", False, 1, 3, tokens=5, width=4, pooled_width=3)
    states = TextStates(torch.zeros(5, 4), torch.tensor([1.0, 0, 2]))
    states.sequence[:2] = torch.tensor([[0, 0, 0, 0], [0, 1.5, 0, -2]])
    packed = layout.pack_text(states)
    assert len(packed) == 2 * (2 * 4 + 3)
    for found, expected in zip(layout.unpack_text(packed), states, strict=True):
        assert torch.equal(found.float(), expected)


# --- crops -------------------------------------------------------------------------------------


class Gradients(Squares):
    """Their red rises from left to right; wide."""

    def sample(self, number: int) -> SourceSample:
        row = np.stack([np.arange(120) * 2, np.full(120, number), np.zeros(120)], 1).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(np.broadcast_to(row, (33, 120, 3)).copy()).save(file, "PNG")
        return dataclasses.replace(super().sample(number), image=file.getvalue())


def test_training_draws_among_the_stored_crops(root: Path, tmp_path: Path) -> None:
    recipe = with_vae(root)
    settings = Preparation([32], heldout_percent=20, crop="random", format="png")
    images = prepare(Gradients(30), tmp_path / "images", settings, workers=1)
    data = data_of(recipe, encode(recipe, images, tmp_path / "encoded", crops=3))
    drawn: dict[tuple[int, str], set[float]] = {}
    for micro in (micro for step in range(STEPS) for micro in data.steps()[step]):
        assert micro.encodings
        assert micro.encodings.latents
        for name, latents in zip(micro.ids, micro.encodings.latents.mean, strict=True):
            drawn.setdefault((micro.stage, name), set()).add(float(latents.float().sum()))
    assert 1 < max(map(len, drawn.values())) <= 3
    heldout, module = data.heldout(4), make_module(recipe)
    for number in range(len(heldout)):
        micro = heldout[number]
        of_images = dataclasses.replace(micro, encodings=None)
        for found, expected in zip(module.latents(micro, 0), module.latents(of_images, 0), strict=True):
            torch.testing.assert_close(found, expected, atol=0.02, rtol=0.01)


def test_crops_that_would_be_the_same_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="all crops would be the same"):
        EncodingTask(make_module(with_vae(root)), PreparedDataset(root / "images"), tmp_path / "more", crops=2)
    settings = Preparation([32], heldout_percent=0, crop="random", format="png")
    images = PreparedDataset(prepare(Squares(10), tmp_path / "images", settings, workers=1))
    with pytest.raises(ValueError, match="whole images are stored"):
        EncodingTask(make_module([]), images, tmp_path / "more", crops=2)


# --- interruptions and shards ------------------------------------------------------------------


def slowly(*arguments: Any) -> Any:
    for record in encode_batch(*arguments):
        time.sleep(0.02)
        yield record


def test_killed_and_shared_encodings_equal_those_made_in_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = prepare(Squares(), tmp_path / "images", Preparation([16, 32], heldout_percent=20), workers=1)
    alone = encode([], images, tmp_path / "alone")
    module = make_module([])
    module.text_encoder([""])
    monkeypatch.setattr(encode_module, "encode_batch", slowly)
    killed = EncodingTask(module, PreparedDataset(images), tmp_path / "killed")
    for parts in (0, 2, 5):
        process = multiprocessing.get_context("fork").Process(target=encode_parts, args=(killed, 4, 0))
        process.start()
        while len([path for path in parts_folder(killed.output).glob("*") if path.name.isdigit()]) <= parts:
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(0.03)
        assert process.pid
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not killed.is_complete()
    monkeypatch.undo()
    encode_parts(killed, 4, 0)
    merge(killed)
    assert contents(killed.output) == contents(alone)

    shared = EncodingTask(module, PreparedDataset(images), tmp_path / "shared")
    encode_parts(shared, 4, 0, (1, 2))
    with pytest.raises(ValueError, match="parts are missing"):
        merge(shared)
    encode_parts(shared, 4, 0, (0, 2))
    merge(shared)
    assert contents(shared.output) == contents(alone)
    assert shared.is_complete()
    assert not parts_folder(shared.output).exists()


# --- what is refused ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(root: Path) -> Path:
    return encode(with_vae(root), root / "images", root / "images" / "encodings" / "latents")


def start(overrides: list[str], folder: Path) -> None:
    """What happens before training."""
    data, module = data_of(overrides, folder), make_module(overrides)
    data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
    data.setup("fit")
    data.steps()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--model.text_encoder.max_length", "8"],
            r"text_encoder.sequence is .* \(max_length 8\) .* \(max_length 16\)",
        ),
        (["--model.text_encoder.dtype", "bfloat16"], "dtype bfloat16"),
        (["--model.text_encoder.zero_padding", "false"], r"\(zero_padding False\) .* \(zero_padding True\)"),
        (["--model.text_encoder.sequence", "google/mt5-large"], "sequence is google/mt5-large .* by all-MiniLM-L6-v2"),
        (["--model.text_encoder.pooled", "BAAI/AltCLIP"], "pooled is BAAI/AltCLIP .* made by none"),
        (["--model.autoencoder", "{name: pixels, factor: 1}"], "autoencoder is pixels .* made by"),
        (["--model.latent_pyramid", "pool"], "latent_pyramid is pool .* made for encode"),
        (["--resolutions", "[4, 8, 16]"], r"resolutions is \[4, 8, 16\] .* made for \[8, 16, 32\]"),
        (["--model.transformer.init_args.pooled_projection_dim", "64"], "pooled_projection_dim is 64"),
    ],
)
def test_training_with_other_encoders_is_refused(overrides: list[str], message: str, root: Path, encoded: Path) -> None:
    start(with_vae(root), encoded)
    with pytest.raises(ValueError, match=message):
        start([*with_vae(root), *overrides], encoded)


def test_another_revision_is_refused_and_another_place_is_not(root: Path, encoded: Path, tmp_path: Path) -> None:
    make_vae(seed=0).save_pretrained(tmp_path / "elsewhere" / "vae")
    start(with_vae(tmp_path / "elsewhere"), encoded)
    make_vae(seed=1).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"model\.autoencoder is .* \(revision \w{32}\) in the recipe, but .* made by"):
        start(with_vae(tmp_path), encoded)
    with pytest.raises(ValueError, match=r"model\.autoencoder is"):
        EncodingTask(make_module(with_vae(tmp_path)), PreparedDataset(root / "images"), encoded).is_complete()


def test_encoders_that_are_not_on_this_machine_go_by_name(root: Path, encoded: Path, tmp_path: Path) -> None:
    (root / "vae").rename(root / "gone")
    try:
        start(with_vae(root), encoded)
        with pytest.raises(ValueError, match=r"model\.autoencoder is .*nowhere/vae in the recipe"):
            start(with_vae(tmp_path / "nowhere"), encoded)
    finally:
        (root / "gone").rename(root / "vae")


def test_outputs_of_something_else_are_refused(root: Path, encoded: Path, tmp_path: Path) -> None:
    images, module = PreparedDataset(root / "images"), make_module(with_vae(root))
    with pytest.raises(ValueError, match="is a data set of images"):
        EncodingTask(module, images, root / "images").is_complete()
    with pytest.raises(ValueError, match="holds encodings already"):
        EncodingTask(module, PreparedDataset(encoded), tmp_path / "out")
    pooled = make_module([*with_vae(root), "--model.latent_pyramid", "pool"])
    with pytest.raises(ValueError, match="latent_pyramid was encode and is pool now"):
        EncodingTask(pooled, images, encoded).is_complete()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="exists and holds no encodings"):
        EncodingTask(module, images, tmp_path / "mine").is_complete()


def test_parts_of_another_model_block_no_encoding(root: Path, tmp_path: Path) -> None:
    images, out = PreparedDataset(root / "images"), tmp_path / "out"
    pooled = make_module([*with_vae(root), "--model.latent_pyramid", "pool"])
    encode_parts(EncodingTask(pooled, images, out), 8, 0, (0, 2))
    task = EncodingTask(make_module(with_vae(root)), images, out)
    with pytest.raises(ValueError, match="latent_pyramid was pool and is encode now"):
        encode_parts(task, 8, 0, (0, 2))
    encode_parts(task, 8, 0)
    merge(task)
    assert task.is_complete()
    assert list(tmp_path.iterdir()) == [out]


# --- as commands -------------------------------------------------------------------------------


def test_encode_show_verify_and_train_as_commands(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "encoded"
    arguments = [*tiny, "--output", str(output), "--workers", "1", "--batch_size", "16"]
    assert main(["data", "encode", *arguments]) == 0
    assert f"--data.init_args.folder {output}\n" in capsys.readouterr().out
    assert main(["data", "encode", *arguments]) == 0
    assert "is complete" in capsys.readouterr().out
    assert main(["data", "show", str(output)]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"model\.text_encoder\.sequence +name all-MiniLM-L6-v2, revision \w{32}, .*class BertModel", printed
    )
    # The recipe's source stays as it is: a folder that holds its data set is taken, another's is refused.
    keys = [*tiny, "--data.init_args.folder", str(output), "--trainer.max_time", "00:00:00:01"]
    assert main(["run", *keys, "--trainer.callbacks", "null", "--model.bridge.init_args.kind", "matched"]) == 0
    assert main(["run", *keys, "--data.init_args.source.init_args.size", "64", "--name", "other"]) == 2
    assert "made with other settings" in capsys.readouterr().err


def test_verify_reads_encodings(encoded: Path, root: Path, tmp_path: Path) -> None:
    assert verify(encoded, 1) == []
    assert verify(root / "images", 1) == []
    about = json.loads((encoded / "dataset.json").read_text())
    bucket = PreparedDataset(encoded).buckets("train")[-1]
    good = EncodedRecord.from_item(bucket.shards.read([0])[0])
    nan = torch.full((len(good.latents[0]) // 2,), torch.nan, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    bad = {
        "short": good._replace(latents=[good.latents[0][:-2], *good.latents[1:]]),
        "fewer": good._replace(latents=good.latents[1:]),
        "nan": good._replace(latents=[nan, *good.latents[1:]]),
        "text": good._replace(text=good.text[:1]),
        "good": good,
    }
    problems = {}
    for name, record in bad.items():
        folder = tmp_path / name
        writer = ShardWriter(folder / "train" / bucket.name, 2**20)
        writer.write(record._replace(id=name).to_item())
        writer.close()
        samples = {"train": {bucket.name: 1}, "heldout": {}}
        (folder / "dataset.json").write_text(json.dumps(about | {"samples": samples, "checksums": {}}))
        problems[name] = [damage.problem for damage in verify(folder, 1) if damage.sample == name]
    assert "wrong size" in problems["short"][0]
    assert "it has 4 kinds of latents, not 5" in problems["fewer"][0]
    assert problems["nan"] == ["its encodings are not finite"]
    assert "1 text states for 2 captions" in problems["text"][0]
    assert problems["good"] == []
