"""NamiModule's step: against the loss written out by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nami_lightning.runs.recipe import Recipe
from nami_lightning.training import rng
from nami_lightning.training.batch import MicroBatch, pixels
from nami_lightning.training.module import NamiModule

TINY = Path(__file__).parents[1] / "tiny.yaml"
ONE_STAGE = [
    *("--resolutions", "[16]"),
    *("--model.transformer.init_args.num_layers", "[1]"),
    *("--model.transformer.init_args.num_single_layers", "[1]"),
    *("--model.bridge.init_args.window_ratios", "[1]"),
    *("--curriculum.phases", "[{steps: 5, ratio: [1], learning_rate: 0.001}]"),
]


def make(*overrides: str) -> NamiModule:
    module = Recipe(TINY, overrides).make_model()
    module.configure_model()
    with torch.no_grad():
        for parameter in module.transformer.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return module


def micro_batch(stage: int, side: int, count: int = 3) -> MicroBatch:
    images = torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return MicroBatch(7, stage, images, ["red apple"] * count, ["a"] * count, list(range(count)))


def test_one_stage_is_plain_rectified_flow() -> None:
    module, micro = make(*ONE_STAGE, "--model.tau", "logit_normal"), micro_batch(0, 16)
    z = micro.images.float() / 127.5 - 1
    draws = rng.sample(3, 7, micro.global_indices, (3, 16, 16))
    t = torch.sigmoid(draws.normal)
    x = t.view(-1, 1, 1, 1) * draws.noise + (1 - t.view(-1, 1, 1, 1)) * z
    text = module.text_encoder(micro.captions)
    velocity = module.transformer(x, text.sequence, text.pooled, t, 0)
    expected = F.mse_loss(velocity, draws.noise - z)
    torch.testing.assert_close(module.flow_loss(module, module.transformer, micro, 7)[0], expected)


def test_the_papers_loss_is_ours_times_the_squared_width() -> None:
    micro = micro_batch(1, 16)
    ours, papers = make(), make("--model.local_velocity_loss", "true")
    papers.bridge.load_state_dict(ours.bridge.state_dict())
    loss = papers.flow_loss(papers, papers.transformer, micro, 7)[0]
    torch.testing.assert_close(loss, ours.flow_loss(ours, ours.transformer, micro, 7)[0] / 9)


def test_pooled_and_encoded_pyramids_agree_on_pixels() -> None:
    finest = micro_batch(1, 32)
    images = pixels(finest.images)
    pooled = make("--model.latent_pyramid", "pool").latents(finest, 7)
    for found, factor in zip(pooled, (2, 4), strict=True):
        torch.testing.assert_close(found, F.avg_pool2d(images, factor))


def test_dropped_prompts_become_the_empty_one() -> None:
    module = make()
    drop = torch.tensor([True, False])
    states = module.encode_prompts(["dog", "dog"], drop)
    empty, dog = module.text_encoder([""]), module.text_encoder(["dog"])
    assert torch.equal(states.sequence[0], empty.sequence[0])
    assert torch.equal(states.pooled[1], dog.pooled[0])


def test_validation_chance_is_fixed_and_needs_no_global_state() -> None:
    module, micro = make(), micro_batch(2, 32)
    torch.manual_seed(1)
    first = module.flow_loss(module, module.transformer, micro, "validation")[0]
    torch.manual_seed(2)
    assert torch.equal(module.flow_loss(module, module.transformer, micro, "validation")[0], first)
    assert not torch.equal(module.flow_loss(module, module.transformer, micro, 8)[0], first)


def test_running_losses_start_at_the_first_and_skip_untrained_stages() -> None:
    module = make()
    module._update_running_losses(torch.tensor([4.0, 0.0, 2.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert module.running_losses[:3:2].tolist() == [4.0, 2.0]
    assert module.running_losses[1].isnan()
    module._update_running_losses(torch.tensor([2.0, 5.0, 2.0]), torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(module.running_losses, torch.tensor([4 * 0.99 + 2 * 0.01, 5.0, 2.0]))


def test_weights_are_a_function_of_the_seed() -> None:
    one, same, other = make(), make(), make("--seed", "4")
    weights = [dict(module.transformer.named_parameters())["x_embedder.weight"] for module in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_frozen_parts_are_named_in_the_checkpoint_but_not_in_it() -> None:
    module = make()
    module.encode_prompts(["dog"])
    module.latents(micro_batch(0, 8), 0)
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["nami"]["encoders"]["model.text_encoder.sequence"]["name"] == "all-MiniLM-L6-v2"
    assert {name.split(".")[0] for name in module.state_dict()} == {"bridge", "transformer", "running_losses"}


def test_it_starts_from_pretrained_weights(tmp_path: Path) -> None:
    source = make()
    source.transformer.save_pretrained(tmp_path)
    module = Recipe(TINY, ["--model.pretrained", str(tmp_path)]).make_model()
    module.configure_model()
    for found, expected in zip(module.transformer.parameters(), source.transformer.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_text_encoder_of_another_width_is_refused() -> None:
    module = Recipe(TINY, ["--model.transformer.init_args.joint_attention_dim", "256"]).make_model()
    with pytest.raises(ValueError, match="gives states 384 wide"):
        module.encode_prompts(["dog"])


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "64-true"])
def test_precisions_that_need_a_scaled_loss_or_converted_batches_are_refused(precision: str) -> None:
    module = make()
    module._trainer = SimpleNamespace(precision=precision)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=f"{precision} is not supported"):
        module.setup("fit")


def test_another_optimizer_has_its_own_defaults() -> None:
    """Not those of AdamW, whose weight decay is 0.01."""
    optimizer = make("--model.optimizer", "torch.optim.Adam").configure_optimizers()
    assert optimizer.defaults["weight_decay"] == 0
    assert isinstance(make("--model.optimizer", "null").configure_optimizers(), torch.optim.AdamW)
