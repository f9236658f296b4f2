"""Images in and out: any file that people have to a clean picture of a bucket's shape, and that to a tensor.

Down-sampling when reading is by the mean of whole cells, the filter that composes: an image brought from 64 to 16 px
is the same as one brought there by way of 32, so all stages agree on what an image's coarse version is. From JPEG
files libjpeg gives up to an eighth of the size at once: nearly the same mean (53 dB from it, rounding alone being 59),
in half the time.
"""

import io
import warnings
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nami_lightning.datamodules.aspect_buckets import Shape

Position: TypeAlias = tuple[float, float]
"""Of a window in a larger image: from left and from top, both in [0, 1)."""

MIDDLE: Position = (0.5, 0.5)
ImageFormat = Literal["jpeg", "png", "webp"]

MAX_PIXELS = 2**28
"""Images of more pixels (16,384 x 16,384) are refused before they are decoded."""

SAVE_OPTIONS = {"jpeg": {"subsampling": 0}, "png": {}, "webp": {}}
WHITE = (255, 255, 255, 255)


class BadImage(ValueError):
    """An image that can't be used; the message says why."""


def open_image(data: bytes | memoryview) -> Image.Image:
    """An encoded image as 8-bit RGB, upright, its first frame, transparency on white.

    Raises:
        BadImage: it can't be decoded to its end, or has too many pixels.
    """
    if not data:
        raise BadImage("zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's on large images and odd EXIF: the limit is ours
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"too large: {image.width}x{image.height} px")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: {error}") from error
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise BadImage(f"not a readable image: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes to 8-bit RGB; transparent parts become white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        sixteen_bits = image.mode.startswith("I;16") or values.max() > 255
        image = Image.fromarray((values / (257 if sixteen_bits else 1)).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    return image.convert("RGB")


def cover(image: Image.Image, shape: Shape) -> Image.Image:
    """The image, smaller, so that it just covers ``shape``; its ratio is kept."""
    scale = max(shape.width / image.width, shape.height / image.height)
    size = (max(shape.width, round(image.width * scale)), max(shape.height, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def crop(image: Image.Image, shape: Shape, position: Position = MIDDLE) -> Image.Image:
    """A window of ``shape``; ``position`` in [0, 1) says where, from left and top to right and bottom."""
    left = int(position[0] * (image.width - shape.width + 1))
    top = int(position[1] * (image.height - shape.height + 1))
    return image.crop((left, top, left + shape.width, top + shape.height))


def encode_image(image: Image.Image, format: ImageFormat, quality: int) -> bytes:
    """The bytes of an image file; JPEG with full colour resolution."""
    output = io.BytesIO()
    image.save(output, format, quality=quality, **SAVE_OPTIONS[format])
    return output.getvalue()


def read_image(data: bytes | memoryview, shape: Shape, factor: int, position: Position = MIDDLE) -> Tensor:
    """A stored image to uint8 ``(3, height, width)``.

    Args:
        data: a record's image.
        shape: wanted.
        factor: how many times finer the stored image is.
        position: of the window, where the stored image is larger than ``shape`` times ``factor``; see :func:`crop`.

    Raises:
        ValueError: the image is smaller than that.
    """
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.width < shape.width * factor or image.height < shape.height * factor:
        raise ValueError(f"a stored image is {image.width}x{image.height}, smaller than {factor} times {shape}")
    finest = image.width
    image.draft("RGB", (image.width // factor, image.height // factor))
    if image.mode != "RGB":  # where it is, convert() would only copy it
        image = image.convert("RGB")
    if (rest := factor * image.width // finest) > 1:
        image = image.reduce(rest)
    if image.size != shape:
        image = crop(image, shape, position)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)
