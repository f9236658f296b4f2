"""Techniques of training: each against its published definition, off, resumed, on two processes, and their cost."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_contents import numbers, same_numbers
from helpers.processes import run
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nami_lightning.metrics.budget import sample_flops, training_flops
from nami_lightning.models.transformer import patchify, unpatchify
from nami_lightning.runs.load import load_module
from nami_lightning.runs.recipe import Recipe
from nami_lightning.runs.run_dir import Run
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.loss import FlowError
from nami_lightning.training.module import NamiModule
from nami_lightning.training.techniques.token_routing import TokenRouting

TINY = Path(__file__).parents[1] / "tiny.yaml"
ROUTING = "{class_path: nami_lightning.TokenRouting, init_args: {share: 0.5, first_block: 1}}"
STEPS = "[{steps: 3, ratio: [2, 2, 4], learning_rate: 0.003, warmup_steps: 0}]"


def make(*techniques: str) -> NamiModule:
    """Make the tiny recipe's module, with weights that are not the first ones."""
    torch.manual_seed(0)  # of the bridges, which are not fitted here
    module = Recipe(TINY, ["--model.techniques", f"[{', '.join(techniques)}]"]).make_model()
    module.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.transformer.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return module


def micro_batch(stage: int, count: int = 3, step: int = 7) -> MicroBatch:
    side = 8 * 2**stage
    images = torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return MicroBatch(step, stage, images, ["red apple"] * count, list("abc"[:count]), list(range(count)))


def loss(module: NamiModule, micro: MicroBatch, step: int = 7) -> FlowError:
    techniques = module.techniques.active(step)
    return module.flow_loss(module, module.transformer, micro, micro.step, techniques=techniques)


# --- token routing -----------------------------------------------------------------------------


def by_hand(module: NamiModule, inputs: tuple[Any, ...], kept: Tensor) -> Tensor:
    """TREAD, section 3, written out for three blocks of which the second is skipped by some tokens."""
    images, sequence, pooled, time, stage = inputs
    network = module.transformer
    x = network.x_embedder(patchify(images, 4))
    context = network.context_embedder(sequence)
    temb = network.time_text_embed(time * 1000, pooled)
    cosines, sines = network.pos_embed(network._positions(stage, 8, 8, context.shape[1], x.device))
    first, second, third = network.blocks(stage)
    context, x = first(x, context, temb, (cosines, sines), None)
    chosen = torch.zeros(64, dtype=torch.bool)
    chosen[kept] = True
    of_text = torch.ones(context.shape[1], dtype=torch.bool)
    rows = torch.cat([of_text, chosen])
    context, through = second(x[:, chosen], context, temb, (cosines[rows], sines[rows]), None)
    x = x.clone()
    x[:, chosen] = through  # the others are as they were
    _, x = third(x, context, temb, (cosines, sines), None)
    return unpatchify(network.proj_out(network.norm_out(x, temb)), 8, 8, 4)


def test_routed_tokens_skip_the_middle_blocks_and_come_back() -> None:
    module, micro = make(ROUTING), micro_batch(2)
    seen: dict[str, Any] = {}
    forward = module.transformer.forward

    def spy(*inputs: Any, **keywords: Any) -> Tensor:
        seen.update(inputs=inputs, hooks=keywords["block_hooks"])
        seen["velocity"] = forward(*inputs, **keywords)
        velocity: Tensor = seen["velocity"]
        return velocity

    module.transformer.forward = spy
    loss(module, micro)
    (route,) = seen["hooks"]
    assert len(set(route.kept.tolist())) == 32
    torch.testing.assert_close(seen["velocity"], by_hand(module, seen["inputs"], route.kept), rtol=0, atol=1e-5)
    loss(module, micro_batch(1))
    assert seen["hooks"] == []  # the finest stage alone
    del module.transformer.forward


