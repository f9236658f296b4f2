"""Which image files Pillow reads, with the plugins of Pillow that are installed."""

import posixpath
from functools import cache
from importlib import import_module

from PIL import Image

USUAL = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
"""Where a name has images of several formats, the first of these is used."""

NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow only recognises, or hands to other programs."""

PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_jxl": None, "pillow_avif": None}
"""Modules that teach Pillow more formats, each with the function that does it; null: importing does."""

PLUGIN_OF = {
    **dict.fromkeys(("heic", "heics", "heif", "heifs", "hif"), "pillow-heif"),
    **dict.fromkeys(("avif", "avifs"), "pillow-avif-plugin"),  # for a Pillow that was built without AVIF
    "jxl": "pillow-jxl-plugin",
}
"""The package that reads a format, by extension."""

BEGINNINGS = {
    **dict.fromkeys((b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1"), "pillow-heif"),
    **dict.fromkeys((b"ftypavif", b"ftypavis"), "pillow-avif-plugin"),
    b"JXL \r\n\x87\n": "pillow-jxl-plugin",
}
"""The package that reads a format, by the bytes 4 to 11 of its files."""


@cache
def register_plugins() -> None:
    """Let Pillow read the formats of the plugins that are installed."""
    Image.init()
    for module, function in PLUGINS.items():
        try:
            plugin = import_module(module)
        except ImportError:
            continue
        if function is not None:
            getattr(plugin, function)()


@cache
def image_extensions() -> tuple[str, ...]:
    """Return the extensions of the image files that can be read, without dots, in lower case."""
    register_plugins()
    readable = {
        extension.removeprefix(".")
        for extension, format in Image.registered_extensions().items()
        if format in Image.OPEN and format not in NOT_PICTURES
    }
    return (*USUAL, *sorted(readable.difference(USUAL)))


def extension_of(name: str) -> str:
    """Return the extension of a file's name in lower case, with its dot; empty if it has none."""
    return posixpath.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    """Return whether a file has the extension of an image that can be read."""
    return extension_of(name)[1:] in image_extensions()


def why_no_image(extension: str) -> str:
    """Return why files with this extension, dot included, are not read as images."""
    return _needs(PLUGIN_OF.get(extension[1:])) or "not an image Pillow reads"


def missing_plugin(data: bytes | memoryview) -> str:
    """Return what must be installed to read an image file that can't be read; empty if it is of no known format."""
    begin = bytes(data[:12])
    return _needs("pillow-jxl-plugin" if begin.startswith(b"\xff\x0a") else BEGINNINGS.get(begin[4:]))


def _needs(plugin: str | None) -> str:
    return f"an image that Pillow reads with a plugin: pip install {plugin}" if plugin else ""
