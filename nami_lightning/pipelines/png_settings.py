"""The settings of an image in its PNG: what was asked for, and with what it was drawn."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nami_lightning.utils.atomic_write import replacing
from nami_lightning.utils.text_files import parse_json

CHUNK = "nami_lightning"
"""The text chunk of a PNG that holds the settings as JSON."""

PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
"""The last bytes of a PNG."""


def save_with_settings(image: Image.Image, path: Path, asked: Mapping[str, Any], drawn: Mapping[str, Any]) -> None:
    """Write a PNG that holds its settings as text, completely or not at all.

    Args:
        image: the image.
        path: its file.
        asked: what was asked for; None is what was left to the pipeline. It is for a later command to compare.
        drawn: with which settings it was drawn. Each is a text chunk of its own too.
    """
    info = PngInfo()
    for name, value in drawn.items():
        if value is not None:
            info.add_text(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    info.add_itxt(CHUNK, json.dumps({"asked": asked, "drawn": drawn}, ensure_ascii=False))
    with replacing(path) as partial:
        image.save(partial, "PNG", pnginfo=info)


def read_settings(path: Path) -> dict[str, dict[str, Any]] | None:
    """Return what :func:`save_with_settings` wrote, ``asked`` and ``drawn``, without decoding the image.

    Returns:
        None if the file has no such settings.

    Raises:
        OSError: it is no PNG, or not a whole one.
    """
    with path.open("rb") as file:
        file.seek(-min(len(PNG_END), file.seek(0, os.SEEK_END)), os.SEEK_END)
        if file.read() != PNG_END:
            raise OSError(f"{path} is not a whole PNG")
    try:
        with Image.open(path) as image:
            found = parse_json(image.info[CHUNK])
            return {"asked": dict(found["asked"]), "drawn": dict(found["drawn"])}
    except (KeyError, ValueError, TypeError):
        return None
    except OSError as error:
        raise OSError(f"{path} is not a whole PNG: {error}") from error
