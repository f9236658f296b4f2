"""Operations of training in closed form, and what devices can do: for the plan before a run, and for utilisation in it.

Operations are counted as ``torch.utils.flop_counter`` counts them, which the tests hold this file to: matrix products
alone, two for a multiplication and its addition, and five products in flash attention's backward pass, which computes
the scores again. What activation checkpointing recomputes is kept apart: it is work, but it trains nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

NumberType = str
"""``bfloat16``, ``float16``, ``float32`` or ``tfloat32`` (float32 numbers multiplied with fewer bits)."""


@dataclass(frozen=True)
class Device:
    """A kind of GPU.

    Attributes:
        memory: GiB that CUDA reports as its total.
        half: dense TFLOP/s in bfloat16 and float16.
        tfloat32: dense TFLOP/s of float32 matrices at ``torch.set_float32_matmul_precision("high")``.
        single: TFLOP/s in float32.
        name: words that CUDA's name of the device holds.
    """

    memory: float
    half: float
    tfloat32: float
    single: float
    name: tuple[str, ...]

    def flops(self, number_type: NumberType) -> float:
        """Peak FLOP/s in a number type."""
        rates = {"bfloat16": self.half, "float16": self.half, "tfloat32": self.tfloat32, "float32": self.single}
        return rates[number_type] * 1e12


DEVICES = {
    "a100-40gb": Device(39.4, 312, 156, 19.5, ("a100", "40gb")),
    "a100-80gb": Device(79.2, 312, 156, 19.5, ("a100", "80gb")),
    "h100": Device(79.1, 989.4, 494.7, 66.9, ("h100", "hbm3")),
    "h100-pcie": Device(79.1, 756, 378, 51.2, ("h100", "pcie")),
    "h200": Device(139.8, 989.4, 494.7, 66.9, ("h200",)),
    "b200": Device(178.4, 2250, 1125, 75, ("b200",)),
    "l40s": Device(44.4, 362, 183, 91.6, ("l40s",)),
    "rtx-4090": Device(23.6, 165.2, 82.6, 82.6, ("4090",)),
}
"""NVIDIA's data sheets, without sparsity."""


def device_called(name: str) -> Device | None:
    """The device that ``torch.cuda.get_device_name`` calls ``name``, if it is known."""
    return next((one for one in DEVICES.values() if all(word in name.lower() for word in one.name)), None)


def number_type(precision: str | int | None, param_dtype: str = "float32") -> NumberType:
    """In what matrices are multiplied.

    Args:
        precision: ``trainer.precision``.
        param_dtype: that of the sharding strategy, if there is one.
    """
    text = str(precision or "32-true")
    if text.startswith("bf16"):
        return "bfloat16"
    if text.startswith("16"):
        return "float16"
    if param_dtype != "float32":
        return param_dtype
    import torch

    return "float32" if torch.get_float32_matmul_precision() == "highest" else "tfloat32"


@dataclass(frozen=True)
class Flops:
    """Operations of training on one sample.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass.
        recomputed: of the forward pass, again, for activation checkpointing.
    """

    forward: int
    backward: int
    recomputed: int

    @property
    def model(self) -> int:
        """What the model needs: what model FLOPs utilisation counts."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """What is computed: with what is recomputed."""
        return self.model + self.recomputed


class _Counter:
    """Adds up products of matrices."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def linear(self, rows: int, inputs: int, outputs: int, of_data: bool = False, trained: bool = True) -> None:
        """A linear layer: backward, a product for the weight's gradient, and one for the input's if it isn't data."""
        product = 2 * rows * inputs * outputs
        self.forward += product
        self.backward += product * trained * (1 if of_data else 2)

    def attention(self, tokens: int, width: int) -> None:
        """All heads of self-attention: queries and keys, scores and values."""
        product = 2 * tokens**2 * width
        self.forward += 2 * product
        self.backward += 5 * product


def transformer_flops(
    config: Mapping[str, Any], stage: int, image_tokens: int, text_tokens: int, activation_checkpointing: int = 0
) -> Flops:
    """Operations of one sample's forward and backward pass through the network of a stage.

    Args:
        config: of a :class:`~nami_lightning.NamiTransformer2DModel`.
        stage: 0 (coarsest) to K-1.
        image_tokens: of the sample.
        text_tokens: of its prompt, padding included.
        activation_checkpointing: every so many-th block is recomputed in the backward pass; 0 none.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch = config["in_channels"] * config["patch_size"] ** 2
    doubles, singles = (list(accumulate(config[key]))[stage] for key in ("num_layers", "num_single_layers"))

    total = _Counter()
    total.linear(image_tokens, patch, width, of_data=True)
    total.linear(text_tokens, config["joint_attention_dim"], width, of_data=True)
    for inputs in (256, config["pooled_projection_dim"]):  # the sinusoids of time, the pooled text
        total.linear(1, inputs, width, of_data=True)
        total.linear(1, width, width)

    recomputed = 0
    for double, count in ((True, doubles), (False, singles)):
        for index in range(count):
            # What the last block makes of the text is used by nobody if it is a double one.
            text_trained = not double or bool(singles) or index + 1 < count
            block = _block(double, width, image_tokens, text_tokens, text_trained)
            total.forward += block.forward
            total.backward += block.backward
            if activation_checkpointing and index % activation_checkpointing == 0:
                recomputed += block.forward

    total.linear(1, width, 2 * width)
    total.linear(image_tokens, width, patch)
    return Flops(total.forward, total.backward, recomputed)


def _block(double: bool, width: int, image: int, text: int, text_trained: bool) -> _Counter:
    counter = _Counter()
    tokens = image + text
    counter.attention(tokens, width)
    counter.linear(tokens, width, 3 * width)
    if not double:
        counter.linear(1, width, 3 * width)
        counter.linear(tokens, width, 4 * width)
        counter.linear(tokens, 5 * width, width)
        return counter
    for rows, trained in ((image, True), (text, text_trained)):
        counter.linear(1, width, 6 * width)
        counter.linear(rows, width, width, trained=trained)
        counter.linear(rows, width, 4 * width, trained=trained)
        counter.linear(rows, 4 * width, width, trained=trained)
    return counter
