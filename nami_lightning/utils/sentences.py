"""Where sentences end."""

import re

SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)]*(?=\s|$)|[。！？]+[」』”]*")  # noqa: RUF001


def sentence_ends(text: str) -> list[int]:
    """Return the positions in a text after which a sentence ends, also in Chinese and Japanese."""
    return [match.end() for match in SENTENCE_END.finditer(text)]
