"""Shared by all tests: one thread, no network, and a small data set of real emoji."""

import os
from pathlib import Path

import pytest
from helpers.processes import ENVIRONMENT

TINY = Path(__file__).parent / "tiny.yaml"
LIMIT = 80
LONGEST = [f"test_{name}.py" for name in ("distributed", "faults", "encode", "resume", "compare", "plan", "remote")]


def pytest_configure(config: pytest.Config) -> None:
    """Hide a GPU from all tests but those of ``pytest -m gpu``, and import Lightning.

    That is before pytest listens to the logs: only then Lightning prints its own, as in a command line.

    Not where pytest-xdist only hands out the tests: its processes would wait for that import, and repeat it.
    """
    if config.getoption("markexpr") != "gpu":
        os.environ.update(ENVIRONMENT)
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        import lightning  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: pytest-xdist hands out files in this order, and the short ones fill the end."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums are done in one order."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def flops_of_attention() -> None:
    """Before 2.15, torch's counter does not know the CPU's kernel of attention; its formulas are the other kernels'."""
    import torch
    from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop, sdpa_flop

    for kernel, formula in (
        (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop),
        (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, sdpa_backward_flop),
    ):
        if kernel not in flop_registry:
            register_flop_formula(kernel, get_raw=True)(formula)


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny recipe's data set, prepared once."""
    from nami_lightning.datamodules.preparation.prepare import prepare
    from nami_lightning.datamodules.preparation.prepare_parts import Preparation, fingerprint, settings_of
    from nami_lightning.datamodules.sources import OpenMoji

    root = tmp_path_factory.mktemp("data")
    source, preparation = OpenMoji(["en", "de"], LIMIT, size=32), Preparation([32], heldout_percent=10.0, format="png")
    prepare(source, root / fingerprint(settings_of(source, preparation)), preparation, workers=1)
    return root


@pytest.fixture(scope="module")
def tiny_module(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """As ``tiny``, in folders of this module."""
    runs = tmp_path_factory.mktemp("runs")
    return [str(TINY), "--output_dir", str(runs), "--data.init_args.folder", str(data_root)]


@pytest.fixture
def tiny(data_root: Path, tmp_path: Path) -> list[str]:
    """Arguments of ``lightning run`` for the tiny recipe, in folders of this test."""
    return [str(TINY), "--output_dir", str(tmp_path / "runs"), "--data.init_args.folder", str(data_root)]
