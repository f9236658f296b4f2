"""Tiny judges of images with random weights but known answers, made on the spot and saved to a folder."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    PreTrainedTokenizerFast,
    SwinConfig,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltImageProcessor,
    ViltProcessor,
)

from helpers.tiny_models import BOS, EOS, PAD, VOCABULARY, make_tokenizer

HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)
FILE = f"""{HEADER}
cups,"Two cups, one red.",,1,0,entity,whole,entity - whole (cups),Are there cups?
cups,"Two cups, one red.",,2,1,other,count,"other - count (cups, ==2)",Are there two cups?
cups,"Two cups, one red.",,3,2,attribute,color,"attribute - color (cup, red)",Is one of the two cups red?
sea,A painting of the sea below a hill.,,1,0,global,,global - (painting),Is this a painting?
sea,A painting of the sea below a hill.,,2,0,entity,whole,entity - whole (sea),Is there a sea?
sea,A painting of the sea below a hill.,,3,"1, 2",relation,spatial,"relation - spatial (sea, hill, below)",Is it below?
"""


HORSE = 17
"""COCO's number of it."""


def make_detector(folder: Path, classes: int = 80) -> Path:
    """A tiny Mask2Former with random weights that calls everything a horse."""
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        num_labels=classes,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.bias[HORSE] = 20.0
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}, num_labels=classes).save_pretrained(folder)
    return folder


def make_clip(folder: Path) -> Path:
    """A tiny CLIP with random weights."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    text = sizes | special | {"vocab_size": len(VOCABULARY), "max_position_embeddings": 20}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, make_tokenizer(20, bos=True)).save_pretrained(folder)
    return folder


def make_vilt(folder: Path, answer: int) -> Path:
    """A tiny ViLT that always gives answer 0 (no) or 1 (yes)."""
    torch.manual_seed(0)
    config = ViltConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        id2label={0: "no", 1: "yes"},
        label2id={"no": 0, "yes": 1},
    )
    model = ViltForQuestionAnswering(config)
    with torch.no_grad():
        model.classifier[-1].bias[answer] = 100.0
    model.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "there", "a", "cat", "?"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    ViltProcessor(ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=8), tokenizer).save_pretrained(folder)
    return folder


def make_llava(folder: Path, answer: str) -> Path:
    """A tiny LLaVA that always says one word: all its logits are equal, and that word is its first."""
    torch.manual_seed(0)
    others = ["</s>", "<unk>", "<image>", "USER:", "ASSISTANT:", "Is", "there", "a", "cat?"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate([answer, *others])}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="</s>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=32, patch_size=8, **small),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), num_key_value_heads=2, eos_token_id=1, pad_token_id=1, **small
        ),
        image_token_index=image_token,
        image_token_id=image_token,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(folder)
    template = (
        "{% for message in messages %}USER: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
        " ASSISTANT:"
    )
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder
