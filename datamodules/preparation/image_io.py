"""Read and write images: from any image file to a clean picture of a bucket's shape, and from that to a tensor.

Stored images are reduced by taking the mean of whole blocks of pixels when they are read. This filter can be applied in
steps: an image reduced from 64 to 16 px equals one reduced to 32 px first. So all stages agree on the coarse version of
an image. For JPEG files, libjpeg itself reduces up to eight times, in half the time. Its result is nearly the same
mean: it differs by 53 dB, where rounding alone gives 59 dB.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from nami_lightning.datamodules.aspect_buckets import Shape
from nami_lightning.datamodules.image_formats import missing_plugin, register_plugins

Position: TypeAlias = tuple[float, float]
"""The position of a crop window in a larger image: from left and from top, both in [0, 1)."""

MIDDLE: Position = (0.5, 0.5)
ImageFormat = Literal["jpeg", "png", "webp"]

MAX_PIXELS = 2**28
"""Images with more pixels than this (16,384 x 16,384) are refused before they are decoded."""

JPEG = ("JPEG", "MPO")
START_OF_SCAN = b"\xff\xda"
MOST_SCANS = 100
"""Passes over a JPEG that are decoded; a progressive one has about ten. Each takes time and may have few bytes."""

SAVE_OPTIONS = {"jpeg": {"subsampling": 0}, "png": {}, "webp": {}}
SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")
"""Formats whose integers of 32 bits in Pillow were 16 bits in the file."""

GREY_MODES = ("1", "L", "LA")
WHITE = (255, 255, 255, 255)


BROKEN_PROFILE = "a broken colour profile: taken as sRGB"
SRGB = ImageCms.createProfile("sRGB")
MODE_OF_SPACE = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""The mode of the images that a profile of each colour space describes."""


class BadImage(ValueError):
    """An error for an image that can't be used; the message says why."""


def open_image(data: bytes | memoryview, notes: list[str] | None = None) -> Image.Image:
    """Decode an image file to 8-bit sRGB: upright, the first frame only, with transparency on white, and no metadata.

    Args:
        data: the image file.
        notes: what is odd about the image, though it can be used, is added to this list.

    Raises:
        BadImage: the image can't be decoded completely, it has too many pixels, or its numbers have no clear meaning.
    """
    if not data:
        raise BadImage("zero bytes")
    register_plugins()
    try:
        with warnings.catch_warnings(), _own_limit():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF and the like
            image = Image.open(io.BytesIO(data))
            if image.format in JPEG and (scans := bytes(data).count(START_OF_SCAN)) > MOST_SCANS:
                raise BadImage(f"a JPEG of {scans:,} passes over the whole image; the limit is {MOST_SCANS}")
            image.load()
            upright = ImageOps.exif_transpose(image)
            upright.format = image.format
            return to_rgb(upright, notes)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        pixels = int(re.findall(r"\d+", str(error))[0])
        raise BadImage(f"too large: {pixels:,} px; the limit is {MAX_PIXELS:,} px") from error
    except UnidentifiedImageError as error:
        reason = missing_plugin(data) or "not a readable image: no format that Pillow knows"
        raise BadImage(reason) from error
    except Exception as error:  # Pillow raises errors of many classes on damaged files
        raise BadImage(f"not a readable image: {error}") from error


@contextmanager
def _own_limit() -> Iterator[None]:
    """Give Pillow ``MAX_PIXELS`` as its limit inside a ``with`` block, also for images in icons and other containers.

    Pillow refuses an image of more than twice the number that it is given.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS // 2
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def to_rgb(image: Image.Image, notes: list[str] | None = None) -> Image.Image:
    """Convert an image of any of Pillow's modes to 8-bit sRGB without metadata; transparent parts become white.

    Raises:
        BadImage: its numbers have no clear meaning.
    """
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = to_8_bits(image)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        alpha: Image.Image | None = image.convert("RGBA").getchannel("A")
    else:
        alpha = None
    try:
        colours = _to_srgb(image, profile) if profile else image.convert("RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        colours = image.convert("RGB")
        if notes is not None:
            notes.append(BROKEN_PROFILE)
    if alpha is not None:
        colours.putalpha(alpha)
        colours = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), colours).convert("RGB")
    colours.info = {}
    return colours


def to_8_bits(image: Image.Image) -> Image.Image:
    """Convert an image of larger integers or of floats to 8 bits, if it is clear which number is white.

    Floats from 0 to 1 are so; from 0 to 255 if one is above 16, because else they could be brighter than white. So are
    integers of 16 bits; of 32 bits if none is above 65,535.

    Raises:
        BadImage: it is not clear.
    """
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    what = "floats" if image.mode == "F" else "integers"
    if not np.isfinite([low, high]).all():
        raise BadImage(f"{what} with no clear meaning: some are not finite")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS):
        white = 65535
    elif image.mode == "F":
        white = 1 if high <= 1 else 255 if 16 < high <= 255 else 0
    else:
        white = 255 if high <= 255 else 65535 if high <= 65535 else 0
    if low < 0 or not white:
        raise BadImage(f"{what} with no clear meaning: from {low:g} to {high:g}")
    small = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    small.info = image.info
    return small


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Return the image's colours in sRGB.

    Raises:
        ImageCms.PyCMSError: the profile is broken, or is not for this kind of image.
        OSError: the profile is broken.
        ValueError: the profile is for another kind of image.
    """
    space = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    mode = MODE_OF_SPACE.get(space)
    grey = image.mode in GREY_MODES
    if mode is None or (image.mode == "CMYK") != (mode == "CMYK") or (mode == "L" and not grey):
        raise ValueError(f"a profile of {space} in an image of {image.mode}")
    colours = ImageCms.applyTransform(image.convert(mode), _transform(profile, mode))
    assert colours is not None
    return colours


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.ImageCmsProfile(io.BytesIO(profile)), SRGB, mode, "RGB")


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


def read_image(
    data: bytes | memoryview,
    shape: Shape,
    factor: int,
    position: Position = MIDDLE,
    share: float = 1.0,
    flip: bool = False,
) -> Tensor:
    """Decode a stored image to uint8 ``(3, height, width)``.

    Args:
        data: the image file of a record.
        shape: the shape to return.
        factor: how many times larger the stored image's resolution is.
        position: the position of the window, if the stored image is larger than ``shape`` times ``factor``; see
            :func:`crop`.
        share: the share of the window's sides that is shown, scaled to ``shape``; 1 shows all of it.
        flip: mirror the image, left to right.

    Raises:
        ValueError: the stored image is smaller than ``shape`` times ``factor``.
    """
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.width < shape.width * factor or image.height < shape.height * factor:
        raise ValueError(f"a stored image is {image.width}x{image.height}, smaller than {factor} times {shape}")
    stored_width = image.width
    detail = factor // 2 if share < 1 and factor % 2 == 0 else factor  # a part of an image is scaled down, not up
    image.draft("RGB", (image.width // detail, image.height // detail))
    if image.mode != "RGB":  # an RGB image would only be copied
        image = image.convert("RGB")
    if (remaining := detail * image.width // stored_width) > 1:
        image = image.reduce(remaining)
    if share < 1:
        sides = (max(1, round(share * side * factor / detail)) for side in shape)
        image = crop(image, Shape(*sides), position).resize(shape, Image.Resampling.LANCZOS)
    elif image.size != shape:
        image = crop(image, shape, position)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)
