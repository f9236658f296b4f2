"""Operations of training in closed form, and the speed of known devices.

A plan uses them before a run, and the callback ``Throughput`` uses them during a run, for the utilisation of a device.

Operations are counted as ``torch.utils.flop_counter`` counts them, and the tests compare the two. Only matrix products
count: a multiplication and its addition are two operations. Flash attention's backward pass has five products, because
it computes the scores again. What activation checkpointing computes again is counted separately: it is work, but it
trains nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

DtypeName = str
"""Name of a dtype: ``bfloat16``, ``float16``, ``float32``, or ``tfloat32`` (float32 values multiplied with fewer bits).
"""


@dataclass(frozen=True)
class Device:
    """A kind of GPU: its memory and its speed.

    Attributes:
        memory: total memory in GiB, as CUDA reports it.
        half: dense TFLOP/s in bfloat16 and float16.
        tfloat32: dense TFLOP/s of float32 matrices at ``torch.set_float32_matmul_precision("high")``.
        single: dense TFLOP/s in float32.
        name: words that CUDA's name of the device contains, in lower case.
        node_bandwidth: GB/s that a device sends to the others of its node: NVLink, or PCIe without it.
        network_bandwidth: GB/s that a device sends to other nodes: one network card a device where that is usual.
    """

    memory: float
    half: float
    tfloat32: float
    single: float
    name: tuple[str, ...]
    node_bandwidth: float = 32
    network_bandwidth: float = 12.5

    def peak_flops(self, dtype: DtypeName) -> float:
        """Return the peak speed in FLOP/s for a dtype."""
        rates = {"bfloat16": self.half, "float16": self.half, "tfloat32": self.tfloat32, "float32": self.single}
        return rates[dtype] * 1e12


DEVICES = {
    "a100-40gb": Device(39.4, 312, 156, 19.5, ("a100", "40gb"), 300, 25),
    "a100-80gb": Device(79.2, 312, 156, 19.5, ("a100", "80gb"), 300, 25),
    "h100": Device(79.1, 989.4, 494.7, 66.9, ("h100", "hbm3"), 450, 50),
    "h100-pcie": Device(79.1, 756, 378, 51.2, ("h100", "pcie"), 64, 25),
    "h200": Device(139.8, 989.4, 494.7, 66.9, ("h200",), 450, 50),
    "b200": Device(178.4, 2250, 1125, 75, ("b200",), 900, 50),
    "l40s": Device(44.4, 362, 183, 91.6, ("l40s",)),
    "rtx-4090": Device(23.6, 165.2, 82.6, 82.6, ("4090",)),
}
"""Known devices, with the values of NVIDIA's data sheets without sparsity; bandwidths are of one direction."""


def find_device(name: str) -> Device | None:
    """Return the device that ``torch.cuda.get_device_name`` calls ``name``; None if it is not known."""
    return next((one for one in DEVICES.values() if all(word in name.lower() for word in one.name)), None)


def matmul_dtype(precision: str | int | None, param_dtype: str = "float32") -> DtypeName:
    """Return the dtype that matrices are multiplied in.

    Args:
        precision: the recipe's ``trainer.precision``.
        param_dtype: the sharding strategy's ``param_dtype``, if there is such a strategy.
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
        forward: operations of the forward pass.
        backward: operations of the backward pass.
        recomputed: operations of the forward pass that activation checkpointing does a second time.
    """

    forward: int
    backward: int
    recomputed: int

    @property
    def model(self) -> int:
        """Return the operations that the model needs; model FLOPs utilisation counts these."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """Return the operations that the device does, with those that are recomputed."""
        return self.model + self.recomputed


class _Counter:
    """A counter that adds up the operations of matrix products."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def linear(self, rows: int, inputs: int, outputs: int, of_data: bool = False, trained: bool = True) -> None:
        """Add a linear layer.

        The backward pass has one product for the weight's gradient, and one for the input's gradient unless the input
        is data.
        """
        product = 2 * rows * inputs * outputs
        self.forward += product
        self.backward += product * trained * (1 if of_data else 2)

    def attention(self, tokens: int, width: int) -> None:
        """Add all heads of self-attention: queries times keys, and scores times values."""
        product = 2 * tokens**2 * width
        self.forward += 2 * product
        self.backward += 5 * product


def transformer_flops(
    config: Mapping[str, Any],
    stage: int,
    image_tokens: int,
    text_tokens: int,
    activation_checkpointing: int = 0,
    block_tokens: Sequence[int] | None = None,
) -> Flops:
    """Return the operations of one sample's forward and backward pass through the network of a stage.

    Args:
        config: configuration of a :class:`~nami_lightning.NamiTransformer2DModel`.
        stage: index of the stage, from 0 (coarsest) to K-1.
        image_tokens: number of image tokens of the sample.
        text_tokens: number of text tokens of its prompt, padding included.
        activation_checkpointing: N: every N-th block is recomputed in the backward pass; 0: none is.
        block_tokens: image tokens that each block sees, where they aren't all of the sample's.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch = config["in_channels"] * config["patch_size"] ** 2
    doubles, singles = (list(accumulate(config[key]))[stage] for key in ("num_layers", "num_single_layers"))

    total = _Counter()
    total.linear(image_tokens, patch, width, of_data=True)
    total.linear(text_tokens, config["joint_attention_dim"], width, of_data=True)
    for inputs in (256, config["pooled_projection_dim"]):  # the sinusoidal embedding of time, and the pooled text
        total.linear(1, inputs, width, of_data=True)
        total.linear(1, width, width)

    recomputed = 0
    for double, count in ((True, doubles), (False, singles)):
        for index in range(count):
            # Nothing uses the text output of the last block if that block is a double one, so it gets no gradient.
            text_trained = not double or bool(singles) or index + 1 < count
            seen = image_tokens if block_tokens is None else block_tokens[index if double else doubles + index]
            block = _block(double, width, seen, text_tokens, text_trained)
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
