"""Makes a font of coloured pictures of one size and no outlines, as Noto's font of emoji is."""

import io
from collections.abc import Mapping
from pathlib import Path

from fontTools.fontBuilder import FontBuilder
from fontTools.misc.xmlReader import XMLReader
from PIL import Image

SIZE, WIDTH, HEIGHT, ABOVE = 109, 136, 128, 101
"""Noto's: px of the font, the sides of a picture, and how far it reaches above the line of the letters."""

CARET = ("caretSlopeNumerator", "caretSlopeDenominator", "caretOffset")
REST = ("minOriginSB", "minAdvanceSB", "maxBeforeBL", "minAfterBL", "pad1", "pad2")
METRICS = {"ascender": ABOVE, "descender": ABOVE - HEIGHT, "widthMax": WIDTH} | dict.fromkeys((*CARET, *REST), 0)


def make_coloured_font(path: Path, colours: Mapping[str, str]) -> str:
    """Write a font with a square of one colour for each character, and return its path."""
    names = {character: f"g{number}" for number, character in enumerate(colours)}
    order = [".notdef", *names.values()]
    builder = FontBuilder(SIZE, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap({ord(character): name for character, name in names.items()})
    builder.setupMaxp()
    builder.font["maxp"].numGlyphs = len(order)
    builder.setupHorizontalMetrics(dict.fromkeys(order, (WIDTH, 0)))
    builder.setupHorizontalHeader(ascent=ABOVE, descent=ABOVE - HEIGHT)
    builder.setupNameTable({"familyName": "Coloured", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=ABOVE, sTypoDescender=ABOVE - HEIGHT)
    builder.setupPost(keepGlyphNames=True)
    xml = _tables({name: colours[character] for character, name in names.items()})
    XMLReader(io.BytesIO(xml.encode()), builder.font).read()
    builder.font.save(str(path))
    return str(path)


def _fields(values: Mapping[str, int]) -> str:
    return "".join(f'<{name} value="{value}"/>' for name, value in values.items())


def _tables(colours: Mapping[str, str]) -> str:
    """Return the two tables of pictures, by the names of the glyphs, in the XML of fontTools."""
    glyph = {"height": HEIGHT, "width": WIDTH, "BearingX": 0, "BearingY": ABOVE, "Advance": WIDTH}
    pictures = ""
    for name, colour in colours.items():
        Image.new("RGBA", (WIDTH, HEIGHT), colour).save(png := io.BytesIO(), "PNG")
        pictures += (
            f'<cbdt_bitmap_format_17 name="{name}"><SmallGlyphMetrics>{_fields(glyph)}</SmallGlyphMetrics>'
            f"<rawimagedata>{png.getvalue().hex()}</rawimagedata></cbdt_bitmap_format_17>"
        )
    lines = "".join(
        f'<sbitLineMetrics direction="{way}">{_fields(METRICS)}</sbitLineMetrics>' for way in ("hori", "vert")
    )
    strike = {"colorRef": 0, "startGlyphIndex": 1, "endGlyphIndex": len(colours), "ppemX": SIZE, "ppemY": SIZE}
    places = "".join(f'<glyphLoc id="{number}" name="{name}"/>' for number, name in enumerate(colours, 1))
    return (
        '<?xml version="1.0"?><ttFont sfntVersion="\\x00\\x01\\x00\\x00">'
        f'<CBDT><header version="3.0"/><strikedata index="0">{pictures}</strikedata></CBDT>'
        f'<CBLC><header version="3.0"/><strike index="0"><bitmapSizeTable>{lines}'
        f"{_fields(strike | {'bitDepth': 32, 'flags': 1})}</bitmapSizeTable>"
        f'<eblc_index_sub_table_1 imageFormat="17" firstGlyphIndex="1" lastGlyphIndex="{len(colours)}">{places}'
        "</eblc_index_sub_table_1></strike></CBLC></ttFont>"
    )
