"""Indexes: positions of images and labels in a tar, and which tars are refused."""

from __future__ import annotations

import ast
import io
import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mpp.data.shards.index import class_names, digest, expand, fingerprint, index_path, index_shard, member_name, scan
from mpp.errors import UserError

FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def content(path: Path, row: np.ndarray, column: int = 0) -> bytes:
    return path.read_bytes()[row[column] : row[column] + row[column + 1]]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["a{}.jpg", "deep/er/a{}.JPEG", "x" * 120 + "/y{}.png", "ü{}.webp", "a.b{}.tif"])
def test_finds_images_in_every_tar_format(tmp_path: Path, format: str, name: str) -> None:
    members = {name.format(i): bytes([i]) * (100 * i + 1) for i in range(4)}
    index = scan(str(write_tar(tmp_path / "a.tar", members, FORMATS[format])))
    assert [content(tmp_path / "a.tar", row) for row in index.table] == list(members.values())
    assert (index.table[:, 3] == -1).all()


def test_arrays_are_images_where_no_other_is_beside_them(tmp_path: Path) -> None:
    """key.npy next to key.jpg is an embedding or a depth map, not an image."""
    members = {"a.npy": b"1", "b.jpg": b"22", "b.npy": b"333", "c.depth.npy": b"4444", "c.png": b"5", "d.NPY": b"66"}
    index = scan(str(write_tar(tmp_path / "a.tar", members, tarfile.PAX_FORMAT)))
    assert [content(tmp_path / "a.tar", row) for row in index.table] == [b"1", b"22", b"5", b"66"]


@settings(max_examples=40, deadline=None)
@given(
    members=st.lists(
        st.tuples(st.sampled_from(["jpg", "txt", "cls", "json", "pth", "png"]), st.binary(max_size=1500)),
        max_size=12,
    ),
    format=st.sampled_from(sorted(FORMATS)),
)
def test_agrees_with_tarfile(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes]], format: str
) -> None:
    named = {f"k{i}.{ext}": data for i, (ext, data) in enumerate(members)}
    path = write_tar(tmp_path_factory.mktemp("t") / "a.tar", named, FORMATS[format])
    with tarfile.open(path) as tar:
        expected = [(m.offset_data, m.size) for m in tar if m.name.endswith(("jpg", "png"))]
    assert [tuple(row[:2]) for row in scan(str(path)).table.tolist()] == expected


def test_the_longest_names_there_are(tmp_path: Path) -> None:
    """The index of such a shard is in the cache, because its name next to the shard would be too long."""
    path = write_tar(tmp_path / ("x" * 251 + ".tar"), {f"{i}.jpg": b"data" for i in range(3)})
    for _ in range(2):
        assert len(index_shard(str(path), str(tmp_path / "cache")).table) == 3
    assert os.listdir(tmp_path / "cache" / "indexes") == [index_path(str(path), str(tmp_path / "cache")).name]
    assert sorted(os.listdir(tmp_path)) == ["cache", path.name]


