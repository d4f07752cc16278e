"""Samples of a tar: each has one image and its own label."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpp.data.labeled import open_labeled
from mpp.data.shards.index import index_path, index_shard, left_out_from, scan
from mpp.data.shards.pack import pack
from mpp.data.shards.reader import ShardImages
from mpp.data.shards.samples import ANOTHER_IMAGE, ONE_LABEL, REPLACED, SEVERAL_LABELS, samples_among
from mpp.data.walk import ARRAY_BESIDE, HIDDEN, SHARED_NAME, LeftOut
from mpp.errors import UserError
from tests.conftest import drawn_image, encoded
from tests.data.test_labeled import tar_with


def found(names: list[str], image_extension: str | None = None) -> tuple[dict[str, str | None], dict[str, int]]:
    """Return (label by image, number of members left out by reason). A member's offset is its position in `names`."""
    rows, left_out = samples_among([(name, i, 1) for i, name in enumerate(names)], image_extension)
    pairs = {names[image]: names[label] if label >= 0 else None for image, _, label, _, _ in rows}
    return pairs, {reason: count for reason, (count, _) in left_out.found.items()}


@pytest.mark.parametrize(
    ("names", "pairs", "left_out"),
    [
        (["a.jpg", "a.cls"], {"a.jpg": "a.cls"}, {}),
        (["d/a.jpg", "a.cls"], {"d/a.jpg": None}, {}),
        (["a.jpg", "a.json", "a.cls"], {"a.jpg": "a.cls"}, {}),
        (["a.jpg", "a.json"], {"a.jpg": "a.json"}, {}),
        (["v1.0.jpg", "v1.0.cls", "v1.1.jpg", "v1.1.cls"], {"v1.0.jpg": "v1.0.cls", "v1.1.jpg": "v1.1.cls"}, {}),
        (["v1.0.jpg", "v1.1.jpg"], {"v1.0.jpg": None, "v1.1.jpg": None}, {}),
        (["v1.0.jpg", "v1.1.jpg", "v1.cls"], {"v1.0.jpg": None, "v1.1.jpg": None}, {ONE_LABEL: 1}),
        (["a.rgb.png", "a.cls"], {"a.rgb.png": "a.cls"}, {}),
        (["a.jpg", "a.seg.png", "a.cls"], {"a.jpg": "a.cls"}, {ANOTHER_IMAGE: 1}),
        (["a.jpg", "a.seg.png", "a.seg.json"], {"a.jpg": "a.seg.json"}, {ANOTHER_IMAGE: 1}),
        (["a.jpg", "a.1.jpg", "a.1.cls", "a.cls"], {"a.jpg": "a.cls", "a.1.jpg": "a.1.cls"}, {}),
        (["a.png", "a.jpg", "a.npy"], {"a.jpg": None}, {ANOTHER_IMAGE: 1, ARRAY_BESIDE: 1}),
        (["a.jpg", "a.depth.npy"], {"a.jpg": None}, {ARRAY_BESIDE: 1}),
        (["a.jpg", "a.x.cls", "a.y.cls"], {"a.jpg": None}, {SEVERAL_LABELS: 2}),
        (["./._a.jpg", "./a.jpg", "__MACOSX/a.jpg", ".thumbs/a.jpg"], {"./a.jpg": None}, {HIDDEN: 3}),
        (["a.txt", "a.pth", "b.JPG", "b.CLS"], {"b.JPG": "b.CLS"}, {}),
    ],
)
def test_which_label_belongs_to_which_image(
    names: list[str], pairs: dict[str, str | None], left_out: dict[str, int]
) -> None:
    assert found(names) == (pairs, left_out)


def test_the_last_of_several_members_with_one_name_counts() -> None:
    """`tar -r` appends a corrected file, and unpacking would keep that one."""
    rows, left_out = samples_among([("a.jpg", 1, 10), ("a.cls", 2, 1), ("./a.jpg", 3, 30), ("a.cls", 4, 1)])
    assert rows == [(3, 30, 4, 1, 0)]
    assert left_out.found == {REPLACED: (2, "a.jpg")}


def test_the_image_of_a_sample_can_be_chosen() -> None:
    names = ["a.rgb.png", "a.depth.png", "a.cls", "b.depth.png", "b.RGB.png", "c.png"]
    assert found(names, "rgb.png") == ({"a.rgb.png": "a.cls", "b.RGB.png": None}, {ANOTHER_IMAGE: 3})
    assert found(names, "png") == ({"c.png": None}, {ANOTHER_IMAGE: 4})


PARTS = [f"{stem}.{ending}" for stem in ("a", "a.seg", "a.0", "b.rgb", "b.depth") for ending in ("jpg", "png", "cls")]


