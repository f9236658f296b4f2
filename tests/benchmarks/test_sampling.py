"""What the benchmark of sampling runs, counted in the blocks and by torch; its times are nobody's to assert."""

import csv
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nami_lightning.benchmarks.sampling import PIPELINES, Encoders, all_blocks, count_operations, time_sampling
from nami_lightning.benchmarks.sampling_report import Measurement, less_than_flux_base, render_tables, with_paper
from nami_lightning.cli.main import main
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.planning.flops import transformer_flops
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
    own = pipeline.bridge.num_stages
    timing = time_sampling(pipeline, [steps * stages // own] * own, images=3)

    assert len(timing.stages) == own
    assert all(value > 0 for value in timing.stages)
    assert 0 < timing.network < sum(timing.stages) <= timing.whole
    tokens = [(side // config["patch_size"]) ** 2 for side in model.resolutions]
    expected: dict[str, list[int]] = {
        "NAMI": [steps * total for total in accumulate(blocks)],
        "flow-only": [steps * sum(blocks)] * stages,
        "FLUX-base": [0] * (stages - 1) + [steps * stages * sum(blocks)],
    }
    assert [runs[count] for count in tokens] == expected[name]


@pytest.mark.parametrize("side", [32, 64])
def test_the_operations_are_those_that_torch_counts_in_the_call(side: int) -> None:
    model = Recipe(TINY).make_model()
    less = {}
    for counted in (False, True):
        totals = {}
        for name, make in PIPELINES.items():
            pipeline = make(model)
            own = pipeline.bridge.num_stages
            steps = [2 * model.num_stages // own] * own
            if counted:
                with FlopCounterMode(display=False) as counter:  # of the whole call, bridges included
                    time_sampling(pipeline, steps, 3, side)
                totals[name] = counter.get_total_flops()
            else:
                totals[name] = count_operations(pipeline, steps, 3, side)
        less[counted] = {name: 1 - total / totals["FLUX-base"] for name, total in totals.items()}
    assert less[True] == pytest.approx(less[False], abs=0.01)


def test_nami_0_6b_takes_sixty_percent_less_operations_at_1024_px_as_torch_counts_them() -> None:
    model = Recipe("nami_0.6b").make_model()
    config, length = model.transformer_config, model.text_encoder_config.max_length
    flux_base = config | {key: [total] for key, total in all_blocks(model).items()}
    totals = []
    for one, sides in ((config, [256, 512, 1024]), (flux_base, [1024] * 3)):
        formula = counted = 0
        with torch.device("meta"):
            network = NamiTransformer2DModel(**one)
            states = torch.empty(1, length, one["joint_attention_dim"]), torch.empty(1, one["pooled_projection_dim"])
            for number, side in enumerate(sides):
                stage, latent = min(number, network.num_stages - 1), side // model.autoencoder_config.factor
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    network(torch.empty(1, one["in_channels"], latent, latent), *states, torch.ones(1), stage)
                counted += counter.get_total_flops()
                formula += transformer_flops(one, stage, (side // 16) ** 2, length).forward
        totals.append((formula, counted))
    (nami, nami_counted), (flux, flux_counted) = totals
    assert 1 - nami / flux == pytest.approx(1 - nami_counted / flux_counted, abs=0.01)
    assert 1 - nami / flux == pytest.approx(0.598, abs=5e-4)


def test_the_command_prints_a_row_a_model(capsys: Any) -> None:
    assert main(["bench", "sample", str(TINY), "--steps", "1", "--rounds", "1", "--batch_size", "2"]) == 0
    header, *rows = capsys.readouterr().out.strip().splitlines()
    assert header.split()[:7] == ["model", "8", "px", "16", "px", "32", "px"]
    assert header.split()[7:] == ["seconds", "less", "TFLOP", "less", "overhead"]
    assert [row.split()[0] for row in rows[:3]] == ["NAMI", "flow-only", "FLUX-base"]
    assert rows[2].split()[1:3] == ["-", "-"]
    assert rows[2].split()[-4] == rows[2].split()[-2] == "0.0%"
    assert "2 image(s) at once, 1 steps per stage (3 in one stage)" in rows[-1]


def test_resolutions_and_encoders_go_into_the_table_the_csv_and_the_plot(tmp_path: Path, capsys: Any) -> None:
    command = ["bench", "sample", str(TINY), "--steps", "1", "--rounds", "1", "--warm_up", "0", "--with_encoders"]
    assert main([*command, "--resolutions", "32", "64", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "16 px  32 px  64 px" in printed
    with (tmp_path / "out" / "sampling.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["resolution"], row["model"]) for row in rows] == [
        (side, name) for side in ("32", "64") for name in PIPELINES
    ]
    for row in rows:
        parts = [float(row[name]) for name in ("seconds", "seconds_prompts", "seconds_decoding")]
        assert float(row["seconds_with_encoders"]) == pytest.approx(sum(parts))
        assert min(parts) > 0
        base = next(one for one in rows if one["model"] == "FLUX-base" and one["resolution"] == row["resolution"])
        assert float(row["less_seconds"]) == pytest.approx(1 - float(row["seconds"]) / float(base["seconds"]))
    assert [row["steps"] for row in rows] == ["1+1+1", "1+1+1", "3"] * 2
    assert Image.open(tmp_path / "out" / "sampling.png").size[0] > 500
    assert (tmp_path / "out" / "sampling.svg").is_file()


def test_a_resolution_that_the_stages_cannot_halve_is_refused(capsys: Any) -> None:
    assert main(["bench", "sample", str(TINY), "--resolutions", "40"]) == 2
    assert "--resolutions: 40 px is not a multiple of 16" in capsys.readouterr().err


def test_the_encoders_are_not_asked_from_memory() -> None:
    model = Recipe(TINY).make_model()
    assert model.text_encoder_config.cache
    assert Encoders(model, "cpu").text.cache is None


def test_the_papers_figures_stand_beside_three_stages_up_to_1024_px_alone() -> None:
    def measured(side: int, stages: int) -> list[Measurement]:
        return [
            Measurement("NAMI", side, [1] * stages, 1, [1.0] * stages, 3.0, 0.01, 10**12),
            Measurement("FLUX-base", side, [stages], 1, [6.0], 6.0, 0.01, 4 * 10**12),
        ]

    assert len(with_paper(measured(512, 3))) == len(with_paper(measured(1024, 2))) == 2
    shown = with_paper([*measured(512, 3), *measured(1024, 3), *measured(2048, 3)])
    assert [(one.side, one.model) for one in shown[4:7]] == [
        (1024, f"{name} (paper)") for name in ("NAMI", "flow-only", "FLUX-base")
    ]
    # Table 2's own reduction, 64.82%, and Figure 26's 53.01%.
    assert less_than_flux_base(shown[4], shown, "seconds") == pytest.approx(0.6482, abs=1e-4)
    assert less_than_flux_base(shown[5], shown, "seconds") == pytest.approx(0.5301)
    assert less_than_flux_base(shown[2], shown, "operations") == 0.75
    small, large, _, note = render_tables(shown)
    assert "paper" not in small
    assert ["NAMI", "(paper)", "0.270", "0.450", "2.210", "2.980", "64.8%", "-", "-", "-"] in [
        line.split() for line in large.splitlines()
    ]
    assert "A100" in note
