"""The files that a source is made of, found and named."""

import glob
from pathlib import Path
from typing import NamedTuple

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


class Files(NamedTuple):
    """The files of one kind at a path: one part of a source each.

    Attributes:
        path: a folder with such files in it or in folders below it, one file, or a pattern (``data/train-*``).
        extension: of those in a folder: ``.tar``.
    """

    path: str
    extension: str

    def parts(self) -> list[str]:
        """``NAME:BYTES`` of every file, sorted; the name relative to the folder, or what of it has no pattern.

        Raises:
            FileNotFoundError: there are none.
        """
        if Path(self.path).is_dir():
            found = [path for path in Path(self.path).rglob("*") if path.suffix.lower() == self.extension]
        else:
            pattern = glob.escape(self.path) if Path(self.path).exists() else self.path
            found = list(map(Path, glob.glob(pattern, recursive=True)))
        names = [(path.relative_to(self._root()).as_posix(), path) for path in found if path.is_file()]
        if not names:
            raise FileNotFoundError(f"no {self.extension} files at {self.path}: give their folder, one, or a pattern")
        return [f"{name}:{path.stat().st_size}" for name, path in sorted(names)]

    def file(self, part: str) -> Path:
        """Where a part's file lies."""
        return self._root() / part.rpartition(":")[0]

    def name(self, part: str) -> str:
        """A part's file, without extension: what its samples' ids start with."""
        return Path(part.rpartition(":")[0]).with_suffix("").as_posix()

    def _root(self) -> Path:
        path = Path(self.path)
        if path.is_dir():
            return path
        if path.exists():
            return path.parent
        fixed = [index for index, part in enumerate(path.parts) if glob.has_magic(part)]
        return Path(*path.parts[: fixed[0]]) if fixed else path.parent
