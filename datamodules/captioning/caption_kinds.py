"""The kinds of captions that a model is asked for: their prompts, and the limits of their lengths."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from string import Formatter
from typing import Any

from nami_lightning.models.labelling.captioner import Said
from nami_lightning.utils.sentences import sentence_ends

PLACEHOLDERS = {"max_length"}
TOO_SHORT, TOO_LONG = "too short", "no sentence ends within the limit"

IN_LANGUAGE = " Answer in {language}."
WITH_CONTEXT = (
    " The image was found with this text, which may be wrong or incomplete: “{caption}” Use the names and facts in it "
    "that the image agrees with."
)


@dataclass(frozen=True)
class CaptionKind:
    """One kind of caption.

    Args:
        prompt: what the model is asked; ``{max_length}`` stands for the limit.
        min_length: shortest caption in characters; a shorter answer is left out.
        max_length: longest caption in characters; a longer answer ends with its last whole sentence before that.
        max_tokens: largest number of tokens that the model writes.

    Raises:
        ValueError: a limit is out of its range, or the prompt has an unknown placeholder.
    """

    prompt: str
    min_length: int = 1
    max_length: int = 2000
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.min_length <= self.max_length or self.max_tokens < 1:
            raise ValueError(
                f"a kind of caption needs 0 < min_length <= max_length and max_tokens > 0; got {self.min_length}, "
                f"{self.max_length} and {self.max_tokens}"
            )
        try:
            names = {name for _, name, _, _ in Formatter().parse(self.prompt) if name is not None}
        except ValueError as error:
            raise ValueError(f"the prompt {self.prompt!r} can't be read: {error}; write {{{{ for a brace") from error
        if unknown := names - PLACEHOLDERS:
            raise ValueError(f"the prompt {self.prompt!r} has the unknown placeholder {min(unknown)!r}")

    def ask(self, language: str = "", context: str = "") -> str:
        """Return the prompt for an image.

        Args:
            language: the language of the answer; empty: the prompt's own.
            context: the source's caption; empty: the model is not told it.
        """
        question = self.prompt.format(max_length=self.max_length)
        question += IN_LANGUAGE.format(language=language) if language else ""
        return question + (WITH_CONTEXT.format(caption=context) if context else "")

    def caption(self, said: Said) -> tuple[str, str]:
        """Return the caption that an answer makes, or an empty text and the reason why it makes none."""
        text = " ".join(said.text.split())
        if len(text) > 1 and text[0] in '"“' and text[-1] in '"”':
            text = text[1:-1].strip()
        if not said.ended or len(text) > self.max_length:
            ends = [end for end in sentence_ends(text) if end <= self.max_length]
            if not ends:
                return "", TOO_LONG
            text = text[: ends[-1]]
        return (text, "") if len(text) >= self.min_length else ("", TOO_SHORT)


KINDS = {
    "short": CaptionKind(
        "Describe this image in one short sentence of at most {max_length} characters. Name what is most important in "
        "it. Write the sentence alone.",
        8,
        120,
        64,
    ),
    "medium": CaptionKind(
        "Describe this image in two or three sentences, of at most {max_length} characters in all: its subjects, what "
        "they do, where they are, and the style of the image. Write the description alone, and begin with the subject.",
        40,
        400,
        160,
    ),
    "long": CaptionKind(
        "Describe this image in detail, in at most {max_length} characters: all subjects with their number, colours "
        "and positions, the background, any text as it is written, light, camera angle, and the style of the image. "
        "Write only what can be seen, as plain sentences without a list, and begin with the subject.",
        120,
        1500,
        512,
    ),
}
"""The kinds that need no file; the data set's captions are of the kind ``source``."""


def choose_kinds(names: Sequence[str], file: Path | None = None) -> dict[str, CaptionKind]:
    """Return the kinds of these names, from a YAML file of kinds or, if that has none of the name, from ``KINDS``.

    Raises:
        ValueError: a name is unknown, or the file holds something else.
    """
    known = KINDS | (_read_kinds(file) if file else {})
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown kind of caption {unknown[0]}: there are {', '.join(known)}")
    return {name: known[name] for name in names}


def _read_kinds(file: Path) -> dict[str, CaptionKind]:
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML in UTF-8: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold kinds of captions by name, each with a prompt")
    return {str(name): _kind(value, f"{file}, {name}") for name, value in values.items()}


def _kind(value: Any, where: str) -> CaptionKind:
    keys = [field.name for field in fields(CaptionKind)]
    if not isinstance(value, dict) or "prompt" not in value or not value.keys() <= set(keys):
        raise ValueError(f"{where}: a kind has the keys {', '.join(keys)}, of which prompt must be there")
    if not isinstance(value["prompt"], str) or not all(isinstance(value.get(key, 1), int) for key in keys[1:]):
        raise ValueError(f"{where}: the prompt must be a text, and the limits whole numbers")
    try:
        return CaptionKind(**value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
