"""Tiny models that label a data set, with random weights, made on the spot and saved to a folder."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from helpers.tiny_models import VOCABULARY, make_tokenizer


def make_siglip(folder: Path) -> Path:
    """A tiny SigLIP with random weights, 8 wide."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(VOCABULARY), "max_position_embeddings": 12, "projection_size": 8}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    SiglipProcessor(SiglipImageProcessor(size={"height": 32, "width": 32}), make_tokenizer(12)).save_pretrained(folder)
    return folder


def make_text_detector(folder: Path) -> Path:
    """A tiny YOLOS with random weights that calls some of its boxes text, and others a figure."""
    torch.manual_seed(0)
    labels = {0: "figure", 1: "text"}
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=6,
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
    )
    model = YolosForObjectDetection(config)
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(0, 0.5)
    model.save_pretrained(folder)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QUESTION = (
    "{% for m in messages %}User : {% for p in m['content'] %}{% if p['type'] == 'image' %}"
    "<|vision_start|> <|image_pad|> <|vision_end|> {% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "Assistant :"
)


def make_qwen_vl(folder: Path) -> Path:
    """A tiny Qwen2-VL with random weights."""
    torch.manual_seed(1)
    words = ["<pad>", "</s>", "<unk>", "what", "is", "it", "?", "a", "cat", "dog", ":", "User", "Assistant"]
    numbers = {word: number for number, word in enumerate([*words, *VISION_TOKENS])}
    backend = Tokenizer(WordLevel(numbers, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=VISION_TOKENS,
    )
    tokenizer.image_token, tokenizer.video_token = VISION_TOKENS[2:]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config={"vocab_size": len(numbers), "num_key_value_heads": 2, "rope_parameters": rope} | sizes | special,
        vision_config=vision,
        vision_start_token_id=numbers[VISION_TOKENS[0]],
        vision_end_token_id=numbers[VISION_TOKENS[1]],
        image_token_id=numbers[VISION_TOKENS[2]],
        video_token_id=numbers[VISION_TOKENS[3]],
    )
    model = Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for weights in [*model.model.language_model.parameters(), model.lm_head.weight]:
            weights.normal_()
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    images = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112)
    Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=QUESTION).save_pretrained(folder)
    return folder
