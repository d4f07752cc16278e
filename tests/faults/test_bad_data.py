"""Unusual and damaged images and shards: each fault is reported, and the run continues with the other images."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mpp.data.decoding.decode import decode_crop
from mpp.data.shards.index import index_path, index_shard, scan
from mpp.data.shards.reader import ShardImages
from mpp.errors import BadImage, UserError
from mpp.runs.records import read_metrics
from tests.conftest import drawn_image, encoded
from tests.faults.conftest import RECIPES
from tests.faults.processes import Nursery

ALL = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
LIMIT = 64_000_000


def png(width: int, height: int, colour_type: int = 2, bits: int = 8, rows: bytes = bytes(1000)) -> bytes:
    """Return a PNG whose header gives this size. Unless `rows` are given, it holds few pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def deep_tiff(bits: int, side: int = 24) -> bytes:
    """Return a TIFF with three channels of this number of bits."""
    pixels = (np.arange(side * side * 3) % 251).astype(f"<u{bits // 8}").tobytes()
    tags = [
        (256, 4, 1, side), (257, 4, 1, side), (258, 3, 3, 8 + 2 + 9 * 12 + 4), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 8 + 2 + 9 * 12 + 4 + 6), (277, 3, 1, 3), (278, 4, 1, side), (279, 4, 1, len(pixels)),
    ]  # fmt: skip
    table = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + bytes(4) + struct.pack("<3H", *[bits] * 3) + pixels


