"""Find and name the files of a source; each file is one part."""

import glob
from pathlib import Path
from typing import NamedTuple

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


class Files(NamedTuple):
    """The files of one kind at a path; each is one part of a source.

    Attributes:
        path: a folder whose files and subfolders are searched, one file, or a pattern (``data/train-*``).
        extension: the extension of the files to find in a folder, for example ``.tar``.
    """

    path: str
    extension: str

    def parts(self) -> list[str]:
        """Return ``NAME:BYTES`` of every file, sorted.

        A name is relative to the folder; for a pattern, relative to the part of the path before the first wildcard.

        Raises:
            FileNotFoundError: there are no such files.
        """
        if Path(self.path).is_dir():
            found = [path for path in Path(self.path).rglob("*") if path.suffix.lower() == self.extension]
        else:
            pattern = glob.escape(self.path) if Path(self.path).exists() else self.path
            found = list(map(Path, glob.glob(pattern, recursive=True)))
        names = [(path.relative_to(self._root()).as_posix(), path) for path in found if path.is_file()]
        if not names:
            raise FileNotFoundError(f"no {self.extension} files at {self.path}: give a folder, a file, or a pattern")
        return [f"{name}:{path.stat().st_size}" for name, path in sorted(names)]

    def file(self, part: str) -> Path:
        """Return the path of a part's file."""
        return self._root() / part.rpartition(":")[0]

    def name(self, part: str) -> str:
        """Return the name of a part's file without its extension; the ids of its samples start with this name."""
        return Path(part.rpartition(":")[0]).with_suffix("").as_posix()

    def _root(self) -> Path:
        """Return the folder to which the names of files are relative."""
        path = Path(self.path)
        if path.is_dir():
            return path
        if path.exists():
            return path.parent
        wildcards = [index for index, part in enumerate(path.parts) if glob.has_magic(part)]
        return Path(*path.parts[: wildcards[0]]) if wildcards else path.parent
