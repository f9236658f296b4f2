"""A pytest plugin: tiny models of diffusers and transformers with random weights, made on the spot."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    MT5Config,
    MT5EncoderModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from nami_lightning.models.autoencoder import PixelCodec
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.image_features import ImageEncoder
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.pipelines.nami_pipeline import NamiPipeline

WORDS = ["a", "the", "red", "blue", "green", "cat", "dog", "tree", "house", "on", "in", "under", "big", "small", "and"]
PAD, EOS, UNKNOWN, BOS = range(4)
VOCABULARY = {"<pad>": PAD, "</s>": EOS, "<unk>": UNKNOWN, "<s>": BOS} | {w: i + 4 for i, w in enumerate(WORDS)}

TextModel = tuple[Any, PreTrainedTokenizerFast]
MakeFlux = Callable[..., FluxTransformer2DModel]


def make_tokenizer(model_max_length: int, bos: bool = False) -> PreTrainedTokenizerFast:
    """Words to numbers, ``</s>`` at the end, and ``<s>`` in front if ``bos``."""
    backend = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>" if bos else "$A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=model_max_length,
    )


@pytest.fixture
def t5() -> TextModel:
    """A T5 encoder 16 wide, with its tokenizer."""
    return make_t5()


def make_t5() -> TextModel:
    """Return a T5 encoder 16 wide, with its tokenizer."""
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=len(VOCABULARY), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=PAD
    )
    return T5EncoderModel(config).eval(), make_tokenizer(64)


def make_mt5() -> TextModel:
    """Return an mT5 encoder 16 wide, with its tokenizer."""
    torch.manual_seed(6)
    config = MT5Config(
        vocab_size=len(VOCABULARY), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=PAD
    )
    return MT5EncoderModel(config).eval(), make_tokenizer(512)


def make_bert() -> TextModel:
    """Return a BERT 12 wide without a pooling layer, with its tokenizer of 77 tokens."""
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        pad_token_id=PAD,
    )
    return BertModel(config, add_pooling_layer=False).eval(), make_tokenizer(77, bos=True)


@pytest.fixture
def clip() -> TextModel:
    """A CLIP text encoder 12 wide, with its tokenizer."""
    return make_clip()


def make_clip() -> TextModel:
    """Return a CLIP text encoder 12 wide, with its tokenizer."""
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return CLIPTextModel(config).eval(), make_tokenizer(20, bos=True)


@pytest.fixture
def vae() -> AutoencoderKL:
    """An autoencoder with 4 channels that reduces by 2, with a scale and a shift."""
    return make_vae(3)


def make_vae(seed: int) -> AutoencoderKL:
    """Return an autoencoder with 4 channels that reduces by 2, with random weights, a scale and a shift."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.7,
        shift_factor=0.2,
        sample_size=16,
    ).eval()


def make_two_stages(**changes: Any) -> NamiTransformer2DModel:
    """Return a network of two stages, 32 wide, with random weights; ``changes`` replace its settings."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "in_channels": 4,
        "patch_size": 2,
        "num_layers": [1, 0],
        "num_single_layers": [0, 2],
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 6, 6],
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
    }
    return NamiTransformer2DModel(**settings | changes)


@pytest.fixture
def make_flux() -> MakeFlux:
    """Makes a FLUX 32 wide with random weights; ``make_flux(double, single)``."""

    def make(double: int = 2, single: int = 4, **settings: Any) -> FluxTransformer2DModel:
        torch.manual_seed(4)
        defaults: dict[str, Any] = {
            "patch_size": 1,
            "in_channels": 16,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        }
        flux = FluxTransformer2DModel(num_layers=double, num_single_layers=single, **defaults | settings)
        return flux.eval()

    return make


class ColourMap(ImageEncoder):
    """An image encoder for alignment: the colours of a grid of 4 by 4 cells, and their squares."""

    num_features = 6

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return one map ``(B, 6, 4, 4)``."""
        colours = nn.functional.adaptive_avg_pool2d(images, 4)
        return [torch.cat([colours, colours.square()], 1)]


class TwoMaps(ImageEncoder):
    """An image encoder of two convolutions with fixed random weights."""

    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 5, 3, 2, 1)
        self.eval().requires_grad_(False)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the maps ``(B, 4, H/2, W/2)`` and ``(B, 5, H/4, W/4)``."""
        first = self.first(images)
        return [first, self.second(first.relu())]


class MeanColours(nn.Module):
    """Six numbers an image: means and deviations of its colours."""

    name = "mean_colours"
    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        images = images.double() / 255
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


def make_transformer(stages: int, channels: int = 3, seed: int = 0) -> NamiTransformer2DModel:
    """Return a network 32 wide with random weights, to which each stage adds a single block."""
    torch.manual_seed(seed)
    return NamiTransformer2DModel(
        in_channels=channels,
        num_layers=[1] + [0] * (stages - 1),
        num_single_layers=[1] * stages,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=[4, 6, 6],
    ).eval()


def make_pipeline(t5: TextModel, clip: TextModel, stages: int = 2, vae: AutoencoderKL | None = None) -> NamiPipeline:
    """Return a NAMI pipeline with random weights, of 16 px: of pixels, or with ``vae`` of its latents."""
    channels = 3 if vae is None else 4
    transformer = make_transformer(stages, channels, seed=5)
    bridge = BridgeFlow([1.0] * stages, channels)
    bridge.fitted.fill_(True)
    codec = PixelCodec() if vae is None else vae
    pipeline = NamiPipeline(transformer, bridge, codec, *t5, *clip, resolution=16, max_sequence_length=8)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
