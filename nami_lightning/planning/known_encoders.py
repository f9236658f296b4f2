"""The configurations of the encoders that packaged recipes name, so that plans count them without a network."""

from typing import Any

_MT5 = {"model_type": "mt5", "vocab_size": 250112, "num_layers": 24, "d_kv": 64, "feed_forward_proj": "gated-gelu"}
_BERT = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

TEXT_ENCODERS: dict[tuple[str, str | None], dict[str, Any]] = {
    ("google/mt5-large", None): _MT5 | {"d_model": 1024, "d_ff": 2816, "num_heads": 16},
    ("google/mt5-xxl", None): _MT5 | {"d_model": 4096, "d_ff": 10240, "num_heads": 64},
    ("BAAI/AltCLIP-m9", None): _BERT
    | {"model_type": "altclip_text_model", "vocab_size": 250002, "max_position_embeddings": 514, "project_dim": 768},
    ("Tencent-Hunyuan/HunyuanDiT-Diffusers", "text_encoder"): _BERT
    | {"model_type": "bert", "vocab_size": 47020, "max_position_embeddings": 512},
}
"""Settings of transformers' configurations, by the model's name and the folder in it."""

_FLUX = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

AUTOENCODERS: dict[tuple[str, str | None], dict[str, Any]] = {("black-forest-labs/FLUX.1-schnell", "vae"): _FLUX}
"""Settings of an ``AutoencoderKL``, likewise."""
