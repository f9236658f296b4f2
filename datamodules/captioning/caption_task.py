"""What is to be captioned, by which model, and the captions that a sample has afterwards."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nami_lightning.datamodules.captioning.caption_kinds import CaptionKind
from nami_lightning.datamodules.preparation.parts_folder import check_settings, check_unused
from nami_lightning.datamodules.storage.dataset import DESCRIPTION, SPLITS, Bucket, PreparedDataset
from nami_lightning.datamodules.storage.shards import SOURCE, Record
from nami_lightning.models.encoder_revisions import revision_of
from nami_lightning.models.labelling.captioner import Said

OLD = "old"
"""The name under which the weight of the captions that the data set has is stated."""

CAPTIONS = "captions"
"""In ``dataset.json``: how the captions were made, and how many."""


@dataclass(frozen=True)
class CaptionSettings:
    """How captions are made.

    Args:
        model: hub name or folder of the model.
        kinds: the kinds of captions, by name.
        languages: the languages of the captions; empty: that of the prompts. Each image gets each kind in each.
        context: tell the model the source's caption.
        weights: how often training uses the captions of each kind, relative to the others, and those that the data set
            has (``old``); 1 for those that are not named. Captions of one kind share its weight.
        name: beginning of the names of the new kinds, to tell two models apart.
        dtype: the type of the model's weights.

    Raises:
        ValueError: a weight is negative, or is stated for an unknown kind, or all are zero.
    """

    model: str
    kinds: Mapping[str, CaptionKind]
    languages: Sequence[str] = ()
    context: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)
    name: str = ""
    dtype: str = "float32"

    def __post_init__(self) -> None:
        known = [OLD, *self.kinds]
        if unknown := [name for name in self.weights if name not in known]:
            raise ValueError(f"--weights: there is no kind {unknown[0]} among {', '.join(known)}")
        if any(weight < 0 for weight in self.weights.values()) or not any(self.weights.get(n, 1) for n in known):
            raise ValueError(f"--weights must not be negative, nor all zero; got {dict(self.weights)}")

    def labels(self) -> dict[str, tuple[str, str]]:
        """Return the name that captions are stored under, with their kind and their language."""
        return {
            "-".join(part for part in (self.name, kind, language) if part): (kind, language)
            for kind in self.kinds
            for language in self.languages or [""]
        }

    def as_json(self) -> dict[str, Any]:
        """Return all settings as JSON values, with the model's revision."""
        return asdict(self) | {
            "kinds": {name: asdict(kind) for name, kind in self.kinds.items()},
            "languages": list(self.languages),
            "weights": dict(self.weights),
            "revision": revision_of(self.model),
        }


@dataclass(frozen=True)
class CaptionPart:
    """One part of the work: the samples of one chunk.

    Attributes:
        bucket_folder: the folder of the bucket, relative to the data set's folder.
        bucket: the bucket of the samples.
        first: the index of the first sample in the bucket.
        samples: the number of samples.
    """

    bucket_folder: str
    bucket: Bucket
    first: int
    samples: int

    def record(self, position: int) -> Record:
        """Return the sample at a position in the part.

        Raises:
            DamagedSample: it can't be read.
        """
        index = self.first + position
        item = self.bucket.shards.read([index])[0]
        try:
            return Record.from_item(item)
        except (TypeError, ValueError) as error:
            raise self.bucket.shards.damaged_sample(index, f"can't be read: {error}") from error


class CaptionTask:
    """What is to be captioned, how, and where the result is written.

    Args:
        images: a prepared data set of images.
        output: the folder of the data set with more captions.
        settings: how captions are made.

    Raises:
        ValueError: the data set holds encodings, or has captions of the same names.
    """

    def __init__(self, images: PreparedDataset, output: Path, settings: CaptionSettings) -> None:
        if images.encodings is not None:
            raise ValueError(f"{images.location} holds encodings: give the data set of images that they were made from")
        self.images, self.output, self.caption_settings = images, output, settings
        earlier = [label for one in images.description.get(CAPTIONS, []) for label in one["counts"]]
        if again := [label for label in settings.labels() if label in earlier]:
            raise ValueError(f"{images.location} has captions {again[0]} already: name the new ones with --name")
        self.parts = [
            CaptionPart(f"{split}/{bucket.name}", bucket, first, samples)
            for split in SPLITS
            for bucket in images.buckets(split)
            for first, samples in _spans(bucket.chunk_sizes)
        ]

    def settings(self) -> dict[str, Any]:
        """Return all settings that decide what the data set holds."""
        return {"images": self.images.identity, CAPTIONS: self.caption_settings.as_json()}

    def is_complete(self) -> bool:
        """Return whether the output is the finished data set of this task.

        Raises:
            ValueError: it is another data set, or something else.
        """
        if not (self.output / DESCRIPTION).exists():
            check_unused(self.output, "is not a data set")
            return False
        made = PreparedDataset(self.output).description.get(CAPTIONS)
        if not made:
            raise ValueError(f"{self.output} is a data set without new captions: choose another output")
        check_settings(made[-1]["settings"], self.settings(), self.output)
        return True

    def question(self, record: Record, label: str) -> str:
        """Return the prompt for one caption of a sample."""
        kind, language = self.caption_settings.labels()[label]
        context = record.caption(0.0) if self.caption_settings.context else ""
        return self.caption_settings.kinds[kind].ask(language, context)

    def with_new(self, record: Record, said: Mapping[str, Said], counts: Counter[tuple[str, str]]) -> Record:
        """Return a sample with its old and its new captions.

        Args:
            record: the sample.
            said: the answer for each new caption, by the name that it is stored under.
            counts: the number of captions by name and reason why they were left out (empty: stored), to be added to.
        """
        settings = self.caption_settings
        new: dict[str, list[tuple[str, str]]] = {}
        for label, (kind, _) in settings.labels().items():
            text, reason = settings.kinds[kind].caption(said[label])
            counts[label, reason] += 1
            if text:
                new.setdefault(kind, []).append((label, text))
        old_weights = record.weights or [1.0] * len(record.captions)
        share = settings.weights.get(OLD, 1.0) / sum(old_weights)
        weights = [weight * share for weight in old_weights]
        texts, kinds = list(record.captions), list(record.kinds or [SOURCE] * len(record.captions))
        for kind, captions in new.items():
            weights += [settings.weights.get(kind, 1.0) / len(captions)] * len(captions)
            texts += [text for _, text in captions]
            kinds += [label for label, _ in captions]
        if not any(weights):  # the old ones count nothing, and no new one could be used: better the old ones than none
            weights[: len(old_weights)] = old_weights
        return record._replace(captions=texts, weights=[] if len(set(weights)) == 1 else weights, kinds=kinds)


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first index and the number of samples of each chunk."""
    spans, first = [], 0
    for size in sizes:
        spans.append((first, size))
        first += size
    return spans
