"""DICOM files, written by pydicom, are read as what was measured, and only their pixels go into shards."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEGBaseline8Bit

import mpp
from mpp.data.decoding.decode import decode_cut
from mpp.data.decoding.dicom import DicomFile, read_only_frame
from mpp.data.shards.pack import pack
from mpp.data.shards.reader import ShardImages
from mpp.errors import BadImage, UserError
from mpp.runs.records import read_metrics
from tests.conftest import drawn_image, encoded, pretrain_recipe

PATIENT = "Doe^Jane"
LARGE = 10**6


def dicom(pixels: np.ndarray, *, bits: int | None = None, photometric: str = "MONOCHROME2", **tags: Any) -> bytes:
    """Return a DICOM file of pixels, ([frames,] h, w) or (h, w, 3), with the name of a patient in it."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = tags.pop("syntax", ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3"
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    file.PatientName, file.PatientID = PATIENT, "4711"
    colour = photometric not in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
    file.Rows, file.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    file.SamplesPerPixel, file.PhotometricInterpretation = 3 if colour else 1, photometric
    if colour:
        file.PlanarConfiguration = 0
    if pixels.ndim == 3 and not colour:
        file.NumberOfFrames = len(pixels)
    file.BitsAllocated = 8 * pixels.dtype.itemsize
    file.BitsStored = bits or file.BitsAllocated
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, int(pixels.dtype.kind == "i")
    file.PixelData = tags.pop("data", pixels.tobytes())
    for name, value in tags.items():
        setattr(file, name, value)
    stream = io.BytesIO()
    file.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def read(data: bytes) -> np.ndarray:
    return read_only_frame(data, LARGE)


def test_hounsfield_units() -> None:
    stored = np.array([[0, 1024], [2048, 4095]], dtype=np.uint16)
    found = read(dicom(stored, bits=12, RescaleSlope=1, RescaleIntercept=-1024))
    assert found.dtype == np.int16
    assert found.tolist() == [[[-1024, 0], [1024, 3071]]]
    cut = decode_cut(
        dicom(stored, bits=12, RescaleSlope=1, RescaleIntercept=-1024), lambda w, h: (0, 0, w, h), (2, 2), channels=1,
        formats=("DICOM",), max_image_pixels=LARGE, value_range=(-1024.0, 3071.0),
    )  # fmt: skip
    assert cut.pixels.flatten().tolist() == pytest.approx([0, 255 * 1024 / 4095, 255 * 2048 / 4095, 255])


def test_signed_values_and_fractions() -> None:
    stored = np.array([[-3, 5]], dtype=np.int16)
    assert read(dicom(stored)).tolist() == [[[-3, 5]]]
    found = read(dicom(stored, RescaleSlope="0.25", RescaleIntercept=0))
    assert (found.dtype, found.tolist()) == (np.float32, [[[-0.75, 1.25]]])


def test_a_table_in_place_of_slope_and_intercept() -> None:
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [4, 0, 16], "US"
    table.LUTData = np.array([0, 100, 1000, 30000], dtype=np.uint16).tobytes()
    found = read(dicom(np.array([[0, 1], [2, 3]], dtype=np.uint16), bits=12, ModalityLUTSequence=Sequence([table])))
    assert found.tolist() == [[[0, 100], [1000, 30000]]]


def test_bright_where_low() -> None:
    stored = np.array([[0, 4095, 1000]], dtype=np.uint16)
    assert read(dicom(stored, bits=12, photometric="MONOCHROME1")).tolist() == [[[4095, 0, 3095]]]
    signed = np.array([[-2048, 2047, 0]], dtype=np.int16)
    assert read(dicom(signed, bits=12, photometric="MONOCHROME1")).tolist() == [[[2047, -2048, -1]]]
    measured = dicom(stored, bits=12, photometric="MONOCHROME1", RescaleSlope=2, RescaleIntercept=-100)
    assert read(measured).tolist() == [[[-100, 8090, 1900]]], "what was measured must not be inverted"


def test_a_rescale_that_is_empty_or_changes_nothing() -> None:
    stored = np.array([[1, 200]], dtype=np.uint8)
    found = read(dicom(stored, RescaleSlope=1, RescaleIntercept=0))
    assert (found.dtype, found.tolist()) == (np.uint8, [[[1, 200]]]), "an image of 8 bit must stay one"
    assert read(dicom(stored, RescaleSlope="", RescaleIntercept="")).tolist() == [[[1, 200]]]
    assert read(dicom(stored, RescaleIntercept=-1024)).tolist() == [[[-1023, -824]]]


def test_more_pixels_than_the_header_says() -> None:
    with pytest.raises(BadImage, match="with pixels of 3 frames; its header says 1"):
        read(dicom(np.zeros((3, 4, 4), dtype=np.uint8), NumberOfFrames=1))


