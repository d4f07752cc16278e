"""Decoding: every kind of image that a user may have, and every kind of file that is not an image."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as theirs

from mpp.data.decoding.decode import centre_box, decode_crop, random_box
from mpp.errors import BadImage
from mpp.rng import Purpose, stream
from tests.conftest import drawn_image, encoded

ALL = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")


def decode(data: bytes, size: tuple[int, int] = (8, 8), channels: int = 3, **changes: object) -> torch.Tensor:
    keywords = {"channels": channels, "formats": ALL, "max_image_pixels": 10**6} | changes
    return decode_crop(data, lambda w, h: (0, 0, w, h), size, **keywords)  # type: ignore[arg-type]


def flat(mode: str, colour: object, size: tuple[int, int] = (32, 16)) -> Image.Image:
    return Image.new(mode, size, colour)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_format(format: str, channels: int) -> None:
    pixels = decode(encoded(flat("RGB", (200, 100, 50)), format), (8, 12), channels)
    assert pixels.shape == (channels, 8, 12)
    assert pixels.dtype == torch.uint8
    expected = {1: [124], 3: [200, 100, 50], 4: [200, 100, 50, 255]}[channels]
    torch.testing.assert_close(pixels.float().mean((1, 2)), torch.tensor(expected).float(), atol=4, rtol=0)


@pytest.mark.parametrize(
    ("image", "format", "options", "expected"),
    [
        (flat("CMYK", (0, 255, 255, 0)), "JPEG", {}, (255, 0, 0)),
        (flat("L", 77), "JPEG", {}, (77, 77, 77)),
        (flat("1", 1), "PNG", {}, (255, 255, 255)),
        (flat("P", 0).convert("P"), "PNG", {}, (0, 0, 0)),
        (flat("RGBA", (255, 0, 0, 0)), "PNG", {}, (128, 128, 128)),
        (flat("RGBA", (255, 0, 0, 255)), "PNG", {}, (255, 0, 0)),
        (flat("LA", (255, 0)), "PNG", {}, (128, 128, 128)),
        (flat("RGB", (9, 9, 9)), "PNG", {"transparency": (9, 9, 9)}, (128, 128, 128)),
        (Image.fromarray(np.full((16, 32), 257 * 99, np.uint16)), "PNG", {}, (99, 99, 99)),
        (Image.fromarray(np.full((16, 32), 257 * 99, np.uint16)), "TIFF", {}, (99, 99, 99)),
    ],
)
def test_modes(image: Image.Image, format: str, options: dict[str, object], expected: tuple[int, ...]) -> None:
    pixels = decode(encoded(image, format, **options))
    torch.testing.assert_close(pixels.float().mean((1, 2)), torch.tensor(expected).float(), atol=3, rtol=0)


def test_exif_rotation_is_applied() -> None:
    image = flat("RGB", (0, 0, 0), (16, 32))
    image.paste((255, 255, 255), (0, 0, 16, 16))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated clockwise, with white on the right
    pixels = decode(encoded(image, "JPEG", exif=exif, quality=95), (16, 32)).float()[0]
    assert pixels[:, 20:].mean() > 240
    assert pixels[:, :12].mean() < 15


def test_first_frame_of_an_animation() -> None:
    buffer = io.BytesIO()
    flat("RGB", (250, 0, 0)).save(buffer, "GIF", save_all=True, append_images=[flat("RGB", (0, 250, 0))])
    assert decode(buffer.getvalue()).float().mean((1, 2))[0] > 200


@pytest.mark.parametrize("side", [(1, 1), (4000, 2), (2, 4000)])
def test_odd_sizes(side: tuple[int, int]) -> None:
    assert decode(encoded(flat("RGB", (10, 20, 30), side))).shape == (3, 8, 8)


def test_shrunk_decoding_agrees_with_the_full_one() -> None:
    image = drawn_image(3, 512)
    data = encoded(image, "JPEG", quality=95)
    fast = decode(data, (32, 32)).float()
    slow = decode(encoded(image, "PNG"), (32, 32)).float()
    assert (fast - slow).abs().mean() < 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"<html>not found</html>", "not an image of JPEG"),
        (encoded(drawn_image(1), "JPEG")[:300], "(?i)trunc"),
        (encoded(drawn_image(1), "PNG")[:200], "trunc|broken|OSError|SyntaxError"),
        (encoded(flat("RGB", (0, 0, 0), (1100, 1000)), "JPEG"), "1100×1000 pixels, over max_image_pixels"),
        (encoded(flat("RGB", (0, 0, 0), (1100, 1000)), "PNG"), "1100×1000 pixels, over max_image_pixels"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floating-point"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 500, "not an image"),
    ],
)
def test_bad_images_say_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(BadImage, match=message):
        decode(data)


def pages(*images: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    images[0].save(file, "TIFF", save_all=True, append_images=images[1:], **options)
    return file.getvalue()


def test_a_stack_of_pages() -> None:
    """Several pages of one size are refused, because all but the first would be lost. A thumbnail is allowed."""
    page = drawn_image(1)
    for big in (False, True):
        with pytest.raises(BadImage, match="a TIFF of several pages of one size; data.channels"):
            decode(pages(page, drawn_image(2), big_tiff=big))
    small = page.resize((8, 8))
    alone = encoded(page, "TIFF")
    assert torch.equal(decode(pages(page, small)), decode(alone))
    directory = int.from_bytes(alone[4:8], "little")
    entries = int.from_bytes(alone[directory : directory + 2], "little")
    link = directory + 2 + 12 * entries
    for elsewhere in (9, 100, len(alone) - 1, len(alone) + 4, 0xFFFFFFF0):
        damaged = alone[:link] + elsewhere.to_bytes(4, "little") + alone[link + 4 :]
        assert torch.equal(decode(damaged), decode(alone)), "the first page must still be read"


def test_a_format_that_was_not_allowed() -> None:
    with pytest.raises(BadImage, match="not an image of PNG"):
        decode(encoded(drawn_image(1), "JPEG"), formats=("PNG",))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_else(data: st.DataObject) -> None:
    original = encoded(drawn_image(2), data.draw(st.sampled_from(ALL)))
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    try:
        assert decode(bytes(damaged[:cut])).shape == (3, 8, 8)
    except BadImage as error:
        assert "\n" not in str(error)


@given(w=st.integers(1, 5000), h=st.integers(1, 5000), seed=st.integers(0, 2**40))
def test_boxes_lie_inside(w: int, h: int, seed: int) -> None:
    for left, top, bw, bh in (
        random_box(stream(seed, Purpose.CROP), w, h, (0.2, 1.0), (0.75, 4 / 3)),
        centre_box(w, h, (224, 160)),
        centre_box(w, h, (32, 32), 0.875),
    ):
        assert left >= 0
        assert top >= 0
        assert bw >= 1
        assert bh >= 1
        assert left + bw <= w
        assert top + bh <= h


def test_random_boxes_have_the_area_they_are_asked_for() -> None:
    rng = stream(0, Purpose.CROP)
    areas = [
        w * h / 10**6 for _, _, w, h in (random_box(rng, 1000, 1000, (0.2, 1.0), (0.75, 4 / 3)) for _ in range(500))
    ]
    assert min(areas) > 0.19
    assert 0.5 < np.mean(areas) < 0.65  # a little below 0.6, because wide large boxes do not fit


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_crops_are_torchvisions_to_the_bit(mode: str) -> None:
    image = drawn_image(3, 90).convert(mode)
    pixels = torch.from_numpy(np.atleast_3d(np.asarray(image)).copy()).permute(2, 0, 1)
    for box in ((0, 0, 90, 90), (7, 3, 80, 33), (60, 2, 16, 24), (5, 5, 24, 16), (89, 89, 1, 1)):
        left, top, w, h = box
        found = decode_crop(
            encoded(image, "PNG"), lambda *_, box=box: box, (16, 24), channels=len(pixels), formats=("PNG",),
            max_image_pixels=10**6,
        )  # fmt: skip
        bicubic = InterpolationMode.BICUBIC
        assert torch.equal(found, theirs.resized_crop(pixels, top, left, h, w, [16, 24], bicubic, antialias=True))
