"""Shared by all tests: one thread, no network, and a small data set of real emoji."""

import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")

import pytest
import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop, sdpa_flop

from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation, fingerprint, settings_of
from nami_lightning.datamodules.sources import OpenMoji

torch.set_num_threads(1)

# Before 2.15, torch's counter does not know the CPU's kernel of attention; its formulas are those of the other kernels.
for kernel, formula in (
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, sdpa_backward_flop),
):
    if kernel not in flop_registry:
        register_flop_formula(kernel, get_raw=True)(formula)

TINY = Path(__file__).parent / "tiny.yaml"
LIMIT = 80
SEVERAL_PROCESSES = ("test_distributed.py", "test_faults.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For pytest-xdist: the longest files first, one after another, since each of their tests takes all cores at times.

    The others are shared out by file, so that what a file's tests share is made once.
    """
    items.sort(key=lambda item: item.path.name not in SEVERAL_PROCESSES)
    for item in items:
        group = "several processes" if item.path.name in SEVERAL_PROCESSES else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny recipe's data set lies, prepared once."""
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
