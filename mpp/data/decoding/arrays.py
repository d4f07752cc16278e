"""Read images that are arrays of numbers: .npy, TIFF and DICOM files with any channels, 8 to 64 bit, integer or float.

They are scaled to float32 in [0, 255], the range of 8-bit pixels, so that mean and std mean the same for all images.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpp.data.decoding.dicom import is_dicom, read_only_frame
from mpp.errors import BadImage, UserError, how_to_get
from mpp.recipe.sections import ValueRange

NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of TIFF and BigTIFF files, little- and big-endian."""
MOST_MISSING = 0.5
"""Greatest share of an image's values that may be missing; with more missing, an image shows too little (a guess)."""
PARSING = threading.Lock()
"""Lock around numpy's parsing of headers. numpy uses Python's ast, in which CPython 3.11 occasionally raises a
SystemError if two threads use it at once (python/cpython issue 106905)."""


def read_array(
    data: bytes, *, channels: int, formats: tuple[str, ...], max_image_pixels: int, nodata: float | None = None
) -> np.ndarray | None:
    """Read an image of one of this module's formats, as numbers.

    Args:
        data: Bytes of a file.
        channels: Number of channels that the image must have.
        formats: Names of the accepted formats.
        max_image_pixels: Greatest number of pixels of an image. Larger images are refused.
        nodata: Value that marks missing pixels, which are filled in.

    Returns:
        (C, H, W) in the stored type; None if the bytes have another format.

    Raises:
        BadImage: If the image cannot be decoded, or has other channels or too many pixels.
    """
    try:
        if data.startswith(NPY):
            if "NPY" not in formats:
                raise BadImage(f"not an image of {', '.join(formats)}")
            return fill_missing(_npy(data, channels, max_image_pixels), nodata)
        if data.startswith(TIFF) and "TIFF" in formats:
            return _tiff(data, channels, max_image_pixels, nodata)
        if is_dicom(data) and "DICOM" in formats:
            return fill_missing(_dicom(data, channels, max_image_pixels), nodata)
    except (BadImage, UserError):
        raise
    except Exception as error:  # numpy and tifffile may raise anything on hostile bytes
        raise _bad(error) from None
    return None


def check_npy(data: bytes) -> None:
    """Check by its header that an .npy file holds an image, with any number of channels.

    Raises:
        BadImage: If it does not.
    """
    try:
        shape, _ = _npy_header(data)
    except BadImage:
        raise
    except Exception as error:  # numpy may raise anything on hostile bytes
        raise _bad(error) from None
    if len(shape) not in (2, 3) or 0 in shape:
        raise BadImage(f"an array of {'×'.join(map(str, shape))}, not an image")


