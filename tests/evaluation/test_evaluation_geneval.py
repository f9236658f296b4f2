"""GenEval: the prompts against the published list's hash, every rule both ways on detections with known answers, and
the judges' models with random weights."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_judges import make_clip, make_detector
from PIL import Image
from torchvision.ops import box_iou
from transformers import CLIPModel, CLIPProcessor

from nami_lightning.evaluation.generate import GeneratedImages
from nami_lightning.evaluation.geneval.judge import Judge, judge_images, score_table, scores
from nami_lightning.evaluation.geneval.models import ColorClassifier, Detector, bounding_box, crop
from nami_lightning.evaluation.geneval.prompts import COLORS, TASKS, geneval_items, object_names
from nami_lightning.evaluation.geneval.rules import Box, Detection, filter_detections, judge_objects, overlap, relations
from nami_lightning.evaluation.prompts import Item, first_of_each_kind
from nami_lightning.utils.image_grid import save_image

PUBLISHED = "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680"
"""SHA-256 of the published generation_prompts.txt."""

BOX: Box = (0, 0, 10, 10)


def found(label: str, score: float = 0.99, box: Box = BOX) -> Detection:
    return Detection(label, score, box)


def at(x: float, y: float) -> Box:
    """A box 10 px wide and high around a point."""
    return x - 5, y - 5, x + 5, y + 5


def no_colors(objects: Sequence[Detection], name: str) -> list[str]:
    raise AssertionError(f"no colour matters, but that of {name} was asked for")


def colored(*colors: str) -> Any:
    """Says these colours, of as many objects as it is asked about."""
    return lambda objects, name: list(colors[: len(objects)])


# --- prompts -----------------------------------------------------------------------------------


def test_prompts_are_the_published_list_in_its_order() -> None:
    items = geneval_items()
    text = "".join(f"{item.prompt}\n" for item in items)
    assert hashlib.sha256(text.encode()).hexdigest() == PUBLISHED
    assert list(Counter(item.kind for item in items).items()) == list(
        zip(TASKS, (80, 99, 80, 94, 100, 100), strict=True)
    )
    assert [item.id for item in items[:2]] == ["00000", "00001"]
    assert len(items) == 553


def test_metadata_asks_for_what_the_prompt_says() -> None:
    by_prompt = {item.prompt: item.metadata for item in geneval_items()}
    assert by_prompt["a photo of a dog right of a teddy bear"]["include"] == [
        {"class": "teddy bear", "count": 1},
        {"class": "dog", "count": 1, "position": ["right of", 0]},
    ]
    counting = by_prompt["a photo of two clocks"]
    assert counting["include"] == [{"class": "clock", "count": 2}]
    assert counting["exclude"] == [{"class": "clock", "count": 3}]
    assert by_prompt["a photo of a purple wine glass and a black apple"]["include"] == [
        {"class": "wine glass", "count": 1, "color": "purple"},
        {"class": "apple", "count": 1, "color": "black"},
    ]
    classes = {entry["class"] for metadata in by_prompt.values() for entry in metadata["include"]}
    assert classes == set(object_names())


def test_a_limit_takes_the_first_of_every_kind() -> None:
    few = first_of_each_kind(geneval_items(), 2)
    assert Counter(item.kind for item in few) == dict.fromkeys(TASKS, 2)
    assert few[0] == geneval_items()[0]
    with pytest.raises(ValueError, match="--limit 0"):
        first_of_each_kind(few, 0)


# --- rules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "score", "counts"),
    [
        ("colors", 0.3, False),
        ("colors", 0.31, True),
        ("counting", 0.31, False),
        ("counting", 0.9, False),
        ("counting", 0.91, True),
    ],
)
def test_detections_count_above_the_tasks_threshold(tag: str, score: float, counts: bool) -> None:
    assert ("cup" in filter_detections([found("cup", score)], tag)) is counts


def test_at_most_sixteen_of_a_class_the_most_confident_first() -> None:
    many = [found("cup", 0.4 + i / 100) for i in range(20)] + [found("dog", 0.5)]
    objects = filter_detections(many, "two_object")
    assert [d.score for d in objects["cup"]] == sorted((d.score for d in many[:20]), reverse=True)[:16]
    assert len(objects["dog"]) == 1


def test_overlapping_detections_stay_unless_a_limit_is_set() -> None:
    same = [found("cup", 0.9), found("cup", 0.8), found("dog", 0.7), found("cup", 0.6, (100, 100, 120, 120))]
    assert len(filter_detections(same, "colors")["cup"]) == 3
    limited = filter_detections(same, "colors", max_overlap=0.5)
    assert [d.score for d in limited["cup"]] == [0.9, 0.6]
    assert len(limited["dog"]) == 1, "another class's boxes don't matter"


def test_overlap_is_torchvisions_on_boxes_one_px_larger() -> None:
    boxes = torch.rand(20, 4, generator=torch.Generator().manual_seed(0)) * 50
    boxes[:, 2:] += boxes[:, :2]
    larger = boxes + torch.tensor([0.0, 0, 1, 1])
    expected = box_iou(larger, larger)
    ours = torch.tensor([[overlap(tuple(a), tuple(b)) for b in boxes.tolist()] for a in boxes.tolist()])
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-100, 0, {"left of"}),
        (100, 0, {"right of"}),
        (0, -100, {"above"}),
        (0, 100, {"below"}),
        (100, 100, {"right of", "below"}),
        (-100, -100, {"left of", "above"}),
        (0, 0, set()),
        # The margin is 0.1 of both widths, 2 px: of an offset of o px there remain o - 2, which must be over half of o.
        (2, 0, set()),
        (4, 0, set()),
        (4.1, 0, {"right of"}),
        # 98 of 116.6 px to the right, but only 58 of 116.6 down.
        (100, 60, {"right of"}),
        (100, 62, {"right of", "below"}),
    ],
)
def test_relations_of_boxes(x: float, y: float, expected: set[str]) -> None:
    assert relations(at(x, y), at(0, 0)) == expected


def test_the_margin_grows_with_the_boxes() -> None:
    assert relations((95, 0, 105, 10), (0, 0, 10, 10)) == {"right of"}
    assert relations((-400, 0, 600, 10), (-495, 0, 505, 10)) == set()


def test_a_single_object_is_there_or_not() -> None:
    asked = {"include": [{"class": "cup", "count": 1}]}
    assert judge_objects(asked, {"cup": [found("cup")]}, no_colors).correct
    assert judge_objects(asked, {"cup": [found("cup")] * 3}, no_colors).correct, "more do no harm"
    missing = judge_objects(asked, {"dog": [found("dog")]}, no_colors)
    assert not missing.correct
    assert missing.reasons == ("expected 1 cup, found 0",)


def test_two_objects_must_both_be_there() -> None:
    asked = {"include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1}]}
    assert judge_objects(asked, {"cup": [found("cup")], "dog": [found("dog")]}, no_colors).correct
    assert not judge_objects(asked, {"cup": [found("cup")]}, no_colors).correct
    assert not judge_objects(asked, {"dog": [found("dog")]}, no_colors).correct


@pytest.mark.parametrize(("number", "correct"), [(0, False), (2, False), (3, True), (4, False), (9, False)])
def test_counts_are_exact(number: int, correct: bool) -> None:
    asked = {"include": [{"class": "cup", "count": 3}], "exclude": [{"class": "cup", "count": 4}]}
    assert judge_objects(asked, {"cup": [found("cup")] * number, "dog": [found("dog")]}, no_colors).correct is correct


def test_colors_are_those_of_the_most_confident_objects() -> None:
    asked = {"include": [{"class": "cup", "count": 1, "color": "red"}]}
    two = {"cup": [found("cup", 0.9), found("cup", 0.8)]}
    assert judge_objects(asked, two, colored("red", "blue")).correct
    second_alone_is_red = judge_objects(asked, two, colored("blue", "red"))
    assert second_alone_is_red.reasons == ("expected red cup, found blue",)
    assert not judge_objects(asked, {}, no_colors).correct, "and without a cup no colour is asked for"


def test_color_attribution_needs_both_colors_on_their_objects() -> None:
    asked = {
        "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
    }
    objects = {"cup": [found("cup")], "dog": [found("dog")]}

    def colors(cup: str, dog: str) -> Any:
        return lambda objects, name: [{"cup": cup, "dog": dog}[name]]

    assert judge_objects(asked, objects, colors("red", "blue")).correct
    assert not judge_objects(asked, objects, colors("blue", "red")).correct
    assert len(judge_objects(asked, objects, colors("blue", "red")).reasons) == 2


def test_positions_are_judged_on_the_most_confident_objects() -> None:
    asked = {"include": [{"class": "bear", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]}
    bear = [found("bear", 0.9, at(0, 0))]
    right, left = found("dog", 0.8, at(100, 0)), found("dog", 0.7, at(-100, 0))
    assert judge_objects(asked, {"bear": bear, "dog": [right, left]}, no_colors).correct
    wrong = judge_objects(asked, {"bear": bear, "dog": [left, right]}, no_colors)
    assert wrong.reasons == ("expected dog right of bear, found left of",)
    over = judge_objects(asked, {"bear": bear, "dog": [found("dog", 0.8, at(0, 0))]}, no_colors)
    assert over.reasons == ("expected dog right of bear, found neither side",)
    alone = judge_objects(asked, {"dog": [right]}, no_colors)
    assert alone.reasons == ("expected 1 bear, found 0", "nothing for dog to be right of")


# --- scores ------------------------------------------------------------------------------------


def test_the_overall_score_is_the_unweighted_mean_of_tasks() -> None:
    # NAMI-2B's row of Table 3: 0.99 0.78 0.64 0.82 0.20 0.45 make 0.65.
    shares = dict(zip(TASKS, (0.99, 0.78, 0.64, 0.82, 0.20, 0.45), strict=True))
    result = scores({task: [share] * (3 + i) for i, (task, share) in enumerate(shares.items())})
    assert round(result["overall"], 2) == 0.65
    assert result["tasks"] == pytest.approx(shares)
    assert score_table({"NAMI-2B": result})[1].split()[:8] == [
        "NAMI-2B",
        *["0.65", "0.99", "0.78", "0.64", "0.82", "0.20", "0.45"],
    ]


def test_images_are_judged_once_and_anew_when_they_change(tmp_path: Path) -> None:
    folder = GeneratedImages(tmp_path, "model")
    items = [
        Item("00000", "a photo of a cup", "single_object", {"include": [{"class": "cup", "count": 1}]}),
        Item("00001", "a photo of a dog", "single_object", {"include": [{"class": "dog", "count": 1}]}),
    ]
    for item in items:
        for i in range(2):
            save_image(Image.new("RGB", (8, 8), (10 * i, int(item.id), 0)), folder.path(item, i))
    seen = []

    def detect(image: Image.Image) -> list[Detection]:
        seen.append(image.getpixel((0, 0)))
        return [found("cup")]

    def colors(image: Image.Image, objects: Sequence[Detection], name: str) -> list[str]:
        return no_colors(objects, name)

    models = Judge(detect, colors, {"detector": "a"})
    assert judge_images(folder, items, 2, models)["tasks"] == {"single_object": 0.5}
    assert len(seen) == 4
    with (tmp_path / "verdicts.jsonl").open("a") as file:
        file.write('{"judge": "cut sho')  # a kill while a verdict was written
    assert judge_images(folder, items, 2, models)["overall"] == 0.5
    assert len(seen) == 4, "no image is judged twice"
    save_image(Image.new("RGB", (8, 8), "white"), folder.path(items[0], 0))
    judge_images(folder, items, 2, models)
    judge_images(folder, items, 2, models)
    assert len(seen) == 5, "but a new image is"
    judge_images(folder, items, 2, Judge(detect, colors, {"detector": "b"}))
    assert len(seen) == 9, "and all are by another judge"


# --- models ------------------------------------------------------------------------------------


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_the_detector_loads_from_a_folder_and_finds_by_cocos_numbers(tmp_path: Path) -> None:
    detector = Detector(str(make_detector(tmp_path)), "cpu", (64, 128))
    objects = detector(picture(96, 64))
    assert objects
    for thing in objects:
        assert thing.label == "horse"
        assert 0.3 <= thing.score <= 1
        assert thing.mask is not None
        assert thing.mask.shape == (64, 96)
        rows, columns = np.nonzero(thing.mask)
        assert thing.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_a_detector_of_other_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="knows 18 classes"):
        Detector(str(make_detector(tmp_path, classes=18)), "cpu")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nami_lightning.evaluation.results.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"scipy is needed: pip install 'nami_lightning\[evaluate\]'"):
        Detector("any", "cpu")


def test_models_that_are_not_there_are_named() -> None:
    with pytest.raises(FileNotFoundError, match="detector nowhere/nothing can't be loaded"):
        Detector("nowhere/nothing", "cpu")
    with pytest.raises(FileNotFoundError, match="CLIP nowhere/nothing can't be loaded"):
        ColorClassifier("nowhere/nothing", "cpu")


def test_colors_are_the_nearest_mean_text_on_the_masked_crop(tmp_path: Path) -> None:
    folder = make_clip(tmp_path)
    image = picture(48, 48)
    mask = np.zeros((48, 48), bool)
    mask[8:40, 4:36] = True
    objects = [Detection("cat", 0.9, bounding_box(mask), mask), Detection("cat", 0.8, (0, 0, 20, 40))]
    said = ColorClassifier(str(folder), "cpu")(image, objects, "cat")

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    forms = ("a photo of a {} cat", "a photo of a {}-colored cat", "a photo of a {} object")
    texts = [form.format(color) for color in COLORS for form in forms]
    for thing, color in zip(objects, said, strict=True):
        inputs = processor(text=texts, images=crop(image, thing), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        words = output.text_embeds / output.text_embeds.norm(dim=1, keepdim=True)
        classes = words.reshape(len(COLORS), 3, -1).mean(1)
        classes = classes / classes.norm(dim=1, keepdim=True)
        assert color == COLORS[int((classes @ output.image_embeds[0]).argmax())]


def test_a_crop_is_grey_outside_the_mask() -> None:
    mask = np.zeros((20, 30), bool)
    mask[5:15, 10:20] = True
    mask[5, 10] = False
    image = Image.new("RGB", (30, 20), (200, 10, 10))
    cut = crop(image, Detection("cat", 0.9, bounding_box(mask), mask))
    assert cut.size == (10, 10)
    assert cut.getpixel((0, 0)) == (0x99, 0x99, 0x99)
    assert cut.getpixel((1, 0)) == (200, 10, 10)
    assert crop(image, Detection("cat", 0.9, (0, 0, 30, 20))).getpixel((0, 0)) == (200, 10, 10)
