"""Find the source that reads what is at a path."""

import glob
from pathlib import Path

from nami_lightning.datamodules.sources.base import Source
from nami_lightning.datamodules.sources.folder import ImageFolder
from nami_lightning.datamodules.sources.huggingface import HuggingFaceDataset
from nami_lightning.datamodules.sources.listing import is_image, walk
from nami_lightning.datamodules.sources.parquet import DamagedParquet, Parquet, image_columns, open_parquet
from nami_lightning.datamodules.sources.webdataset import WebDataset

SAVED_DATASET = ("dataset_info.json", "state.json", "dataset_dict.json")


def find_source(path: str | Path) -> Source:
    """Return the source that reads a folder, a file, or a pattern of files, with its default settings.

    Where images lie beside Parquet files, the Parquet files are used only if they hold images, because img2dataset also
    writes some that don't.

    Raises:
        FileNotFoundError: nothing is at the path.
        ValueError: no source reads what is there.
        ModuleNotFoundError: the extra ``data`` is needed and not installed.
    """
    path = str(path)
    if Path(path).is_dir():
        return _in_folder(path)
    files = [path] if Path(path).exists() else sorted(glob.glob(path, recursive=True))
    if not files:
        raise FileNotFoundError(f"nothing lies at {path}: give a folder, a file, or a pattern of files")
    for extension, kind in ((".tar", WebDataset), (".parquet", Parquet)):
        if all(Path(file).suffix.lower() == extension for file in files):
            return kind(path)
    raise ValueError(f"{path} is neither a folder, nor .tar files, nor .parquet files alone")


def _in_folder(path: str) -> Source:
    """Return the source that reads a folder."""
    if any(Path(path, name).is_file() for name in SAVED_DATASET):
        return HuggingFaceDataset(path)
    parquet, has_images = "", False
    for name, is_folder in walk(path):
        extension = "" if is_folder else Path(name).suffix.lower()
        if extension == ".tar":
            return WebDataset(path)
        if extension == ".parquet":
            parquet = parquet or name
        has_images = has_images or is_image(name) or is_folder
    if parquet and (not has_images or _holds_images(Path(path, parquet))):
        return Parquet(path)
    if has_images:
        return ImageFolder(path)
    raise ValueError(
        f"{path} holds no images: no image files, .tar files, .parquet files, nor a dataset saved to disk "
        f"({', '.join(SAVED_DATASET)})"
    )


def _holds_images(file: Path) -> bool:
    try:
        return bool(image_columns(open_parquet(file)))
    except DamagedParquet:
        return False
