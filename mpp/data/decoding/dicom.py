"""Read the pixels of DICOM files. Nothing else of a file is kept, because headers hold data of patients."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mpp.errors import BadImage, UserError, how_to_get

DEFLATED = b"1.2.840.10008.1.2.1.99"
"""Name of the format whose header and pixels are compressed together, as files have it near their beginning."""
LONGEST_META_BYTES = 4096
MARK = slice(128, 132)
"""Place of the letters DICM in a file, after 128 bytes of any content (DICOM PS3.10, section 7.1)."""


def is_dicom(data: bytes) -> bool:
    return data[MARK] == b"DICM"


class DicomFile:
    """An opened DICOM file.

    Args:
        data: Bytes of the file.

    Raises:
        BadImage: If it cannot be read, or has no image.
        UserError: If pydicom is not installed.
    """

    def __init__(self, data: bytes) -> None:
        try:
            import pydicom
        except ModuleNotFoundError as error:
            raise UserError(f"DICOM files need pydicom: {how_to_get('dicom')}") from error
        with _faults():
            if DEFLATED in data[:LONGEST_META_BYTES]:
                raise BadImage("a deflated DICOM file, which may inflate to any size")
            self._header: Any = pydicom.dcmread(io.BytesIO(data))
            if "PixelData" not in self._header:
                raise BadImage("a DICOM file without PixelData")
            self.frames = max(int(self._header.get("NumberOfFrames") or 1), 1)

    def read(self, frame: int, *, max_image_pixels: int) -> np.ndarray:
        """Read a frame.

        Grey values are those that the device measured, such as Hounsfield units: the rescale slope and intercept, or
        the table in their place, are applied. If low stored values are meant to be bright (MONOCHROME1), they are
        inverted before. Palettes and YCbCr become RGB. Windows for display are not applied.

        Args:
            frame: Number of the frame, from 0.
            max_image_pixels: Greatest number of pixels of a frame. Larger ones are refused.

        Returns:
            (C, H, W), C is 1 or 3. Whole numbers are integers, others float32.

        Raises:
            BadImage: If the frame cannot be decoded, or is too large.
        """
        header = self._header
        with _faults():
            from pydicom import pixels

            width, height = int(header.Columns), int(header.Rows)
            if width * height > max_image_pixels:
                raise BadImage(f"{width}×{height} pixels, over max_image_pixels {max_image_pixels}")
            stored = pixels.pixel_array(header, index=frame, raw=False)  # YCbCr becomes RGB
            if header.PhotometricInterpretation == "PALETTE COLOR":
                stored = pixels.apply_color_lut(stored, header)
            if stored.ndim == 3:
                return np.ascontiguousarray(stored.transpose(2, 0, 1))
            if header.PhotometricInterpretation == "MONOCHROME1":
                highest = -1 if header.PixelRepresentation else 2 ** int(header.BitsStored) - 1
                stored = (highest - stored.astype(np.int64)).astype(stored.dtype)
            return _in_fitting_type(self._measured(stored, frame))[None]

    def _measured(self, stored: np.ndarray, frame: int) -> np.ndarray:
        """Return what was measured at each pixel, from stored values, (H, W).

        In enhanced multi-frame files, slope and intercept are in the functional groups of the frame, or of all frames.
        """
        from pydicom.pixels import apply_modality_lut

        of_frame = (self._header.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
        for group in (*of_frame, *(self._header.get("SharedFunctionalGroupsSequence") or [])):
            if transformations := group.get("PixelValueTransformationSequence"):
                return stored * float(transformations[0].RescaleSlope) + float(transformations[0].RescaleIntercept)
        measured: np.ndarray = apply_modality_lut(stored, self._header)
        return measured


def read_one_frame(data: bytes, max_image_pixels: int) -> np.ndarray:
    """Read the image of a DICOM file that has only one; see `DicomFile.read`.

    Raises:
        BadImage: If the file cannot be read, or has several frames.
        UserError: If pydicom is not installed.
    """
    file = DicomFile(data)
    if file.frames > 1:
        raise BadImage(f"a DICOM file of {file.frames} frames; `mpp pack` makes an image of each")
    return file.read(0, max_image_pixels=max_image_pixels)


@contextmanager
def _faults() -> Iterator[None]:
    """Raise BadImage in place of any other exception, and keep warnings about unusual headers from the user."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadImage:
        raise
    except Exception as error:  # pydicom may raise anything on hostile bytes, or if it lacks a decoder
        reason = str(error).splitlines()[0] if str(error) else ""
        raise BadImage(f"DICOM: {type(error).__name__}: {reason}") from None


def _in_fitting_type(values: np.ndarray) -> np.ndarray:
    """Return integers as they are, floats that are whole numbers as int16 or int32, and other floats as float32."""
    if values.dtype.kind != "f":
        return values
    if (values == np.rint(values)).all():
        for dtype in (np.int16, np.int32):
            if np.iinfo(dtype).min <= values.min() and values.max() <= np.iinfo(dtype).max:
                return values.astype(dtype)
    return values.astype(np.float32)
