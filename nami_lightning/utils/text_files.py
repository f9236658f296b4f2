"""Text files that people write: prompts, questions, recipes. UTF-8, or UTF-16 that says so in its first bytes."""

import codecs
import json
import re
from pathlib import Path
from typing import Any

HINT = "save it as UTF-8"


def read_text(path: Path) -> str:
    """Return the text of a file of people's, without a byte order mark.

    Raises:
        ValueError: the file has another encoding; the message names the file and the line.
        OSError: the file can't be read.
    """
    data = path.read_bytes()
    encoding = encoding_of(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode(encoding, "ignore")
        name = "UTF-16, though it begins so" if encoding == "utf-16" else "UTF-8"
        line = before.count("\n") + 1
        raise ValueError(f"{path}, line {line}: not {name} ({error.reason}): {HINT}") from error
    if "\0" in text:  # UTF-16 without a byte order mark, UTF-32, or no text at all
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"{path}, line {line}: NUL characters, so this is not text in UTF-8: {HINT}")
    return text


def is_text(text: str) -> bool:
    """Tell whether a text can be written: NULs and halves of pairs of surrogates can't."""
    return "\0" not in text and text.encode("utf-8", "replace").decode() == text


def parse_json(text: str | bytes) -> Any:
    """Return the value that a text in JSON holds.

    Raises:
        ValueError: it is no JSON, or its values are nested without an end.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("values are nested in values without an end") from error


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file of people's, without their ends; see :func:`read_text`."""
    return split_lines(read_text(path))


def split_lines(text: str) -> list[str]:
    r"""Return the lines of a text, without their ends: ``\n``, ``\r\n`` or ``\r``, and no other character.

    ``str.splitlines`` also splits at U+2028, U+0085, form feeds and more, which may stand inside a caption.
    """
    lines = re.split(r"\r\n|\n|\r", text)
    return lines[:-1] if lines[-1] == "" else lines


def encoding_of(data: bytes) -> str:
    """Return the encoding of a file: UTF-16 if ``data`` starts with its byte order mark, else UTF-8."""
    return "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