@given(
    st.lists(st.sampled_from(PARTS), unique=True, max_size=8).flatmap(
        lambda n: st.tuples(st.just(n), st.permutations(n))
    )
)
def test_the_order_of_the_members_does_not_matter(both: tuple[list[str], list[str]]) -> None:
    assert found(both[0]) == found(both[1])


def test_names_that_come_again_and_again_are_counted() -> None:
    """Such images most likely belong to one sample, whereas numbers in the names of photographs occur only once."""
    pairs, counted = found([f"{i}.{part}.png" for i in range(3) for part in ("rgb", "depth")])
    assert (len(pairs), counted) == (6, {SHARED_NAME: 6})
    assert found([f"v1.{i}.jpg" for i in range(3)])[1] == {}
    labeled = [f"v{v}.{i}.{ending}" for v in range(2) for i in range(2) for ending in ("jpg", "cls")]
    assert found(labeled)[1] == {}
    line = "6 images share their name up to the first dot with others and are all read; .*, such as 0.rgb.png"
    assert re.fullmatch(line, str(LeftOut({SHARED_NAME: (6, "0.rgb.png")})))


def test_what_a_server_says_of_members_is_not_believed() -> None:
    good = {HIDDEN: [2, "._a.jpg"]}
    known = left_out_from(good)
    assert known
    assert known.found == {HIDDEN: (2, "._a.jpg")}
    for bad in (
        {"free text": [1, "a"]},
        {HIDDEN: [-1, "a"]},
        {HIDDEN: [1 << 60, "a"]},
        {HIDDEN: [1, "a" * 301]},
        {HIDDEN: [True, "a"]},
    ):
        assert left_out_from(bad) is None
    assert "\x1b" not in str(LeftOut({HIDDEN: (1, "._\x1b[31m")}))


def test_an_index_keeps_what_was_left_out(tmp_path: Path) -> None:
    """The next command also reports the count, although it does not read the shard again."""
    image = encoded(drawn_image(0))
    path = tar_with(tmp_path / "0.tar", {"a.png": image, "a.seg.png": image, "._b.png": b"?"})
    first = index_shard(str(path), str(tmp_path))
    assert index_path(str(path)).exists()
    again = index_shard(str(path), str(tmp_path))
    assert first.left_out.found == again.left_out.found == {HIDDEN: (1, "._b.png"), ANOTHER_IMAGE: (1, "a.seg.png")}
    assert ShardImages(str(path), key="k").left_out.found[HIDDEN] == (1, f"{path}: ._b.png")


def test_each_choice_of_an_image_has_its_own_index(tmp_path: Path) -> None:
    rgb, depth = encoded(drawn_image(0)), encoded(drawn_image(1))
    (tmp_path / "in").mkdir()
    path = tar_with(tmp_path / "in" / "0.tar", {"a.rgb.png": rgb, "a.depth.png": depth, "a.cls": b"1"})
    for extension, data in (("rgb.png", rgb), ("depth.png", depth)):
        images = ShardImages(str(tmp_path / "in"), key="k", image_extension=extension)
        assert [images.read(0, row) for row in range(images.counts[0])] == [data]
        assert images.read_label(0, 0) == (b"1", False)
        assert index_path(str(path), image_extension=extension).exists()
    with pytest.raises(UserError, match=r"no images in .*; data\.image_extension is seg\.png, as in x\.seg\.png"):
        ShardImages(str(tmp_path / "in"), key="k", image_extension="seg.png")
    both = ShardImages(str(tmp_path / "in"), key="k")
    assert (both.counts, list(both.left_out.found)) == ([2], [ONE_LABEL])
    with pytest.raises(UserError, match="no label beside it .*; left out: 1 .label of a name up to the first dot"):
        open_labeled((str(tmp_path / "in"),), key="k", classes=None, cache_dir=None, cache_limit_bytes=1e9)
    packed = pack(str(tmp_path / "in"), str(tmp_path / "out"), image_extension="rgb.png", workers=1)
    assert (packed.images, packed.labeled) == (1, True)


def test_dotted_names_keep_their_labels_when_they_are_packed(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(9):
        members |= {f"img_v1.{i:03d}.png": encoded(drawn_image(i)), f"img_v1.{i:03d}.cls": str(i % 3).encode()}
    (tmp_path / "in").mkdir()
    tar_with(tmp_path / "in" / "0.tar", members)
    assert not scan(str(tmp_path / "in" / "0.tar")).left_out
    pack(str(tmp_path / "in"), str(tmp_path / "out"), workers=1)
    for folder in (tmp_path / "in", tmp_path / "out"):
        data = open_labeled((str(folder),), key="k", classes=None, cache_dir=None, cache_limit_bytes=1e9)
        own = {data.reader.read(i): int(data.labels[i]) for i in range(len(data))}
        assert own == {encoded(drawn_image(i)): i % 3 for i in range(9)}
