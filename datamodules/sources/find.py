"""Find the source that reads what is at a path."""

import glob
from pathlib import Path

from nami_lightning.datamodules.image_formats import extension_of, is_image
from nami_lightning.datamodules.sources.base import Source
from nami_lightning.datamodules.sources.files import walk
from nami_lightning.datamodules.sources.folder import ImageFolder
from nami_lightning.datamodules.sources.huggingface import HuggingFaceDataset
from nami_lightning.datamodules.sources.parquet import DamagedParquet, Parquet, image_columns, open_parquet
from nami_lightning.datamodules.sources.webdataset import WebDataset
from nami_lightning.datamodules.storage.remote import is_remote
from nami_lightning.datamodules.storage.remote_files import list_remote

SAVED_DATASET = ("dataset_dict.json",), ("dataset_info.json", "state.json")
"""Files that the library ``datasets`` writes for a dataset of several splits, and for one."""


def find_source(path: str | Path) -> Source:
    """Return the source that reads a folder, a file, a pattern of files, or the URL of one, with its default settings.

    Where images lie beside Parquet files, the Parquet files are used only if they hold images, because img2dataset also
    writes some that don't.

    Raises:
        FileNotFoundError: nothing is at the path.
        FetchFailed: a store can't be reached.
        ValueError: no source reads what is there.
        ModuleNotFoundError: the extra ``data`` is needed and not installed.
    """
    path = str(path)
    if is_remote(path):
        found = list_remote(path)
        if found.is_folder:
            return _in_folder(path)
        files = list(found.files)
    elif Path(path).is_dir():
        return _in_folder(path)
    else:
        files = [path] if Path(path).exists() else sorted(glob.glob(path, recursive=True))
    if not files:
        raise FileNotFoundError(f"nothing lies at {path}: give a folder, a file, or a pattern of files")
    for extension, kind in ((".tar", WebDataset), (".parquet", Parquet)):
        if all(Path(file).suffix.lower() == extension for file in files):
            return kind(path)
    raise ValueError(f"{path} is neither a folder, nor .tar files, nor .parquet files alone")


def _in_folder(path: str) -> Source:
    """Return the source that reads a folder."""
    if not is_remote(path) and any(all(Path(path, name).is_file() for name in names) for names in SAVED_DATASET):
        return HuggingFaceDataset(path)
    tars, images, parquet, linked_folders = 0, 0, [], 0
    for name, is_folder in walk(path):
        linked_folders += is_folder
        tars += extension_of(name) == ".tar"
        images += not is_folder and is_image(name)
        if extension_of(name) == ".parquet":
            parquet.append(name)
    if (tars or images) and parquet and not _holds_images(f"{path}/{parquet[0]}"):
        parquet = []
    found: dict[str, tuple[type[ImageFolder | WebDataset | Parquet], int]] = {
        "image files": (ImageFolder, images),
        ".tar files": (WebDataset, tars),
        ".parquet files": (Parquet, len(parquet)),
    }
    kinds = {what: kind for what, (kind, count) in found.items() if count}
    if len(kinds) > 1:
        counts = ", ".join(f"{found[what][1]:,} {what} ({kind.__name__})" for what, kind in kinds.items())
        names = " or ".join(kind.__name__ for kind in kinds.values())
        raise ValueError(
            f"{path} holds {counts}: say which of them to read, --source {names}, with --source.path {path}; the "
            "others are ignored then"
        )
    if kinds or linked_folders:
        return next(iter(kinds.values()), ImageFolder)(path)
    raise ValueError(
        f"{path} holds no images: no image files that Pillow reads, .tar files, .parquet files, nor a dataset saved to "
        "disk (dataset_dict.json, or dataset_info.json and state.json)"
    )


def _holds_images(file: str) -> bool:
    try:
        return bool(image_columns(open_parquet(file)))
    except DamagedParquet:
        return False
