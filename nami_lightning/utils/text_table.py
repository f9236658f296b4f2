"""Tables for the terminal, and in Markdown."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], alignments: str) -> list[str]:
    """Return rows as lines of text with aligned columns.

    Args:
        rows: rows with the same number of cells.
        alignments: ``<`` (left) or ``>`` (right) for each column.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[f"{cell:{way}{width}}" for cell, way, width in zip(row, alignments, widths, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in cells]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; a bar in a cell becomes a slash."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
