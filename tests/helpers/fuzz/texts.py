"""Recipes, command lines, prompts, questions, rating files and answers of judges, changed by chance."""

import contextlib
import io
import json
import random
from argparse import ArgumentTypeError
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from helpers.fuzz.cases import Refused, require
from helpers.fuzz.mutations import NUMBERS, TEXTS, as_json, maybe_damaged, mutated_text, mutated_value
from nami_lightning.cli import argument_types
from nami_lightning.cli.main import main
from nami_lightning.datamodules.storage.chunk_cache import parse_size
from nami_lightning.evaluation.dpg import judge as dpg
from nami_lightning.evaluation.generate import GeneratedImages
from nami_lightning.evaluation.nami1k import prompts as nami1k
from nami_lightning.evaluation.nami1k.rating_pages import FORMAT, pages_of_rater, render_page
from nami_lightning.evaluation.nami1k.ratings import read_answers, read_key, summarize, summary_lines
from nami_lightning.evaluation.prompts import Item
from nami_lightning.pipelines.image_rows import KEYS, batches, read_rows
from nami_lightning.pipelines.lora import split_weight
from nami_lightning.runs.recipe import Recipe
from nami_lightning.serving.server import is_own
from nami_lightning.utils.text_files import read_lines

TINY = Path(__file__).parents[2] / "tiny.yaml"


# --- recipes and command lines -------------------------------------------------------------------


@cache
def tiny_recipe() -> dict[str, Any]:
    """Return the recipe of the tests."""
    content: dict[str, Any] = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    return content


def recipe_case(rng: random.Random, folder: Path) -> None:
    """A changed recipe is read to the same values twice, or refused."""
    path = folder / "recipe.yaml"
    if rng.random() < 0.5:
        text = mutated_text(rng, TINY.read_text(encoding="utf-8"))
        path.write_bytes(maybe_damaged(rng, text.encode("utf-8", "surrogatepass")))
    else:
        content = tiny_recipe()
        for _ in range(rng.randint(1, 3)):
            content = mutated_value(rng, content)
        path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    recipe = Recipe(path)
    require(folder.resolve() in recipe.folder.resolve().parents or recipe.config.output_dir != "runs", "outside runs/")
    recipe.make_model()
    dump = recipe.dump()
    (folder / "again.yaml").write_text(dump, encoding="utf-8")
    require(Recipe(folder / "again.yaml").dump() == dump, "the resolved recipe is read as another one")


KEYS_OF_RECIPES = (
    *("--seed", "--name", "--output_dir", "--resolutions", "--curriculum.unit", "--curriculum.phases", "--import_from"),
    *("--model.tau", "--model.loss_weighting", "--model.transformer", "--model.transformer.init_args.num_layers"),
    *("--trainer.devices", "--trainer.callbacks+", "--trainer.logger", "--trainer.nonsense", "--config", "--base"),
    *("--data", "--data.init_args.max_micro_batch", "--model.optimizer", "--trainer.precision", "--model", "--data.x"),
)
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("run", str(TINY), "--print_config"),
    ("sample", "no_run", "--prompt", "a"),
    ("sample", "no_run", "--prompts", "FILE", "--shard", "0/2", "--steps", "2"),
    ("show", "no_run"),
    ("plan", "no_recipe", "--devices", "8"),
    ("export", "no_run", "--step", "3"),
    ("convert", "no_folder", "--output", "out"),
    ("compare", "no_run", "none", "--by", "flops"),
    ("sweep", "FILE"),
    ("data", "prepare", "--source", "no_folder", "--output", "out", "--resolutions", "8", "16"),
    ("data", "show", "no_folder", "--images", "3"),
    ("data", "verify", "no_folder", "--workers", "1"),
    ("launch", "slurm", "no_recipe", "--nodes", "2", "--time", "1:00:00"),
    ("serve", "no_run", "--port", "70000"),
    ("tune", "steps", "no_run", "--most_steps", "4"),
    ("distill", "no_run", "--steps", "1", "1", "1"),
    ("evaluate", "dpg", "no_run", "--questions", "FILE"),
    ("evaluate", "nami1k", "no_run", "--prompts", "FILE"),
)
"""Commands that end at once: what they name does not exist."""


