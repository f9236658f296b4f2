"""Scores equal what their models say, survive interruptions, and leave out what they should."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_judges import make_clip
from helpers.tiny_labellers import make_siglip, make_text_detector
from PIL import Image, ImageDraw, ImageEnhance
from transformers import AutoModel, AutoModelForObjectDetection, AutoProcessor

from nami_lightning.cli.main import main
from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation
from nami_lightning.datamodules.scoring import score as score_module
from nami_lightning.datamodules.scoring.duplicates import first_of_each, pairs_by_features, pairs_by_hash
from nami_lightning.datamodules.scoring.filter import OF_HELDOUT, WITHIN, ScoreFilters, decide, write_filtered
from nami_lightning.datamodules.scoring.image_scores import colours, entropy, perceptual_hash
from nami_lightning.datamodules.scoring.score import ScoreModels, score
from nami_lightning.datamodules.scoring.score_files import SCORES, Scores, read_scores
from nami_lightning.datamodules.sources.base import Source, SourceSample
from nami_lightning.datamodules.storage.dataset import SPLITS, PreparedDataset
from nami_lightning.datamodules.storage.shards import Record
from nami_lightning.datamodules.storage.verify import verify
from nami_lightning.models.labelling.aesthetic import AestheticPredictor
from nami_lightning.models.labelling.text_area import covered


def scene(seed: int, side: int = 64) -> Image.Image:
    """A picture of ten coloured shapes."""
    chance = random.Random(seed)
    image = Image.new("RGB", (side, side), tuple(chance.randrange(256) for _ in range(3)))
    drawing = ImageDraw.Draw(image)
    for _ in range(10):
        x, y = chance.randrange(-10, side), chance.randrange(-10, side)
        box = (x, y, x + chance.randrange(8, side // 2), y + chance.randrange(8, side // 2))
        draw = chance.choice([drawing.rectangle, drawing.ellipse])
        draw(box, fill=tuple(chance.randrange(256) for _ in range(3)))
    return image


def altered(image: Image.Image, seed: int) -> Image.Image:
    """The same picture after a little scaling, cropping, brightening and JPEG."""
    chance = random.Random(seed)
    margin = chance.randrange(2)
    small = image.crop((margin, margin, image.width - margin, image.height - margin))
    small = ImageEnhance.Brightness(small.resize((96, 96))).enhance(chance.uniform(0.92, 1.05)).resize(image.size)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=chance.choice([70, 85, 95]))
    return Image.open(buffer).convert("RGB")


class Scenes(Source):
    """Scenes with one caption or two, the last ``copies`` of them near-duplicates of the first."""

    def __init__(self, number: int, copies: int = 0) -> None:
        self.number, self.copies = number, copies

    def settings(self) -> dict[str, Any]:
        return {"name": "scenes", "number": self.number, "copies": self.copies}

    def parts(self) -> list[str]:
        return [str(first) for first in range(0, self.number + self.copies, 10)]

    def read(self, part: str) -> Iterator[SourceSample]:
        for index in range(int(part), min(int(part) + 10, self.number + self.copies)):
            image = scene(index) if index < self.number else altered(scene(index - self.number), index)
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            captions = (
                ["a red cat", "the big dog under a tree"] if index % 3 == 0 else [f"a {index % 7} house on the tree"]
            )
            yield SourceSample(f"scene {index}", buffer.getvalue(), captions)


def make(folder: Path, number: int, copies: int = 0) -> PreparedDataset:
    settings = Preparation([32, 64], heldout_percent=20, format="png")
    return PreparedDataset(prepare(Scenes(number, copies), folder, settings, 1))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Forty scenes, and twenty near-duplicates of the first twenty."""
    return make(tmp_path_factory.mktemp("data") / "scenes", 40, 20)


def all_records(dataset: PreparedDataset) -> list[Record]:
    buckets = [bucket for split in SPLITS for bucket in dataset.buckets(split)]
    return [Record.from_item(item) for bucket in buckets for item in bucket.shards.read(range(len(bucket)))]


