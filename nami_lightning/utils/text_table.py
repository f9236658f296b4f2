"""Tables for the terminal."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], alignments: str) -> list[str]:
    """Rows as lines with aligned columns.

    Args:
        rows: of equally many cells.
        alignments: ``<`` or ``>`` for each column.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[f"{cell:{way}{width}}" for cell, way, width in zip(row, alignments, widths, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in cells]
