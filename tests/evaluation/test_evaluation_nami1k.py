"""NAMI-1K: its prompt file, the distributions of prompts, the raters' pages, and what their answers come to."""

import base64
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from nami_lightning.evaluation.generate import GeneratedImages
from nami_lightning.evaluation.geneval.prompts import geneval_items, object_names
from nami_lightning.evaluation.nami1k.prompts import KINDS, TOPICS, count_kinds, read_prompts
from nami_lightning.evaluation.nami1k.rating_pages import DIMENSIONS, RatingSettings, render_page, write_pages
from nami_lightning.evaluation.nami1k.ratings import (
    agreement,
    krippendorff_alpha,
    overall_score,
    read_answers,
    read_key,
    summarize,
    summary_lines,
)
from nami_lightning.evaluation.prompt_stats import count_by_length, count_by_topic, describe_prompts, nearest_topics
from nami_lightning.evaluation.prompts import Item
from nami_lightning.evaluation.results import bootstrap_interval
from nami_lightning.utils.image_grid import save_image

# --- prompts -----------------------------------------------------------------------------------


def test_the_papers_examples_are_five_of_each_kind() -> None:
    examples = read_prompts()
    assert Counter(item.kind for item in examples) == dict.fromkeys(KINDS, 5)
    assert examples[0].prompt == "A photo of four apples."
    assert examples[7].prompt == "A man hugging a tiger in a lucid nightmare."
    assert examples[14].prompt.endswith("white clouds highlighting the city's prosperity.")
    assert all(item.metadata["topic"] in TOPICS for item in examples)
    assert count_kinds(examples) == "open 5 of 360, human 5 of 320, long 5 of 320"
    assert sum(KINDS.values()) == 1000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2: not JSON"),
        ('{"id": "a", "kind": "open"}', 'line 2: must be an object with the strings "id", "kind" and "prompt"'),
        ('{"id": "a", "kind": "short", "prompt": "a cat"}', "line 2: kind 'short' is none of open, human, long"),
        ('{"id": "../a", "kind": "open", "prompt": "a cat"}', "line 2: id '../a' can't name a folder"),
        ('{"id": "b", "kind": "open", "prompt": "  "}', "line 2: the prompt is empty"),
        ('{"id": "first", "kind": "open", "prompt": "a cat"}', "line 2: the id first is used twice"),
    ],
)
def test_a_prompt_file_of_another_format_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "first", "kind": "long", "prompt": "a dog"}\n' + line)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_prompts(path)


def test_lengths_are_counted_in_tens_of_words() -> None:
    items = [Item(str(n), " ".join(["word"] * n), "open") for n in (1, 10, 11, 120, 121, 300)]
    counts = count_by_length(items)
    assert {name: count for name, count in counts.items() if count} == {"1-10": 2, "11-20": 1, "111-120": 1, "121+": 2}
    # Figure 5: GenEval's prompts lie within 10 words.
    assert count_by_length(geneval_items())["1-10"] > 0.9 * 553


def test_topics_are_those_stated_or_the_nearest() -> None:
    items = [
        Item("a", "x", "open", {"topic": "food"}),
        Item("b", "y", "open", {"topic": "mine"}),
        Item("c", "z", "open"),
    ]
    counts = count_by_topic(items, None)
    assert {name: count for name, count in counts.items() if count} == {"food": 1, "mine": 1, "not stated": 1}
    prompts = ["a photo of a dog and a horse", "spaghetti with tomatoes on a plate", "a red sports car on a road"]
    assert nearest_topics(prompts, "all-MiniLM-L6-v2") == ["animals", "food", "vehicles"]


def test_found_topics_are_mostly_cocos_own_categories() -> None:
    """COCO's 80 classes come in groups; the one that is no topic (street furniture) is left out."""
    groups = {"people": 1, "vehicles": 8, "": 5, "animals": 10, "objects": 5, "sports and leisure": 10}
    truth = [topic for topic, number in groups.items() for _ in range(number)]
    truth += ["objects"] * 7 + ["food"] * 10 + ["objects"] * 2 + ["plants"] + ["objects"] * 21
    found = nearest_topics([f"a photo of a {name}" for name in object_names()], "all-MiniLM-L6-v2")
    right = [topic == true for topic, true in zip(found, truth, strict=True) if true]
    assert len(right) == 75
    assert sum(right) >= 55