def test_no_two_threads_parse_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads index shards, but the parser of CPython 3.11 must not be used by two threads at once."""
    path = write_tar(tmp_path / "a.tar", {f"{i}.jpg": b"data" for i in range(3)})
    index_shard(str(path), str(tmp_path / "cache"))
    parse, inside, most = ast.literal_eval, 0, 0

    def watched(text: str) -> object:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.005)
        inside -= 1
        return parse(text)

    monkeypatch.setattr(ast, "literal_eval", watched)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: index_shard(str(path), str(tmp_path / "cache")), range(8)))
    assert most == 1


def test_reads_what_webdataset_writes(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        for i in range(5):
            writer.write({"__key__": f"s{i}", "jpg": bytes([i]) * 9, "cls": i, "json": {"label": 7}})
    table = scan(str(tmp_path / "w.tar")).table
    assert [content(tmp_path / "w.tar", row) for row in table] == [bytes([i]) * 9 for i in range(5)]
    assert [content(tmp_path / "w.tar", row, 2) for row in table] == [str(i).encode() for i in range(5)]
    assert (table[:, 4] == 0).all(), "a .cls is the label even if there is also a .json"


@pytest.mark.parametrize("format", FORMATS)
def test_a_tar_cut_anywhere_is_refused_with_its_name(tmp_path: Path, format: str) -> None:
    whole = write_tar(tmp_path / "w.tar", {f"{i}.jpg": b"x" * 700 for i in range(3)}, FORMATS[format])
    data = whole.read_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512 + 1024
    for size in [*range(1, end, 171), end - 1]:
        (tmp_path / "c.tar").write_bytes(data[:size])
        with pytest.raises(UserError, match=r"c\.tar: (cut off|not a tar|corrupt header)"):
            scan(str(tmp_path / "c.tar"))
    (tmp_path / "c.tar").write_bytes(data[:end])
    assert len(scan(str(tmp_path / "c.tar")).table) == 3


def test_refuses_what_is_no_tar(tmp_path: Path) -> None:
    for data, message in (
        (b"", "empty file"),
        (b"\x1f\x8b" + b"x" * 2000, "not a tar"),
        (b"<html>" * 200, "not a tar"),
    ):
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(UserError, match=message):
            scan(str(tmp_path / "a.tar"))
    with pytest.raises(UserError, match="No such file"):
        scan(str(tmp_path / "none.tar"))


def test_a_corrupt_header_in_the_middle_is_refused_with_its_place(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{i}.jpg": b"x" * 512 for i in range(3)})
    data = bytearray(path.read_bytes())
    data[1024 + 10] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match="corrupt header at byte 1024"):
        scan(str(path))


def test_a_negative_size_is_refused(tmp_path: Path) -> None:
    """A negative size would move the scan backwards, so that it never ends."""
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"x" * 600, "b.jpg": b"y"})
    data = bytearray(path.read_bytes())
    at = 512 + 1024
    data[at + 124 : at + 136] = b"-0000001000\0"
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"corrupt header at byte {at}"):
        scan(str(path))
    info = tarfile.TarInfo("c.jpg")
    info.pax_headers = {"size": "-2048"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
    with pytest.raises(UserError, match=r"a\.tar: "):
        scan(str(path))


def test_links_and_folders_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, kind in (
            ("d.jpg", tarfile.DIRTYPE),
            ("l.jpg", tarfile.SYMTYPE),
            ("h.jpg", tarfile.LNKTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    table = scan(str(tmp_path / "a.tar")).table
    assert len(table) == 1
    assert content(tmp_path / "a.tar", table[0]) == b"abc"


def test_a_stored_index_is_used_until_the_shard_changes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"x"})
    index_shard(str(path), str(tmp_path / "cache"))
    assert index_path(str(path)).exists()
    before = index_path(str(path)).stat().st_mtime_ns
    index_shard(str(path), str(tmp_path / "cache"))
    assert index_path(str(path)).stat().st_mtime_ns == before
    write_tar(path, {"a.jpg": b"x", "b.jpg": b"y"})
    assert len(index_shard(str(path), str(tmp_path / "cache")).table) == 2


def test_a_damaged_index_is_made_anew(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"x"})
    for damage in (b"", b"PK\x03\x04 nonsense", b"\x80\x04pickle"):
        index_path(str(path)).write_bytes(damage)
        assert len(index_shard(str(path), str(tmp_path)).table) == 1


def test_a_folder_that_cannot_be_written_sends_the_index_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"x"})
    index_path(str(path)).mkdir()  # no file can be renamed onto a folder, whereas permissions do not stop root
    (index_path(str(path)) / "x").touch()
    index_shard(str(path), str(tmp_path / "cache"))
    assert index_path(str(path), str(tmp_path / "cache")).exists()


def test_expand(tmp_path: Path) -> None:
    paths = [str(write_tar(tmp_path / f"s-{i:03d}.tar", {"a.jpg": b"x"})) for i in range(3)]
    assert expand(str(tmp_path), "k") == paths
    assert expand(str(tmp_path / "s-{000..002}.tar"), "k") == paths
    assert expand(str(tmp_path / "s-*.tar"), "k") == paths
    assert expand((paths[2], paths[0]), "k") == [paths[2], paths[0]]
    assert expand("https://h/s-{0..1}.tar", "k") == ["https://h/s-0.tar", "https://h/s-1.tar"]
    for bad, message in (
        (str(tmp_path / "no*.tar"), "no such shard"),
        (str(tmp_path / "s-{000..009}.tar"), "no such shard"),
        ((paths[0], paths[0]), "named twice"),
        ((paths[0], f"{os.path.dirname(paths[0])}/./{os.path.basename(paths[0])}"), "named twice, also as"),
        ("pipe:cat /etc/passwd", "pipes are never run"),
        (str(tmp_path / "s-{0..1.tar"), "unbalanced|no such shard"),
    ):
        with pytest.raises(UserError, match=message) as error:
            expand(bad, "data.shards")
        assert str(error.value).startswith("data.shards: ")


def test_fingerprint_is_of_the_data_not_its_place(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    a = write_tar(tmp_path / "a.tar", {"a.jpg": b"x"})
    b = tmp_path / "b" / "a.tar"
    b.write_bytes(a.read_bytes())
    c = write_tar(tmp_path / "c.tar", {"a.jpg": b"x"})
    prints = [fingerprint([str(p)], [scan(str(p)).size_bytes], [digest(scan(str(p)))]) for p in (a, b, c)]
    assert prints[0] == prints[1] != prints[2]


def test_member_name_and_class_names(tmp_path: Path, shards: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"here/a.jpg": b"x"})
    assert member_name(str(path), int(scan(str(path)).table[0, 0])) == "here/a.jpg"
    assert member_name(str(path), 10**9) == ""
    assert class_names(str(shards)) == ["disc", "square"]
    assert class_names(str(path.parent)) is None


def test_sparse_members_are_not_taken_for_images(tmp_path: Path) -> None:
    big = tmp_path / "hole.jpg"
    with open(big, "wb") as f:
        f.seek(1 << 20)
        f.write(b"x")
    if os.system(f"cd {tmp_path} && tar --sparse -cf s.tar hole.jpg 2>/dev/null") == 0:
        assert len(scan(str(tmp_path / "s.tar")).table) == 0


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    for name in ("folder.tar", "pipe.tar"):
        for read in (scan, lambda path: index_shard(path, str(tmp_path / "cache"))):
            with pytest.raises(UserError, match=f"{name}: not a file"):
                read(str(tmp_path / name))
