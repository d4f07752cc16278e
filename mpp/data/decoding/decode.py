"""Decode the bytes of a file into a cropped image.

The result is uint8, or float32 in [0, 255] if a range of values is given. The header is read first. Every fault of the
file raises BadImage with the reason.

JPEGs are decoded by simplejpeg, at a fraction of their size if the crop is at least twice the target. Pillow decodes
everything else, and JPEGs with rotation, CMYK or a fault.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Unpack

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mpp.data.decoding.arrays import NPY, TIFF, fill_missing, read_array, scaled
from mpp.data.decoding.dicom import is_dicom, read_only_frame
from mpp.errors import BadImage
from mpp.recipe.sections import Decoding, Reading, ValueRange

Box = tuple[int, int, int, int]
"""(left, top, width, height) in pixels."""


class Cut(NamedTuple):
    """Pixels of an image, and the box within them that becomes the crop."""

    pixels: Tensor
    """(C, h, w), often a view of a larger image in memory."""
    box: tuple[float, float, float, float]
    """(top, left, height, width). Whole numbers, unless a JPEG was decoded at a fraction of its size."""

    @staticmethod
    def whole(pixels: Tensor) -> Cut:
        return Cut(pixels, (0.0, 0.0, float(pixels.shape[1]), float(pixels.shape[2])))

    @property
    def is_whole(self) -> bool:
        return self.box == (0, 0, *self.pixels.shape[1:])


MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for each number of channels."""
CORNER_FRACTION = 0.875
"""Side of a corner crop divided by the image's: 224 of 256 px (Krizhevsky et al. 2012, section 4.1)."""
PNG = b"\x89PNG"
GREY = 128  # background of transparent pixels


def random_box(
    rng: np.random.Generator,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """Draw a random resized crop (Szegedy et al. 2015, section 6).

    If ten draws do not fit into the image, return the largest centred box with an aspect in `ratio`, like torchvision.

    Args:
        rng: Random generator.
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        scale: Least and greatest area, as fractions of the image's area.
        ratio: Least and greatest aspect (width over height). The aspect is drawn log-uniformly.
    """
    for _ in range(10):
        area = rng.uniform(*scale) * width * height
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w, h = width, height
    if width / height > ratio[1]:
        w = max(round(height * ratio[1]), 1)
    elif width / height < ratio[0]:
        h = max(round(width / ratio[0]), 1)
    return (width - w) // 2, (height - h) // 2, w, h


def centre_box(width: int, height: int, size: tuple[int, int], fraction: float = 1.0) -> Box:
    """Return the largest centred box with the aspect of `size`, its sides multiplied by `fraction`.

    Args:
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        size: (H, W) of the result, which gives the aspect.
        fraction: Factor for both sides of the box.
    """
    aspect = size[1] / size[0]
    w = min(width, height * aspect) * fraction
    h = w / aspect
    w, h = max(round(w), 1), max(round(h), 1)
    return (width - w) // 2, (height - h) // 2, w, h


def view_boxes(views: int, size: tuple[int, int], fraction: float) -> list[Callable[[int, int], Box]]:
    """Return the functions that choose the crops of `views` views: the centre, and for ten views also the corners.

    The other half of two or ten views are mirror images of these crops.

    Args:
        views: Number of views: 1, 2 or 10.
        size: (H, W) of the crops.
        fraction: Side of the central crop, as a fraction of the largest box with this aspect.
    """

    def at_corner(x: float, y: float) -> Callable[[int, int], Box]:
        def box(width: int, height: int) -> Box:
            _, _, w, h = centre_box(width, height, size, CORNER_FRACTION)
            return round(x * (width - w)), round(y * (height - h)), w, h

        return box

    corners = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)] if views == 10 else []
    return [lambda width, height: centre_box(width, height, size, fraction), *(at_corner(*c) for c in corners)]


