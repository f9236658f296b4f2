"""Caption a prepared data set part by part, and merge the parts into a data set with old and new captions.

Each batch of answers is written to the part's log when the model has given it, so that an interruption costs one batch.
A part whose answers are complete becomes a folder of shards, with a report.

OUTPUT.parts/.000012.jsonl    the answers of an unfinished part: a line for each sample
OUTPUT.parts/000012/          a finished part: ``items`` and ``report.json``
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from nami_lightning.datamodules.captioning.caption_task import CAPTIONS, CaptionPart, CaptionTask
from nami_lightning.datamodules.preparation.image_io import BadImage, open_image
from nami_lightning.datamodules.preparation.parts_folder import (
    REPORT,
    SETTINGS,
    check_settings,
    checksums,
    finished_parts,
    merging,
    part_name,
    parts_folder,
    start_or_resume,
    unfinished_parts,
    write_description,
)
from nami_lightning.datamodules.preparation.prepare import split_counts
from nami_lightning.datamodules.storage.dataset import SKIPPED, SPLITS
from nami_lightning.datamodules.storage.shards import Record, ShardWriter, join
from nami_lightning.models.labelling.captioner import Captioner, Said
from nami_lightning.utils.atomic_write import publish, this_process

ITEMS = "items"
Answers = dict[int, dict[str, Said]]
"""The answers of a part: for each position in it, those for each new caption by name."""


def caption_parts(
    task: CaptionTask, load: Callable[[], Captioner], batch_size: int, shard: tuple[int, int] = (0, 1)
) -> None:
    """Caption the parts that are not finished yet.

    Args:
        task: what is to be captioned.
        load: loads the model; it is called if a part is not finished.
        batch_size: the number of images that the model answers about at once.
        shard: (i, n): caption only every n-th part, from part i on, while other machines caption the others.

    Raises:
        ValueError: other machines make captions with other settings, or another process works on the same part.
    """
    folder = parts_folder(task.output)
    model = None if folder.exists() else load()  # first, so that a misspelt name leaves nothing behind
    start_or_resume(folder, task.settings(), shared=shard[1] > 1)
    missing = unfinished_parts(folder, range(shard[0], len(task.parts), shard[1]))
    if not missing:
        return
    model = model or load()
    with tqdm(desc="captioning", total=sum(task.parts[number].samples for number in missing), unit="image") as bar:
        for number in missing:
            log = folder / f".{part_name(number)}.jsonl"
            try:
                with FileLock(log.with_suffix(".lock"), timeout=0):
                    answers = _answer(task, task.parts[number], model, batch_size, log, bar)
                    _write_part(task, task.parts[number], answers, folder / part_name(number))
                    log.unlink(missing_ok=True)
            except Timeout as error:
                raise ValueError(f"another process captions part {number} of {task.output}: wait for it") from error


def _answer(task: CaptionTask, part: CaptionPart, model: Captioner, batch_size: int, log: Path, bar: Any) -> Answers:
    """Return all answers about the samples of a part: those in its log, and the model's for the others."""
    answers = read_log(log)
    bar.update(len(answers))
    waiting = [position for position in range(part.samples) if position not in answers]
    with log.open("a", encoding="utf-8") as file:
        for first in range(0, len(waiting), batch_size):
            positions = waiting[first : first + batch_size]
            given = _ask(task, [part.record(position) for position in positions], model, part, positions)
            for position, said in zip(positions, given, strict=True):
                answers[position] = said
                line = [position, {label: list(one) for label, one in said.items()}]
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(positions))
    return answers


def _ask(
    task: CaptionTask, records: Sequence[Record], model: Captioner, part: CaptionPart, positions: Sequence[int]
) -> list[dict[str, Said]]:
    """Return the model's answers about some samples.

    Raises:
        DamagedSample: an image can't be read.
    """
    images = []
    for record, position in zip(records, positions, strict=True):
        try:
            images.append(open_image(record.image))
        except BadImage as error:
            raise part.bucket.shards.damaged_sample(part.first + position, f"can't be read: {error}") from error
    given: list[dict[str, Said]] = [{} for _ in records]
    for label, (kind, _) in task.caption_settings.labels().items():
        questions = [task.question(record, label) for record in records]
        answers = model(images, questions, task.caption_settings.kinds[kind].max_tokens)
        for said, answer in zip(given, answers, strict=True):
            said[label] = answer
    return given


def read_log(log: Path) -> Answers:
    """Return the answers in a log, and cut off a line that an interruption left unfinished."""
    if not log.exists():
        return {}
    data = log.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with log.open("r+b") as file:
            file.truncate(len(whole))
    lines = [json.loads(line) for line in whole.decode().split("\n") if line]
    return {position: {label: Said(*one) for label, one in said.items()} for position, said in lines}


def _write_part(task: CaptionTask, part: CaptionPart, answers: Answers, target: Path) -> None:
    """Write the samples of a part with their captions, and its report, completely or not at all."""
    partial = target.with_name(f".{target.name}.{this_process()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    writer = ShardWriter(partial / ITEMS, 2 * int(task.images.description["settings"]["chunk_mib"]) * 2**20)
    counts: Counter[tuple[str, str]] = Counter()
    for position in range(part.samples):
        writer.write(task.with_new(part.record(position), answers[position], counts).to_item())
    writer.close()
    by_label = [[label, reason, count] for (label, reason), count in counts.items()]
    (partial / REPORT).write_text(json.dumps({"checksums": checksums(partial / ITEMS), "counts": by_label}))
    publish(partial, target, REPORT)


def merge(task: CaptionTask) -> None:
    """Merge the parts into the data set at the task's output, and remove them.

    Raises:
        ValueError: parts are missing, or they were made with other settings.
    """
    with merging(task.output) as partial:
        parts = finished_parts(task.output, len(task.parts))
        check_settings(
            json.loads((parts_folder(task.output) / SETTINGS).read_text()), task.settings(), parts_folder(task.output)
        )
        sums: dict[str, str] = {}
        samples: dict[str, int] = {}
        counts: dict[str, dict[str, int]] = {label: {} for label in task.caption_settings.labels()}
        for bucket, group in groupby(range(len(parts)), key=lambda number: task.parts[number].bucket_folder):
            numbers = list(group)
            names = [parts[number].name for number in numbers]
            samples[bucket] = join([parts[number] / ITEMS for number in numbers], names, partial / bucket)
            for number in numbers:
                report = json.loads((parts[number] / REPORT).read_text())
                sums |= {f"{bucket}/{parts[number].name}-{file}": value for file, value in report["checksums"].items()}
                for label, reason, count in report["counts"]:
                    counts[label][reason or "made"] = counts[label].get(reason or "made", 0) + count
        if task.images.cache:
            task.images.cache.metadata(SKIPPED)
        shutil.copyfile(task.images.folder / SKIPPED, partial / SKIPPED)
        images = task.images.description
        made = {"settings": task.settings(), "counts": counts}
        write_description(
            partial,
            images
            | {
                "samples": {split: split_counts(samples, split) for split in SPLITS},
                "checksums": sums,
                CAPTIONS: [*images.get(CAPTIONS, []), made],
            },
        )
