"""Ranks that share the tokens of a sample: what each computes, which samples it has, and what is refused.

That they train as one process does is tested with real ranks, beside the strategies.
"""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.tiny_models import make_two_stages
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from nami_lightning import NamiTransformer2DModel
from nami_lightning.cli.main import main, make_parser
from nami_lightning.cli.plan import read_setup
from nami_lightning.datamodules import MultiResolutionDataModule
from nami_lightning.models.autoencoder import AutoencoderConfig
from nami_lightning.models.text_encoder import TextStates
from nami_lightning.planning.memory import count_saved_bytes
from nami_lightning.planning.plan import make_plan
from nami_lightning.planning.traffic import step_traffic
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.checks import check_shapes
from nami_lightning.training.curriculum import Curriculum, Phase
from nami_lightning.training.parallel.token_groups import TokenGroup, make_token_groups
from nami_lightning.training.strategies import parallelize
from nami_lightning.training.techniques.token_routing import TokenRouting

TINY = Path(__file__).parents[1] / "tiny.yaml"
SHARED = Curriculum([Phase(1, [1, 1], 1e-3)], 4, context_parallel=[1, 2])


@pytest.fixture
def ranks() -> Iterator[None]:
    """The second of four ranks, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield
    dist.destroy_process_group()


def predict(group: TokenGroup, model: NamiTransformer2DModel, side: int = 8, text: int = 6) -> Tensor:
    states = TextStates(torch.randn(2, text, 8), torch.randn(2, 8))
    return group.predict(model, torch.randn(2, 4, side, side), states, torch.rand(2), 1)


@pytest.mark.parametrize(("compiled", "autocast"), [(False, False), (False, True), (True, True)])
def test_each_rank_computes_its_part_of_the_tokens_and_of_the_heads(
    ranks: None, monkeypatch: pytest.MonkeyPatch, compiled: bool, autocast: bool
) -> None:
    model, seen = make_two_stages(), list[tuple[int, ...]]()
    if compiled:
        torch._dynamo.reset()
        for block in model.blocks(1):
            block.compile(backend="eager", dynamic=False, fullgraph=True)
    (group,) = make_token_groups(SHARED, model, []).values()
    assert (group.size, group.rank, dist.get_process_group_ranks(group.ranks)) == (2, 1, [0, 1])
    attention = nn.functional.scaled_dot_product_attention

    def noted(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        seen.append((*query.shape[1:3], *key.shape[1:3]))
        return attention(query, key, value, **settings)

    if not compiled:
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noted)
    tokens = []
    for block in model.blocks(1):
        block.register_forward_pre_hook(lambda _, inputs: tokens.append((inputs[0].shape[1], inputs[1].shape[1])))
    model.proj_out.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        predict(group, model).square().mean().backward()
    assert tokens == [(8, 3)] * 3 + [16]  # of 16 image and 6 text tokens; the head has all
    assert seen == ([] if compiled else [(1, 22, 1, 22)] * 3)  # one of two heads, all tokens


def test_a_part_of_the_gradient_comes_back_as_often_as_there_are_ranks(ranks: None) -> None:
    model = make_two_stages()
    (group,) = make_token_groups(SHARED, model, []).values()
    seen = list[tuple[Tensor, ...]]()
    model.blocks(1)[-1].register_full_backward_hook(lambda module, _, gradients: seen.append(gradients))
    model.norm_out.register_full_backward_hook(lambda module, gradients, _: seen.append(gradients))
    predict(group, model).square().mean().backward()
    whole, mine = seen[0][0], seen[1][1]
    torch.testing.assert_close(mine, 2 * whole[:, 8:])


def test_without_a_group_attention_is_as_it_was(ranks: None) -> None:
    model = make_two_stages()
    inputs = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8), torch.randn(2, 8), torch.rand(2), 1
    expected = model(*inputs)
    make_token_groups(SHARED, model, [])
    assert torch.equal(model(*inputs), expected)


def test_ranks_of_a_group_have_the_same_samples(data_root: Path) -> None:
    settings = ["--curriculum.unit", "4", "--curriculum.context_parallel", "[1, 1, 2]"]
    data = Recipe(TINY, ["--data.init_args.folder", str(data_root), *settings]).make_data()
    alone = Recipe(TINY, ["--data.init_args.folder", str(data_root), *settings[:2]]).make_data()
    assert isinstance(data, MultiResolutionDataModule)
    assert isinstance(alone, MultiResolutionDataModule)
    for step in (0, 20, 40):
        parts = [data.steps(rank, 4)[step] for rank in range(4)]
        whole = alone.steps()[step]
        for stage in range(3):
            names = [[name for micro in part if micro.stage == stage for name in micro.ids] for part in parts]
            expected = [name for micro in whole if micro.stage == stage for name in micro.ids]
            if stage == 2:
                assert (names[0], names[2]) == (names[1], names[3])
                names = names[::2]
            assert [name for part in names for name in part] == expected


def test_tokens_that_cant_be_shared_are_refused(ranks: None, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_two_stages()
    (group,) = make_token_groups(SHARED, model, []).values()
    with pytest.raises(ValueError, match=r"2 ranks share the tokens of a sample, but this one has 9 image tokens"):
        predict(group, model, side=6)
    with pytest.raises(ValueError, match=r"this one has 5 text tokens"):
        predict(group, model, text=5)
    with pytest.raises(ValueError, match=r"TokenRouting needs all tokens of a sample on one rank"):
        make_token_groups(SHARED, model, [TokenRouting()])
    with pytest.raises(ValueError, match=r"context_parallel\[1\] lets 2 ranks share .* must divide .* 3"):
        SHARED.split(SHARED.phases[0], 1, 3, 8)
    landscape = [(Fraction(48), Fraction(32)), (Fraction(56), Fraction(24))]
    vae = AutoencoderConfig("pixels", factor=1)
    check_shapes(landscape, 32, {"patch_size": 8}, vae, [1, 4])
    with pytest.raises(ValueError, match=r"context_parallel\[0\] lets 2 .* some images of the data set have 21 tokens"):
        check_shapes(landscape, 32, {"patch_size": 8}, vae, [2, 1])
    assert main(["bench", "step", str(TINY), "--curriculum.context_parallel", "[1, 1, 2]"]) == 2
    assert "measure without curriculum.context_parallel" in capsys.readouterr().err
    for wrong in ([1], [1, 0], [1, 1, 1]):
        with pytest.raises(ValueError, match=r"must have a number of at least 1 for each of the 2 stages"):
            Curriculum(SHARED.phases, 4, wrong)
    assert main(["plan", str(TINY), "--devices", "6", "--curriculum.context_parallel", "[1, 1, 3]"]) == 2
    assert "3 does not divide its 2 attention heads and its 8 text tokens and its 64 image tokens" in (
        capsys.readouterr().err
    )


class Exchanged(TorchDispatchMode):
    """Counts the bytes that this rank of a group of two sends in all-to-alls and all-gathers."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            self.sent += args[0].nbytes / 2
        elif func is torch.ops.c10d.allgather_.default:
            self.sent += sum(tensor.nbytes for tensor in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recomputed", [0, 2])
def test_a_plan_knows_what_is_sent_and_kept(ranks: None, recomputed: int) -> None:
    arguments = ["plan", str(TINY), "--devices", "2", "--curriculum.unit", "2", "--device", "a100-80gb"]
    arguments += ["--model.activation_checkpointing", str(recomputed), "--data.init_args.max_micro_batch", "[4, 4, 2]"]
    options, overrides = make_parser().parse_known_args([*arguments, "--curriculum.context_parallel", "[1, 1, 2]"])
    parsed = Recipe(options.recipe, overrides)
    setup = read_setup("tiny", parsed.parser.instantiate(parsed.config), options)
    model, last = setup.network.make(), setup.curriculum.phases[-1]
    (group,) = make_token_groups(setup.curriculum, model, []).values()
    parallelize(model, None, recomputed)
    states = TextStates(torch.randn(2, 8, 384), torch.randn(2, 384))
    with Exchanged() as exchanged:
        for _ in range(setup.micro_batches(last, 2)[0]):
            group.predict(model, torch.randn(2, 3, 32, 32), states, torch.rand(2), 2).square().mean().backward()
    alone = replace(setup, curriculum=Curriculum(setup.curriculum.phases, setup.curriculum.unit))
    assert step_traffic(setup, last).node - step_traffic(alone, last).node == exchanged.sent
    shared, whole = make_plan(setup), make_plan(replace(alone, max_micro_batch=(4, 4, 2), devices=1))
    assert (shared.stages[2].micro_batch, shared.stages[2].devices) == (2, 2)
    assert shared.stages[2].saved == whole.stages[2].saved // 2


def test_a_plans_activations_are_those_of_a_rank(ranks: None) -> None:
    """But for the head's: it has all tokens on each rank."""
    model, saved = make_two_stages(), list[int]()
    model.requires_grad_(True)
    for shared in (False, True):
        by_block: dict[nn.Module | None, int] = {}
        blocks = list(model.blocks(1))
        groups = make_token_groups(SHARED, model, [])
        with count_saved_bytes(model, blocks, by_block):
            if shared:
                predict(groups[1], model, side=32, text=32)
            else:
                model(torch.randn(2, 4, 32, 32), torch.randn(2, 32, 8), torch.randn(2, 8), torch.rand(2), 1)
        saved.append(sum(by_block[block] for block in blocks))
    assert saved[1] == pytest.approx(saved[0] / 2, rel=0.03)


def test_a_network_is_prepared_only_where_tokens_are_shared() -> None:
    model: Any = make_two_stages()
    before = [block.attn.processor for block in model.blocks(1)]
    parallelize(model, None)
    assert make_token_groups(Curriculum(SHARED.phases, 4), model, [TokenRouting()]) == {}
    assert [block.attn.processor for block in model.blocks(1)] == before
