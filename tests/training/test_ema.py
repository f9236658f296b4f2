"""An EMA on another device than the weights, beside what DDP wraps."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.module import NamiModule

TINY = Path(__file__).parents[1] / "tiny.yaml"


@pytest.fixture
def ranks() -> Iterator[None]:
    """A process group of two, of which only this one is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def make(*overrides: str) -> NamiModule:
    module = Recipe(TINY, overrides).make_model()
    module.use_ema, module.ema_on_host = True, True
    module.configure_model()
    return module


def test_ddp_wraps_a_module_whose_ema_is_on_another_device(ranks: None) -> None:
    module = make()
    assert module.ema is not None
    del module.ema.__dict__["_apply"]
    module.ema.to("meta")  # here there is no second kind of device that could compute
    wrapped = DistributedDataParallel(module, find_unused_parameters=True)
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu", "meta"}
    assert len(wrapped._module_parameters) == len(list(module.parameters())) - len(list(module.ema.parameters()))


def test_an_ema_on_the_host_stays_there() -> None:
    module = make()
    assert module.ema is not None
    module.to("meta")
    assert {parameter.device.type for parameter in module.transformer.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in module.ema.parameters()} == {"cpu"}
