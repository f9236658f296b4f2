"""Error messages for users: the line of a parser's message that matters, and the nearest name to a misspelt one."""

import inspect
import pickle
import re
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

import jsonargparse
from lightning.fabric.utilities.exceptions import MisconfigurationException

UNHELPFUL_ENTRIES = ("Expected a <class 'NoneType'>", "Not a valid subclass of")
MOST_CHARACTERS = 3000
"""Characters of a message."""

PROJECT = Path(__file__).parent.resolve()
PROJECT_FOLDERS = (PROJECT, *(PROJECT.joinpath(part).resolve() for part in ("callbacks", "datamodules")))
RECIPE_CLASSES = {
    "curriculum": "nami_lightning.Curriculum",
    "model": "nami_lightning.NamiModule",
    "trainer": "lightning.pytorch.Trainer",
}


def is_user_error(error: BaseException) -> bool:
    """Tell whether an error's message is enough for a user, without a traceback.

    It is if it comes from our own checks, from the recipe's parser, from Lightning's checks, or is about a file.
    """
    if isinstance(
        error, jsonargparse.ArgumentError | FileNotFoundError | ModuleNotFoundError | MisconfigurationException
    ):
        return True
    if isinstance(error, OSError) and error.filename is not None:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = Path(frames[-1].filename).resolve() if frames else Path()
    ours = any(home in raised_in.parents for home in PROJECT_FOLDERS) or "jsonargparse" in raised_in.parts
    return ours and isinstance(error, ValueError | RuntimeError | OSError)


def explain(error: BaseException, known_keys: Iterable[str] = ()) -> str:
    """Return one clear message: where the error is (the recipe key), what is wrong, and the nearest right name.

    Args:
        error: any exception; a message of jsonargparse is cut to the line that matters.
        known_keys: every key of a recipe, ``model.tau`` for example.
    """
    return shortened(_explanation(str(error), known_keys))


def shortened(text: str) -> str:
    """Return a message without its middle if it is longer than a screen: a value in it may be of any length."""
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[: MOST_CHARACTERS * 2 // 3]} ... {text[-MOST_CHARACTERS // 3 :]}"


def _explanation(text: str, known_keys: Iterable[str]) -> str:
    key = re.search(r'Parser key "([^"]+)"', text)
    where = f"{key[1]}: " if key else ""
    if match := re.search(r"unrecognized arguments: --(\S+)", text):
        return f"unknown recipe key {match[1]}{_nearest(match[1], known_keys)}"
    if match := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
        return f"{match[1]}: unknown key {match[2]}{_nearest(match[2], _parameters(RECIPE_CLASSES.get(match[1], '')))}"
    if match := re.search(r"Option '([^']+)' is not accepted", text):
        names = _parameters(_class_of(text, match.start())) or known_keys
        return f"{where}unknown key {match[1]}{_nearest(match[1], names)}"
    if match := re.search(r"module '([^']+)' has no attribute '([^']+)'", text):
        return f"{where}{match[1]} has no {match[2]}{_nearest(match[2], dir(import_module(match[1])))}"
    if match := re.search(r"Key '([^']+)' is required", text):
        return f"the recipe lacks the key {match[1]}"
    return where + _first_cause(text)


def why_unreadable(error: Exception) -> str:
    """Return why torch can't read a file of weights, without torch's advice to run the code in it."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or holds more than tensors and plain values, which could run code"
    return first_line(error).partition(". ")[0]


def first_line(error: Exception) -> str:
    """Return the first line of a library's error message; the error's type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """Return a library's error message as a single line."""
    return " ".join(str(error).split())


def _nearest(wrong: str, names: Iterable[str]) -> str:
    nearest = get_close_matches(wrong, list(names), n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _class_of(text: str, position: int) -> str:
    """Return the class path that a rejected option was given to: the last named before it, or the first after it."""
    before = re.findall(r"class_path '([\w.]+)'", text[:position])
    after = re.findall(r"class_path='([\w.]+)'", text[position:])
    return (before[-1:] or after[:1] or [""])[0]


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError):
        return []


def _first_cause(text: str) -> str:
    """Return what is wrong if the message lists what was tried of a union: the first entry about the right type.

    Other messages are returned as they are.
    """
    _, found, causes = text.partition("Errors:\n")
    if not found:
        return re.sub(r'^Parser key "[^"]+":\s*', "", text).strip()
    causes = causes.partition("\n  Given value")[0].partition("\nGiven value")[0]
    entries = re.split(r"^\s*- ", causes, flags=re.MULTILINE)
    real = [entry.strip() for entry in entries if entry.strip() and not entry.startswith(UNHELPFUL_ENTRIES)]
    return re.sub(r"\s*\n\s*", " ", real[0]) if real else text