def test_a_description_is_written_for_people_and_programs(tmp_path: Path) -> None:
    lists = {"geneval": geneval_items(), "nami1k": read_prompts()}
    text = "\n".join(describe_prompts(lists, tmp_path, None))
    assert "not stated" in text
    assert Image.open(tmp_path / "prompts.png").width > 600
    assert "<svg" in (tmp_path / "prompts.svg").read_text()
    saved = json.loads((tmp_path / "prompts.json").read_text())
    assert sum(saved["words"]["geneval"].values()) == 553
    assert sum(saved["topics"]["nami1k"].values()) == 15


# --- pages -------------------------------------------------------------------------------------

MODELS = ("SecretModelA", "SecretModelB")


@pytest.fixture
def folders(tmp_path: Path) -> list[GeneratedImages]:
    """Two models' images of the paper's examples, each image of a colour of its own."""
    made = [GeneratedImages(tmp_path / name, name) for name in MODELS]
    for m, folder in enumerate(made):
        for i, item in enumerate(read_prompts()):
            save_image(Image.new("RGB", (64, 48), (250 * m, 16 * i, 100)), folder.path(item, 0))
    return made


def read_page(path: Path) -> dict[str, Any]:
    """What a page shows, as its own script reads it."""
    match = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
    assert match
    return json.loads(match[1])


def test_pages_are_whole_blind_and_shuffled(folders: list[GeneratedImages], tmp_path: Path) -> None:
    items, out = read_prompts(), tmp_path / "ratings"
    pages = write_pages(folders, items, 1, RatingSettings(raters=3, each=3, page_images=20), out)
    assert [path.name for path in pages[:3]] == [
        f"rater-{name}.html" for name in ("1-part-01", "1-part-02", "2-part-01")
    ]
    key = read_key(out)
    orders = []
    for rater in range(3):
        shown = [read_page(path) for path in pages[2 * rater : 2 * rater + 2]]
        entries = [entry for part in shown for entry in part["entries"]]
        assert [len(part["entries"]) for part in shown] == [20, 10]
        assert sorted(entry["image"] for entry in entries) == sorted(key["images"])
        for entry in entries:
            about = key["images"][entry["image"]]
            number = next(i for i, item in enumerate(items) if item.id == about["item"])
            assert entry["prompt"] == items[number].prompt
            picture = Image.open(io.BytesIO(base64.b64decode(entry["picture"].partition(",")[2])))
            assert picture.size == (64, 48)
            assert (
                np.abs(
                    np.array(picture)[0, 0].astype(int) - (250 * MODELS.index(about["model"]), 16 * number, 100)
                ).max()
                < 6
            )
        orders.append([entry["image"] for entry in entries])
    assert len({tuple(order) for order in orders}) == 3
    models = [key["images"][image]["model"] for image in orders[0]]
    assert models not in (sorted(models), sorted(models, reverse=True))
    for path in pages:
        text = path.read_text()
        assert not any(name in text for name in MODELS)
        assert "http://" not in text
        assert "https://" not in text


def test_pages_share_the_images_out_evenly(folders: list[GeneratedImages], tmp_path: Path) -> None:
    pages = write_pages(folders, read_prompts(), 1, RatingSettings(raters=5, each=2), tmp_path / "ratings")
    of_raters = [[entry["image"] for entry in read_page(path)["entries"]] for path in pages]
    assert [len(images) for images in of_raters] == [12] * 5
    assert set(Counter(image for images in of_raters for image in images).values()) == {2}


