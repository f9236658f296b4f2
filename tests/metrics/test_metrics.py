"""The metrics against torchmetrics, scipy and plain loops, and their callback on small runs of real data."""

import json
import math
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from helpers.processes import run
from helpers.tiny_models import MeanColours
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from nami_lightning.callbacks import BridgePretraining, Metrics, RunCheckpoint, SamplerSettings, image_metrics
from nami_lightning.callbacks.generation import generate
from nami_lightning.datamodules import MultiResolutionDataModule
from nami_lightning.datamodules.step_dataset import HeldoutDataset
from nami_lightning.metrics import distances
from nami_lightning.metrics.caption_agreement import ClipScore, Probe, sentences
from nami_lightning.metrics.distances import unit_counts
from nami_lightning.metrics.features import EfficientNetLite0, EfficientNetLite2, Inception, metric_name
from nami_lightning.metrics.record import Entry, Evaluation, read_entries, write_entries
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.batch import MicroBatch


class Identity(nn.Module):
    """Features that are given as images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, images: Tensor) -> Tensor:
        return images


def sets(n: int = 40, m: int = 60, width: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.2, 2, width)
    drawn = torch.randn(n, width, generator=generator) * scale + 0.3
    return drawn, torch.randn(m, width, generator=generator) @ torch.randn(width, width, generator=generator)


@pytest.mark.parametrize(("n", "m", "width"), [(40, 60, 12), (9, 60, 12), (10, 11, 30)])
def test_frechet_is_torchmetrics_and_scipys(n: int, m: int, width: int) -> None:
    drawn, real = sets(n, m, width)
    theirs = FrechetInceptionDistance(feature=Identity(width)).set_dtype(torch.float64)
    theirs.update(drawn.double(), real=False)
    theirs.update(real.double(), real=True)
    found = distances.frechet(drawn, real)(unit_counts(drawn), unit_counts(real))
    assert found == pytest.approx(float(theirs.compute()), rel=1e-4)
    covariances = np.cov(drawn.double().numpy().T), np.cov(real.double().numpy().T)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1] + 1e-12 * np.eye(width)).real
    between = float((drawn.double().mean(0) - real.double().mean(0)).square().sum())
    assert found == pytest.approx(between + np.trace(covariances[0] + covariances[1] - 2 * root), rel=1e-4)
    assert distances.frechet(real, real)(unit_counts(real), unit_counts(real)) == pytest.approx(0, abs=1e-8)


def test_kid_is_torchmetrics_on_one_subset_of_all() -> None:
    drawn, real = sets(50, 50)
    theirs = KernelInceptionDistance(feature=Identity(12), subsets=1, subset_size=50)
    theirs.update(drawn, real=False)
    theirs.update(real, real=True)
    ours = distances.kid(drawn, real)(unit_counts(drawn), unit_counts(real))
    assert ours == pytest.approx(float(theirs.compute()[0]), rel=1e-4)


def test_mmd_is_cmmds_formula() -> None:
    drawn, real = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (part.double().numpy() for part in sets()))

    def kernel(x: Any, y: Any) -> float:
        return np.exp(-scipy.spatial.distance.cdist(x, y, "sqeuclidean") / 200).mean()

    expected = 1000 * (kernel(drawn, drawn) + kernel(real, real) - 2 * kernel(drawn, real))
    found = distances.mmd(*sets())(unit_counts(torch.from_numpy(drawn)), unit_counts(torch.from_numpy(real)))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", distances.DISTANCES)
def test_counts_are_repeated_samples(kind: str) -> None:
    """KID alone differs: it pairs no sample with itself, nor with its repetition."""
    drawn, real = sets(30, 30)
    counts = torch.randint(0, 3, (30,), generator=torch.Generator().manual_seed(1))
    repeated = drawn.repeat_interleave(counts, dim=0)
    distance = distances.DISTANCES[kind]
    found = distance(drawn, real)(counts, unit_counts(real))
    if kind != "kid":
        assert found == pytest.approx(distance(repeated, real)(unit_counts(repeated), unit_counts(real)), rel=1e-6)
    else:
        kernel = lambda x, y: (x @ y / 12 + 1) ** 3  # noqa: E731
        x, y = drawn.double(), real.double()
        pairs = [(i, j) for i in range(30) for j in range(30) if i != j]
        weight = sum(int(counts[i] * counts[j]) for i, j in pairs)
        xx = sum(float(counts[i] * counts[j] * kernel(x[i], x[j])) for i, j in pairs) / weight
        yy = sum(float(kernel(y[i], y[j])) for i, j in pairs) / len(pairs)
        xy = sum(float(counts[i] * kernel(x[i], y[j])) for i in range(30) for j in range(30)) / int(counts.sum()) / 30
        assert found == pytest.approx(xx + yy - 2 * xy, rel=1e-6)


def test_precision_and_recall_against_a_k_d_tree() -> None:
    drawn, real = (part.double().numpy() for part in sets(40, 60, 3))

    def covered(points: Any, manifold: Any) -> list[float]:
        reach = scipy.spatial.KDTree(manifold).query(manifold, k=4)[0][:, -1]
        return [float((np.linalg.norm(manifold - point, axis=1) <= reach).any()) for point in points]

    precision, recall = distances.precision_recall(torch.from_numpy(drawn), torch.from_numpy(real))
    assert precision.tolist() == covered(drawn, real)
    assert recall.tolist() == covered(real, drawn)
    assert 0 < precision.mean() < 1
    found, indices = distances.nearest_neighbours(torch.from_numpy(drawn), torch.from_numpy(real))
    expected = scipy.spatial.KDTree(real).query(drawn)
    np.testing.assert_allclose(found, expected[0])
    assert indices.tolist() == expected[1].tolist()


def test_retrieval_counts_equal_captions_once() -> None:
    similarity = torch.tensor([[3.0, 9, 2, 1], [1, 9, 0, 9], [3, 2, 1, 0], [0, 1, 2, 3]])
    captions = ["a", "b", "c", "b"]
    assert distances.retrieval(similarity, captions, 1).tolist() == [0, 1, 0, 0]
    assert distances.retrieval(similarity, captions, 2).tolist() == [1, 1, 0, 1]
    assert distances.retrieval(similarity, captions, 5).tolist() == [1, 1, 1, 1]


def test_the_probe_finds_the_captions_that_features_tell() -> None:
    """Features that are a rotation of the sentences' own states, and noise, which the probe must not learn."""
    words = ("red", "blue", "green", "big", "small"), ("apple", "dog", "house", "flag", "heart", "sun")
    captions = [f"{colour} {thing} {other}" for colour in words[0] for thing in words[1] for other in words[1][:5]]
    generator = torch.Generator().manual_seed(0)
    texts = sentences(captions)
    mixing = torch.randn(384, 100, generator=generator, dtype=torch.float64)
    features = texts @ mixing + 0.2 * torch.randn(len(captions), 100, generator=generator)
    unseen = torch.arange(len(captions)) % 4 == 0
    told = [caption for caption, kept in zip(captions, ~unseen, strict=True) if kept]
    rest = [caption for caption, kept in zip(captions, unseen, strict=True) if kept]
    similarity = Probe(features[~unseen], told).similarity(features[unseen], rest)
    assert similarity.abs().max() <= 1 + 1e-9
    assert distances.retrieval(similarity, rest, 1).mean() > 0.5
    shuffled = torch.randperm(len(told), generator=generator)
    nothing = Probe(features[~unseen][shuffled], told).similarity(features[unseen], rest)
    assert distances.retrieval(nothing, rest, 1).mean() < 0.1


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A tiny CLIP with random weights, saved as transformers saves one."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTextConfig,
        CLIPVisionConfig,
        PreTrainedTokenizerFast,
    )

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "red", "apple", "dog"])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    text = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=16, eos_token_id=1, pad_token_id=0, **sizes)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **sizes)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    folder = tmp_path / "Tiny-CLIP"
    model.save_pretrained(folder)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_of_transformers_clip(clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    score = ClipScore(str(clip_folder))
    assert score.name == "tiny_clip"
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    captions = ["red apple", "dog", "dog apple"]
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    inputs = processor(text=captions, images=list(images), return_tensors="pt", padding=True)
    with torch.no_grad():
        cosines = torch.cosine_similarity(*(model(**inputs)[key] for key in ("image_embeds", "text_embeds")))
    assert score(images, captions) == pytest.approx((100 * cosines).clamp(min=0).tolist(), abs=1e-3)
    assert max(score(images, captions)) > 0
    with pytest.raises(FileNotFoundError, match=r"CLIP .*nowhere can't be loaded"):
        ClipScore(str(clip_folder / "nowhere"))


@pytest.mark.parametrize("network", [EfficientNetLite0, EfficientNetLite2])
def test_the_packaged_features_tell_pictures_from_noise(network: type[EfficientNetLite0]) -> None:
    features = network()
    assert network.__name__.lower() == features.name.replace("_", "")
    noise = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    flat = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
    assert features(noise).shape == (2, 1280)
    assert torch.dist(features(noise)[0], features(noise)[1]) < torch.dist(features(noise)[0], features(flat)[0])


def test_names_of_models() -> None:
    assert metric_name("openai/clip-vit-large-patch14") == "clip_vit_large_patch14"
    assert metric_name(nn.Identity()) == "identity"
    with pytest.raises(FileNotFoundError, match=r"Inception's weights nowhere\.pth don't exist"):
        Inception("nowhere.pth")


def test_inception_is_the_one_of_torchmetrics_fid(tmp_path: Path) -> None:
    """With random weights, since the real ones are a download."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="needs the extra fid")

    class Unloaded(fidelity.FeatureExtractorInceptionV3):  # type: ignore[name-defined]
        def load_state_dict(self, *_: Any) -> None:
            """Stay random."""

    weights = tmp_path / "weights.pth"
    torch.save({}, weights)
    torch.manual_seed(0)
    torch.save(Unloaded("inception-v3-compat", ["2048"], str(weights)).state_dict(), weights)
    features = Inception(str(weights))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(weights))
    found = features(images)
    assert found.shape == (2, features.num_features)
    assert found.std() > 0
    torch.testing.assert_close(found, theirs.inception(images))


# --- on disk ---------------------------------------------------------------------------------------


def entry(step: int, value: float = 1.0, seconds: float | None = 2.0) -> Entry:
    return Entry(step, 10 * step, 100 * step, seconds, 8, {"metrics/frechet_x": value})


def test_entries_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    assert read_entries(tmp_path) == []
    write_entries(tmp_path, [entry(1), entry(2)])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "sam')
    assert read_entries(tmp_path) == [entry(1), entry(2)]
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1 is not an evaluation"):
        read_entries(tmp_path)


def test_an_evaluation_comes_back_as_it_was(tmp_path: Path) -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    told = Evaluation(
        step=7,
        features="x",
        drawn=np.ones((3, 2), np.float32),
        real=np.zeros((4, 2), np.float32),
        captions=["a", "café", "b"],
        seeds=[0, 1, 2],
        real_ids=["p", "q", "r", "s"],
        of_drawn={"probe/retrieval_at_1": np.array([1.0, 0, 1])},
        of_real={"metrics/recall_x": np.array([1.0, 0, 1, 1])},
        images=[image, image[::-1]],
    )
    told.save(tmp_path)
    found = Evaluation.load(tmp_path)
    assert found is not None
    assert [found.step, found.captions, found.seeds, found.real_ids] == [7, told.captions, told.seeds, told.real_ids]
    np.testing.assert_array_equal(found.of_drawn["probe/retrieval_at_1"], [1, 0, 1])
    np.testing.assert_array_equal(found.of_real["metrics/recall_x"], [1, 0, 1, 1])
    np.testing.assert_array_equal(found.images[1], image[::-1])
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.npz"]


# --- the callback ----------------------------------------------------------------------------------


SAMPLER = SamplerSettings(num_inference_steps=6, guidance_scale=2.0)
PHASES = "[{steps: 4, ratio: [2, 1, 1], learning_rate: 0.002}, {steps: %d, ratio: [0, 2, 1], learning_rate: 0.002}]"


def fit(tiny: list[str], steps: int = 2, **settings: Any) -> tuple[Any, MultiResolutionDataModule, L.Trainer]:
    """Train the tiny recipe for 4 + ``steps`` steps with Metrics, from the newest checkpoint if there is one."""
    overrides = ["--curriculum.phases", PHASES % steps, "--data.init_args.num_workers", "0"]
    recipe = Recipe(tiny[0], [*tiny[1:], *overrides])
    model, data, trainer = recipe.make()
    defaults: dict[str, Any] = {"samples": 8, "training_images": 20, "sampler": SAMPLER, "agreement": None}
    measure = Metrics(**{**defaults, "features": MeanColours(), "batch_size": 3, "seed": 5, **settings})
    trainer.callbacks = [BridgePretraining(samples=64), measure, RunCheckpoint(2, keep=9)]  # type: ignore[attr-defined]
    newest = sorted((recipe.folder / "checkpoints").glob("*.ckpt"))
    trainer.fit(model, data, ckpt_path=newest[-1] if newest else None, weights_only=True)
    assert isinstance(data, MultiResolutionDataModule)
    return model, data, trainer


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_the_callback_measures_what_the_pipeline_draws(tiny: list[str], tmp_path: Path) -> None:
    model, data, _ = fit(tiny, every_n_steps=3, agreement="probe", shown=2)
    folder = tmp_path / "runs" / "tiny"
    entries = read_entries(folder)
    assert [one.step for one in entries] == [3, 6]
    last = entries[-1]
    # 4 steps of 8 samples and 2 of 6; tiny's unit is 2.
    assert last.samples == 4 * 8 + 2 * 6
    assert entries[0].samples == 3 * 8

    heldout = data.heldout(8, micro_batch=[8, 8, 8])
    finest = next(heldout[i] for i in range(len(heldout)) if heldout[i].stage == 2)
    drawn = generate(model, SAMPLER, finest.captions, [5 + i for i in range(len(finest))], output_type="pt")
    drawn = (drawn * 255).round().byte()
    real, fake = (MeanColours()(images) for images in (finest.images, drawn))
    expected = FrechetInceptionDistance(feature=MeanColours()).set_dtype(torch.float64)
    expected.update(finest.images, real=True)
    expected.update(drawn, real=False)
    found = last.metrics
    assert found["metrics/frechet_mean_colours"] == pytest.approx(float(expected.compute()), rel=1e-2)
    assert found["metrics/mmd_mean_colours"] == pytest.approx(
        distances.mmd(fake.float(), real.float())(unit_counts(fake), unit_counts(real)), rel=1e-3
    )
    training = torch.cat([data.steps(seed=5).stage_batch(number, 2).images for number in range(2)])  # 4 each
    perfect = distances.frechet(MeanColours()(training).float(), real.float())
    of_training = perfect(unit_counts(fake), unit_counts(real))
    assert found["metrics/frechet_mean_colours_of_real"] == pytest.approx(of_training, rel=1e-3)
    assert {
        *(f"metrics/{kind}_mean_colours{of}" for kind in ("frechet", "kid", "mmd") for of in ("", "_of_real")),
        *(f"metrics/{kind}_mean_colours" for kind in ("precision", "recall", "copies")),
        "metrics/nearest_training_mean_colours",
        *(f"probe/retrieval_at_{k}_mean_colours{of}" for k in (1, 5) for of in ("", "_of_real")),
    } == set(found)
    logged = scalars(folder)
    assert all(logged[name][6] == pytest.approx(value, rel=1e-5) for name, value in found.items())
    assert logged["used/samples"][6] == last.samples

    evaluation = Evaluation.load(folder)
    assert evaluation is not None
    assert (evaluation.step, evaluation.captions, evaluation.seeds[0]) == (6, finest.captions, 5)
    np.testing.assert_array_equal(evaluation.images[1], drawn[1].permute(1, 2, 0))
    np.testing.assert_allclose(evaluation.drawn, fake, rtol=1e-5)
    assert evaluation.real_ids == finest.ids


def test_held_out_images_are_read_as_they_are_needed(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read, held, alive = HeldoutDataset.__getitem__, [], []

    def counted(heldout: HeldoutDataset, number: int) -> MicroBatch:
        micro = read(heldout, number)
        held.append(weakref.ref(micro.images))
        alive.append(sum(images() is not None for images in held))
        return micro

    monkeypatch.setattr(HeldoutDataset, "__getitem__", counted)
    fit(tiny, batch_size=1)
    assert len(alive) > 2 * 8  # the real images, then the captions of those that are drawn
    assert max(alive) <= 3


def test_a_resume_goes_on_with_time_and_forgets_what_was_not_saved(tiny: list[str], tmp_path: Path) -> None:
    fit(tiny, every_n_steps=1)
    folder = tmp_path / "runs" / "tiny"
    first = read_entries(folder)
    assert [one.step for one in first] == [1, 2, 3, 4, 5, 6]
    assert all(early.seconds < late.seconds for early, late in pairwise(first))  # type: ignore[operator]
    (folder / "checkpoints" / "step=0000006.ckpt").unlink()
    fit(tiny, every_n_steps=3, steps=5)
    again = read_entries(folder)
    # Step 5 was measured after the checkpoint of step 4 that the run went on from.
    assert [one.step for one in again] == [1, 2, 3, 4, 6, 9]
    assert again[4].metrics == pytest.approx(first[5].metrics)
    assert (again[4].samples, again[4].flops) == (first[5].samples, first[5].flops)
    assert first[3].seconds < again[4].seconds < again[5].seconds  # type: ignore[operator]


def test_time_is_unknown_where_metrics_came_later(tiny: list[str], tmp_path: Path) -> None:
    fit(tiny)
    for checkpoint in (tmp_path / "runs" / "tiny" / "checkpoints").glob("*.ckpt"):
        state = torch.load(checkpoint, weights_only=True)
        state["callbacks"].pop("Metrics")
        torch.save(state, checkpoint)
    with pytest.warns(UserWarning, match="the time of training is not recorded"):
        fit(tiny, steps=3)
    assert [one.seconds is None for one in read_entries(tmp_path / "runs" / "tiny")] == [False, True]


def test_flops_are_the_counters_over_a_whole_step(tiny: list[str], tmp_path: Path) -> None:
    """Counted on real steps, among which the bridges' own products are a thousandth."""
    from torch.utils.flop_counter import FlopCounterMode

    model, data, _ = fit(tiny)
    steps = data.steps()
    with FlopCounterMode(display=False) as counter:
        for step in range(6):
            for micro in steps[step]:
                model.flow_loss(model, model.transformer, micro, step)[0].backward()
    text = model.text_encoder_config
    assert text.cache  # else the encoder's own operations would be among them
    assert read_entries(tmp_path / "runs" / "tiny")[-1].flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_validation_by_tau_adds_up_to_the_stages(tiny: list[str], tmp_path: Path) -> None:
    model, data, trainer = fit(tiny)
    found = {name: float(value) for name, value in trainer.validate(model, data, verbose=False)[0].items()}
    heldout = data.heldout(data.validation_samples)
    for stage in range(3):
        micros = [heldout[i] for i in range(len(heldout)) if heldout[i].stage == stage]
        rows = []
        for micro in micros:
            errors, tau, _ = model.flow_loss(model, model.transformer, micro, "validation", reduction="none")
            rows += list(zip(tau.tolist(), errors.mean((1, 2, 3)).tolist(), strict=True))
        for part in range(4):
            inside = [loss for tau, loss in rows if part / 4 <= tau < (part + 1) / 4]
            name = f"val/loss_stage{stage + 1}_tau_{part / 4:.2f}-{(part + 1) / 4:.2f}"
            assert (name in found) == bool(inside)
            if inside:
                assert found[name] == pytest.approx(np.mean(inside), rel=1e-4)
        assert found[f"val/loss_stage{stage + 1}"] == pytest.approx(np.mean([loss for _, loss in rows]), rel=1e-4)


class Contrasts(MeanColours):
    """Other features of the same images."""

    name = "contrasts"

    def forward(self, images: Tensor) -> Tensor:
        """Return the features ``(B, 6)``."""
        return super().forward(images // 2) ** 2


def test_several_networks_measure_the_same_images(tiny: list[str], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"every_n_steps": 3, "agreement": "probe"}
    several = [*tiny, "--name", "several"]
    fit(several, **settings, features=[MeanColours(), Contrasts()])
    fit([*tiny, "--name", "first"], **settings)
    fit([*tiny, "--name", "second"], **settings, features=Contrasts())
    both, first, second = (
        read_entries(tmp_path / "runs" / name)[-1].metrics for name in ("several", "first", "second")
    )
    of_second = {name: value for name, value in second.items() if not name.startswith("probe/")}
    assert both == first | of_second  # the probe uses the first alone
    assert len(of_second) == 10
    evaluation = Evaluation.load(tmp_path / "runs" / "several")
    assert evaluation is not None
    assert evaluation.features == "mean_colours"
    with pytest.raises(ValueError, match="different names; got mean_colours, mean_colours"):
        Metrics(features=[MeanColours(), MeanColours()])


def test_two_processes_measure_what_one_does(tiny: list[str], tmp_path: Path) -> None:
    callback = {
        "class_path": "nami_lightning.callbacks.Metrics",
        "init_args": {
            "samples": 7,  # one is left over: the second process repeats another beside it
            "training_images": 20,
            "agreement": None,
            "features": {"class_path": "helpers.tiny_models.MeanColours"},
            "sampler": {"num_inference_steps": 3, "guidance_scale": 1.0},
            "batch_size": 2,
        },
    }
    callbacks = [{"class_path": "nami_lightning.callbacks.BridgePretraining", "init_args": {"samples": 64}}, callback]
    settings = ["--curriculum.phases", "[{steps: 2, ratio: [2, 1, 1], learning_rate: 0.002}]"]
    settings += ["--trainer.callbacks", json.dumps(callbacks)]
    two = ["--trainer.devices", "2", "--trainer.strategy", "fsdp2", "--name", "two"]
    for more in (["--name", "one"], two):
        run([*tiny, *settings, *more])
    one, other = (read_entries(tmp_path / "runs" / name)[-1] for name in ("one", "two"))
    assert other.metrics == pytest.approx(one.metrics, rel=1e-3)
    assert (other.samples, other.flops, other.drawn) == (one.samples, one.flops, one.drawn)
    drawn = [Evaluation.load(tmp_path / "runs" / name) for name in ("one", "two")]
    np.testing.assert_allclose(drawn[1].drawn, drawn[0].drawn, atol=2e-3)  # type: ignore[union-attr]
    assert drawn[1].captions == drawn[0].captions  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [lambda: Metrics(samples=1), lambda: Metrics(batch_size=0)])
def test_settings_out_of_range_are_refused(make: Callable[[], Metrics]) -> None:
    with pytest.raises(ValueError, match="Metrics needs"):
        make()


def test_lines_are_plain_json(tmp_path: Path) -> None:
    write_entries(tmp_path, [entry(1, seconds=None)])
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {
        "step": 1,
        "samples": 10,
        "flops": 100,
        "seconds": None,
        "drawn": 8,
        "metrics": {"metrics/frechet_x": 1.0},
    }
    assert math.isfinite(line["flops"])


# --- early checks, late errors ---------------------------------------------------------------------


class Broken(MeanColours):
    """Features of a network that fails."""

    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("no kernel for this image")


def test_a_measurement_that_fails_loses_no_training_and_is_an_error_at_the_end(tiny: list[str], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"training is saved, but Metrics failed at step 3: no kernel .*; step 6"):
        fit(tiny, every_n_steps=3, features=Broken())
    names = [path.stem for path in (tmp_path / "runs" / "tiny" / "checkpoints").iterdir()]
    assert sorted(names) == ["step=0000002", "step=0000004", "step=0000006"]


def test_what_measuring_needs_is_checked_before_the_first_step(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match="CLIP no/such-clip can't be loaded"):
        fit(tiny, agreement="no/such-clip")
    monkeypatch.setattr(image_metrics, "FEWEST", 50)
    with pytest.raises(ValueError, match="at least 50 held-out images of the finest stage, but there are"):
        fit(tiny, samples=50, training_images=50)
    assert not list((tmp_path / "runs" / "tiny").glob("checkpoints/*"))