def test_colours() -> None:
    picture = np.asarray(drawn_image(3, 16))
    assert np.array_equal(read(dicom(picture, photometric="RGB")), picture.transpose(2, 0, 1))
    luminance = np.asarray(Image.fromarray(picture).convert("YCbCr"))
    assert np.abs(read(dicom(luminance, photometric="YBR_FULL")).astype(int) - picture.transpose(2, 0, 1)).max() <= 2
    jpeg = encoded(Image.fromarray(picture), "JPEG", quality=95, subsampling=0)
    found = read(dicom(picture, photometric="YBR_FULL", syntax=JPEGBaseline8Bit, data=encapsulate([jpeg])))
    assert np.abs(found.astype(int) - picture.transpose(2, 0, 1)).mean() < 4


def test_a_palette() -> None:
    colours = {
        f"{name}PaletteColorLookupTable{part}": value
        for name, entries in (("Red", [0, 255]), ("Green", [10, 20]), ("Blue", [7, 9]))
        for part, value in (("Descriptor", [2, 0, 8]), ("Data", bytes(entries)))
    }
    found = read(dicom(np.array([[0, 1]], dtype=np.uint8), photometric="PALETTE COLOR", **colours))
    assert found.tolist() == [[[0, 255]], [[10, 20]], [[7, 9]]]
    for name, value in list(colours.items()):  # entries of 16 bit, as most devices write them
        deep = (
            [2, 0, 16] if name.endswith("Descriptor") else (np.frombuffer(value, np.uint8) * np.uint16(257)).tobytes()
        )
        colours[name] = deep
    found = read(dicom(np.array([[0, 1]], dtype=np.uint8), photometric="PALETTE COLOR", **colours))
    assert (found.dtype, found.tolist()) == (np.uint8, [[[0, 255]], [[10, 20]], [[7, 9]]])


def test_frames_have_their_own_slopes() -> None:
    groups = []
    for slope in (1, 10):
        values, group = Dataset(), Dataset()
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = slope, -5, "HU"
        group.PixelValueTransformationSequence = Sequence([values])
        groups.append(group)
    stored = np.array([[[1, 2]], [[1, 2]]], dtype=np.uint16)
    data = dicom(stored, PerFrameFunctionalGroupsSequence=Sequence(groups))
    file = DicomFile(data)
    assert file.frames == 2
    assert [file.read(i, max_image_pixels=LARGE).tolist() for i in range(2)] == [[[[-4, -3]]], [[[5, 15]]]]
    with pytest.raises(BadImage, match="of 2 frames; `mpp pack` makes an image of each"):
        read(data)


def test_as_eight_bit() -> None:
    """Without a value range, 8-bit files are ordinary images, and deeper ones are refused."""
    grey = np.asarray(drawn_image(2, 12, channels=1))
    reading: Any = {"formats": ("PNG", "DICOM"), "max_image_pixels": LARGE}

    def whole(width: int, height: int) -> tuple[int, int, int, int]:
        return 0, 0, width, height

    for channels in (1, 3):
        cut = decode_cut(dicom(grey), whole, (12, 12), channels=channels, **reading)
        assert np.array_equal(cut.pixels.numpy(), np.repeat(grey[None], channels, 0))
    with pytest.raises(BadImage, match="values of uint16: give their range by data.value_range"):
        decode_cut(dicom(grey.astype(np.uint16)), whole, (12, 12), channels=1, **reading)
    with pytest.raises(BadImage, match="of 1 channels; expected 5"):
        decode_cut(dicom(grey), whole, (12, 12), channels=5, value_range="type", **reading)
    with pytest.raises(BadImage, match="not an image of PNG"):
        decode_cut(dicom(grey), whole, (12, 12), channels=1, formats=("PNG",), max_image_pixels=LARGE)


def test_without_an_image_and_too_large() -> None:
    with pytest.raises(BadImage, match="2000×1000 pixels, over max_image_pixels"):
        read(dicom(np.zeros((1000, 2000), dtype=np.uint8)))
    file = pydicom.dcmread(io.BytesIO(dicom(np.zeros((2, 2), dtype=np.uint8))))
    del file.PixelData
    stream = io.BytesIO()
    file.save_as(stream)
    with pytest.raises(BadImage, match="without PixelData"):
        read(stream.getvalue())


def test_a_deflated_file_is_not_inflated() -> None:
    pixels = np.zeros((4, 4), dtype=np.uint8)
    assert read(dicom(pixels)).shape == (1, 4, 4)
    assert read(dicom(pixels, ImageComments="1.2.840.10008.1.2.1.99")).shape == (1, 4, 4)
    with pytest.raises(BadImage, match="a deflated DICOM file"):
        read(dicom(pixels, syntax=DeflatedExplicitVRLittleEndian))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_are_bad_images(draw: st.DataObject) -> None:
    data = bytearray(dicom(np.arange(64, dtype=np.uint16).reshape(8, 8), RescaleSlope=1, RescaleIntercept=-1))
    for place in draw.draw(st.lists(st.integers(132, len(data) - 1), max_size=8)):
        data[place] = draw.draw(st.integers(0, 255))
    cut = bytes(data[: draw.draw(st.integers(132, len(data)))])
    try:
        found = read(cut)
    except BadImage as error:
        assert "\n" not in str(error)
    else:
        assert found.ndim == 3