def test_the_same_again_writes_the_same_pages_and_another_rating_is_refused(
    folders: list[GeneratedImages], tmp_path: Path
) -> None:
    items, out = read_prompts(), tmp_path / "ratings"
    before = [path.read_bytes() for path in write_pages(folders, items, 1, RatingSettings(), out)]
    assert [path.read_bytes() for path in write_pages(folders, items, 1, RatingSettings(), out)] == before
    with pytest.raises(ValueError, match="belongs to another rating"):
        write_pages(folders, items[:5], 1, RatingSettings(), out)
    save_image(Image.new("RGB", (64, 48), "white"), folders[0].path(items[0], 0))
    with pytest.raises(ValueError, match="belongs to another rating"):
        write_pages(folders, items, 1, RatingSettings(), out)


def test_a_prompt_cannot_break_out_of_its_page() -> None:
    text = render_page("study", 1, 1, [{"image": "1", "prompt": "</script><b>&amp;", "picture": "data:,"}])
    assert text.count("</script>") == 2


@pytest.mark.parametrize("settings", [{"raters": 0, "each": 0}, {"each": 6}, {"page_images": 0}])
def test_a_plan_that_makes_no_sense_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"raters|too few"):
        RatingSettings(**settings)


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "published"),
    [
        ((83.93, 83.28, 84.26, 90.16), 85.05),  # FLUX-dev
        ((75.74, 65.90, 61.64, 75.74), 69.97),
        ((76.39, 65.25, 61.97, 74.43), 69.77),
        ((74.43, 69.51, 63.93, 64.92), 68.95),
        ((75.41, 62.30, 60.00, 72.46), 67.80),
        ((76.07, 66.89, 62.30, 76.72), 70.69),  # NAMI-2B
    ],
)
def test_the_weights_make_the_papers_table_5(row: tuple[float, ...], published: float) -> None:
    # The columns are relevance, coherence, aesthetic, realism; all is rounded to 0.01.
    assert overall_score(dict(zip(DIMENSIONS, row, strict=True))) == pytest.approx(published, abs=0.0051)


def test_alpha_is_krippendorffs_own_example() -> None:
    """Four observers and twelve units; he gives 0.849 for interval data (2011, section E)."""
    nan = float("nan")
    scores = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
            [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan],
        ]
    )
    assert krippendorff_alpha(scores) == pytest.approx(0.849, abs=5e-4)


def test_alpha_at_its_ends() -> None:
    scores = np.random.default_rng(0).integers(0, 101, 400).astype(float)
    assert krippendorff_alpha(np.stack([scores, scores])) == pytest.approx(1)
    assert abs(krippendorff_alpha(scores.reshape(2, 200)) or 1) < 0.2
    assert krippendorff_alpha(np.array([[1.0, 2.0], [np.nan, np.nan]])) is None
    assert krippendorff_alpha(np.ones((2, 3))) is None


def test_the_interval_is_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(1).normal(60, 15, 80)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert bootstrap_interval([values], resamples=5000) == pytest.approx((theirs.low, theirs.high), abs=0.3)
    two = bootstrap_interval([values, np.full(5, 20.0)])
    assert two == pytest.approx(((theirs.low + 20) / 2, (theirs.high + 20) / 2), abs=0.3)
    assert bootstrap_interval([values, np.array([1.0, 2.0])]) is None, "two values say nothing of others"


def rate_all(pages: list[Path], key: dict[str, Any], folder: Path) -> list[Path]:
    """Answers of raters who agree but for a bias of their own; model A gets 10 more than B."""
    folder.mkdir()
    paths = []
    for path in pages:
        shown = read_page(path)
        answers = []
        for entry in shown["entries"]:
            about = key["images"][entry["image"]]
            base = 40 + 10 * (about["model"] == MODELS[0]) + list(KINDS).index(about["kind"]) * 5 + shown["rater"]
            answers.append({"image": entry["image"], **{name: base + i for i, name in enumerate(DIMENSIONS)}})
        saved = {name: shown[name] for name in ("format", "study", "rater", "part")} | {"answers": answers}
        paths.append(folder / f"answers-{path.stem}.json")
        paths[-1].write_text(json.dumps(saved))
    return paths


