"""Prompts described: how long they are and what they are about, as the paper's Figures 5, 9 and 10 show it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nami_lightning.evaluation.nami1k.prompts import TOPICS
from nami_lightning.evaluation.prompts import Item
from nami_lightning.evaluation.results import need, percent, write_json
from nami_lightning.models.text_encoder import PromptEncoder, TextEncoderConfig
from nami_lightning.utils.image_grid import save_figure
from nami_lightning.utils.text_table import table

WORDS_A_BIN = 10
LONGEST = 120
"""Words; longer prompts share the last bin."""

UNKNOWN = "not stated"
BATCH = 64


def describe(lists: Mapping[str, Sequence[Item]], out: Path, topic_encoder: str | None) -> list[str]:
    """Print tables, and write ``prompts.json``, ``prompts.png`` and ``prompts.svg``.

    Args:
        lists: prompts of each benchmark, by its name.
        out: folder of the files.
        topic_encoder: text encoder (Hugging Face name or folder, ``all-MiniLM-L6-v2``) that finds the topic of a
            prompt whose list states none; None: it stays unknown.
    """
    counts = {name: lengths(items) for name, items in lists.items()}
    about = {name: topics(items, topic_encoder) for name, items in lists.items()}
    write_json(out / "prompts.json", {"words": counts, "topics": about, "topics_found_by": topic_encoder})
    plot(counts, about, out / "prompts")
    found_by = f" (those that are not stated: nearest by {topic_encoder})" if topic_encoder else ""
    lines = [
        "words a prompt, % of prompts",
        *_shares(counts),
        "",
        f"topics, % of prompts{found_by}",
        *_shares(about),
        "",
    ]
    if any(UNKNOWN in found for found in about.values()):
        lines += ["Where no topic is stated, --topic_encoder all-MiniLM-L6-v2 finds the nearest of 14.", ""]
    return [*lines, f"{out / 'prompts.png'}, .svg and .json"]


def lengths(items: Sequence[Item]) -> dict[str, int]:
    """Prompts by number of words, in bins of 10: ``1-10``, ..., ``111-120``, ``121+``."""
    words = [len(item.prompt.split()) for item in items]
    bins = Counter(min((count - 1) // WORDS_A_BIN, LONGEST // WORDS_A_BIN) for count in words)
    firsts = range(1, LONGEST, WORDS_A_BIN)
    names = [*(f"{first}-{first + WORDS_A_BIN - 1}" for first in firsts), f"{LONGEST + 1}+"]
    return {name: bins[i] for i, name in enumerate(names)}


def topics(items: Sequence[Item], topic_encoder: str | None) -> dict[str, int]:
    """Prompts by topic: as their list states it, or else the nearest of the 14; see :func:`describe`."""
    stated = [item.metadata.get("topic") for item in items]
    open_ = [item.prompt for item, topic in zip(items, stated, strict=True) if topic is None]
    found = iter(nearest_topics(open_, topic_encoder) if topic_encoder and open_ else [UNKNOWN] * len(open_))
    counts = Counter(next(found) if topic is None else topic for topic in stated)
    known = {topic: counts.pop(topic, 0) for topic in TOPICS}
    return known | dict(counts.most_common())


def nearest_topics(prompts: Sequence[str], encoder: str) -> list[str]:
    """The topic that may show the thing nearest to each prompt, by the cosine of a text encoder's mean states.

    An estimate: MiniLM finds the topic of 59 in 75 of GenEval's single objects, and takes cups for food.
    """
    encode = PromptEncoder.load(TextEncoderConfig(encoder, max_length=128))
    owners, things = zip(*((topic, thing) for topic in TOPICS for thing in TOPICS[topic].split(", ")), strict=True)
    anchors = _unit(encode([f"a photo of {thing}" for thing in things]).pooled)
    nearest: list[str] = []
    for first in range(0, len(prompts), BATCH):
        states = _unit(encode(prompts[first : first + BATCH]).pooled)
        nearest += [owners[i] for i in (states @ anchors.T).argmax(1).tolist()]
    return nearest


def _unit(states: Tensor) -> Tensor:
    return states / states.norm(dim=1, keepdim=True)


def _shares(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    rows = [["", *counts]]
    for name in dict.fromkeys(name for of_list in counts.values() for name in of_list):
        shares = [of_list.get(name, 0) / sum(of_list.values()) for of_list in counts.values()]
        rows.append([f"  {name}", *(percent(share) if share else "" for share in shares)])
    rows.append(["  prompts", *(f"{sum(of_list.values()):,}" for of_list in counts.values())])
    return table(rows, "<" + ">" * len(counts))


def plot(counts: Mapping[str, Mapping[str, int]], about: Mapping[str, Mapping[str, int]], stem: Path) -> None:
    """Both distributions as grouped bars, to ``stem.png`` and ``stem.svg``."""
    need("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    for axes, of_lists, title in zip(figure.subplots(2, 1), (counts, about), ("words a prompt", "topics"), strict=True):
        _bars(axes, of_lists)
        axes.set(title=title, ylabel="% of prompts")
        axes.legend()
    save_figure(figure, stem)


def _bars(axes: Any, of_lists: Mapping[str, Mapping[str, int]]) -> None:
    names = list(dict.fromkeys(name for of_list in of_lists.values() for name in of_list))
    width = 0.8 / len(of_lists)
    for i, (label, of_list) in enumerate(of_lists.items()):
        heights = [100 * of_list.get(name, 0) / sum(of_list.values()) for name in names]
        axes.bar(np.arange(len(names)) + (i - (len(of_lists) - 1) / 2) * width, heights, width, label=label)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
