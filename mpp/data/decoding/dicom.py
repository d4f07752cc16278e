"""Read the pixels of DICOM files. Nothing else of a file is kept, because headers hold data of patients."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mpp.errors import BadImage, UserError, how_to_get

MARK = slice(128, 132)
"""Place of the letters DICM, after 128 bytes of any content (DICOM PS3.10, section 7.1)."""
TRANSFER_SYNTAX = re.compile(rb"\x02\x00\x10\x00UI..([0-9.]+)", re.DOTALL)
"""The element that names the encoding of what follows it, as a UID."""
DEFLATED = b"1.2.840.10008.1.2.1.99"
"""Encoding of files that are compressed as a whole, so that a small file may become gigabytes."""


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
        encoding = TRANSFER_SYNTAX.search(data)
        if encoding and encoding[1] == DEFLATED:
            raise BadImage("a deflated DICOM file; these are not read")
        with _bad_image_for_any_error():
            self._header: Any = pydicom.dcmread(io.BytesIO(data))
            if "PixelData" not in self._header:
                raise BadImage("a DICOM file without PixelData; float pixel data are not read")
            self.frames = max(int(self._header.get("NumberOfFrames") or 1), 1)
            self._check_length()

    def _check_length(self) -> None:
        """Raise BadImage if uncompressed pixels are of more frames than the header says, which would be lost."""
        header = self._header
        if header.file_meta.TransferSyntaxUID.is_compressed:
            return
        of_frame = header.Rows * header.Columns * header.SamplesPerPixel * header.BitsAllocated // 8
        if of_frame and len(header.PixelData) // of_frame > self.frames:
            frames = len(header.PixelData) // of_frame
            raise BadImage(f"a DICOM file with pixels of {frames} frames; its header says {self.frames}")

    def read(self, frame: int, *, max_image_pixels: int) -> np.ndarray:
        """Read a frame.

        Grey values are those that the device measured, such as Hounsfield units: the rescale slope and intercept, or
        the table in their place, are applied. Where there are none, and low values are meant to be bright
        (MONOCHROME1), the stored values are inverted. Palettes and YCbCr become RGB. Windows for display are not
        applied.

        Args:
            frame: Number of the frame, from 0.
            max_image_pixels: Greatest number of pixels of a frame. Larger ones are refused.

        Returns:
            (C, H, W), C is 1 or 3. Whole numbers are integers, others float32.

        Raises:
            BadImage: If the frame cannot be decoded, or is too large.
        """
        header = self._header
        with _bad_image_for_any_error(header.file_meta.TransferSyntaxUID.name):
            from pydicom import pixels

            width, height = int(header.Columns), int(header.Rows)
            if width * height > max_image_pixels:
                raise BadImage(f"{width}×{height} pixels, over max_image_pixels {max_image_pixels}")
            stored = pixels.pixel_array(header, index=frame, raw=False)  # YCbCr becomes RGB
            if header.PhotometricInterpretation == "PALETTE COLOR":
                stored = pixels.apply_color_lut(stored, header)
                stored = (stored >> 8).astype(np.uint8) if stored.dtype == np.uint16 else stored
            if stored.ndim == 3:
                return np.ascontiguousarray(stored.transpose(2, 0, 1))
            if "ModalityLUTSequence" in header:
                return _in_fitting_type(pixels.apply_modality_lut(stored, header))[None]
            slope, intercept = self._slope_and_intercept(frame)
            if (slope, intercept) != (1, 0):
                return _in_fitting_type(stored * slope + intercept)[None]
            if header.PhotometricInterpretation == "MONOCHROME1":
                highest = -1 if header.PixelRepresentation else 2 ** int(header.BitsStored) - 1
                stored = (highest - stored.astype(np.int64)).astype(stored.dtype)
            return stored[None]

    def _slope_and_intercept(self, frame: int) -> tuple[float, float]:
        """Return the numbers by which stored values become measured ones.

        In enhanced multi-frame files, they are in the functional groups of the frame, or of all frames.
        """
        of_frame = (self._header.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
        for group in (*of_frame, *(self._header.get("SharedFunctionalGroupsSequence") or [])):
            if transformations := group.get("PixelValueTransformationSequence"):
                return _rescale(transformations[0])
        return _rescale(self._header)


def _rescale(header: Any) -> tuple[float, float]:
    """Return slope and intercept; missing and empty ones are 1 and 0."""
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    return (1.0 if slope in (None, "") else float(slope)), (0.0 if intercept in (None, "") else float(intercept))


def read_only_frame(data: bytes, max_image_pixels: int) -> np.ndarray:
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
def _bad_image_for_any_error(encoding: str = "") -> Iterator[None]:
    """Raise BadImage in place of any error of pydicom, without its words, which may quote the header.

    Warnings about unusual headers are not shown either.

    Args:
        encoding: Name of the encoding of the pixels, for messages. "" means unknown.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadImage:
        raise
    except Exception as error:  # pydicom may raise anything on hostile bytes, or if it lacks a decoder
        if "missing dependencies" in str(error):
            raise BadImage(f"DICOM: pydicom needs a plugin for {encoding}; see docs/multichannel.md") from None
        by = f" as {encoding}" if encoding else ""
        raise BadImage(f"DICOM: cannot be decoded{by} ({type(error).__name__})") from None


def _in_fitting_type(values: np.ndarray) -> np.ndarray:
    """Return floats that are whole numbers as int16 or int32, other floats as float32, and integers as they are."""
    if values.dtype.kind != "f":
        return values
    if (values == np.rint(values)).all():
        for dtype in (np.int16, np.int32):
            if np.iinfo(dtype).min <= values.min() and values.max() <= np.iinfo(dtype).max:
                return values.astype(dtype)
    return values.astype(np.float32)