def test_tokens_are_drawn_anew_in_each_step_and_are_those_of_any_rank() -> None:
    (routing,) = make(ROUTING).techniques
    assert isinstance(routing, TokenRouting)

    def kept(micro: MicroBatch) -> list[int]:
        module = make(ROUTING)
        hooks: list[Any] = []
        forward = module.transformer.forward
        module.transformer.forward = lambda *x, **y: hooks.extend(y["block_hooks"]) or forward(*x, **y)
        loss(module, micro)
        positions: list[int] = hooks[0].kept.tolist()
        return positions

    assert kept(micro_batch(2)) == kept(micro_batch(2, count=1)) == sorted(kept(micro_batch(2)))
    assert kept(micro_batch(2)) != kept(micro_batch(2, step=8))


def test_validation_routes_nothing() -> None:
    plain, routed, micro = make(), make(ROUTING), micro_batch(2)
    before = plain.flow_loss(plain, plain.transformer, micro, "validation")[0]
    assert torch.equal(before, routed.flow_loss(routed, routed.transformer, micro, "validation")[0])
    assert not torch.equal(loss(plain, micro).loss, loss(routed, micro).loss)


# --- all ---------------------------------------------------------------------------------------

ALL = [ROUTING]


@pytest.mark.parametrize("technique", ALL)
def test_operations_are_those_of_torchs_counter(technique: str) -> None:
    module = make(technique)
    for stage in range(3):
        micro = micro_batch(stage)
        loss(module, micro)  # text states are remembered then, and not counted
        with FlopCounterMode(display=False) as counter:
            error = loss(module, micro)
            sum(error.added.values(), error.loss).backward()
        counted = sample_flops(module, stage).model
        assert counter.get_total_flops() == pytest.approx(3 * counted, rel=0.01)


def test_a_technique_that_ended_changes_nothing() -> None:
    ending = ROUTING.replace("share: 0.5", "share: 0.5, end_step: 4")
    module, plain, micro = make(ending), make(), micro_batch(2)
    assert torch.equal(loss(module, micro, step=4).loss, loss(plain, micro).loss)
    assert not torch.equal(loss(module, micro, step=3).loss, loss(plain, micro).loss)
    on, off = (sum(sample_flops(module, k, step).model * n for k, n in enumerate((8, 4, 2))) for step in (0, 4))
    assert on < off == sum(sample_flops(plain, k).model * n for k, n in enumerate((8, 4, 2)))
    assert training_flops(module, 10) == 4 * on + 6 * off


@pytest.fixture(scope="module")
def arguments(tiny_module: list[str]) -> list[str]:
    return [*tiny_module, "--model.techniques", f"[{', '.join(ALL)}]", "--trainer.val_check_interval", "3"]


@pytest.fixture(scope="module")
def whole(arguments: list[str]) -> Path:
    """A run that was never interrupted."""
    run([*arguments, "--curriculum.phases", STEPS, "--name", "whole"])
    return Path(arguments[2]) / "whole"


def test_resumed_it_ends_with_the_same_bits(arguments: list[str], whole: Path) -> None:
    settings = [*arguments, "--name", "resumed", "--curriculum.phases"]
    run([*settings, STEPS.replace("steps: 3", "steps: 2")])
    run([*settings, STEPS])
    ends = [numbers(Run(folder).checkpoint()) for folder in (whole, whole.parent / "resumed")]
    assert same_numbers(*ends) == []


def test_two_processes_with_shards_train_as_one(arguments: list[str], whole: Path) -> None:
    settings = ["--name", "shards", "--trainer.devices", "2", "--trainer.strategy", "fsdp2"]
    run([*arguments, "--curriculum.phases", STEPS, *settings])
    one, two = (load_module(Run(folder)).transformer.state_dict() for folder in (whole, whole.parent / "shards"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        (ROUTING.replace("0.5", "1.5"), "share between 0 and 1"),
        (ROUTING.replace("first_block: 1", "first_block: 2"), "leaves no block of stage 3 to skip"),
        (ROUTING.replace("share", "stages: [4], share"), "stages has 4, and the model stages 1 to 3"),
        (ROUTING.replace("share", "end_step: 0, share"), "end_step must be at least 1"),
        (f"{ROUTING}, {ROUTING}", "lists TokenRouting more than once"),
    ],
)
def test_what_does_not_fit_is_refused(technique: str, message: str) -> None:
    with pytest.raises((ValueError, SystemExit), match=message):
        make(technique)