def decode_crop(
    data: bytes,
    choose_box: Callable[[int, int], Box],
    size: tuple[int, int],
    **decoding: Unpack[Decoding],
) -> Tensor:
    """Decode an image, crop a box and resize it.

    Args:
        data: Bytes of a file.
        choose_box: Function that chooses the crop from (width, height).
        size: (H, W) of the result.
        **decoding: Decoding settings, see `decode_cut`.

    Returns:
        (channels, H, W) uint8, or float32 in [0, 255] with `value_range`.

    Raises:
        BadImage: If the bytes cannot be decoded.
    """
    return resize(decode_cut(data, choose_box, size, **decoding), size)


def decode_cut(
    data: bytes,
    choose_box: Callable[[int, int], Box],
    size: tuple[int, int],
    *,
    channels: int,
    formats: tuple[str, ...],
    max_image_pixels: int,
    value_range: ValueRange | None = None,
    nodata: float | None = None,
) -> Cut:
    """Decode an image and crop a box, without resizing.

    Args:
        data: Bytes of a file.
        choose_box: Function that chooses the crop from (width, height), once they are known.
        size: (H, W) to which the cut will be resized. JPEGs are decoded no finer than this size requires.
        channels: Number of channels that the image must have or is converted to.
        formats: Names of the accepted formats.
        max_image_pixels: Greatest number of pixels of an image. Larger images are refused.
        value_range: Values that become 0 and 255, for images with any number of channels and bits. None means 8-bit
            images.
        nodata: Value that marks missing pixels, in addition to values that are not finite; see `fill_missing`.

    Returns:
        The cut: pixels (channels, h, w) uint8, or float32 in [0, 255] with `value_range`, and the box in them.

    Raises:
        BadImage: If the bytes are not an image of `formats`, too large, truncated or otherwise not decodable.
    """
    if value_range is not None:
        reading: Reading = {"channels": channels, "formats": formats, "max_image_pixels": max_image_pixels}
        array = _numbers(data, value_range, nodata, reading)
        left, top, w, h = choose_box(array.shape[2], array.shape[1])
        return Cut.whole(scaled(array[:, top : top + h, left : left + w], value_range))
    if data[:2] == b"\xff\xd8" and channels != 4 and "JPEG" in formats:
        cut = _jpeg(data, choose_box, size, channels, max_image_pixels)
        if cut is not None:
            return cut
    pixels = decode_pillow(data, channels=channels, formats=formats, max_image_pixels=max_image_pixels)
    left, top, w, h = choose_box(pixels.width, pixels.height)
    tensor = torch.from_numpy(np.atleast_3d(np.array(pixels))).permute(2, 0, 1)
    return Cut.whole(tensor[:, top : top + h, left : left + w])


def _numbers(data: bytes, value_range: ValueRange, nodata: float | None, reading: Reading) -> np.ndarray:
    """Return the whole image, (C, h, w), at full bit depth and with missing values filled.

    Raises:
        BadImage: If it cannot be read at full bit depth.
    """
    array = read_array(data, nodata=nodata, **reading)
    if array is None:  # most likely 8 bit; grey images may have 16
        if reading["channels"] not in MODES:
            raise BadImage(f"not a TIFF, .npy or DICOM; expected {reading['channels']} channels (data.channels)")
        pixels = decode_pillow(data, **reading, deep=True)
        array = np.atleast_3d(np.array(pixels)).transpose(2, 0, 1)
        if array.dtype == np.uint8 and value_range not in ("type", (0, 255)):  # Pillow reads colours only as 8 bit
            raise BadImage(
                "read as 8 bit, which data.value_range is not; only TIFF, .npy, DICOM and grey PNG have more"
            )
        return fill_missing(array, nodata)
    return array


class Deep(NamedTuple):
    """Range of the values of a 16-bit image."""

    smallest: float
    largest: float
    most: float
    """Largest value of the image's type."""


