"""Techniques of training: each against its published definition, off, resumed, on two processes, and their cost."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.checkpoint_contents import numbers, same_numbers
from helpers.processes import run
from helpers.tiny_models import TwoMaps
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nami_lightning.cli.main import make_parser
from nami_lightning.cli.plan import read_setup
from nami_lightning.metrics.budget import sample_flops, training_flops
from nami_lightning.models.autoencoder import AutoencoderConfig
from nami_lightning.models.transformer import patchify, unpatchify
from nami_lightning.planning.flops import transformer_flops
from nami_lightning.planning.plan import make_plan
from nami_lightning.runs.load import load_module, load_pipeline
from nami_lightning.runs.recipe import Recipe
from nami_lightning.runs.run_dir import Run
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.loss import FlowError
from nami_lightning.training.module import NamiModule
from nami_lightning.training.techniques.perceptual import PerceptualLoss
from nami_lightning.training.techniques.representation_alignment import RepresentationAlignment
from nami_lightning.training.techniques.technique import ForwardPass, Technique
from nami_lightning.training.techniques.token_routing import TokenRouting

TINY = Path(__file__).parents[1] / "tiny.yaml"
ROUTING = "{class_path: nami_lightning.TokenRouting, init_args: {share: 0.5, first_block: 1}}"
ALIGNMENT = (
    "{class_path: nami_lightning.RepresentationAlignment, init_args: {weight: 0.3, centring: 0.8, cache: true, "
    "encoder: {class_path: helpers.tiny_models.ColourMap}}}"
)
CONTRAST = "{class_path: nami_lightning.ContrastiveFlow, init_args: {weight: 0.1}}"
PERCEPTUAL = (
    "{class_path: nami_lightning.PerceptualLoss, init_args: {weight: 0.2, stages: [2, 3], "
    "encoder: {class_path: helpers.tiny_models.TwoMaps}}}"
)
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

        def spy(*inputs: Any, **keywords: Any) -> Tensor:
            hooks.extend(keywords["block_hooks"])
            velocity: Tensor = forward(*inputs, **keywords)
            return velocity

        module.transformer.forward = spy
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


# --- representation alignment ------------------------------------------------------------------


def alignment(module: NamiModule) -> RepresentationAlignment:
    (technique,) = module.techniques
    assert isinstance(technique, RepresentationAlignment)
    return technique


@pytest.mark.parametrize(("stage", "side"), [(0, 2), (1, 4), (2, 8)])
def test_tokens_are_compared_with_the_features_of_the_image(stage: int, side: int) -> None:
    module, micro = make(ALIGNMENT), micro_batch(stage)
    tokens: list[Tensor] = []
    module.transformer.transformer_blocks[0].register_forward_hook(lambda *call: tokens.append(call[2][1]))
    added = loss(module, micro).added["representation_alignment"]

    # REPA, eq. 8: minus the mean over patches of the cosine similarity; iREPA takes a share of the mean off.
    kernel: Any = alignment(module).projector
    colours = F.adaptive_avg_pool2d(micro.images.float() / 255, 4)
    features = torch.cat([colours, colours**2], 1)
    features = F.adaptive_avg_pool2d(features, side) if side <= 4 else F.interpolate(features, size=8, mode="bilinear")
    similarities = []
    for sample in range(3):
        of_image = features[sample] - 0.8 * features[sample].mean((1, 2), keepdim=True)
        picture = tokens[0][sample].reshape(side, side, 32).permute(2, 0, 1)
        projected = F.conv2d(picture[None], kernel.weight, kernel.bias, padding=1)[0]
        for row in range(side):
            for column in range(side):
                a, b = projected[:, row, column], of_image[:, row, column]
                similarities.append((a @ b) / (a.norm() * b.norm()))
    torch.testing.assert_close(added, 0.3 * (1 - torch.stack(similarities).mean()), rtol=0, atol=2e-3)


def test_an_image_is_encoded_once_where_features_are_remembered() -> None:
    module = make(ALIGNMENT)
    seen: list[int] = []
    alignment(module).encoder[0].register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    first = [loss(module, micro_batch(stage)).added["representation_alignment"] for stage in (0, 2)]
    again = [loss(module, micro_batch(stage)).added["representation_alignment"] for stage in (0, 2)]
    assert seen == [3, 3]
    assert first == again


def test_latents_alone_are_refused() -> None:
    module, micro = make(ALIGNMENT), micro_batch(0)
    micro, x = replace(micro, images=torch.zeros(3, 3, 0, 0)), torch.zeros(3, 3, 8, 8)
    forward = ForwardPass(micro, 0, module.bridge.windows[0], x, torch.zeros(3), x)
    with pytest.raises(ValueError, match="needs images, and this data set holds latents alone"):
        alignment(module).loss(forward)


def test_tokens_that_are_read_are_not_routed_away() -> None:
    early = ROUTING.replace("first_block: 1", "first_block: 0")
    with pytest.raises((ValueError, SystemExit), match="some of stage 3 skip these: read them"):
        make(early, ALIGNMENT)
    make(early.replace("share", "end_step: 9, share"))  # alone it fits

    both, micro = make(ROUTING, ALIGNMENT), micro_batch(2)  # the reader comes first, whatever the order
    assert torch.equal(
        loss(both, micro).added["representation_alignment"],
        loss(make(ALIGNMENT), micro).added["representation_alignment"],
    )


def test_a_checkpoint_holds_the_projector_and_an_export_does_not(whole: Path, tmp_path: Path) -> None:
    weights = torch.load(Run(whole).checkpoint(), weights_only=True)["state_dict"]
    assert {name for name in weights if name.startswith("techniques")} == {
        "techniques.1.projector.weight",
        "techniques.1.projector.bias",
    }
    assert not any("projector" in name for name in load_pipeline(str(whole)).transformer.state_dict())


# --- contrastive flow matching -----------------------------------------------------------------


def passes(module: NamiModule, micro: MicroBatch, monkeypatch: pytest.MonkeyPatch) -> tuple[FlowError, ForwardPass]:
    """The loss of a micro-batch, and the pass that it was computed from."""
    (technique,) = module.techniques
    seen: list[ForwardPass] = []
    assert isinstance(technique, Technique)
    plain = technique.loss

    def spy(forward: ForwardPass) -> Tensor | None:
        seen.append(forward)
        return plain(forward)

    monkeypatch.setattr(technique, "loss", spy)
    return loss(module, micro), seen[0]


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize(("count", "others"), [(2, [1, 0]), (5, [1, 0, 3, 2, 0])])
def test_the_velocity_is_pushed_from_that_of_another_sample(
    count: int, others: list[int], local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(CONTRAST)
    module.flow_loss = replace(module.flow_loss, local_velocity=local)
    error, forward = passes(module, micro_batch(1, count), monkeypatch)
    assert forward.velocity is not None
    # Contrastive flow matching: |v - u|^2 - weight * |v - u of another|^2; the stage's width is 1/3.
    near = sum(((forward.velocity[i] - forward.target[i]) ** 2).mean() for i in range(count)) / count
    far = sum(((forward.velocity[i] - forward.target[others[i]]) ** 2).mean() for i in range(count)) / count
    scale = 1 / 9 if local else 1
    torch.testing.assert_close(error.loss, scale * near)
    torch.testing.assert_close(error.added["contrastive_flow"], -0.1 * scale * far)


def test_one_sample_has_no_other() -> None:
    assert loss(make(CONTRAST), micro_batch(1, count=1)).added == {}


# --- the perceptual loss -----------------------------------------------------------------------


def test_predicted_images_are_compared_by_their_features(monkeypatch: pytest.MonkeyPatch) -> None:
    module, micro = make(PERCEPTUAL), micro_batch(2)
    error, forward = passes(module, micro, monkeypatch)
    assert forward.velocity is not None
    encoder = TwoMaps()
    total = torch.zeros(())
    for sample in range(3):
        # The last stage is x = z + sigma * velocity, and sigma is tau times its width, a third.
        predicted = forward.x[sample] - forward.tau[sample] / 3 * forward.velocity[sample]
        first = [encoder.first((image[None] + 1) / 2) for image in (predicted, micro.images[sample] / 127.5 - 1)]
        second = [encoder.second(one.relu()) for one in first]
        for a, b in (first, second):  # LPIPS, eq. 1, all its weights 1
            units = [one[0] / one[0].norm(dim=0) for one in (a, b)]
            total = total + (1 - forward.tau[sample]) * ((units[0] - units[1]) ** 2).sum(0).mean() / 2 / 3
    torch.testing.assert_close(error.added["perceptual"], 0.2 * total, rtol=1e-3, atol=1e-5)
    (slope,) = torch.autograd.grad(error.added["perceptual"], forward.velocity)
    assert (slope.abs().amax((1, 2, 3)) > 0).all()


def test_stages_that_are_not_named_have_no_perceptual_loss() -> None:
    assert loss(make(PERCEPTUAL), micro_batch(0)).added == {}
    finest = PERCEPTUAL.replace("stages: [2, 3], ", "")
    assert [list(loss(make(finest), micro_batch(stage)).added) for stage in range(3)] == [[], [], ["perceptual"]]


def test_the_perceptual_loss_refuses_latents() -> None:
    (technique,) = make(PERCEPTUAL).techniques
    assert isinstance(technique, PerceptualLoss)
    with pytest.raises(ValueError, match="compares images, and this model has latents of the autoencoder vae"):
        technique.prepare(technique.config, AutoencoderConfig("vae", factor=8))


# --- the clean image ---------------------------------------------------------------------------


def test_a_clean_image_is_trained_by_the_error_of_its_velocity() -> None:
    clean = "--model.transformer.init_args.prediction"
    module = Recipe(TINY, [clean, "clean"]).make_model()
    module.configure_model()  # its head is zero: it predicts the grey image
    micro = micro_batch(2)
    images = micro.images.float() / 127.5 - 1
    seen: list[Tensor] = []
    module.transformer.register_forward_pre_hook(lambda _, inputs: seen.extend((inputs[0], inputs[3])))
    error = loss(module, micro)
    x, t = seen[0], seen[1].view(-1, 1, 1, 1)
    expected = ((x / t.clamp(min=0.05) - (x - images) / t) ** 2).mean()
    torch.testing.assert_close(error.loss, expected, rtol=1e-3, atol=0)
    with pytest.raises((ValueError, SystemExit), match="prediction clean needs a bridge with time noise_level"):
        Recipe(TINY, [clean, "clean", "--model.bridge.init_args.velocity_time", "local"]).make_model()


# --- all ---------------------------------------------------------------------------------------

ALL = [ROUTING, ALIGNMENT, CONTRAST, PERCEPTUAL]


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


@pytest.mark.parametrize("technique", ALL)
def test_a_plan_counts_the_operations_that_training_counts(technique: str) -> None:
    options, overrides = make_parser().parse_known_args(["plan", str(TINY), "--model.techniques", f"[{technique}]"])
    parsed = Recipe(options.recipe, overrides)
    setup = read_setup("tiny", parsed.parser.instantiate(parsed.config), options)
    module, plain = make(technique), make()
    stages = make_plan(setup).stages
    assert [one.flops for one in stages] == [sample_flops(module, stage) for stage in range(3)]
    assert (stages[2].flops == sample_flops(plain, 2)) is ("Contrastive" in technique)  # it adds no matrix product
    (base,) = make_plan(setup.flux_base()).stages
    assert base.flops == transformer_flops(setup.flux_base().network.config, 0, 64, 8, 0)


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


def test_another_list_of_trained_parts_does_not_resume(tiny_module: list[str], whole: Path) -> None:
    settings = [*tiny_module, "--name", "whole", "--curriculum.phases", STEPS.replace("steps: 3", "steps: 4")]
    assert "its techniques is {'RepresentationAlignment'" in run([*settings], status=2)


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
        (ALIGNMENT.replace("weight: 0.3", "weight: 0"), "weight above 0"),
        (ALIGNMENT.replace("weight: 0.3", "depth: 2"), "depth must be 1 to 1"),
        (CONTRAST.replace("0.1", "1"), "weight between 0 and 1"),
        (PERCEPTUAL.replace("0.2", "0"), "weight above 0"),
        (PERCEPTUAL.replace("[2, 3]", "[0]"), "PerceptualLoss.stages has 0, and the model stages 1 to 3"),
        (f"{ROUTING}, {ROUTING}", "lists TokenRouting more than once"),
    ],
)
def test_what_does_not_fit_is_refused(technique: str, message: str) -> None:
    with pytest.raises((ValueError, SystemExit), match=message):
        make(technique)
