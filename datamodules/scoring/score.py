"""Compute scores of a prepared data set chunk by chunk, and write them beside the samples.

A chunk's scores are one file, which is written when it is complete. So any number of processes and machines can share
the chunks, and a command that is run again makes what is missing.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from nami_lightning.datamodules.preparation.parts_folder import changed_settings
from nami_lightning.datamodules.scoring.score_batches import ScoreBatch, ScoreBatches
from nami_lightning.datamodules.scoring.score_files import SETTINGS, is_scored, list_parts, write_part
from nami_lightning.datamodules.storage.dataset import PreparedDataset
from nami_lightning.models.encoder_revisions import revision_of
from nami_lightning.models.labelling.aesthetic import AestheticPredictor
from nami_lightning.models.labelling.contrastive import ContrastiveModel
from nami_lightning.models.labelling.text_area import TextDetector
from nami_lightning.utils.atomic_write import write_json


@dataclass(frozen=True)
class ScoreModels:
    """Which networks score; without any, only the scores are made that need none.

    Args:
        clip: hub name or folder of a CLIP or SigLIP: the similarity of each caption and its image.
        aesthetic: file, folder or hub name of a predictor on the features of ``clip``: the aesthetic score.
        text_detector: hub name or folder of a detector of text: the share of the image that is text.
        features: also store the features of ``clip``, to find near-duplicates by them.
        dtype: the type of the weights of ``clip``.

    Raises:
        ValueError: something needs ``clip``, and none is given.
    """

    clip: str | None = None
    aesthetic: str | None = None
    text_detector: str | None = None
    features: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.clip is None and (self.aesthetic or self.features):
            needed = "--aesthetic predicts from" if self.aesthetic else "--features stores"
            raise ValueError(f"{needed} the features of a CLIP: name it with --clip")

    def settings(self) -> dict[str, Any]:
        """Return what decides the scores, with the revision of each model."""
        named = {"clip": self.clip, "aesthetic": self.aesthetic, "text_detector": self.text_detector}
        revisions = {f"{key}_revision": revision_of(name) if name else None for key, name in named.items()}
        return asdict(self) | revisions


class Scorer:
    """The networks that score, on one device.

    Args:
        models: which networks.
        device: the device that computes.

    Raises:
        ValueError: the aesthetic predictor was made for another CLIP.
    """

    def __init__(self, models: ScoreModels, device: torch.device | str = "cpu") -> None:
        self.models = models
        self.clip = ContrastiveModel(models.clip, device, models.dtype) if models.clip else None
        self.aesthetic = AestheticPredictor(models.aesthetic).to(device) if models.aesthetic else None
        self.text_detector = TextDetector(models.text_detector, device) if models.text_detector else None
        if self.clip and self.aesthetic and self.clip.width != self.aesthetic.width:
            raise ValueError(
                f"{models.aesthetic} takes {self.aesthetic.width} features, but {models.clip} has {self.clip.width}: "
                "name the CLIP that the predictor was trained on"
            )

    def __call__(self, batch: ScoreBatch) -> dict[str, np.ndarray]:
        """Return the scores of a batch, by name; see :mod:`nami_lightning.datamodules.scoring.score_files`."""
        scores = dict(batch.scores)
        if self.text_detector:
            scores["text_area"] = np.array(self.text_detector(batch.images), np.float32)
        if self.clip is None:
            return scores
        features = self.clip.image_features(batch.inputs)
        if self.aesthetic:
            scores["aesthetic"] = self.aesthetic(features).float().cpu().numpy()
        if self.models.features:
            scores["features"] = features.half().cpu().numpy()
        texts = list(dict.fromkeys(caption for captions in batch.captions for caption in captions))
        rows = {text: row for row, text in enumerate(texts)}
        text_features = self.clip.text_features(texts)
        of_image = torch.arange(len(features)).repeat_interleave(torch.from_numpy(scores["captions"]))
        of_text = torch.tensor([rows[caption] for captions in batch.captions for caption in captions])
        similarity = (features[of_image.to(features.device)] * text_features[of_text.to(features.device)]).sum(1)
        scores["similarity"] = similarity.cpu().numpy()
        return scores


def score(
    dataset: PreparedDataset,
    folder: Path,
    models: ScoreModels,
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str = "cpu",
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Make the scores of all chunks that have none yet, or that changed after they were scored.

    Args:
        dataset: a prepared data set of images.
        folder: the folder of its scores.
        models: which networks score.
        batch_size: the number of images that go through a network at once.
        workers: the number of processes that read and decode.
        device: the device that computes.
        shard: (i, n): score only every n-th chunk, from chunk i on, while other machines score the others.

    Raises:
        ValueError: the folder has scores of other models, or the data set holds encodings.
    """
    parts = list_parts(dataset)
    settings = models.settings()
    _check_settings(folder, settings)
    numbers = [n for n in range(shard[0], len(parts), shard[1]) if not is_scored(folder, parts[n])]
    samples = sum(parts[number].samples for number in numbers)
    if not numbers:
        return
    scorer = Scorer(models, device)
    write_json(folder / SETTINGS, settings)  # after the networks are loaded: a misspelt name leaves nothing behind
    processor = scorer.clip.image_processor if scorer.clip else None
    batches = ScoreBatches(parts, numbers, batch_size, processor, scorer.text_detector is not None)
    loader = DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=_unchanged)
    with tqdm(desc="scoring", total=samples, unit="image") as bar:
        for number, of_part in groupby(loader, key=lambda batch: batch.part):
            write_part(folder, parts[number], _joined(_scored(scorer, of_part, bar)))


def _unchanged(batch: Any) -> Any:
    """Return a batch as it is: a DataLoader would make tensors of its arrays."""
    return batch


def _scored(scorer: Scorer, batches: Iterator[ScoreBatch], bar: Any) -> Iterator[dict[str, np.ndarray]]:
    for batch in batches:
        yield scorer(batch)
        bar.update(len(batch.captions))


def _joined(scores: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    rows = list(scores)
    return {name: np.concatenate([one[name] for one in rows]) for name in rows[0]}


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix the scores of two models in one folder.

    Raises:
        ValueError: the folder has scores of other models.
    """
    file = folder / SETTINGS
    if not file.exists():
        return
    if changes := "; ".join(changed_settings(json.loads(file.read_text(encoding="utf-8")), settings)):
        raise ValueError(
            f"{folder} holds scores that were made otherwise ({changes}): write to another folder with --scores, or "
            "remove this one"
        )