def deep_values(data: bytes, decoding: Decoding) -> Deep | None:
    """Return the smallest and largest value of a 16-bit image; None for other images.

    Args:
        data: Bytes of a file.
        decoding: Decoding settings, see `decode_cut`.

    Raises:
        BadImage: If the bytes cannot be decoded.
    """
    reading: Reading = {key: decoding[key] for key in Reading.__annotations__}  # type: ignore[assignment, literal-required]
    if value_range := decoding.get("value_range"):
        array = _numbers(data, value_range, decoding.get("nodata"), reading)
    elif (data.startswith(PNG) and data[24:25] == b"\x10") or data.startswith(TIFF):
        reading["channels"] = 1
        pixels = decode_pillow(data, **reading, deep=True)
        if not pixels.mode.startswith("I"):
            return None
        array = np.asarray(pixels)
    else:
        return None
    if array.dtype.kind not in "ui" or array.dtype.itemsize != 2:
        return None
    return Deep(float(array.min()), float(array.max()), float(np.iinfo(array.dtype).max))


def resize(cut: Cut, size: tuple[int, int]) -> Tensor:
    """Resize a cut to `size`, (H, W), and return (C, H, W).

    The result equals torchvision's to the bit. Without torchvision's overhead, small images take a third less time.
    torch can resize only whole pixels. Pillow resizes a box with fractional edges.
    """
    if not cut.is_whole:
        top, left, height, width = cut.box
        array = cut.pixels.permute(1, 2, 0).contiguous().numpy()
        image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)
    resized = F.interpolate(cut.pixels[None], size, mode="bicubic", antialias=True)[0]
    return resized if resized.dtype == torch.uint8 else resized.clamp_(0, 255)  # uint8 is already in this range


def _jpeg(
    data: bytes,
    choose_box: Callable[[int, int], Box],
    size: tuple[int, int],
    channels: int,
    max_image_pixels: int,
) -> Cut | None:
    """Decode a JPEG on the fast path. Return None if it needs Pillow (rotation, CMYK, warnings of the decoder)."""
    if b"Exif\0\0" in data[:65536] and _orientation(data) != 1:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: a header cut before its colour space
        return None
    _check_size(width, height, max_image_pixels)
    if colours not in ("YCbCr", "RGB", "Gray"):
        return None
    left, top, w, h = choose_box(width, height)
    shrink = min(w / size[1], h / size[0])
    least = {"min_width": int(width / shrink), "min_height": int(height / shrink)} if shrink >= 2 else {}
    try:
        pixels = simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB", strict=True, **least)
    except (ValueError, KeyError):
        return None
    # libjpeg decodes at n/8 of the size and rounds the number of pixels up, so the crop's edges are seldom between
    # two pixels. All pixels that the crop touches are kept, with its place among them. Eighths are exact as floats.
    longer = max(width, height)
    fraction = round(8 * max(pixels.shape[:2]) / longer) / 8 if least else 1.0
    x, y, w_there, h_there = (value * fraction for value in (left, top, w, h))
    first_x, first_y = int(x), int(y)
    end_x, end_y = math.ceil(x + w_there), math.ceil(y + h_there)
    touched = torch.from_numpy(pixels).permute(2, 0, 1)[:, first_y:end_y, first_x:end_x]
    return Cut(touched, (y - first_y, x - first_x, h_there, w_there))


def _orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return image.getexif().get(0x0112, 1)
    except Exception:  # Pillow may raise anything on broken metadata; the pixels may still be good
        return 1


def _check_size(width: int, height: int, max_image_pixels: int) -> None:
    if width < 1 or height < 1:
        raise BadImage(f"{width}×{height} pixels")
    if width * height > max_image_pixels:
        raise BadImage(f"{width}×{height} pixels, over max_image_pixels {max_image_pixels}")


