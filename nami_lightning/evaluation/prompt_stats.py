"""Statistics of prompts: how long they are and their topics, as in the paper's Figures 5, 9 and 10."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F

from nami_lightning.evaluation.nami1k.prompts import TOPICS
from nami_lightning.evaluation.prompts import Item
from nami_lightning.evaluation.results import format_percent, require_package
from nami_lightning.models.text_encoder import PromptEncoder, TextEncoderConfig
from nami_lightning.utils.atomic_write import write_json
from nami_lightning.utils.image_grid import save_figure
from nami_lightning.utils.text_table import table

WORDS_PER_BIN = 10
MAX_WORDS = 120
"""Number of words; all longer prompts are counted in one last bin."""

UNKNOWN_TOPIC = "not stated"
BATCH = 64


def describe_prompts(lists: Mapping[str, Sequence[Item]], out: Path, topic_encoder: str | None) -> list[str]:
    """Write the statistics of prompts as ``prompts.json``, ``prompts.png`` and ``prompts.svg``, and return tables.

    Args:
        lists: prompts of each benchmark, by the benchmark's name.
        out: folder of the files.
        topic_encoder: text encoder (Hugging Face name or folder, ``all-MiniLM-L6-v2`` for example) that finds the topic
            of prompts whose file states none; None: their topic stays unknown.
    """
    counts = {name: count_by_length(items) for name, items in lists.items()}
    topic_counts = {name: count_by_topic(items, topic_encoder) for name, items in lists.items()}
    write_json(out / "prompts.json", {"words": counts, "topics": topic_counts, "topics_found_by": topic_encoder})
    plot(counts, topic_counts, out / "prompts")
    found_by = f" (where none is stated: the nearest, found by {topic_encoder})" if topic_encoder else ""
    lines = [
        "words per prompt, % of prompts",
        *_shares(counts),
        "",
        f"topics, % of prompts{found_by}",
        *_shares(topic_counts),
        "",
    ]
    if any(UNKNOWN_TOPIC in found for found in topic_counts.values()):
        lines += ["For prompts without a stated topic, --topic_encoder all-MiniLM-L6-v2 finds the nearest of 14.", ""]
    return [*lines, f"{out / 'prompts.png'}, .svg and .json"]


def count_by_length(items: Sequence[Item]) -> dict[str, int]:
    """Return the number of prompts by number of words, in bins of 10: ``1-10``, ..., ``111-120``, ``121+``."""
    words = [len(item.prompt.split()) for item in items]
    bins = Counter(min((count - 1) // WORDS_PER_BIN, MAX_WORDS // WORDS_PER_BIN) for count in words)
    firsts = range(1, MAX_WORDS, WORDS_PER_BIN)
    names = [*(f"{first}-{first + WORDS_PER_BIN - 1}" for first in firsts), f"{MAX_WORDS + 1}+"]
    return {name: bins[i] for i, name in enumerate(names)}


def count_by_topic(items: Sequence[Item], topic_encoder: str | None) -> dict[str, int]:
    """Return the number of prompts by topic, as stated or else as the encoder finds it.

    See :func:`describe_prompts`.
    """
    stated = [item.metadata.get("topic") for item in items]
    without_topic = [item.prompt for item, topic in zip(items, stated, strict=True) if topic is None]
    found = iter(
        nearest_topics(without_topic, topic_encoder)
        if topic_encoder and without_topic
        else [UNKNOWN_TOPIC] * len(without_topic)
    )
    counts = Counter(next(found) if topic is None else topic for topic in stated)
    known = {topic: counts.pop(topic, 0) for topic in TOPICS}
    return known | dict(counts.most_common())


def nearest_topics(prompts: Sequence[str], encoder: str) -> list[str]:
    """Return the topic nearest to each prompt, by the cosine of a text encoder's mean states.

    Each topic is represented by the things that its pictures may show. This is an estimate: MiniLM finds the topic of
    59 of GenEval's 75 single objects, and counts cups as food.
    """
    encode = PromptEncoder.load(TextEncoderConfig(encoder, max_length=128))
    owners, things = zip(*((topic, thing) for topic in TOPICS for thing in TOPICS[topic].split(", ")), strict=True)
    anchors = F.normalize(encode([f"a photo of {thing}" for thing in things]).pooled)
    nearest: list[str] = []
    for first in range(0, len(prompts), BATCH):
        states = F.normalize(encode(prompts[first : first + BATCH]).pooled)
        nearest += [owners[i] for i in (states @ anchors.T).argmax(1).tolist()]
    return nearest


def _shares(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    rows = [["", *counts]]
    for name in dict.fromkeys(name for of_list in counts.values() for name in of_list):
        shares = [of_list.get(name, 0) / sum(of_list.values()) for of_list in counts.values()]
        rows.append([f"  {name}", *(format_percent(share) if share else "" for share in shares)])
    rows.append(["  prompts", *(f"{sum(of_list.values()):,}" for of_list in counts.values())])
    return table(rows, "<" + ">" * len(counts))


def plot(counts: Mapping[str, Mapping[str, int]], topic_counts: Mapping[str, Mapping[str, int]], stem: Path) -> None:
    """Plot both distributions as grouped bars, as ``stem.png`` and ``stem.svg``."""
    require_package("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    for axes, counts_by_list, title in zip(
        figure.subplots(2, 1), (counts, topic_counts), ("words per prompt", "topics"), strict=True
    ):
        _bars(axes, counts_by_list)
        axes.set(title=title, ylabel="% of prompts")
        axes.legend()
    save_figure(figure, stem)


def _bars(axes: Any, counts_by_list: Mapping[str, Mapping[str, int]]) -> None:
    names = list(dict.fromkeys(name for of_list in counts_by_list.values() for name in of_list))
    width = 0.8 / len(counts_by_list)
    for i, (label, of_list) in enumerate(counts_by_list.items()):
        heights = [100 * of_list.get(name, 0) / sum(of_list.values()) for name in names]
        axes.bar(np.arange(len(names)) + (i - (len(counts_by_list) - 1) / 2) * width, heights, width, label=label)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
