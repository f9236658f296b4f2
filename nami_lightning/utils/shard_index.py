"""Look at the index of a sharded checkpoint before torch reads it: torch would run whatever code a stranger put there.

The index, ``.metadata``, is a pickle, and torch unpickles it and the values that are not tensors without a limit. Here
both are read with nothing but the types that such checkpoints consist of. What passes is safe for torch to read.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

INDEX = ".metadata"
MOST_BYTES = 2**20
"""Largest size of a value that is not a tensor; a learning rate has about a thousand bytes."""

ALLOWED = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
}
"""The types and functions that an index may name, by module; none of them does more than hold values."""


class _Unpickler(pickle.Unpickler):
    """Reads a pickle that names no other types than :data:`ALLOWED` and the dtypes of torch."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint")


def check_shards(folder: Path) -> None:
    """Check that reading a sharded checkpoint runs no code, and reads no file outside its folder.

    Args:
        folder: of the checkpoint.

    Raises:
        ValueError: it would, or the index or one of its values is missing or damaged.
    """
    try:
        with (folder / INDEX).open("rb") as file:
            index = _Unpickler(file).load()
        if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
            raise pickle.UnpicklingError("it holds something else")
        for place, info in index.storage_data.items():
            _check_entry(folder, info, isinstance(index.state_dict_metadata.get(place.fqn), BytesStorageMetadata))
    except Exception as error:  # a damaged pickle makes errors of many classes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{folder / INDEX} can't be used: {reason}; remove {folder.name} to use the one before"
        ) from error


def _check_entry(folder: Path, info: Any, is_bytes: bool) -> None:
    """Check where a value is stored, and what it holds if it is no tensor.

    Raises:
        pickle.UnpicklingError: it is stored elsewhere, or holds other types than plain ones.
    """
    if Path(info.relative_path).name != info.relative_path:
        raise pickle.UnpicklingError(f"it names the file {info.relative_path}, outside the folder")
    if not is_bytes:
        return
    if not 0 <= info.length <= MOST_BYTES:
        raise pickle.UnpicklingError(f"a value of {info.length:,} bytes that is no tensor")
    with (folder / info.relative_path).open("rb") as file:
        file.seek(info.offset)
        torch.load(io.BytesIO(file.read(info.length)), weights_only=True)
