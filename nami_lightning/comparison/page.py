"""Writes a comparison as one HTML page that needs no other file, and the files that the page is made of."""

import html
import shutil
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import Logger
from PIL import Image

from nami_lightning.comparison.compare import Difference, RunRecord
from nami_lightning.comparison.plots import image_grid, write_loss_plots, write_plots, write_tensorboard
from nami_lightning.comparison.report import Table, make_tables
from nami_lightning.runs.loggers import log_image, log_table
from nami_lightning.utils.atomic_write import write_text
from nami_lightning.utils.image_grid import data_url, save_image

JPEG_ABOVE = 4_000_000
"""Number of px above which the grid is a JPEG on the page, so that the page stays small enough to send."""

STYLE = """
h1 { overflow-wrap: anywhere }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0; display: block; overflow-x: auto }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom }
td.best { font-weight: 600; background: #eaf5ea }
p.note { color: #666; max-width: 60rem }
.plots { display: flex; flex-wrap: wrap; gap: 1rem }
.plots svg { width: 36rem; max-width: 100%; height: auto }
img { max-width: 100% }
"""


def render_page(title: str, shown: Sequence[Table], svgs: Sequence[Path], picture: Image.Image | None) -> str:
    """Return one HTML page that needs no other file: the runs, then the plots and the grid, then the other tables."""
    parts = [f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"]
    parts += [f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"]
    parts += [_html_table(table) for table in shown[:1]]
    if svgs:
        parts += ["<h2>Curves</h2><div class='plots'>", *(_svg(path) for path in svgs), "</div>"]
    if picture is not None:
        parts += ["<h2>The same prompts from the same noise</h2>", _inline(picture)]
    parts += [_html_table(table) for table in shown[1:]]
    return "\n".join([*parts, "</body></html>"])


def _html_table(table: Table) -> str:
    def cell(kind: str, text: str) -> str:
        best = " class='best'" if text.endswith(" *") else ""
        return f"<{kind}{best}>{html.escape(text.removesuffix(' *'))}</{kind}>"

    head = "".join(cell("th", text) for text in table.header)
    body = "\n".join(f"<tr>{''.join(cell('td', text) for text in row)}</tr>" for row in table.rows)
    text = table.note.replace("* the best.", "Green: the best.")
    note = f"<p class='note'>{html.escape(text)}</p>" if text else ""
    return f"<h2>{html.escape(table.title)}</h2><table><tr>{head}</tr>{body}</table>{note}"


def _svg(path: Path) -> str:
    """Return the svg element of a file, with ids that are unique on the page."""
    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, f"{mark}{path.stem}-")
    return text


def _inline(picture: Image.Image) -> str:
    kind = "PNG" if picture.width * picture.height < JPEG_ABOVE else "JPEG"
    return f"<img alt='generated images' src='{data_url(picture, kind, optimize=True, quality=90)}'>"


def write_page(records: Sequence[RunRecord], by: str, output: Path, found: Sequence[Difference]) -> list[Table]:
    """Write index.html, comparison.md, plots, grid.png and tensorboard/ into ``output``, and return the tables."""
    remove_comparison(output)
    shown = make_tables(records, by, found)
    title = " · ".join(record.name for record in records)
    svgs = [*write_plots(records, by, output), *write_loss_plots(records, by, output)]
    picture = image_grid(records)
    if picture is not None:
        save_image(picture, output / "grid.png")
    if any(record.entries for record in records):
        write_tensorboard(records, output / "tensorboard")
    files = {"comparison.md": f"# {title}\n\n" + "\n".join(table.markdown() for table in shown)}
    files["index.html"] = render_page(title, shown, svgs, picture)
    for name, text in files.items():
        write_text(output / name, text)
    return shown


def log_comparison(logger: Logger, tables: Sequence[Table], output: Path) -> None:
    """Give the tables of a comparison, and its grid if there is one, to a logger that takes them.

    Args:
        logger: for this comparison alone; it is told that it ends.
        tables: what :func:`write_page` returned.
        output: the folder that it wrote into.
    """
    for table in tables:
        log_table(logger, f"comparison/{table.title}", table.header, table.rows)
    if (output / "grid.png").is_file():
        with Image.open(output / "grid.png") as grid:
            log_image(logger, "comparison/grid", grid.convert("RGB"), 0)
    logger.finalize("success")


def remove_comparison(output: Path) -> None:
    """Remove what an earlier comparison wrote into ``output``, so that two don't mix; create the folder if needed."""
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "comparison.md").is_file():
        return
    for path in (
        *(path for kind in ("metrics", "probe", "val") for path in output.glob(f"{kind}_*")),
        output / "grid.png",
    ):
        path.unlink(missing_ok=True)
    shutil.rmtree(output / "tensorboard", ignore_errors=True)