def test_answers_make_table_5(folders: list[GeneratedImages], tmp_path: Path) -> None:
    out = tmp_path / "ratings"
    pages = write_pages(folders, read_prompts(), 1, RatingSettings(raters=5, each=5), out)
    key = read_key(out)
    answers = rate_all(pages, key, tmp_path / "answers")
    summary = summarize(read_answers(answers, key), key)
    # By hand: 40 + 10 + the mean of 0, 5, 10 over kinds + the mean of 1..5 over raters, and 0 to 3 by dimension.
    first = summary["models"][MODELS[0]]
    assert [first[name] for name in DIMENSIONS] == pytest.approx([58, 59, 60, 61])
    assert first["overall"] == pytest.approx(0.3 * 58 + 0.3 * 59 + 0.2 * 60 + 0.2 * 61)
    assert summary["models"][MODELS[1]]["overall"] == pytest.approx(first["overall"] - 10)
    assert first["overall_by_kind"] == pytest.approx(
        {k: first["overall"] + d for k, d in zip(KINDS, (-5, 0, 5), strict=True)}
    )
    low, high = first["intervals"]["overall"]
    assert first["overall"] - 5 < low < first["overall"] < high < first["overall"] + 5
    difference = summary["differences"][0]
    assert difference["overall"] == pytest.approx(10)
    assert difference["within_noise"] is False
    assert summary["ratings"] == summary["ratings_wanted"] == 150
    assert 0.8 < summary["agreement"]["overall"] < 1
    text = summary_lines(summary)
    assert text[1].split()[:6] == [MODELS[0], "58.00", "59.00", "60.00", "61.00", "59.30"]
    assert text[-1] == "150 ratings of 5 raters"

    some = summarize(read_answers(answers[:2], key), key)
    assert summary_lines(some)[-1] == "60 ratings of 2 raters, 90 to come"
    alone = summarize(read_answers(answers[:1], key), key)
    assert alone["agreement"] == dict.fromkeys([*DIMENSIONS, "overall"])
    assert summary_lines(alone)


def test_two_models_of_one_quality_are_within_the_noise() -> None:
    key: dict[str, Any] = {
        "models": ["A", "B"],
        "each": 1,
        "images": {
            f"{m}{i}": {"model": m, "item": str(i), "kind": "open", "sample": 0} for m in "AB" for i in range(40)
        },
    }
    rng = np.random.default_rng(3)
    ratings = {image: {1: rng.uniform(40, 60, 4)} for image in key["images"]}
    assert summarize(ratings, key)["differences"][0]["within_noise"] is True
    assert agreement(ratings)["overall"] is None
    few = {image: scores for image, scores in ratings.items() if image[1:] in ("1", "2")}
    assert summary_lines(summarize(few, key))[-2].endswith("on 2 prompts, 95% -: too few prompts to tell")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"study": "other"}, "is of rating other"),
        ({"rater": 9}, "rater 9 is none of the 5"),
        ({"answers": None}, "has no answers"),
        ({"answers": [{"image": "99"}]}, "there is no image 99"),
        ({"answers": [{"image": "01", "relevance": 101}]}, "image 01: relevance is 101, not a number from 0 to 100"),
        ({"answers": [{"image": "01", "relevance": 50}]}, "image 01: coherence is None"),
        ({"answers": []}, "the files hold no answers"),
    ],
)
def test_answers_that_cannot_be_are_refused(
    folders: list[GeneratedImages], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = tmp_path / "ratings"
    write_pages(folders, read_prompts(), 1, RatingSettings(), out)
    key = read_key(out)
    path = tmp_path / "answers.json"
    path.write_text(json.dumps({"format": 1, "study": key["study"], "rater": 1, "part": 1, "answers": []} | change))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_answers([path], key)


def test_a_file_given_twice_is_refused(folders: list[GeneratedImages], tmp_path: Path) -> None:
    out = tmp_path / "ratings"
    pages = write_pages(folders, read_prompts(), 1, RatingSettings(), out)
    key = read_key(out)
    answers = rate_all(pages, key, tmp_path / "answers")
    with pytest.raises(ValueError, match="rater 1 has already rated image"):
        read_answers([answers[0], answers[0]], key)
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.json is not a file of answers"):
        read_answers([tmp_path / "text.json"], key)
    with pytest.raises(FileNotFoundError, match="where --annotate wrote the pages"):
        read_key(tmp_path)