def _check_pages(data: bytes) -> None:
    """Raise BadImage for a TIFF that is a stack of pages, because only one page would be read.

    A second page of another size is a thumbnail.
    """
    if not data.startswith(TIFF):
        return
    try:
        with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
            first = image.size, image.mode
            image.seek(1)
            stack = (image.size, image.mode) == first
    except Exception:  # the second page is missing or unreadable: the first page is the image
        return
    if stack:
        raise BadImage(
            "a TIFF of several pages of one size; data.channels, and data.value_range where that is 1, 3 or 4, read "
            "pages as channels; `mpp pack --split-pages` makes an image of each"
        )


@contextmanager
def own_pixel_limit() -> Iterator[None]:
    """Switch off Pillow's own limit of pixels and its warnings.

    Above its limit Pillow refuses images that the recipe accepts. Warnings of damaged metadata do not help users with a
    million images.
    """
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def decode_pillow(
    data: bytes, *, channels: int, formats: tuple[str, ...], max_image_pixels: int, deep: bool = False
) -> Image.Image:
    """Decode a whole image with Pillow, upright, in the mode of `channels`.

    EXIF rotation is applied. Transparent images are laid over grey, except for 4 channels. 16-bit grey is divided by
    257. CMYK and palettes are converted. The first frame of an animation is used. Stacks of pages are refused.

    Args:
        data: Bytes of a file.
        channels: Number of channels: 1, 3 or 4.
        formats: Names of the accepted formats.
        max_image_pixels: Greatest number of pixels of an image. Larger images are refused.
        deep: Whether 16-bit grey is returned unchanged if `channels` is 1.

    Raises:
        BadImage: If the bytes cannot be decoded.
    """
    if not data:
        raise BadImage("empty file")
    if data.startswith(NPY):
        reading: Reading = {"channels": channels, "formats": formats, "max_image_pixels": max_image_pixels}
        return _to_mode(_of_array(data, reading), MODES[channels])
    if is_dicom(data) and "DICOM" in formats:
        return _to_mode(_of_dicom(data, max_image_pixels), MODES[channels])
    try:
        with own_pixel_limit():
            by_pillow = [name for name in formats if name not in ("NPY", "DICOM")]
            image: Image.Image = Image.open(io.BytesIO(data), formats=by_pillow)
            _check_size(image.width, image.height, max_image_pixels)
            _check_pages(data)
            image.load()
            image = ImageOps.exif_transpose(image)
            if deep and channels == 1 and image.mode.startswith("I;16"):
                return image
            return _to_mode(image, MODES[channels])
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not an image of {', '.join(formats)}") from None
    except Exception as error:  # decoders raise anything on hostile bytes: OSError, SyntaxError, struct.error, …
        raise BadImage(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from None


def _of_array(data: bytes, reading: Reading) -> Image.Image:
    """Read an .npy file of 8-bit pixels. If it has other channels, read it as grey or RGB.

    Raise BadImage for other files.
    """
    faults: list[BadImage] = []
    for channels in dict.fromkeys((reading["channels"], 1, 3)):
        try:
            array = read_array(
                data, channels=channels, formats=reading["formats"], max_image_pixels=reading["max_image_pixels"]
            )
            assert array is not None
            return _eight_bit_image(array)
        except BadImage as error:
            faults.append(error)
    raise faults[0]


def _of_dicom(data: bytes, max_image_pixels: int) -> Image.Image:
    """Read a DICOM file of 8-bit pixels, grey or RGB. Raise BadImage for other files."""
    return _eight_bit_image(read_only_frame(data, max_image_pixels))


def _eight_bit_image(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise BadImage(f"values of {array.dtype}: give their range by data.value_range, such as [0, 4095]")
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, in any of Pillow's modes for it
        values = np.asarray(image.convert("I")).clip(0, 65535) // 257
        image = Image.fromarray(values.astype(np.uint8))
    elif image.mode == "F":
        raise BadImage("floating-point pixels")
    if mode == "RGBA":
        return image.convert("RGBA")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        behind = Image.new("RGBA", image.size, (GREY, GREY, GREY, 255))
        image = Image.alpha_composite(behind, image)
    return image.convert(mode)