def make_predictor(file: Path, width: int) -> torch.nn.Module:
    """Weights in the form of LAION's second predictor, and the same layers to compare with."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(width, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1)).eval()
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, file)
    return layers


# --- scores are what the models say -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_scores_equal_those_of_transformers(kind: str, scenes: PreparedDataset, tmp_path: Path) -> None:
    name = str((make_clip if kind == "clip" else make_siglip)(tmp_path / "clip"))
    model, processor = AutoModel.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
    layers = make_predictor(tmp_path / "predictor.pth", 8)
    models = ScoreModels(name, str(tmp_path / "predictor.pth"), features=True)
    score(scenes, tmp_path / "scores", models, batch_size=7)
    scores = read_scores(scenes, [tmp_path / "scores"], features=True)
    similarity, aesthetic, entropies = [], [], []
    for record in all_records(scenes):
        image = Image.open(io.BytesIO(record.image))
        with torch.no_grad():
            padding = "max_length" if kind == "siglip" else True
            inputs = processor(
                text=record.captions, images=image, padding=padding, truncation=True, return_tensors="pt"
            )
            output = model(**inputs)
            image_features = output.image_embeds / output.image_embeds.norm()
            text_features = output.text_embeds / output.text_embeds.norm(dim=1, keepdim=True)
            similarity += (text_features @ image_features[0]).tolist()
            aesthetic.append(float(layers(image_features)))
        shares = np.bincount(np.asarray(image.convert("L")).ravel(), minlength=256) / image.width / image.height
        entropies.append(-sum(share * np.log2(share) for share in shares if share))
    np.testing.assert_allclose(scores.values["similarity"], similarity, atol=1e-5)
    np.testing.assert_allclose(scores.values["aesthetic"], aesthetic, atol=1e-5)
    np.testing.assert_allclose(scores.values["entropy"], entropies, atol=1e-5)
    assert (scores.values["resolution"] == 64).all()
    assert scores.captions.tolist() == [len(record.captions) for record in all_records(scenes)]
    norms = np.linalg.norm(scores.values["features"].astype(np.float64), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-3)


def test_the_share_of_text_is_the_area_in_boxes(scenes: PreparedDataset, tmp_path: Path) -> None:
    name = str(make_text_detector(tmp_path / "detector"))
    score(scenes, tmp_path / "scores", ScoreModels(text_detector=name), batch_size=7)
    found = read_scores(scenes, [tmp_path / "scores"]).values["text_area"]
    model, processor = AutoModelForObjectDetection.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
    for record, share in list(zip(all_records(scenes), found, strict=True))[:5]:
        inputs = processor(Image.open(io.BytesIO(record.image)), return_tensors="pt")
        with torch.no_grad():
            output = processor.post_process_object_detection(model(**inputs), 0.5, torch.tensor([[64, 64]]))[0]
        inside = np.zeros((64, 64), bool)
        for box, label in zip(output["boxes"].round().int().tolist(), output["labels"].tolist(), strict=True):
            if label == 1:
                left, top, right, bottom = (max(0, value) for value in box)
                inside[top:bottom, left:right] = True
        assert share == pytest.approx(inside.mean(), abs=1e-6)
    assert found.max() > 0


def test_boxes_that_overlap_count_once() -> None:
    assert covered([(0, 0, 5, 10), (3, 0, 8, 10), (-5, -5, 1, 1)], 10, 10) == pytest.approx(0.8)
    assert covered([], 10, 10) == 0


def test_predictors_of_other_forms(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    linear = torch.nn.Linear(8, 1)
    torch.save(linear.state_dict(), tmp_path / "first.pth")  # LAION's first predictor
    features = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    expected = linear(features)[:, 0]
    torch.testing.assert_close(AestheticPredictor(str(tmp_path / "first.pth"))(features), expected)
    folder = tmp_path / "hub"
    folder.mkdir()
    weights = {"predictor.weight": linear.weight, "predictor.bias": linear.bias, "vision_model.x": torch.zeros(2)}
    save_file(weights, folder / "model.safetensors")
    torch.testing.assert_close(AestheticPredictor(str(folder))(features), expected)
    save_file({"vision_model.x": torch.zeros(2)}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="no aesthetic predictor"):
        AestheticPredictor(str(tmp_path / "none.safetensors"))
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="no file of weights"):
        AestheticPredictor(str(tmp_path / "text.pth"))


# --- resuming, and what doesn't fit --------------------------------------------------------------


def scored(dataset: PreparedDataset, folder: Path) -> Scores:
    score(dataset, folder, ScoreModels())
    return read_scores(dataset, [folder])


def test_scoring_goes_on_where_it_stopped(
    scenes: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scored(scenes, tmp_path / "whole")
    written: list[str] = []
    write_part = score_module.write_part

    def write_then_die(folder: Path, part: Any, arrays: dict[str, np.ndarray]) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        write_part(folder, part, arrays)
        written.append(part.file)

    monkeypatch.setattr(score_module, "write_part", write_then_die)
    with pytest.raises(KeyboardInterrupt):
        score(scenes, tmp_path / "parts", ScoreModels())
    with pytest.raises(ValueError, match="have no scores"):
        read_scores(scenes, [tmp_path / "parts"])
    monkeypatch.setattr(score_module, "write_part", write_part)
    times = {file: (tmp_path / "parts" / file).stat().st_mtime_ns for file in written}
    for shard in ((0, 2), (1, 2)):
        score(scenes, tmp_path / "parts", ScoreModels(), shard=shard)
    assert times == {file: (tmp_path / "parts" / file).stat().st_mtime_ns for file in written}
    resumed = read_scores(scenes, [tmp_path / "parts"])
    assert whole.values.keys() == resumed.values.keys()
    assert all((whole.values[name] == resumed.values[name]).all() for name in whole.values)


def test_a_changed_chunk_is_scored_again(tmp_path: Path) -> None:
    dataset = make(tmp_path / "data", 20)
    folder = tmp_path / "data" / SCORES
    scored(dataset, folder)
    description = json.loads((tmp_path / "data/dataset.json").read_text())
    first = next(iter(description["checksums"]))
    description["checksums"][first] = "0" * 32
    (tmp_path / "data/dataset.json").write_text(json.dumps(description))
    changed = PreparedDataset(tmp_path / "data")
    with pytest.raises(ValueError, match="1 of the"):
        read_scores(changed, [folder])
    scored(changed, folder)


def test_what_does_not_fit_is_refused(scenes: PreparedDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--clip"):
        ScoreModels(aesthetic="x.pth")
    clip = str(make_clip(tmp_path / "clip"))
    make_predictor(tmp_path / "wide.pth", 16)
    with pytest.raises(ValueError, match="takes 16 features"):
        score(scenes, tmp_path / "a", ScoreModels(clip, str(tmp_path / "wide.pth")))
    scored(scenes, tmp_path / "b")
    with pytest.raises(ValueError, match="made otherwise"):
        score(scenes, tmp_path / "b", ScoreModels(clip))
    with pytest.raises(FileNotFoundError, match="can't be loaded"):
        score(scenes, tmp_path / "c", ScoreModels(str(tmp_path / "nothing")))
    assert not (tmp_path / "c").exists()
    scores = read_scores(scenes, [tmp_path / "b"])
    with pytest.raises(ValueError, match="no score similarity"):
        decide(scores, ScoreFilters(min_similarity=0.2))
    with pytest.raises(ValueError, match="--features"):
        decide(scores, ScoreFilters(near_duplicate_cosine=0.9))
    with pytest.raises(FileNotFoundError, match="holds no scores"):
        read_scores(scenes, [tmp_path / "nothing"])


# --- near-duplicates -----------------------------------------------------------------------------


def test_pairs_by_hash_are_all_pairs() -> None:
    chance = np.random.default_rng(0)
    hashes = chance.integers(0, 2**63, 400, dtype=np.uint64)
    for copy, (original, bits) in enumerate([(5, 0b1011), (7, 0), (8, 1 << 62), (5, 1 << 40)], 300):
        hashes[copy] = hashes[original] ^ np.uint64(bits)
    grey = np.zeros((400, 48), np.uint8)
    for bits in (0, 3, 16):
        pairs, distances = pairs_by_hash(hashes, grey, bits)
        every = np.bitwise_count(hashes[:, None] ^ hashes[None])
        expected = np.argwhere(np.triu(every <= bits, 1))
        assert pairs.tolist() == expected.tolist()
        assert distances.tolist() == [every[first, second] for first, second in pairs]


def test_pairs_by_features_are_all_pairs() -> None:
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(3000, 6), dim=1).numpy()
    pairs, cosines = pairs_by_features(features, 0.99)
    expected = np.argwhere(np.triu(features @ features.T, 1) >= 0.99)
    assert sorted(pairs.tolist()) == expected.tolist()
    np.testing.assert_allclose(cosines, (features[pairs[:, 0]] * features[pairs[:, 1]]).sum(1), atol=1e-6)


def test_a_chain_of_likenesses_keeps_more_than_its_first() -> None:
    pairs = np.array([[0, 1], [1, 2], [2, 3]])
    assert first_of_each(pairs, np.ones(3), 5).original.tolist() == [0, 0, 2, 2, 4]


def test_planted_duplicates_are_found_and_others_are_not() -> None:
    originals = [scene(seed) for seed in range(200)]
    images = [*originals, *(altered(image, seed) for seed, image in enumerate(originals))]
    hashes = np.array([perceptual_hash(image) for image in images], np.uint64)
    pairs, _ = pairs_by_hash(hashes, np.stack([colours(image) for image in images]), 6)
    planted = [(first, second) for first, second in pairs.tolist() if second == first + 200]
    assert len(planted) >= 190
    assert len(pairs) - len(planted) == 0


def test_the_hash_knows_symmetric_pictures_after_a_jpeg() -> None:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((12, 12, 51, 51), fill="orange", outline="black", width=3)
    again = altered(image, 1)
    assert (perceptual_hash(image) ^ perceptual_hash(again)).bit_count() <= 6
    assert entropy(Image.new("L", (8, 8), 7)) == 0


# --- filtering -----------------------------------------------------------------------------------


def test_held_out_images_leave_the_training_split(scenes: PreparedDataset, tmp_path: Path) -> None:
    scores = scored(scenes, tmp_path / "scores")
    decision = decide(scores, ScoreFilters(near_duplicates=6))
    names = [record.id for record in all_records(scenes)]
    twin = {f"scene {n + 40}": f"scene {n}" for n in range(20)}
    twin |= {value: key for key, value in twin.items()}
    heldout = dict(zip(names, scores.heldout.tolist(), strict=True))
    removed = {name for name, keep in zip(names, decision.kept, strict=True) if not keep}
    assert len(removed) >= 18
    for name in removed:
        assert twin[name] not in removed
        assert heldout[twin[name]] or not heldout[name]
    of_heldout = {name for name, out in zip(names, decision.removed[OF_HELDOUT], strict=True) if out}
    assert of_heldout == {name for name in removed if heldout[twin[name]] and not heldout[name]}
    assert of_heldout
    assert decision.removed[WITHIN].sum() == len(removed) - len(of_heldout)


def test_what_is_in_another_data_set_is_removed(scenes: PreparedDataset, tmp_path: Path) -> None:
    other = make(tmp_path / "other", 10)
    scores = scored(scenes, tmp_path / "scores")
    decision = decide(scores, ScoreFilters(near_duplicates=6), [scored(other, tmp_path / "of other")])
    kept = {record.id for record, keep in zip(all_records(scenes), decision.kept, strict=True) if keep}
    assert not kept & {f"scene {n}" for n in range(10)}
    assert {f"scene {n}" for n in range(20, 40)} <= kept


def test_the_filtered_data_set_is_what_stays(scenes: PreparedDataset, tmp_path: Path) -> None:
    clip = str(make_clip(tmp_path / "clip"))
    score(scenes, tmp_path / "scores", ScoreModels(clip))
    scores = read_scores(scenes, [tmp_path / "scores"])
    limit = float(np.median(scores.values["similarity"]))
    least = float(np.quantile(scores.values["entropy"], 0.1))
    decision = decide(scores, ScoreFilters(min_similarity=limit, min_entropy=least))
    write_filtered(decision, tmp_path / "kept", 1)
    expected, first = {}, 0
    for number, record in enumerate(all_records(scenes)):
        similarity = scores.values["similarity"][first : first + len(record.captions)]
        first += len(record.captions)
        texts = [text for text, value in zip(record.captions, similarity, strict=True) if value >= limit]
        if texts and scores.values["entropy"][number] >= least:
            expected[record.id] = (record.image, texts, bool(scores.heldout[number]))
    kept = PreparedDataset(tmp_path / "kept")
    found = {}
    for split in SPLITS:
        for bucket in kept.buckets(split):
            for item in bucket.shards.read(range(len(bucket))):
                record = Record.from_item(item)
                found[record.id] = (record.image, record.captions, split == "heldout")
    assert found == expected
    assert len(found) < 60
    assert verify(tmp_path / "kept", 1) == []
    description = kept.description
    assert sum(description["removed"].values()) == 60 - len(found)
    assert description["settings"]["filters"]["min_similarity"] == limit
    with pytest.raises(ValueError, match="choose another output"):
        write_filtered(decision, tmp_path / "kept", 1)


def test_the_commands(
    scenes: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(make(tmp_path / "data", 20, 5).folder)
    clip = str(make_clip(tmp_path / "clip"))
    assert main(["data", "score", folder, "--clip", clip, "--workers", "0", "--device", "cpu"]) == 0
    assert "similarity" in capsys.readouterr().out
    before = {file: file.stat().st_mtime_ns for file in Path(folder).rglob("*.npz")}
    assert main(["data", "score", folder, "--clip", clip, "--workers", "0", "--device", "cpu"]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in Path(folder).rglob("*.npz")}
    capsys.readouterr()
    main(["data", "filter", folder, "--filters.near_duplicates", "6", "--filters.min_entropy", "4"])
    printed = capsys.readouterr().out
    assert "min_entropy" in printed
    assert "kept" in printed
    page = (tmp_path / "filter.html").read_text()
    assert page.count("<svg") == 2
    assert "just below 4" in page
    assert page.count("data:image/jpeg") > 20
    main(["data", "filter", folder, "--filters.near_duplicates", "6", "--output", "kept", "--workers", "1"])
    assert (tmp_path / "filter_2.html").exists()
    assert verify(tmp_path / "kept", 1) == []


def test_bad_options_are_one_message(
    scenes: PreparedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["score", str(scenes.folder), "--aesthetic", "x.pth"], "name it with --clip"),
        (["filter", str(scenes.folder), "--scores", str(tmp_path)], "lightning data score"),
        (["filter", str(scenes.folder), "--against", "x"], "--filters.near_duplicates"),
    ):
        assert main(["data", *arguments])
        assert message in capsys.readouterr().err
