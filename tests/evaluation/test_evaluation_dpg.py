"""DPG-Bench: its file, its rules on answers worked out by hand, and the judges' models with constructed answers."""

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_judges import FILE, make_llava, make_vilt
from PIL import Image

from nami_lightning.evaluation import results as reports
from nami_lightning.evaluation.dpg.judge import (
    image_score,
    is_no,
    is_yes,
    judge_images,
    read_questions,
    score_table,
    scores,
)
from nami_lightning.evaluation.dpg.models import QuestionJudge
from nami_lightning.evaluation.generate import GeneratedImages
from nami_lightning.utils.image_grid import save_image


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "dpg_bench.csv"
    path.write_text(FILE, encoding="utf-8-sig")
    return path


def test_the_file_is_read_first_question_included(file: Path, tmp_path: Path) -> None:
    cups, sea = read_questions(file)
    assert (cups.id, cups.prompt) == ("cups", "Two cups, one red.")
    assert [(q["id"], q["parents"], q["category"]) for q in cups.metadata["questions"]] == [
        (1, [], "entity"),
        (2, [1], "other"),
        (3, [2], "attribute"),
    ]
    assert sea.metadata["questions"][2]["parents"] == [1, 2]
    assert sea.metadata["questions"][0]["category"] == "global"
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name in ("cups", "sea"):
        (prompts / f"{name}.txt").write_text(f"About {name}.\n")
    assert [item.prompt for item in read_questions(file, prompts)] == ["About cups.", "About sea."]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tuple,question", "pair,question", "lacks the columns tuple"),
        ("sea,", "../sea,", "line 5: id '../sea' can't name a folder"),
        ("Is one of the two cups red?", "", "line 4: the question is empty"),
        (FILE.partition("\n")[2], "", "holds no question"),
        (FILE[-30:], "", "line 7: the line has fewer columns than the first"),
        (",2,1,other", ",1,0,other", "two propositions with the same number"),
        ("entity - whole (sea)", "thing - whole (sea)", "line 6: the tuple begins with 'thing'"),
        (",2,1,other", ",two,1,other", "line 3: proposition_id and dependency must be numbers"),
    ],
)
def test_a_file_of_another_format_is_refused(file: Path, old: str, new: str, message: str) -> None:
    file.write_text(FILE.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_questions(file)


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        ((True, True, True), 1),
        ((True, True, False), 2 / 3),
        ((True, False, True), 1 / 3),  # the third depends on the second
        ((False, True, True), 0),  # and the second on the first: all fall
        ((False, False, False), 0),
    ],
)
def test_a_question_counts_only_with_those_it_depends_on(file: Path, answers: tuple[bool, ...], share: float) -> None:
    assert image_score(read_questions(file)[0].metadata["questions"], answers) == pytest.approx(share)


def test_either_parents_no_is_enough(file: Path) -> None:
    questions = read_questions(file)[1].metadata["questions"]
    assert image_score(questions, (True, True, True)) == 1
    assert image_score(questions, (False, True, True)) == pytest.approx(1 / 3)
    assert image_score(questions, (True, False, True)) == pytest.approx(1 / 3)


def test_a_question_whose_parent_is_missing_counts_nothing(file: Path) -> None:
    file.write_text(FILE.replace(",2,1,other", ",2,9,other"))
    items = read_questions(file)
    result = scores(items, {item.id: [[True] * 3] for item in items})
    assert result["overall"] == pytest.approx((1 / 3 + 1) / 2)  # the third depends on it
    assert result["orphans"] == 1
    assert "1 question(s) depend on one that the file does not have" in score_table({"a model": result})[-1]


def test_categories_are_plain_answers_and_the_overall_score_is_not(file: Path) -> None:
    items = read_questions(file)
    # Of the cups, image 1: no cups, yet two, yet red; image 2: all yes. Of the sea: all yes, twice.
    answers = {"cups": [[False, True, True], [True, True, True]], "sea": [[True, True, True]] * 2}
    result = scores(items, answers)
    assert result["overall"] == pytest.approx(((0 + 1) / 2 + 1) / 2)
    assert result["categories"] == {"global": 1, "entity": 3 / 4, "attribute": 1, "relation": 1, "other": 1}
    assert result["questions"] == {"global": 2, "entity": 4, "attribute": 2, "relation": 2, "other": 2}
    assert score_table({"a model": result})[1].split()[2:8] == ["75.0", "100.0", "75.0", "100.0", "100.0", "100.0"]


def test_images_are_asked_about_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items, folder = read_questions(file), GeneratedImages(tmp_path, "model")
    for item in items:
        save_image(Image.new("RGB", (8, 8), "red" if item.id == "cups" else "blue"), folder.path(item, 0))
    asked = []

    def answer(image: Any, question: str) -> str:
        asked.append(question)
        return "Yes, it is" if image.getpixel((0, 0)) == (255, 0, 0) else "I can't tell"

    for machine in ("a first machine", "a second"):
        monkeypatch.setattr(reports, "describe_hardware", lambda machine=machine: machine)
        result = judge_images(folder, items, 1, answer, {"judge": "colour"})
        assert (result["overall"], result["unclear_answers"]) == (0.5, 3)
        assert result["judged_on"] == ["a first machine"]
    assert len(asked) == 6
    assert "3 answers began with neither yes nor no" in score_table({"a model": result})[-1]


# --- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "yes"),
    [("yes", True), ("Yes.", True), (" YES, there is", True), ("no", False), ("not yes", False), ("yesterday", False)],
)
def test_yes_is_the_first_word(answer: str, yes: bool) -> None:
    assert is_yes(answer) is yes
    assert is_no(answer) is (answer == "no")


@pytest.mark.parametrize("yes", [True, False])
def test_models_for_questions_answer(tmp_path: Path, yes: bool) -> None:
    judge = QuestionJudge(str(make_vilt(tmp_path, int(yes))), "cpu")
    assert judge(Image.new("RGB", (40, 32), "red"), "is there a cat?") == ("yes" if yes else "no")


@pytest.mark.parametrize("yes", [True, False])
def test_models_that_chat_answer(tmp_path: Path, yes: bool) -> None:
    judge = QuestionJudge(str(make_llava(tmp_path, "Yes" if yes else "No")), "cpu")
    assert is_yes(judge(Image.new("RGB", (40, 32), "red"), "Is there a cat?")) is yes


def test_a_judge_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="judge nowhere/nothing can't be loaded"):
        QuestionJudge("nowhere/nothing", "cpu")
