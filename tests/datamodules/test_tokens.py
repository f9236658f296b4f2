"""Captions are tokenized where the data is read, if a step would have to do it otherwise."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nami_lightning.datamodules import MultiResolutionDataModule
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.module import NamiModule

TINY = Path(__file__).parents[1] / "tiny.yaml"


def read(data_root: Path, *settings: str) -> tuple[NamiModule, list[MicroBatch]]:
    """Return the module of the tiny recipe, and its first batch as a worker hands it over."""
    module, data, _ = Recipe(TINY, ["--data.init_args.folder", str(data_root), *settings]).make()
    assert isinstance(data, MultiResolutionDataModule)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(global_rank=0, world_size=1, lightning_module=module, strategy=strategy)
    data.trainer = trainer
    return module, next(iter(data.train_dataloader()))


def test_a_step_needs_no_tokenizer(data_root: Path) -> None:
    module, batch = read(data_root, "--model.text_encoder.cache", "false")
    expected = [module.encode_prompts(micro.captions) for micro in batch]
    module.text_encoder.sequence_tokenizer = None
    for micro, states in zip(batch, expected, strict=True):
        drop = torch.zeros(len(micro), dtype=torch.bool)
        module.__dict__["_empty_prompt"] = states.row(0)
        for found, one in zip(module.text_states(micro, drop), states, strict=True):
            assert torch.equal(found, one)


def test_tokens_go_to_the_device_with_their_images(data_root: Path) -> None:
    _, batch = read(data_root, "--model.text_encoder.cache", "false")
    tokens = batch[0].to("meta").tokens
    assert tokens is not None
    assert (tokens.sequence.ids.device.type, tokens.sequence.mask.device.type) == ("meta", "meta")


def test_remembered_prompts_need_no_tokens(data_root: Path) -> None:
    _, batch = read(data_root)
    assert {micro.tokens for micro in batch} == {None}
