"""The pages that tell how to extend the package run as they are written.

A page's blocks run in order, in one folder. A block with a title is written to a file of that name. Other Python
blocks run in one namespace; of shell blocks, each command ``lightning`` runs in this process. A ``text`` block shows
output: each word of it must be in what the block before it printed.
"""

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lightning as L
import pytest

from nami_lightning import callbacks
from nami_lightning.cli.main import main
from nami_lightning.runs.recipe import make_parser

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^```(?P<language>\w+)(?: title=\"(?P<title>.+?)\")?\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
FIRST = "extend/recipe.md"


class Block(NamedTuple):
    language: str
    title: str | None
    code: str


def blocks(page: str) -> Iterator[Block]:
    for match in FENCE.finditer((DOCS / page).read_text()):
        yield Block(match["language"], match["title"], match["code"])


def run_shell(code: str) -> None:
    """Run each line, a command ``lightning`` with or without ``PYTHONPATH=.`` before it."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "PYTHONPATH=.":
            sys.path.insert(0, ".")
            words = words[1:]
        if words:
            assert words[0] == "lightning", f"only lightning runs here: {line}"
            assert main(words[1:]) == 0, line


def run_page(page: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> int:
    """Run a page's blocks in the current folder, and return how many were run or compared."""
    namespace: dict[str, object] = {"__name__": "page"}
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    printed, count = "", 0
    for count, block in enumerate(blocks(page), 1):
        if block.title is not None:
            Path(block.title).write_text(block.code)
        elif block.language == "python":
            exec(compile(block.code, f"{page}, block {count}", "exec"), namespace)
        elif block.language == "shell":
            run_shell(block.code)
        elif block.language == "text":
            missing = [word for word in block.code.split() if word not in printed]
            assert not missing, f"{page} shows {missing}, but the block before it printed:\n{printed}"
            continue
        else:
            raise AssertionError(f"{page}: a block of {block.language} has no title and can't be run")
        printed = "".join(capfd.readouterr()) + caplog.text
        caplog.clear()
    return count


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all pages run; they share the small recipe of the first one."""
    folder = tmp_path_factory.mktemp("pages")
    for block in blocks(FIRST):
        if block.title is not None:
            (folder / block.title).write_text(block.code)
    return folder


@pytest.mark.parametrize("page", sorted(str(path.relative_to(DOCS)) for path in DOCS.glob("extend/*.md")))
def test_a_page_runs_as_written(
    page: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert run_page(page, capfd, caplog) >= 3


def test_a_wrong_page_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "DOCS", tmp_path)
    for text, error in (
        ("```python\nraise KeyError\n```\n", KeyError),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", AssertionError),
        ("```shell\nlightning run nothing\n```\n", AssertionError),
        ("```yaml\na: 1\n```\n", AssertionError),
    ):
        Path("page.md").write_text(text)
        with pytest.raises(error):
            run_page("page.md", capfd, caplog)


def test_the_recipes_page_has_every_key() -> None:
    path = DOCS / "hooks" / "recipe_keys.py"
    spec = importlib.util.spec_from_file_location("recipe_keys", path)
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    assert hook.MARKER in (DOCS / "recipes.md").read_text()
    text = hook.on_page_markdown(hook.MARKER, None, None, None)
    for action in make_parser()._actions:
        section, _, key = action.dest.partition(".")
        if section in ("curriculum", "model", "trainer") and key and action.default != "==SUPPRESS==":
            assert f"| `{key}` | " in text, action.dest
    for key in ("window_ratios", "max_micro_batch", "preparation.crop", "every_n_steps", "sampler.solver"):
        assert f"| `{key}` | " in text, key
    for name in callbacks.__all__:
        if issubclass(getattr(callbacks, name), L.Callback):
            assert f"#### {name}\n" in text
    meanings = re.findall(r"^\| `[^|]*` \| [^\n]* \| ([^|\n]*) \|$", text, re.MULTILINE)
    assert len(meanings) > 150
    assert all(meaning.strip() for meaning in meanings)