def test_without_pydicom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(UserError, match="DICOM files need pydicom: pip install"):
        read(dicom_bytes())


def dicom_bytes() -> bytes:
    return b"\0" * 128 + b"DICM"


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Return a folder of 20 slices, a series of three frames and a file without pixels."""
    (tmp_path / "scans").mkdir()
    for i in range(20):
        slice_of = np.asarray(drawn_image(i, channels=1)).astype(np.uint16) * 16
        data = dicom(slice_of, bits=12, RescaleSlope=1, RescaleIntercept=-1024)
        (tmp_path / "scans" / f"{i}.dcm").write_bytes(data)
    frames = np.stack([np.asarray(drawn_image(i, channels=1)).astype(np.uint16) for i in range(3)])
    (tmp_path / "scans" / "series.dcm").write_bytes(dicom(frames))
    (tmp_path / "scans" / "report.dcm").write_bytes(dicom_bytes())
    return tmp_path / "scans"


def test_packed_without_the_data_of_patients(scans: Path, tmp_path: Path) -> None:
    packed = pack(str(scans), str(tmp_path / "shards"), images_per_shard=8, workers=1)
    assert packed.images == 23
    assert [place for place, _ in packed.skipped] == ["report.dcm"]
    for shard in (tmp_path / "shards").glob("*.tar"):
        assert PATIENT.encode() not in shard.read_bytes()
        assert b"DICM" not in shard.read_bytes()
    images = ShardImages(str(tmp_path / "shards"), key="k")
    kept = [np.load(io.BytesIO(images.read(s, r))) for s, count in enumerate(images.counts) for r in range(count)]
    assert sorted((a.shape, a.dtype.str) for a in kept) == [((1, 24, 24), "<i2")] * 20 + [((1, 24, 24), "<u2")] * 3


def test_a_bad_frame_leaves_the_others_and_quotes_no_header(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    picture = drawn_image(3, 16)
    frames = [encoded(picture, "JPEG"), b"no JPEG", encoded(picture, "JPEG")]
    pixels = np.stack([np.asarray(picture)] * 3)
    data = dicom(pixels, photometric="YBR_FULL", NumberOfFrames=3, syntax=JPEGBaseline8Bit, data=encapsulate(frames))
    (tmp_path / "scans" / "series.dcm").write_bytes(data)
    odd = dicom(np.zeros((4, 4), dtype=np.uint8)).replace(b"MONOCHROME2 ", b"Doe^Jane\tX\n ")  # as long
    (tmp_path / "scans" / "odd.dcm").write_bytes(odd)
    packed = pack(str(tmp_path / "scans"), str(tmp_path / "shards"), workers=1)
    assert packed.images == 2
    assert [place for place, _ in packed.skipped] == ["odd.dcm, image 1", "series.dcm, image 2"]
    for kept in (tmp_path / "shards").iterdir():
        assert b"Doe^Jane" not in kept.read_bytes(), kept


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "shards"])
def test_grey_and_colours_in_one_set(packed: bool, channels: int, tmp_path: Path) -> None:
    place = tmp_path / "scans"
    place.mkdir()
    for i in range(24):
        pixels = np.asarray(drawn_image(i, channels=1 if i % 2 else 3))
        (place / f"{i}.dcm").write_bytes(dicom(pixels, photometric="MONOCHROME2" if i % 2 else "RGB"))
    if packed:
        pack(str(place), str(tmp_path / "shards"), workers=1)
        place = tmp_path / "shards"
    few = {"data.channels": channels, "data.held_out": 4, "optim.steps": 2}
    mpp.pretrain(pretrain_recipe(place, tmp_path / "run", **few))
    assert "unreadable" not in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "shards"])
def test_a_run_learns_from_them(packed: bool, scans: Path, tmp_path: Path) -> None:
    (scans / "report.dcm").unlink()
    (scans / "series.dcm").unlink()
    place = scans
    if packed:
        place = tmp_path / "shards"
        pack(str(scans), str(place), workers=1)
    deep = {"data.channels": 1, "data.value_range": [-1024, 3056], "data.held_out": 4, "optim.steps": 2}
    mpp.pretrain(pretrain_recipe(place, tmp_path / "run", **deep))
    assert [record.get("skipped_images", 0) for record in read_metrics(tmp_path / "run")][-1] == 0
