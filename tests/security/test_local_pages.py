"""What is shown of strangers is text, and no page, file or log holds a token of the environment."""

import contextlib
import io
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nami_lightning.cli.main import main
from nami_lightning.comparison.page import render_page as render_comparison
from nami_lightning.comparison.report import Table
from nami_lightning.evaluation.nami1k.rating_pages import render_page as render_rating
from nami_lightning.runs.recipe import Recipe
from nami_lightning.serving.server import is_own
from nami_lightning.utils.environment_secrets import find_secret

TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["<script>alert(1)</script>", "'\"><img src=x onerror=alert(1)>", "</script><script>", "<!--", "{{data}}", "]]>"]
)


class Elements(HTMLParser):
    """Lists a page's elements with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.elements.append((tag, tuple(name for name, _ in attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS, TEXTS)
def test_names_and_values_on_a_comparisons_page_are_text(title: str, cell: str, note: str) -> None:
    def page(*texts: str) -> Elements:
        table = Table(texts[0], ["a", texts[1]], [[texts[1], texts[2]]], texts[2])
        return Elements(render_comparison(texts[0], [table], [], None))

    # "best" is a class of cells that end with a star; an empty note has no element
    found, plain = page(title, f"{cell}.", f"{note}."), page("title", "cell", "note")
    assert [name for name, _ in found.elements] == [name for name, _ in plain.elements]
    assert title.replace("\r\n", "\n").replace("\r", "\n") in found.text.replace("\r\n", "\n").replace("\r", "\n")


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS)
def test_prompts_on_a_raters_page_are_data(prompt: str, study: str) -> None:
    entries = [{"image": "1", "prompt": prompt, "picture": "data:,"}]
    page = render_rating(study, 1, 1, entries)
    plain = render_rating("study", 1, 1, [{"image": "1", "prompt": "prompt", "picture": "data:,"}])
    assert Elements(page).elements == Elements(plain).elements
    data = json.JSONDecoder().raw_decode(page[plain.index('{"format"') :])[0]
    assert (data["study"], data["entries"][0]["prompt"]) == (study, prompt)


@settings(max_examples=200, deadline=None)
@given(TEXTS | st.sampled_from(["localhost.evil", "127.0.0.1@evil", "127.0.0.1:80:80", "[::1"]), st.none() | TEXTS)
def test_only_this_machines_own_page_is_answered(host: str, origin: str | None) -> None:
    assert not is_own(f"{host}.example", origin)
    assert not is_own("127.0.0.1:7860", f"http://evil{origin}")
    assert is_own("127.0.0.1:7860", None)


# --- tokens --------------------------------------------------------------------------------------------

VALUE = "hf_ThisIsASecretOfTheEnvironment"


def test_which_variables_hold_secrets() -> None:
    names = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "COMET_API_KEY", "DB_PASSWORD", "my_token")
    for name in names:
        assert find_secret(f"a: {VALUE}", {name: VALUE}) == name
    for name in ("HOME", "TOKENIZERS_PARALLELISM", "MONKEY", "KEYBOARD", "SECRETARY"):
        assert find_secret(f"a: {VALUE}", {name: VALUE}) is None
    assert find_secret("a: /etc/key.json", {"GOOGLE_APPLICATION_CREDENTIALS": "/etc/key.json"}) is None
    assert find_secret("shuffle: false", {"MY_TOKEN": "false"}) is None


@pytest.mark.parametrize("way", ["environment", "value"])
def test_a_recipe_with_a_secret_is_refused_and_nothing_is_written(
    way: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMET_API_KEY", VALUE)
    key = "${oc.env:COMET_API_KEY}" if way == "environment" else VALUE
    logger = {"class_path": "lightning.pytorch.loggers.CometLogger", "init_args": {"api_key": key}}
    assert main(["run", *tiny, "--trainer.logger", json.dumps([logger])]) == 2
    shown = capsys.readouterr()
    assert "holds the value of the environment variable COMET_API_KEY" in shown.err
    assert VALUE not in shown.err + shown.out
    assert not (tmp_path / "runs").exists()


def test_no_file_of_a_run_and_nothing_printed_holds_a_secret(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, VALUE)
    phase = [{"steps": 2, "ratio": [4, 2, 1], "learning_rate": 1e-3}]
    arguments = ["run", *tiny, "--curriculum.phases", json.dumps(phase), "--trainer.val_check_interval", "2"]
    assert main([*arguments, "--data.init_args.num_workers", "0"]) == 0
    run = tmp_path / "runs" / "tiny"
    assert main(["export", str(run)]) == 0
    shown = capsys.readouterr()
    assert VALUE not in shown.out + shown.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "model_index.json"} <= {path.name for path in files}
    assert any("tfevents" in path.name for path in files)
    for path in files:
        assert VALUE.encode() not in path.read_bytes(), path


def test_an_error_shows_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", VALUE)
    (tmp_path / "recipe.yaml").write_text("base: openmoji\nname: ${oc.env:HF_TOKEN}\n")
    output = io.StringIO()
    with contextlib.redirect_stderr(output), pytest.raises(ValueError, match="HF_TOKEN") as found:
        Recipe(tmp_path / "recipe.yaml")
    assert VALUE not in str(found.value) + output.getvalue()
    assert os.environ["HF_TOKEN"] == VALUE