def command_case(rng: random.Random, folder: Path) -> None:
    """A changed command line ends with status 0, or with status 2 and one message, and writes nothing then."""
    (folder / "file.txt").write_bytes(maybe_damaged(rng, rng.choice(TEXTS).encode("utf-8", "surrogatepass")))
    words = ["file.txt" if word == "FILE" else word for word in rng.choice(COMMANDS)]
    for _ in range(rng.randrange(4)):
        texts = [*map(str, NUMBERS), *(text for text in TEXTS if "\0" not in text), "file.txt", str(folder)]
        match rng.randrange(4):
            case 0:
                place = rng.randrange(1, len(words)) if len(words) > 1 else 0
                words[place] = rng.choice(texts)
            case 1:
                words.insert(rng.randrange(1, len(words) + 1), rng.choice(texts))
            case 2:
                words += [rng.choice(MORE_OPTIONS), rng.choice(texts)]
            case _ if words[0] == "run":
                words += [rng.choice(KEYS_OF_RECIPES), rng.choice(texts)]
    if words[0] == "run" and "--print_config" not in words:
        words.append("--print_config")
    before = {path.name for path in folder.iterdir()}
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            status: Any = main(words)
        except SystemExit as end:
            status = end.code
    said = errors.getvalue()
    require(status in (0, 2, None), f"status {status}")
    require("Traceback" not in said, f"a traceback: {words}")
    if status == 2:
        require("error: " in said, f"no message: {said[-200:]}")
        left = {path.name for path in folder.iterdir()} - before
        require(not left, f"after an error there is {sorted(left)} ({words[0]})")
        raise Refused(said[-200:])


MORE_OPTIONS = ("--seed", "--step", "--workers", "--output", "--device", "--dtype")
TYPES: tuple[Any, ...] = (
    *(argument_types.positive_int, argument_types.positive_float, argument_types.whole_number),
    *(argument_types.utf8_text, argument_types.time_limit, argument_types.resample_count),
)
"""Of options, of which argparse makes one message if they raise."""

READERS: tuple[Any, ...] = (argument_types.parse_shard, split_weight, lambda text: parse_size(text, "cache.max_size"))


def option_case(rng: random.Random, folder: Path) -> None:
    """Values of options, and headers of requests to the page."""
    text = rng.choice(
        [*TEXTS, *map(str, NUMBERS), "0/4", "3/2", "1:00:00", "2-00", "50GB", "folder:0.5", "https://[::1"]
    )
    text = mutated_text(rng, text) if rng.random() < 0.5 else text
    if rng.random() < 0.2:
        require(not is_own(rng.choice(["evil.example", text]), rng.choice([None, text])), "a stranger's request")
        is_own("localhost:7860", text)
        return
    rng.choice(READERS)(text)
    try:
        rng.choice(TYPES)(text)
    except (ArgumentTypeError, ValueError, TypeError) as error:
        raise Refused(str(error)) from error


# --- prompts and questions -----------------------------------------------------------------------


def prompts_case(rng: random.Random, folder: Path) -> None:
    """A file of prompts: every line that is not empty is an image to draw, or the file is refused."""
    kind = rng.choice([".txt", ".jsonl", ".csv", "", ".TXT", ".png"])
    path = folder / f"prompts{kind}"
    rows = [
        {"prompt": rng.choice([*TEXTS, "a cat"]), rng.choice(KEYS): rng.choice([*TEXTS, *NUMBERS, [1, 2], "1+2"])}
        for _ in range(rng.randint(0, 5))
    ]
    if kind == ".jsonl":
        lines = [json.dumps(mutated_value(rng, row) if rng.random() < 0.2 else row) for row in rows]
    elif kind == ".csv":
        names = rng.sample(KEYS, rng.randint(1, len(KEYS)))
        lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
    else:
        lines = [str(row["prompt"]) for row in rows]
    text = "\n".join(lines)
    path.write_bytes(maybe_damaged(rng, text.encode("utf-8", "surrogatepass")))
    read = read_rows(path)
    if kind != ".csv":
        require(len(read) == sum(bool(line.strip()) for line in read_lines(path)), "lines without an image")
    numbered = list(enumerate(row.over({"seed": 1, "steps": 3}) for row in read))
    in_batches = [number for batch in batches(numbered, 2) for number, _ in batch]
    require(sorted(in_batches) == list(range(len(read))), "rows that are in no batch")
    for row in read:
        row.prompt.encode()
        json.dumps(row.asked, allow_nan=False)


def nami1k_case(rng: random.Random, folder: Path) -> None:
    """NAMI-1K's prompts: each line is an item with a folder of its own, or the file is refused."""
    path = folder / "prompts.jsonl"
    rows: list[Any] = [
        {
            "id": rng.choice([*TEXTS, "a-1", "a.b"]) if rng.random() < 0.3 else f"p{number}",
            "kind": rng.choice(["open", "human", "long"]),
            "prompt": rng.choice([*TEXTS, "a cat"]),
        }
        for number in range(rng.randint(1, 5))
    ]
    rows = [mutated_value(rng, row) if rng.random() < 0.2 else row for row in rows]
    path.write_bytes(maybe_damaged(rng, "\n".join(map(json.dumps, rows)).encode("utf-8", "surrogatepass")))
    items = nami1k.read_prompts(path)
    require(len({item.id for item in items}) == len(items), "two items in one folder")
    for item in items:
        place = (folder / "out" / item.id).resolve()
        require(place.parent == (folder / "out").resolve(), "an item outside its folder")
        place.mkdir(parents=True)
        item.prompt.encode()


HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)
QUESTIONS = f"""{HEADER}
a1,"a red cup",k,1,0,entity,whole,entity - whole (cup),Is there a cup?
a1,"a red cup",k,2,1,attribute,color,"attribute - color (cup, red)",Is the cup red?
b2,"two dogs",k,1,0,entity,whole,entity - whole (dogs),Are there dogs?
b2,"two dogs",k,2,"1,3",other,count,"other - count (dogs, ==2)",Are there two dogs?
"""


def questions_case(rng: random.Random, folder: Path) -> None:
    """DPG-Bench's questions: a score from 0 to 1 for any answers, or the file is refused."""
    path = folder / "questions.csv"
    path.write_bytes(maybe_damaged(rng, mutated_text(rng, QUESTIONS).encode("utf-8", "surrogatepass")))
    items = dpg.read_questions(path)
    answers = {item.id: [[rng.random() < 0.5 for _ in item.metadata["questions"]]] for item in items}
    found = dpg.scores(items, answers)
    require(0 <= found["overall"] <= 1, f"a score of {found['overall']}")
    dpg.score_table({"a": found})


# --- ratings and answers of judges -----------------------------------------------------------------


def rating_key() -> dict[str, Any]:
    """Return the key of a rating of two models."""
    images = {
        f"{number}": {"model": f"m{number % 2}", "item": f"p{number // 2}", "kind": "open", "sample": 0}
        for number in range(1, 9)
    }
    settings = {"format": FORMAT, "models": ["m0", "m1"], "raters": 3, "each": 2, "page_images": 4, "files": "x"}
    return {"study": "abcd", "salt": "s", **settings, "images": images}


def ratings_case(rng: random.Random, folder: Path) -> None:
    """Files of raters' answers: scores from 0 to 100 for each model, or the file and the image are named."""
    key = rating_key()
    changed = mutated_value(rng, key) if rng.random() < 0.3 else key
    (folder / "key.json").write_bytes(as_json(rng, changed) if rng.random() < 0.3 else json.dumps(changed).encode())
    paths = []
    for rater in range(1, rng.randint(2, 4)):
        numbers = [number for page in pages_of_rater(key, rater) for number in page]
        scores = ("relevance", "coherence", "aesthetic", "realism")
        answers = [{"image": number} | {name: rng.randint(0, 100) for name in scores} for number in numbers]
        saved: Any = {"format": FORMAT, "study": "abcd", "rater": rater, "answers": answers}
        if rng.random() < 0.6:
            saved = mutated_value(rng, saved)
        paths.append(folder / f"{rater}.json")
        paths[-1].write_bytes(as_json(rng, saved))
    read = read_key(folder)
    ratings = read_answers(paths, read)
    summary = summarize(ratings, read)
    for name, model in summary["models"].items():
        require(0 <= model["overall"] <= 100, f"{name} has {model['overall']}")
    summary_lines(summary)
    render_page(read["study"], 1, 1, [{"image": "1", "prompt": rng.choice(TEXTS), "picture": ""}])


def judge_case(rng: random.Random, folder: Path) -> None:
    """Answers of a judge, and its file of earlier verdicts, changed."""
    questions = [
        {"id": number, "parents": [1] if number > 1 else [], "category": "entity", "question": f"q{number}"}
        for number in (1, 2)
    ]
    items = [Item("a", "a cup", "all", {"questions": questions})]
    images = GeneratedImages(folder / "images", "model")
    images.path(items[0], 0).parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(images.path(items[0], 0))

    def answer(image: Any, question: str) -> str:
        return rng.choice([*TEXTS, "Yes.", "no", "yes, it is"])

    dpg.judge_images(images, items, 1, answer, {"model": "m"})
    log = images.folder / dpg.VERDICTS
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    entries = [mutated_value(rng, entry) if rng.random() < 0.8 else entry for entry in [*entries, *entries]]
    log.write_bytes(maybe_damaged(rng, "\n".join(map(json.dumps, entries)).encode("utf-8", "surrogatepass")))
    asked: list[str] = []

    def agree(_: object, text: str) -> str:
        asked.append(text)
        return "yes"

    found = dpg.judge_images(images, items, 1, agree, {"model": "m"})
    require(0 <= found["overall"] <= 1, f"a score of {found['overall']}")
    require(len(asked) in (0, 2), "an image that is judged in part")
