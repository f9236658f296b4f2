"""What a preparation would read, keep and write: told from a sample of the source, before anything is written."""

import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from tqdm import tqdm

from nami_lightning.datamodules.preparation.prepare_parts import PartWriter, Preparation
from nami_lightning.datamodules.sources.base import Skipped, Source, SourceSample
from nami_lightning.datamodules.storage.shards import Shards
from nami_lightning.utils.text_table import table

PARTS = 8
"""The number of parts that the sample is taken from, evenly spread over the source."""

SAMPLES = 400
"""The number of samples that are tried."""

BLOCK = 512
"""Bytes of a block of a tar: each file takes one more than its content fills."""


class Plan(NamedTuple):
    """What was found in a sample, and what it means for the whole source.

    Attributes:
        parts: the number of parts of the source.
        tried_parts: the number of parts that the sample is from.
        tried: the number of samples that were tried.
        kept: how many of them a data set would hold, by bucket.
        left_out: how many it would not hold, by reason.
        samples: about how many samples the whole source has.
        at_least: the source may have more than that: it doesn't say how large its parts are.
        bytes: the bytes of the source's files; None if they are not known.
        stored_bytes: the bytes that the kept samples take.
        seconds: the time that the sample took, in one process.
    """

    parts: int
    tried_parts: int
    tried: int
    kept: dict[str, int]
    left_out: dict[str, int]
    samples: int
    at_least: bool
    bytes: int | None
    stored_bytes: int
    seconds: float


def make_plan(source: Source, preparation: Preparation, samples: int = SAMPLES) -> Plan:
    """Prepare a sample of a source in a temporary folder, and return what it tells of the whole.

    Args:
        source: where the images come from.
        preparation: how the images would be prepared.
        samples: the number of samples to try.

    Raises:
        ValueError: the source is empty.
        FetchFailed: a store can't be reached.
    """
    parts = source.parts()
    if not parts:
        raise ValueError(f"the source {type(source).__name__} has no images: {source.settings()}")
    chosen = [parts[number * len(parts) // min(PARTS, len(parts))] for number in range(min(PARTS, len(parts)))]
    most = max(1, samples // len(chosen))
    counts: dict[str, int] = {}
    at_least = False
    begin = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        writer = PartWriter(Path(folder, "part"), preparation)
        for part in tqdm(chosen, desc="reading a sample", unit="part"):
            taken = list(islice(source.read(part), most))
            for sample in taken:
                writer.add(sample)
            count = len(taken) if len(taken) < most else source.part_samples(part) or _estimate(source, part, taken)
            counts[part] = count or len(taken)
            at_least |= count is None
        writer.close("", {})
        seconds = perf_counter() - begin
        kept = {bucket: len(Shards(Path(folder, "part", bucket))) for bucket in writer.writers}
        stored = sum(path.stat().st_size for path in Path(folder).rglob("*.bin"))
    left_out = Counter(writer.removed) + Counter(skipped.reason.split(":")[0] for skipped in writer.skipped)
    sizes = [source.part_bytes(part) for part in parts]
    total_bytes = None if None in sizes else sum(size or 0 for size in sizes)
    weigh = source.part_bytes if total_bytes is not None else source.part_samples
    weights = {part: weigh(part) or 1 for part in parts}
    total = round(sum(counts.values()) * sum(weights.values()) / sum(weights[part] for part in chosen))
    return Plan(
        *(len(parts), len(chosen), writer.read, kept, dict(left_out), total, at_least, total_bytes, stored, seconds)
    )


def _estimate(source: Source, part: str, taken: list[SourceSample | Skipped]) -> int | None:
    """Return about how many samples a part has, by the bytes of the first ones in a tar; None if it can't be told."""
    sizes = [
        sum(BLOCK + -(-size // BLOCK) * BLOCK for size in (len(one.image), len("\n".join(one.captions).encode())))
        for one in taken
        if isinstance(one, SourceSample)
    ]
    size = source.part_bytes(part)
    return round(size * len(sizes) / sum(sizes)) if size and sizes else None


def plan_lines(plan: Plan, output: str, workers: int, drop_duplicates: bool) -> list[str]:
    """Return the lines that say what would be read, kept and written.

    Args:
        plan: what the sample tells.
        output: where the data set would be written.
        workers: the number of processes.
        drop_duplicates: duplicates would be left out, which a sample can't tell.
    """
    kept = sum(plan.kept.values())
    share, about = kept / plan.tried, "at least" if plan.at_least else "about"
    size = f" ({_text(plan.bytes)})" if plan.bytes is not None else ""
    milliseconds = 1000 * plan.seconds / plan.tried
    hours = milliseconds / 1000 * plan.samples / 3600 / workers
    duplicates = "; fewer, if there are duplicates" if drop_duplicates else ""
    rows = [
        ["read", f"{about} {plan.samples:,} images in {plan.parts:,} parts{size}"],
        ["kept", f"{about} {round(plan.samples * share):,} images, {share:.1%} of the sample{duplicates}"],
        ["written", f"{about} {_text(plan.stored_bytes / plan.tried * plan.samples)} to {output}"],
        [
            "time",
            f"{about} {hours:,.2f} hours with {workers} process(es), {milliseconds:.1f} ms an image",
        ],
    ]
    lines = [
        f"By a sample of {plan.tried:,} images from {plan.tried_parts:,} of {plan.parts:,} parts; nothing is written:"
    ]
    lines += [f"  {line}" for line in table(rows, "<<")]
    for title, counts in (("kept of the sample", plan.kept), ("left out of the sample", plan.left_out)):
        rows = [[name, f"{count:,}"] for name, count in sorted(counts.items(), key=lambda item: -item[1])]
        lines += ["", title, *(f"  {line}" for line in table(rows, "<>"))] if rows else []
    return lines


def _text(size: float) -> str:
    return f"{tqdm.format_sizeof(size, 'B', 1024)}"
