"""What only a GPU can show: ``make gpu``. Without one every test here is skipped, and says so."""

from collections.abc import Callable

import pytest
import torch

from nami_lightning.benchmarks.gpu.parity import CHECKS, Skipped
from nami_lightning.benchmarks.gpu.section import Promise
from nami_lightning.benchmarks.gpu.sizes import GPU, Training
from nami_lightning.benchmarks.gpu.training_speed import measure_training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible: make gpu, where one is"),
]

DEMO = Training(
    "demo",
    "openmoji",
    (
        "--data.init_args.source=null",  # the steps are random
        "--trainer.accelerator=gpu",
        "--trainer.precision=bf16-mixed",
        "--curriculum.unit=4",
        "--curriculum.phases=[{steps: 100, ratio: [1, 2, 4], learning_rate: 5.0e-5}]",
    ),
    bare_loop=False,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_gpu_computes_what_the_cpu_does(check: Callable[[torch.device], list[Promise]]) -> None:
    try:
        promises = check(GPU.device)
    except Skipped as reason:
        pytest.skip(str(reason))
    assert [promise for promise in promises if promise.held is False] == []


def test_a_step_waits_for_the_gpu_once() -> None:
    measured = measure_training(DEMO, GPU)
    assert measured.waits is not None
    assert measured.waits <= 1, measured.places
