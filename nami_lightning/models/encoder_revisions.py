"""Revisions of frozen encoders: which ones made a data set's encodings, and whether a recipe has the same.

An encoder is known by its revision: the commit of a Hugging Face repository, or a hash of a folder's files. Where it is
not on this machine, since training on encodings needs none, its name must do.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from nami_lightning.models.autoencoder import PIXELS, AutoencoderConfig
from nami_lightning.models.text_encoder import TextEncoderConfig, resolve_name

MODEL_FILES = {".json", ".txt", ".model", ".safetensors", ".bin"}
"""Kinds of files by which a model's folder is hashed: settings, tokenizer and weights."""

BEFORE = {"attention_mask": True, "zero_padding": True, "pooling": None}
"""Settings that descriptions of earlier versions lack, and what they were then."""

REMEMBERED_FROM = 2**28
"""Bytes from which on a folder's hash is remembered; a smaller one is read in a moment."""

IDENTIFIED_BY = ("name", "revision", "class")
"""The keys of a description that are not settings of the encoder."""

EncoderDescriptions = dict[str, dict[str, Any] | None]


def describe_encoders(text: TextEncoderConfig, vae: AutoencoderConfig) -> EncoderDescriptions:
    """Describe each encoder under its recipe key: its name, revision (None: not on this machine) and settings."""
    sequence: dict[str, Any] = {
        "max_length": text.max_length,
        "attention_mask": text.attention_mask,
        "zero_padding": text.zero_padding,
        "dtype": text.dtype,
    }
    pooled: dict[str, Any] | None = None
    if text.pooled is None:
        sequence["pooling"] = text.pooling
    else:
        length = text.pooled_max_length or text.max_length
        pooled = _name_and_revision(text.pooled, text.pooled_subfolder)
        pooled |= {"max_length": length, "pooling": text.pooling, "dtype": text.dtype}
    if vae.name == PIXELS:
        of_vae: dict[str, Any] = {"scaling_factor": vae.scaling_factor, "shift_factor": vae.shift_factor}
    else:
        of_vae = {"factor": vae.factor, "dtype": vae.dtype}
    return {
        "model.text_encoder.sequence": _name_and_revision(text.sequence, text.sequence_subfolder) | sequence,
        "model.text_encoder.pooled": pooled,
        "model.autoencoder": _name_and_revision(vae.name, vae.subfolder) | of_vae,
    }


def check_encoders(made_with: EncoderDescriptions, text: TextEncoderConfig, vae: AutoencoderConfig, where: str) -> None:
    """Refuse encodings that were made by other encoders than a recipe's.

    Args:
        made_with: what :func:`describe_encoders` returned when they were made.
        text: the recipe's.
        vae: the recipe's.
        where: their folder or URL.

    Raises:
        ValueError: naming the recipe key, and both values.
    """
    if difference := first_difference(made_with, describe_encoders(text, vae)):
        raise ValueError(
            f"{difference.key} is {difference.now} in the recipe, but the encodings in {where} were made by "
            f"{difference.was}: encode the data set again (lightning data encode), or train with the encoder that they "
            "were made by"
        )


class EncoderDifference(NamedTuple):
    """In what two descriptions differ: the recipe ``key``, and what it ``was`` and is ``now``, for people."""

    key: str
    was: str
    now: str


def first_difference(
    was: EncoderDescriptions, now: EncoderDescriptions, ignored: Collection[str] = ()
) -> EncoderDifference | None:
    """Return the first difference between two descriptions of encoders; None if they are the same.

    Encoders whose revisions are both known are told apart by them, so that a folder may move; others by their names.

    Args:
        was: what :func:`describe_encoders` returned then.
        now: what it returns now.
        ignored: settings that may differ.
    """
    for key, wanted in now.items():
        made = was.get(key)
        if differing := _differing_setting(made, wanted, ignored):
            return EncoderDifference(key, *(_describe(of, differing) for of in (made, wanted)))
    return None


def _differing_setting(made: dict[str, Any] | None, wanted: dict[str, Any] | None, ignored: Collection[str]) -> str:
    """Return the first key in which two encoders differ; empty if they are the same."""
    if made is None or wanted is None:
        return "name" if made is not wanted else ""
    known = made["revision"] is not None and wanted["revision"] is not None
    settings = sorted((made.keys() | wanted.keys()) - set(IDENTIFIED_BY) - set(ignored))
    names = ["revision" if known else "name", *settings]
    return next((name for name in names if _setting(made, name) != _setting(wanted, name)), "")


def _describe(of: dict[str, Any] | None, differing: str) -> str:
    if of is None:
        return "none"
    return str(of["name"]) if differing == "name" else f"{of['name']} ({differing} {_setting(of, differing)})"


def _setting(of: dict[str, Any], name: str) -> Any:
    return of.get(name, BEFORE.get(name))


def _name_and_revision(name: str, subfolder: str | None = None) -> dict[str, Any]:
    path = f"{name}/{subfolder}" if subfolder else name
    return {"name": path, "revision": revision_of(name, subfolder)}


def revision_of(name: str, subfolder: str | None = None) -> str | None:
    """Return the commit of a Hugging Face model in the local cache, or a hash of a folder's files.

    Args:
        name: of the model, or its folder.
        subfolder: where in it the encoder lies.

    Returns:
        None for one that is not on this machine, and for ``pixels``, which has no weights.
    """
    if name == PIXELS:
        return None
    name = resolve_name(name)
    folder = Path(name, subfolder or "")
    if folder.is_dir():
        return hash_of(folder)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, f"{subfolder}/config.json" if subfolder else "config.json")
    except HFValidationError:
        return None
    parts = Path(found).parts if isinstance(found, str) else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def hash_of(folder: Path) -> str:
    """Return BLAKE2b (128 bits) of the names and contents of the model files in a folder, without folders below it.

    Of a large folder it is remembered in the user's cache, so that one process reads it, once, and not each rank at
    each start. It is read again if a file's size or one of its times has changed.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES and path.is_file())
    stats = [path.stat() for path in files]
    if sum(stat.st_size for stat in stats) < REMEMBERED_FROM:
        return _hash_contents(files)
    # The time of the last change of any kind as well: programs set the time of modification back, but not that one.
    known_by = [(file.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file, s in zip(files, stats, strict=True)]
    key = hashlib.blake2b(json.dumps([str(folder.resolve()), known_by]).encode(), digest_size=16).hexdigest()
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nami_lightning" / "encoder_hashes"
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / key).open("a+", encoding="utf-8") as entry:
            fcntl.lockf(entry, fcntl.LOCK_EX)  # the other ranks wait for the first one's result
            entry.seek(0)
            known = entry.read()
            if len(known) != len(key):
                known = _hash_contents(files)
                entry.truncate(0)
                entry.write(known)
            return known
    except (OSError, RuntimeError):  # no home, or one that can't be written or locked
        return _hash_contents(files)


def _hash_contents(files: list[Path]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for file in files:
        total.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).digest())
    return total.hexdigest()
