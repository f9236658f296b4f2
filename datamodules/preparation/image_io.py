"""Read and write images: from any image file to a clean picture of a bucket's shape, and from that to a tensor.

Stored images are reduced by taking the mean of whole blocks of pixels when they are read. This filter can be applied in
steps: an image reduced from 64 to 16 px equals one reduced to 32 px first. So all stages agree on the coarse version of
an image. For JPEG files, libjpeg itself reduces up to eight times, in half the time. Its result is nearly the same
mean: it differs by 53 dB, where rounding alone gives 59 dB.
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
"""The position of a crop window in a larger image: from left and from top, both in [0, 1)."""

MIDDLE: Position = (0.5, 0.5)
ImageFormat = Literal["jpeg", "png", "webp"]

MAX_PIXELS = 2**28
"""Images with more pixels than this (16,384 x 16,384) are refused before they are decoded."""

SAVE_OPTIONS = {"jpeg": {"subsampling": 0}, "png": {}, "webp": {}}
WHITE = (255, 255, 255, 255)


class BadImage(ValueError):
    """An error for an image that can't be used; the message says why."""


def open_image(data: bytes | memoryview) -> Image.Image:
    """Decode an image file to 8-bit RGB: upright, the first frame only, with transparency on white.

    Raises:
        BadImage: the image can't be decoded completely, or it has too many pixels.
    """
    if not data:
        raise BadImage("zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and odd EXIF; the limit here is MAX_PIXELS
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"too large: {image.width}x{image.height} px")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: {error}") from error
    except Exception as error:  # Pillow raises errors of many classes on damaged files
        raise BadImage(f"not a readable image: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any of Pillow's modes to 8-bit RGB; transparent parts become white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        sixteen_bits = image.mode.startswith("I;16") or values.max() > 255
        image = Image.fromarray((values / (257 if sixteen_bits else 1)).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    return image.convert("RGB")


def cover(image: Image.Image, shape: Shape) -> Image.Image:
    """Return the image reduced so that it just covers ``shape``, with its ratio of sides kept."""
    scale = max(shape.width / image.width, shape.height / image.height)
    size = (max(shape.width, round(image.width * scale)), max(shape.height, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def crop(image: Image.Image, shape: Shape, position: Position = MIDDLE) -> Image.Image:
    """Return a window of ``shape``; ``position`` goes from left and top (0) to right and bottom (1)."""
    left = int(position[0] * (image.width - shape.width + 1))
    top = int(position[1] * (image.height - shape.height + 1))
    return image.crop((left, top, left + shape.width, top + shape.height))


def encode_image(image: Image.Image, format: ImageFormat, quality: int) -> bytes:
    """Return the content of an image file; JPEG keeps the full colour resolution."""
    output = io.BytesIO()
    image.save(output, format, quality=quality, **SAVE_OPTIONS[format])
    return output.getvalue()


def read_image(data: bytes | memoryview, shape: Shape, factor: int, position: Position = MIDDLE) -> Tensor:
    """Decode a stored image to uint8 ``(3, height, width)``.

    Args:
        data: the image file of a record.
        shape: the shape to return.
        factor: how many times larger the stored image's resolution is.
        position: the position of the window, if the stored image is larger than ``shape`` times ``factor``; see
            :func:`crop`.

    Raises:
        ValueError: the stored image is smaller than ``shape`` times ``factor``.
    """
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.width < shape.width * factor or image.height < shape.height * factor:
        raise ValueError(f"a stored image is {image.width}x{image.height}, smaller than {factor} times {shape}")
    stored_width = image.width
    image.draft("RGB", (image.width // factor, image.height // factor))
    if image.mode != "RGB":  # an RGB image would only be copied
        image = image.convert("RGB")
    if (remaining := factor * image.width // stored_width) > 1:
        image = image.reduce(remaining)
    if image.size != shape:
        image = crop(image, shape, position)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)
