"""What the benchmark of drawing runs, counted in the blocks themselves; its times are nobody's to assert."""

from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from nami_lightning.benchmarks.sampling import PIPELINES, time_sampling
from nami_lightning.cli.main import main
from nami_lightning.runs.recipe import Recipe

TINY = Path(__file__).parents[1] / "tiny.yaml"


@pytest.mark.parametrize("name", list(PIPELINES))
def test_all_take_as_many_steps_and_the_blocks_that_they_should(name: str) -> None:
    model = Recipe(TINY).make_model()
    config, stages, steps = model.transformer_config, model.num_stages, 2
    blocks = [a + b for a, b in zip(config["num_layers"], config["num_single_layers"], strict=True)]
    pipeline = PIPELINES[name](model)
    runs: Counter[int] = Counter()  # of any block, by the tokens of the image

    def count(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        runs[inputs[0].shape[1]] += 1

    for block in (*pipeline.transformer.transformer_blocks, *pipeline.transformer.single_transformer_blocks):
        block.register_forward_hook(count)
    seconds = time_sampling(pipeline, steps * stages // pipeline.bridge.num_stages, images=3)

    assert len(seconds) == pipeline.bridge.num_stages
    assert all(value > 0 for value in seconds)
    tokens = [(side // config["patch_size"]) ** 2 for side in model.resolutions]
    expected: dict[str, list[int]] = {
        "NAMI": [steps * total for total in accumulate(blocks)],
        "flow-only": [steps * sum(blocks)] * stages,
        "FLUX-base": [0] * (stages - 1) + [steps * stages * sum(blocks)],
    }
    assert [runs[count] for count in tokens] == expected[name]


def test_the_command_prints_a_row_a_model(capsys: Any) -> None:
    assert main(["bench", "sample", str(TINY), "--steps", "1", "--rounds", "1", "--batch_size", "2"]) == 0
    header, *rows, about = capsys.readouterr().out.strip().splitlines()
    assert header.split() == ["model", "8", "px", "16", "px", "32", "px", "overall", "less", "than", "FLUX-base"]
    assert [row.split()[0] for row in rows] == ["NAMI", "flow-only", "FLUX-base"]
    assert rows[2].split()[1:3] == ["-", "-"]
    assert rows[2].split()[-1] == "0.0%"
    assert "2 image(s) at once, 1 steps per stage (3 in one stage)" in about