def _bad(error: Exception) -> BadImage:
    """Convert an exception of a library's reader to a reason in one line."""
    return BadImage(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _npy_header(data: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Return (shape, type) of an .npy file, after a check that its numbers are complete.

    Raise BadImage if they are not. numpy may raise any other exception.
    """
    with PARSING:
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in reader:
            raise BadImage(f"npy of version {version}")
        shape, _, dtype = reader[version](stream)
    _check_type(dtype)
    if len(data) - stream.tell() < math.prod(shape) * dtype.itemsize:
        raise BadImage("cut off")
    return shape, dtype


def _npy(data: bytes, channels: int, max_image_pixels: int) -> np.ndarray:
    _check(*_npy_header(data), channels, max_image_pixels)
    with PARSING:
        return _channels_first(np.load(io.BytesIO(data), allow_pickle=False), channels)


def _tiff(data: bytes, channels: int, max_image_pixels: int, nodata: float | None) -> np.ndarray:
    with _import_tifffile().TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        _check(series.shape, series.dtype, channels, max_image_pixels)
        array = _channels_first(series.asarray(), channels)
        return fill_missing(array, _checked_nodata(series.keyframe), nodata)


def split_tiff(data: bytes) -> Iterator[np.ndarray | BadImage]:
    """Yield the pages of a TIFF, (C, H, W) with missing values filled, or why a page cannot be read.

    Pages that the file calls reduced are previews and left out. There is nothing to yield if only one image is left.

    Raises:
        BadImage: If the file itself cannot be read.
        UserError: If tifffile is not installed.
    """
    tifffile = _import_tifffile()
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            series = [one for one in file.series if not one.keyframe.is_reduced]
            if len(series) == 1 and series[0].shape in (series[0].keyframe.shape, (1, *series[0].keyframe.shape)):
                return
            for one in series:
                # without an entry for each page, tifffile has only the whole series
                whole = one.asarray().reshape(-1, *one.keyframe.shape) if len(one.pages) == 1 else None
                for number in range(len(one.pages) if whole is None else len(whole)):
                    try:
                        page = one.pages[number].asarray() if whole is None else whole[number]
                        yield fill_missing(_page(page, one.keyframe), _checked_nodata(one.keyframe))
                    except Exception as error:  # tifffile may raise anything on hostile bytes
                        yield error if isinstance(error, BadImage) else _bad(error)
    except BadImage:
        raise
    except Exception as error:
        raise _bad(error) from None


def _page(array: np.ndarray, page: Any) -> np.ndarray:
    """Return a page as (C, H, W). Raise BadImage for inks and other axes."""
    _check_type(array.dtype)
    if page.photometric.name == "SEPARATED":
        raise BadImage("a page of inks (CMYK)")
    if page.axes == "YXS":
        return np.ascontiguousarray(array.transpose(2, 0, 1))
    if page.axes not in ("YX", "SYX"):
        raise BadImage(f"a page with the axes {page.axes}")
    return array if array.ndim == 3 else array[None]


def _import_tifffile() -> Any:
    try:
        import tifffile
    except ModuleNotFoundError as error:
        raise UserError(
            "data.formats: TIFFs of other channels than 1, 3 and 4, or of other numbers than 8 bit, need tifffile: "
            + how_to_get("multichannel")
        ) from error
    return tifffile


def _checked_nodata(page: Any) -> float | None:
    """Return the value that marks missing pixels, by GDAL's tag, or None.

    Raises:
        BadImage: If the numbers of the page are not brightness, or it is not upright.
    """
    if page.photometric.name in ("PALETTE", "MINISWHITE"):
        raise BadImage(f"a TIFF of {page.photometric.name}, whose numbers are not brightness")
    if (turned := page.tags.get("Orientation")) is not None and turned.value != 1:
        raise BadImage(f"a TIFF with orientation {turned.value}")
    named = "GDAL_NODATA" in page.tags and isinstance(page.nodata, int | float)  # the tag is not always a number
    return float(page.nodata) if named else None


def _dicom(data: bytes, channels: int, max_image_pixels: int) -> np.ndarray:
    array = read_only_frame(data, max_image_pixels)
    if len(array) != channels:
        raise BadImage(f"a DICOM file of {len(array)} channels; expected {channels}")
    return array


def _check_type(dtype: np.dtype) -> None:
    """Raise BadImage if the values are not integers or floats."""
    if dtype is None or dtype.kind not in "uif" or dtype.hasobject:
        raise BadImage(f"values of {dtype}; read are whole and floating-point numbers")


def _check(shape: tuple[int, ...], dtype: np.dtype, channels: int, max_image_pixels: int) -> None:
    """Check the type, channels and number of pixels that a header states. Raise BadImage if they do not fit."""
    _check_type(dtype)
    height, width = _places(shape, channels)[1:]
    if height < 1 or width < 1:
        raise BadImage(f"{width}×{height} pixels")
    if width * height > max_image_pixels:
        raise BadImage(f"{width}×{height} pixels, over max_image_pixels {max_image_pixels}")


def _places(shape: tuple[int, ...], channels: int) -> tuple[int, int, int]:
    """Return (C, H, W) for the shape (H, W), (H, W, C) or (C, H, W). Raise BadImage for any other shape."""
    if len(shape) == 2 and channels == 1:
        return 1, int(shape[0]), int(shape[1])
    if len(shape) == 3 and shape[2] == channels:
        return channels, int(shape[0]), int(shape[1])
    if len(shape) == 3 and shape[0] == channels:
        return channels, int(shape[1]), int(shape[2])
    raise BadImage(f"an array of {'×'.join(map(str, shape))}; expected {channels} channels, first or last")


def _channels_first(array: np.ndarray, channels: int) -> np.ndarray:
    _places(array.shape, channels)  # in damaged files, the header and the data may differ
    if array.ndim == 2:
        return array[None]
    return array.transpose(2, 0, 1) if array.shape[2] == channels else array


def fill_missing(array: np.ndarray, *nodata: float | None) -> np.ndarray:
    """Replace missing values (NaN, infinities and `nodata`) by the mean of their channel.

    A channel without any value gets the mean of the whole image.

    Args:
        array: Image, (C, H, W) of any numbers.
        nodata: Values that mark missing pixels. None is ignored.

    Raises:
        BadImage: If more than MOST_MISSING of the values are missing.
    """
    values = [value for value in nodata if value is not None]
    if array.dtype.kind != "f" and not values:
        return array
    missing = ~np.isfinite(array) if array.dtype.kind == "f" else np.zeros(array.shape, dtype=bool)
    with np.errstate(over="ignore"):  # a nodata value may be too large for the image's type
        for value in values:
            missing |= array == np.float64(value).astype(array.dtype) if array.dtype.kind == "f" else array == value
    if not missing.any():
        return array
    if missing.mean() > MOST_MISSING:
        raise BadImage(f"{missing.mean():.0%} of its values are missing, more than {MOST_MISSING:.0%}")
    filled = array.copy()
    of_all = None
    for channel, lacks in zip(filled, missing, strict=True):
        if not lacks.any():
            continue
        if lacks.all():
            of_all = array[~missing].astype(np.float64).mean() if of_all is None else of_all
            channel[:] = of_all
        else:
            channel[lacks] = channel[~lacks].astype(np.float64).mean()
    return filled


def scaled(array: np.ndarray, value_range: ValueRange) -> Tensor:
    """Scale an image, (C, H, W) of any numbers, to float32 in [0, 255].

    Args:
        array: Image.
        value_range: Values that become 0 and 255. "type" means 0 and the largest integer of the array's type, or 0
            and 1 for floats.

    Raises:
        BadImage: If a number is not finite.
    """
    if value_range == "type":
        low, high = 0.0, float(np.iinfo(array.dtype).max) if array.dtype.kind in "ui" else 1.0
    else:
        low, high = value_range
    if not np.isfinite(array).all():
        raise BadImage(f"{int((~np.isfinite(array)).sum())} values are not finite")
    # in float64, because a float32 has 24 bits and an offset may be large
    values = np.clip((array.astype(np.float64) - low) * (255 / (high - low)), 0, 255).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(values))
