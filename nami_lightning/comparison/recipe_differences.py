"""In what the recipes of compared runs differ: the keys that have not the same value in all of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from nami_lightning.comparison.compare import RunRecord


def differing_keys(records: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Return each key of a recipe in which the runs differ, with its value in each run; None where a run lacks it.

    Keys that don't change what is trained (name, folders, devices, ...) are left out.
    """
    flat = [{"seed": record.seed, **dict(flatten(yaml.safe_load(record.recipe) or {}))} for record in records]
    keys = dict.fromkeys(key for values in flat for key in values)
    found = {key: [values.get(key) for values in flat] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested values, without ``init_args``.

    The entries of a list are named by their class, or by their number; a list of plain values is one value.
    """
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from flatten(value, prefix if key == "init_args" else f"{prefix}.{key}".lstrip("."))
    elif isinstance(values, list) and any(isinstance(value, dict) for value in values):
        for number, value in enumerate(values):
            name = str(value.get("class_path", "")).rpartition(".")[2] if isinstance(value, dict) else ""
            yield from flatten(value, f"{prefix}[{name or number}]")
    else:
        yield prefix, values
