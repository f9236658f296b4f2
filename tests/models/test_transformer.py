"""The nested transformer, against diffusers' own FLUX: outputs, weights, names, shapes and sizes."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from nami_lightning.conversion.add_stage import NewStage, extend_transformer
from nami_lightning.models.transformer import HeadKind, NamiTransformer2DModel, RopePositions, patchify, unpatchify

pytest_plugins = "helpers.tiny_models"

MakeFlux = Callable[..., FluxTransformer2DModel]
SPLIT: dict[str, Any] = {"num_layers": [2, 0, 0], "num_single_layers": [1, 1, 2]}


def _inputs(height: int = 8, width: int = 12, channels: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, text states, pooled states, and times of two samples."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, channels, height, width, generator=generator)
    text, pooled = torch.randn(2, 5, 16, generator=generator), torch.randn(2, 12, generator=generator)
    return latents, text, pooled, torch.tensor([0.9, 0.25])


def _flux_velocity(flux: FluxTransformer2DModel, latents: Tensor, text: Tensor, pooled: Tensor, t: Tensor) -> Tensor:
    """FLUX called as its own pipeline calls it: packed latents, coordinates, and back."""
    batch, channels, height, width = latents.shape
    velocity = flux(
        hidden_states=FluxPipeline._pack_latents(latents, batch, channels, height, width),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=t,
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, latents.device, latents.dtype),
        txt_ids=torch.zeros(text.shape[1], 3),
    ).sample
    return FluxPipeline._unpack_latents(velocity, height * 8, width * 8, vae_scale_factor=8)


def _random_nami(seed: int = 0, **settings: Any) -> NamiTransformer2DModel:
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "in_channels": 4,
        "num_layers": [1, 1, 0],
        "num_single_layers": [1, 0, 2],
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 12,
        "axes_dims_rope": [4, 6, 6],
    }
    return NamiTransformer2DModel(**defaults | settings)


# --- what is predicted -------------------------------------------------------------------------


@torch.no_grad()
def test_a_clean_image_is_predicted_by_the_finest_stage_alone() -> None:
    clean, plain = (_random_nami(output_head="shared", prediction=kind) for kind in ("clean", "velocity"))
    latents, text, pooled, t = _inputs()
    t[1] = 0.02
    for stage in (0, 1):
        torch.testing.assert_close(
            clean(latents, text, pooled, t, stage), plain(latents, text, pooled, t, stage), rtol=0, atol=0
        )
    velocity, image = (network(latents, text, pooled, t, 2) for network in (clean, plain))
    # JiT: v = (x - z) / t, with t no less than 0.05; here 1 is noise.
    torch.testing.assert_close(velocity[0], (latents[0] - image[0]) / 0.9)
    torch.testing.assert_close(velocity[1], (latents[1] - image[1]) / 0.05)


@torch.no_grad()
def test_a_network_that_knows_the_image_samples_it() -> None:
    network = _random_nami(num_layers=[1], num_single_layers=[0], output_head="shared", prediction="clean")
    network.proj_out.weight.zero_()
    network.proj_out.bias.copy_(torch.arange(16.0))
    x, text, pooled, _ = _inputs()
    for step in range(10):
        x = x - 0.1 * network(x, text, pooled, torch.full((2,), 1 - step / 10), 0)
    image = torch.arange(16.0).view(4, 2, 2).repeat(2, 1, 4, 6)
    torch.testing.assert_close(x, image, rtol=0, atol=1e-4)


def test_a_network_of_clean_images_is_no_flux_and_gets_no_finer_stage() -> None:
    network = _random_nami(output_head="shared", prediction="clean")
    with pytest.raises(ValueError, match="predicts clean images, and FLUX velocities"):
        network.to_flux()
    with pytest.raises(ValueError, match="only a network of prediction velocity can get a finer stage"):
        extend_transformer(network, NewStage(64))


# --- FLUX --------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["grid", "aligned"])
@torch.no_grad()
def test_one_stage_is_flux(make_flux: MakeFlux, positions: RopePositions) -> None:
    flux = make_flux()
    inputs = _inputs()
    nami = NamiTransformer2DModel.from_flux(flux, rope_positions=positions)
    torch.testing.assert_close(nami(*inputs, stage=0), _flux_velocity(flux, *inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["grid", "aligned"])
@torch.no_grad()
def test_the_last_of_three_stages_is_flux(make_flux: MakeFlux, positions: RopePositions) -> None:
    flux = make_flux()
    inputs = _inputs()
    nami = NamiTransformer2DModel.from_flux(flux, **SPLIT, rope_positions=positions)
    torch.testing.assert_close(nami(*inputs, stage=2), _flux_velocity(flux, *inputs), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_early_stage_is_a_flux_of_its_first_blocks(make_flux: MakeFlux) -> None:
    """On the plain grid, stage k is the FLUX one gets by dropping the blocks of the later stages."""
    flux = make_flux()
    inputs = _inputs(4, 6)
    nami = NamiTransformer2DModel.from_flux(flux, **SPLIT, rope_positions="grid")
    for stage, (double, single) in enumerate([(2, 1), (2, 2), (2, 4)]):
        short = copy.deepcopy(flux)
        short.transformer_blocks = short.transformer_blocks[:double]
        short.single_transformer_blocks = short.single_transformer_blocks[:single]
        expected = _flux_velocity(short, *inputs)
        torch.testing.assert_close(nami(*inputs, stage=stage), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", [{}, SPLIT, SPLIT | {"output_head": "per_stage"}])
def test_from_flux_and_back_is_bit_equal(make_flux: MakeFlux, split: dict[str, Any]) -> None:
    flux = make_flux()
    back = NamiTransformer2DModel.from_flux(flux, **split).to_flux()
    weights, expected = back.state_dict(), flux.state_dict()
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert dict(back.config) == dict(flux.config) | {"axes_dims_rope": back.config.axes_dims_rope}


@pytest.mark.parametrize("output_head", ["shared", "per_stage"])
def test_every_head_starts_as_fluxs(make_flux: MakeFlux, output_head: HeadKind) -> None:
    flux = make_flux()
    nami = NamiTransformer2DModel.from_flux(flux, **SPLIT, output_head=output_head)
    for stage in range(nami.num_stages):
        norm_out, proj_out = nami.head(stage)
        assert torch.equal(proj_out.weight, flux.proj_out.weight)
        assert torch.equal(norm_out.linear.weight, flux.norm_out.linear.weight)
    heads = {id(nami.head(stage)[1].weight) for stage in range(nami.num_stages)}
    assert len(heads) == {"shared": 1, "per_stage": 3}[output_head]


def test_a_flux_that_does_not_fit_is_refused(make_flux: MakeFlux) -> None:
    with pytest.raises(ValueError, match="guidance"):
        NamiTransformer2DModel.from_flux(make_flux(1, 1, guidance_embeds=True))
    with pytest.raises(ValueError, match="add up"):
        NamiTransformer2DModel.from_flux(make_flux(2, 4), num_layers=[1, 0], num_single_layers=[2, 2])


def test_patches_are_packed_as_flux_packs_them() -> None:
    latents = torch.arange(2 * 4 * 6 * 8.0).view(2, 4, 6, 8)
    tokens = patchify(latents, 2)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpatchify(tokens, 3, 4, 2), latents)


# --- the sizes of the paper ----------------------------------------------------------------------


def _head_size(width: int, outputs: int = 64) -> int:
    modulation = width * 2 * width + 2 * width
    return modulation + width * outputs + outputs


@pytest.mark.parametrize("output_head", ["shared", "per_stage"])
@pytest.mark.parametrize(
    ("heads", "num_layers", "num_single_layers", "flux_size"),
    [(16, [7, 0, 0], [2, 7, 6], 2_022_708_544), (12, [4, 0, 0], [1, 4, 3], 635_969_600)],
)
def test_papers_models_are_flux_and_its_further_heads(
    heads: int, num_layers: list[int], num_single_layers: list[int], flux_size: int, output_head: HeadKind
) -> None:
    width = heads * 128
    with torch.device("meta"):
        nami = NamiTransformer2DModel(
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            num_attention_heads=heads,
            joint_attention_dim=1024,
            output_head=output_head,
        )
        flux = FluxTransformer2DModel(
            num_layers=sum(num_layers),
            num_single_layers=sum(num_single_layers),
            num_attention_heads=heads,
            joint_attention_dim=1024,
        )
    assert sum(p.numel() for p in flux.parameters()) == flux_size
    assert sum(p.numel() for p in nami.parameters()) == flux_size + 2 * _head_size(width) * (output_head == "per_stage")
    blocks = {name: p.shape for name, p in nami.named_parameters() if not name.startswith("heads.")}
    last = {n.removeprefix("heads.2."): p.shape for n, p in nami.named_parameters() if n.startswith("heads.2.")}
    assert blocks | last == {name: p.shape for name, p in flux.named_parameters()}
    depths = [len(nami.blocks(stage)) for stage in range(3)]
    assert depths == [sum(num_layers[: k + 1]) + sum(num_single_layers[: k + 1]) for k in range(3)]
    assert nami.blocks(2) == [*nami.transformer_blocks, *nami.single_transformer_blocks]


# --- stages --------------------------------------------------------------------------------------


def _gradients(nami: NamiTransformer2DModel, stage: int) -> dict[str, Tensor]:
    nami.zero_grad(set_to_none=True)
    nami.train()(*_inputs(), stage=stage).square().mean().backward()
    return {name: p.grad for name, p in nami.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("output_head", ["shared", "per_stage"])
@pytest.mark.parametrize(("stage", "double", "single"), [(0, 1, 1), (1, 2, 1), (2, 2, 3)])
def test_a_stage_trains_its_own_modules_alone(stage: int, double: int, single: int, output_head: HeadKind) -> None:
    nami = _random_nami(output_head=output_head)
    gradients = _gradients(nami, stage)
    used: tuple[str, ...] = ("time_text_embed.", "context_embedder.", "x_embedder.")
    used += ("norm_out.", "proj_out.") if output_head == "shared" else (f"heads.{stage}.",)
    used += tuple(f"transformer_blocks.{i}." for i in range(double))
    used += tuple(f"single_transformer_blocks.{i}." for i in range(single))
    assert set(gradients) == {name for name, _ in nami.named_parameters() if name.startswith(used)}
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("stage", [0, 2])
def test_gradient_checkpointing_changes_nothing(stage: int) -> None:
    nami = _random_nami()
    calls: list[int] = []
    nami.get_submodule("transformer_blocks.0.attn").register_forward_pre_hook(lambda *_: calls.append(stage))
    plain = _gradients(nami, stage)
    assert len(calls) == 1
    nami.enable_gradient_checkpointing()
    checkpointed = _gradients(nami, stage)
    assert len(calls) == 1 + 2  # once more in the backward pass
    assert set(checkpointed) == set(plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def _positions(nami: NamiTransformer2DModel, stage: int, height: int, width: int) -> Tensor:
    """The coordinates that the rotary embedding was given."""
    seen: list[Tensor] = []
    hook = nami.pos_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    nami(*_inputs(height, width), stage=stage)
    hook.remove()
    return seen[0]


@torch.no_grad()
def test_positions_stay_when_a_finer_stage_is_added() -> None:
    before = _random_nami()
    after = _random_nami(num_layers=[1, 1, 0, 0], num_single_layers=[1, 0, 2, 1], rope_unit_stage=2)
    for stage in range(3):
        torch.testing.assert_close(_positions(after, stage, 8, 12), _positions(before, stage, 8, 12))
    text, image = _positions(after, 3, 8, 12).split([5, 24])  # 4 x 6 tokens, half as far apart
    assert not text.any()
    torch.testing.assert_close(image[0], torch.tensor([0.0, -0.25, -0.25]))
    torch.testing.assert_close(image[-1] - image[0], torch.tensor([0.0, 1.5, 2.5]))


@torch.no_grad()
def test_aligned_coarse_tokens_sit_at_the_centre_of_the_tokens_they_cover() -> None:
    nami = _random_nami(rope_positions="aligned")
    finest = _positions(nami, 2, 16, 24)
    expected_ids = FluxPipeline._prepare_latent_image_ids(1, 8, 12, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(finest, torch.cat([torch.zeros(5, 3), expected_ids]))
    fine = finest[5:].view(8, 12, 3)
    for stage, cell in ((1, 2), (0, 4)):
        coarse = _positions(nami, stage, 16 // cell, 24 // cell)
        assert not coarse[:5].any()
        covered = fine.unfold(0, cell, cell).unfold(1, cell, cell).mean((-1, -2))
        torch.testing.assert_close(coarse[5:].view(8 // cell, 12 // cell, 3), covered)


@torch.no_grad()
def test_grid_positions_count_each_stages_own_tokens() -> None:
    nami = _random_nami(rope_positions="grid")
    for stage in range(3):
        expected = FluxPipeline._prepare_latent_image_ids(1, 4, 6, torch.device("cpu"), torch.float32)
        assert torch.equal(_positions(nami, stage, 8, 12)[5:], expected)


# --- the house -----------------------------------------------------------------------------------


@torch.no_grad()
def test_initial_output_is_exactly_zero() -> None:
    nami = _random_nami()
    assert nami(*_inputs(), stage=0).any()
    nami.init_weights()
    assert not any(nami(*_inputs(), stage=stage).any() for stage in range(3))
    latents, text, pooled, t = _inputs()
    context = nami.context_embedder(text)
    temb = nami.time_text_embed(t * 1000, pooled)
    rotary = nami.pos_embed(torch.zeros(5 + 24, 3))
    x = nami.x_embedder(patchify(latents, 2))
    for block in [*nami.transformer_blocks, *nami.single_transformer_blocks]:
        torch.testing.assert_close(block(x, context, temb, rotary), (context, x))  # every block is the identity


def test_initial_weights_can_be_trained() -> None:
    """A zero output must not be a dead end: the heads get a gradient at once."""
    nami = _random_nami()
    nami.init_weights()
    latents, *conditions = _inputs()
    torch.nn.functional.mse_loss(nami(latents, *conditions, stage=0), latents).backward()
    gradients = {name for name, p in nami.named_parameters() if p.grad is not None and p.grad.any()}
    assert "proj_out.weight" in gradients


@torch.no_grad()
def test_a_config_without_the_newer_settings_means_what_it_meant(tmp_path: Path) -> None:
    nami = _random_nami(output_head="per_stage").eval()
    nami.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: config[key] for key in config if key not in ("output_head", "rope_unit_stage")}))
    loaded = NamiTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.config.output_head == "per_stage"
    torch.testing.assert_close(loaded(*_inputs(), stage=1), nami(*_inputs(), stage=1))


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    nami = _random_nami(rope_positions="grid").eval()
    nami.save_pretrained(tmp_path)
    loaded = NamiTransformer2DModel.from_pretrained(tmp_path)
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in nami.state_dict().items())
    for stage in range(3):
        torch.testing.assert_close(loaded(*_inputs(), stage=stage), nami(*_inputs(), stage=stage))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_layers": [1, 1], "num_single_layers": [1]}, "num_layers"),
        ({"num_layers": [], "num_single_layers": []}, "num_layers"),
        ({"num_layers": [1, -1], "num_single_layers": [1, 1]}, "negative"),
        ({"num_layers": [0, 1], "num_single_layers": [0, 1]}, "first stage"),
        ({"axes_dims_rope": [4, 6, 8]}, "axes_dims_rope"),
        ({"axes_dims_rope": [5, 5, 6]}, "axes_dims_rope"),
        ({"output_head": "both"}, "output_head must be one of shared, per_stage"),
        ({"rope_positions": "none"}, "rope_positions must be one of aligned, grid"),
        ({"rope_unit_stage": 3}, "rope_unit_stage must be a stage, 0 to 2"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _random_nami(**settings)