def jpeg_of(width: int, height: int) -> bytes:
    """Return a real JPEG whose header gives this size."""
    data = bytearray(encoded(drawn_image(3), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def animated() -> bytes:
    frames = [Image.new("RGB", (24, 24), (40 * i, 10, 200)) for i in range(5)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def rotated() -> bytes:
    image, exif = drawn_image(5, 32).crop((0, 0, 32, 16)), Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif)


def of(mode: str, format: str) -> bytes:
    return encoded(drawn_image(7).convert(mode), format)


GREY16 = np.arange(24 * 24, dtype=np.uint16).reshape(24, 24) * 100
GOOD: dict[str, bytes] = {
    "png named jpg": encoded(drawn_image(1), "PNG"),
    "CMYK": of("CMYK", "JPEG"),
    "grey": of("L", "JPEG"),
    "palette": of("P", "PNG"),
    "one bit": of("1", "PNG"),
    "alpha": of("RGBA", "PNG"),
    "grey with alpha": of("LA", "PNG"),
    "16-bit grey PNG": encoded(Image.fromarray(GREY16), "PNG"),
    "TIFF of 8 bits a channel": deep_tiff(8),
    "deep-colour TIFF, 16 bits": deep_tiff(16),
    "16-bit grey TIFF": encoded(Image.fromarray(GREY16), "TIFF"),
    "EXIF-rotated": rotated(),
    "animated": animated(),
    "1×1": encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"),
    "20000×10": encoded(Image.new("RGB", (20000, 10), (9, 8, 7)), "JPEG"),
    "10×20000": encoded(Image.new("RGB", (10, 20000), (9, 8, 7)), "PNG"),
    "bytes after its end": encoded(drawn_image(2), "JPEG") + b"<?php system('id') ?>" * 100,
    "progressive": encoded(drawn_image(2), "JPEG", progressive=True),
}
BAD: dict[str, tuple[bytes, str]] = {
    "zero bytes": (b"", "empty file"),
    "truncated JPEG": (encoded(drawn_image(1, 64), "JPEG")[:700], "(?i)trunc"),
    "truncated PNG": (encoded(drawn_image(1, 64), "PNG")[:200], "trunc|broken|OSError|SyntaxError"),
    "HTML named .jpg": (b"<!doctype html><html><body>404 Not Found</body></html>", "not an image"),
    "text": (b"hello", "not an image"),
    "400 megapixels, PNG": (png(20000, 20000), "20000×20000 pixels, over max_image_pixels"),
    "400 megapixels, JPEG": (jpeg_of(20000, 20000), "20000×20000 pixels, over max_image_pixels"),
    "400 megapixels, all there": (
        png(20000, 20000, 0, 1, bytes(20000 * 2501)),
        "20000×20000 pixels, over max_image_pixels",
    ),
    "deep-colour TIFF, 32 bits": (deep_tiff(32), "not an image"),
    "4 gigapixels": (png(65000, 65000), "pixels, over max_image_pixels"),
    "no width": (png(0, 10), "not an image|SyntaxError|pixels"),
    "floating-point TIFF": (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floating-point"),
    "a header alone": (b"\xff\xd8\xff\xe0" + bytes(500), "not an image"),
    "a promise of pixels": (png(4000, 4000), "trunc|OSError|SyntaxError"),
    "gzip": (gzip.compress(encoded(drawn_image(1), "JPEG")), "not an image"),
    "an SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "not an image"),
    "a pickle": (
        b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.",
        "not an image",
    ),
}


def decoded(data: bytes, size: tuple[int, int] = (16, 16)) -> Any:
    return decode_crop(data, lambda w, h: (0, 0, w, h), size, channels=3, formats=ALL, max_image_pixels=LIMIT)


IMAGES = "Unusual images are read correctly; bad ones are replaced and named with the reason"


@pytest.mark.promise(IMAGES)
@pytest.mark.parametrize("kind", GOOD)
def test_unusual_images_are_read(kind: str, record_property: Callable[[str, object], None]) -> None:
    assert decoded(GOOD[kind]).shape == (3, 16, 16)
    record_property("unusual inputs tried", 1)


@pytest.mark.promise(IMAGES)
@pytest.mark.parametrize("kind", BAD)
def test_bad_images_are_refused(kind: str, record_property: Callable[[str, object], None]) -> None:
    data, reason = BAD[kind]
    with pytest.raises(BadImage, match=reason):
        decoded(data)
    record_property("bad inputs tried", 1)


def tar_of(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format, errors="surrogateescape") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.promise(IMAGES)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_all_of_them(workers: int, nursery: Nursery, folder: Path) -> None:
    shards = folder / "shards"
    shards.mkdir()
    plain = {f"plain{i}.jpg": encoded(drawn_image(i), "JPEG") for i in range(60)}
    members = {f"{i}.jpg": data for i, data in enumerate([*GOOD.values(), *(data for data, _ in BAD.values())])}
    tar_of(shards / "a.tar", {**members, **plain})
    changes = {
        "optim.epochs": 3,
        "optim.steps": None,
        "data.workers": workers,
        "data.held_out": 4,
        "data.formats": list(ALL),
    }
    path = RECIPES["pretrain"](shards, folder / "r.yaml", folder / "run", **changes)
    nursery.start("pretrain", path, log=folder / "log", world=2).ends_well()
    log = (folder / "run" / "train.log").read_text()
    for i, (kind, (_, reason)) in enumerate(BAD.items(), len(GOOD)):
        line = next((text for text in log.splitlines() if f"a.tar: {i}.jpg: " in text), None)
        assert line, f"{kind} is not named"
        import re

        assert re.search(reason, line)
    for i, kind in enumerate(GOOD):
        assert f"a.tar: {i}.jpg: " not in log, kind
    assert read_metrics(folder / "run")[-1]["skipped_images"] >= 3 * len(BAD) - 3


# ---- shards

TARS = "Any tar is read as Python's tarfile reads it, or refused in one line with file and place"


@pytest.mark.promise(TARS)
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names(format: int, folder: Path, record_property: Callable[[str, object], None]) -> None:
    """Names of any length and script are read, also repeated ones and paths out of the folder: nothing is unpacked."""
    data = encoded(drawn_image(1), "JPEG")
    names = [
        "../../etc/passwd.jpg",
        "/etc/cron.d/evil.jpg",
        "a/../../b.jpg",
        "ünïcödé-图像.jpg",
        "with space\tand tab.jpg",
    ]
    if format != tarfile.USTAR_FORMAT:
        names += ["x" * 300 + ".jpg", "d/" * 200 + "deep.jpg", "名" * 120 + ".jpg"]
    path = tar_of(folder / "a.tar", dict.fromkeys(names, data), format)
    with tarfile.open(path, "a", format=format) as tar:  # add a name a second time
        info = tarfile.TarInfo(names[0])
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    before = sorted(p for p in folder.parent.rglob("*") if folder in p.parents)
    images = ShardImages(str(path), key="data.shards")
    assert images.counts == [len(names)], "of a repeated name, the last member counts"
    for row in range(len(names)):
        assert images.read(0, row) == data
        assert "\n" not in images.name(0, row)
    after = sorted(p for p in folder.parent.rglob("*") if folder in p.parents)
    assert set(after) - set(before) <= {index_path(str(path))}
    record_property("unusual inputs tried", len(names) + 1)


@pytest.mark.promise(TARS)
def test_links_sparse_files_and_other_members(folder: Path) -> None:
    data = encoded(drawn_image(1), "JPEG")
    with tarfile.open(folder / "a.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"kind{kind.decode()}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name, content in (
            ("a.jpg", data),
            ("a.jpg.gz", gzip.compress(data)),
            ("code.py", b"import os"),
            ("x.pkl", b"."),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    images = ShardImages(str(folder / "a.tar"), key="data.shards")
    assert images.counts == [1]
    assert images.read(0, 0) == data
    with open(folder / "holes.tar", "wb") as f:  # a sparse file of a terabyte, which takes no space
        f.truncate(1 << 40)
    with pytest.raises(UserError, match="no images in"):
        ShardImages(str(folder / "holes.tar"), key="data.shards")


@pytest.mark.promise(TARS)
def test_cut_anywhere(folder: Path, record_property: Callable[[str, object], None]) -> None:
    """Cut a tar at, between and inside its members. Cut between two members, it looks like a tar that has ended."""
    whole = tar_of(folder / "whole.tar", {f"{i}.jpg": encoded(drawn_image(i), "JPEG") for i in range(4)}).read_bytes()
    cut, tried = folder / "cut.tar", 0
    content = len(whole.rstrip(b"\0"))
    for length in sorted({*range(0, content, 97), *range(0, content, 512), content}):
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.tar: (cut off|empty file|not a tar)"):
            scan(str(cut))
        tried += 1
    record_property("bad inputs tried", tried)


def refused(nursery: Nursery, folder: Path, recipe: Path, *words: str, **options: Any) -> str:
    log = folder / f"refused{len(list(folder.iterdir()))}"
    run = nursery.start("pretrain", recipe, *words, log=log, world=2, **options)
    assert run.wait() == [2, 2], run.said()
    assert "Traceback" not in run.said(), run.said()
    return run.said()


@pytest.mark.promise("Missing, empty, unreadable, changed or wrong shards are refused by name, in one line")
def test_shards_that_cannot_be_read(nursery: Nursery, folder: Path) -> None:
    shards = folder / "shards"
    shards.mkdir()
    for n in range(3):
        tar_of(shards / f"s{n}.tar", {f"{n}{i}.jpg": encoded(drawn_image(i), "JPEG") for i in range(20)})
    recipe = RECIPES["pretrain"](shards, folder / "r.yaml", folder / "run")
    middle = shards / "s1.tar"
    good = middle.read_bytes()

    assert f"data.shards: '{shards}/s3.tar': no such shard" in refused(
        nursery, folder, recipe, f"data.shards={shards}/s{{0..3}}.tar"
    )
    middle.write_bytes(b"")
    assert f"{middle}: empty file, not a tar" in refused(nursery, folder, recipe)
    middle.write_bytes(gzip.compress(good))
    assert f"{middle}: not a tar file (a compressed one must be unpacked)" in refused(nursery, folder, recipe)
    broken = bytearray(good)
    second = 512 + -(-len(encoded(drawn_image(0), "JPEG")) // 512) * 512
    broken[second + 5] ^= 0xFF
    middle.write_bytes(broken)
    assert f"{middle}: corrupt header at byte {second}" in refused(nursery, folder, recipe)
    middle.write_bytes(good)
    middle.chmod(0)
    assert f"{middle}: Permission denied" in refused(nursery, folder, recipe, bound_by_modes=True)
    middle.chmod(0o644)
    shards.chmod(0)
    assert f"data.shards: '{shards}': Permission denied" in refused(nursery, folder, recipe, bound_by_modes=True)
    shards.chmod(0o755)
    assert not (folder / "run").exists()


@pytest.mark.promise("Missing, empty, unreadable, changed or wrong shards are refused by name, in one line")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_replaced_while_the_run_reads_it(workers: int, nursery: Nursery, folder: Path) -> None:
    """Processes that have a file open keep reading the old one if it is replaced. Those that open it later notice."""
    shards = folder / "shards"
    shards.mkdir()
    members = {f"{i}.jpg": encoded(drawn_image(i), "JPEG") for i in range(40)}
    tar_of(shards / "s0.tar", members)
    changes = {"optim.steps": 100000, "data.workers": workers, "checkpoint_every_steps": 5}
    recipe = RECIPES["pretrain"](shards, folder / "r.yaml", folder / "run", **changes)
    fault = {"point": "save.ends", "nth": 2, "do": "kill"}
    nursery.start("pretrain", recipe, log=folder / "log", world=2, fault=fault).wait()
    tar_of(shards / "s0.tar", {**members, "41.jpg": encoded(drawn_image(41), "JPEG")})
    assert "the data changed since" in refused(nursery, folder, recipe, "--resume", "auto")


# ---- fuzzing

FUZZ = "Fuzzed bytes cause no crash, no hang and no memory growth; each fault is one line"


@pytest.mark.promise(FUZZ)
def test_fuzzed_indexes_and_tars(folder: Path, record_property: Callable[[str, object], None]) -> None:
    shard = tar_of(folder / "a.tar", {f"{i}.jpg": encoded(drawn_image(i), "JPEG") for i in range(5)})
    index_shard(str(shard), str(folder))
    stored, tar = index_path(str(shard)).read_bytes(), shard.read_bytes()
    kept = os.stat(shard)
    fuzzed = 0

    @settings(max_examples=600, deadline=2000, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal fuzzed
        which, original = data.draw(st.sampled_from([("index", stored), ("tar", tar)]))
        damaged = bytearray(original)
        for _ in range(data.draw(st.integers(1, 12))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))]) if data.draw(st.booleans()) else bytes(damaged)
        fuzzed += len(cut)
        shard.write_bytes(cut if which == "tar" else tar)
        index_path(str(shard)).write_bytes(cut if which == "index" else b"")
        os.utime(shard, ns=(kept.st_atime_ns, kept.st_mtime_ns))
        try:
            index = index_shard(str(shard), str(folder))
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            return
        end = len(cut) if which == "tar" else len(tar)
        assert ((index.table[:, 0] + index.table[:, 1]) <= end).all()

    run()
    record_property("bytes fuzzed", fuzzed)


@pytest.mark.promise(FUZZ)
@pytest.mark.parametrize("format", ALL)
def test_fuzzed_images(format: str, record_property: Callable[[str, object], None]) -> None:
    original = encoded(drawn_image(4, 48), format)
    fuzzed = 0

    @settings(max_examples=400, deadline=5000, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal fuzzed
        damaged = bytearray(original)
        for _ in range(data.draw(st.integers(1, 16))):
            at = data.draw(st.integers(0, len(damaged) - 1))
            kind = data.draw(st.sampled_from(["set", "insert", "remove"]))
            if kind == "set":
                damaged[at] = data.draw(st.integers(0, 255))
            elif kind == "insert":
                damaged[at:at] = data.draw(st.binary(max_size=20))
            else:
                del damaged[at : at + data.draw(st.integers(0, 40))]
            damaged = damaged or bytearray(b"x")
        fuzzed += len(damaged)
        try:
            assert decoded(bytes(damaged)).shape == (3, 16, 16)
        except BadImage as error:
            assert "\n" not in str(error)

    run()
    record_property("bytes fuzzed", fuzzed)


MEMORY = """
import resource, sys
sys.path.insert(0, {root!r})
from tests.faults.test_bad_data import BAD, LIMIT, decoded, png
from mpp.errors import BadImage
decoded({good!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for data, _ in BAD.values():
    try:
        decoded(data)
    except BadImage:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.promise(FUZZ)
def test_bad_images_take_no_memory() -> None:
    """A bad image takes less than 8 bytes for each of max_image_pixels: bombs are refused by their headers."""
    import subprocess
    import sys

    from tests.conftest import ROOT

    code = MEMORY.format(root=str(ROOT), good=encoded(drawn_image(1), "JPEG"))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(found.stdout) * 1024 < 8 * LIMIT
