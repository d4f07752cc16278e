"""Sources of `mpp pack` besides folders: manifests, Parquet of Hugging Face and other shards. Also packing in parts."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mpp.cli.app import main
from mpp.data.labeled import open_labeled
from mpp.data.shards import sources
from mpp.data.shards.pack import pack
from mpp.data.shards.reader import ShardImages
from mpp.errors import UserError
from tests.conftest import command, drawn_image, encoded
from tests.http_server import serve


def contents(out: Path) -> list[tuple[bytes, bytes | None]]:
    """Return (image, label) of every sample, in order."""
    images = ShardImages(str(out), key="k")
    places = [(s, r) for s, count in enumerate(images.counts) for r in range(count)]
    return [(images.read(*at), stored[0] if (stored := images.read_label(*at)) else None) for at in places]


@pytest.fixture
def photos(image_folder: Path) -> list[tuple[bytes, int]]:
    found = sorted(image_folder.rglob("*.*"))
    return [(path.read_bytes(), int(path.parent.name == "square")) for path in found]


def written(folder: Path, photos: list[tuple[bytes, int]], *, as_struct: bool = True, names: bool = True) -> Path:
    """Write Parquet as `datasets` does: two files of several row groups, with the features in their metadata."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    (folder / "data").mkdir(parents=True)
    for part in range(2):
        own = photos[part::2]
        values = [{"bytes": data, "path": f"{i}.jpg"} for i, (data, _) in enumerate(own)]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        image = pa.array(values, kind) if as_struct else pa.array([data for data, _ in own], pa.binary())
        table = pa.table(
            {"id": pa.array(range(len(own))), "image": image, "label": pa.array([label for _, label in own])}
        )
        features: dict[str, Any] = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel"}}
        if names:
            features["label"]["names"] = ["disc", "square"]
        about = {"huggingface": json.dumps({"info": {"features": features}})}
        pyarrow.parquet.write_table(
            table.replace_schema_metadata(about),
            folder / "data" / f"train-{part:05d}-of-00002.parquet",
            row_group_size=7,
        )
    return folder


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet(as_struct: bool, photos: list[tuple[bytes, int]], tmp_path: Path) -> None:
    """Every row is packed once and in order, whatever the sizes of row groups and shards."""
    folder = written(tmp_path / "hf", photos, as_struct=as_struct)
    packed = pack(str(folder), str(tmp_path / "out"), images_per_shard=11, workers=1)
    assert (packed.shards, packed.images, packed.classes) == (6, 60, ["disc", "square"])
    rows = [*photos[0::2], *photos[1::2]]
    assert contents(tmp_path / "out") == [(data, str(label).encode()) for data, label in rows]
    labeled = open_labeled((str(tmp_path / "out"),), key="k", classes=None, cache_dir=None, cache_limit_bytes=1e9)
    assert labeled.classes == ["disc", "square"]
    assert labeled.labels.tolist() == [label for _, label in rows]
    where = (tmp_path / "out/sources.tsv").read_text().splitlines()[8]
    assert where.endswith("\ttrain-00000-of-00002.parquet: row group 1, row 1")
    again = pack(str(folder / "data/*.parquet"), str(tmp_path / "again"), images_per_shard=60, labels=False, workers=1)
    assert (again.classes, again.images) == ([], 60)
    assert [label for _, label in contents(tmp_path / "again")] == [None] * 60


def test_parquet_that_is_not_of_images(photos: list[tuple[bytes, int]], tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    def refused(table: Any, message: str, **options: Any) -> None:
        parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(UserError, match=message) as error:
            pack(str(tmp_path / "a.parquet"), str(tmp_path / "out"), workers=1, **options)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    refused(pa.table({"text": ["a"], "n": [1]}), "no column of image bytes among text, n")
    refused(pa.table({"image": pa.array([], pa.binary())}), "no rows")
    refused(
        pa.table({"image": [b"1"], "label": [0.5]}), "no column of whole numbers or names called label", labels=True
    )
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="a.parquet: "):
        pack(str(tmp_path / "a.parquet"), str(tmp_path / "out"), workers=1)
    values = [{"bytes": photos[0][0], "path": ""}, {"bytes": None, "path": "x.jpg"}, {"bytes": b"no", "path": ""}]
    parquet.write_table(pa.table({"image": values}), tmp_path / "a.parquet")
    packed = pack(str(tmp_path / "a.parquet"), str(tmp_path / "out"), workers=1)
    assert packed.images == 1
    assert packed.skipped == [
        ("a.parquet: row group 0, row 1", "no bytes in it"),
        ("a.parquet: row group 0, row 2", "not an image by its content"),
    ]


def test_parquet_labels_and_splits(photos: list[tuple[bytes, int]], tmp_path: Path) -> None:
    """Files are refused if labels or splits would be mixed silently."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    data = photos[0][0]

    def table(labels: list[Any], names: list[str] | None) -> Any:
        found = pa.table({"image": pa.array([data] * len(labels), pa.binary()), "label": labels})
        about = {"info": {"features": {"label": {"names": names}}}}
        return found.replace_schema_metadata({"huggingface": json.dumps(about)})

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            pack(str(tmp_path / "p"), str(tmp_path / "out"), workers=1, **options)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    (tmp_path / "p").mkdir()
    parquet.write_table(table([0, 1], ["cat", "dog"]), tmp_path / "p/a.parquet")
    for other, message in (
        (
            table([0, 1], ["dog", "cat"]),
            "b.parquet: column label: other labels or names of classes than .*a.parquet has",
        ),
        (table(["x", "y"], ["cat", "dog"]), "b.parquet: column label: other labels"),
        (table([0, 5], ["cat", "dog"]), "b.parquet: row group 0, row 1: label 5 of 2 classes"),
        (pa.table({"image": [1, 2], "label": [0, 1]}), "b.parquet: column image: holds int64, not bytes of images"),
    ):
        parquet.write_table(other, tmp_path / "p/b.parquet")
        refused(message)
    parquet.write_table(table([None, -1], ["cat", "dog"]), tmp_path / "p/b.parquet")
    refused("b.parquet: .*has no label", labels=True)
    assert pack(str(tmp_path / "p"), str(tmp_path / "out"), workers=1).images == 4
    assert [label for _, label in contents(tmp_path / "out")] == [b"0", b"1", None, None]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "p/a.parquet").rename(tmp_path / "p/train-0.parquet")
    (tmp_path / "p/b.parquet").rename(tmp_path / "p/test-0.parquet")
    refused(r"holds the splits test, train; give one of them, such as '.*/p/train-\*\.parquet'")


def test_parquet_of_others(photos: list[tuple[bytes, int]], tmp_path: Path) -> None:
    """Labels may be names, or numbers without names. Files may have no rows, and then their columns have no type."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    def table(labels: Any) -> Any:
        return pa.table({"image": pa.array([photos[0][0]] * len(labels), pa.binary()), "label": labels})

    (tmp_path / "p").mkdir()
    parquet.write_table(table(pa.array(["owl", "cat", None])), tmp_path / "p/b.parquet", row_group_size=2)
    parquet.write_table(table(pa.array(["dog", ""])), tmp_path / "p/c.parquet")
    parquet.write_table(pa.table({"image": pa.nulls(0), "label": pa.nulls(0)}), tmp_path / "p/a.parquet")
    packed = pack(str(tmp_path / "p"), str(tmp_path / "named"), workers=1)
    assert (packed.labeled, packed.classes) == (True, ["cat", "dog", "owl"])
    assert [label for _, label in contents(tmp_path / "named")] == [b"2", b"0", None, b"1", None]
    parquet.write_table(table(pa.array(["a", "b", "a"]).dictionary_encode()), tmp_path / "d.parquet")
    assert pack(str(tmp_path / "d.parquet"), str(tmp_path / "encoded"), workers=1).classes == ["a", "b"]
    both = table(pa.array(["b", "a"])).append_column("labels", pa.array([1, 0]))
    parquet.write_table(both, tmp_path / "both.parquet")
    assert pack(str(tmp_path / "both.parquet"), str(tmp_path / "both"), workers=1).labeled
    assert [label for _, label in contents(tmp_path / "both")] == [b"1", b"0"], "numbers are preferred to names"
    parquet.write_table(table([str(n) for n in (10, 2, 0)]), tmp_path / "digits.parquet")
    assert pack(str(tmp_path / "digits.parquet"), str(tmp_path / "digits"), workers=1).classes == ["0", "2", "10"]
    parquet.write_table(table([f"a photo of {n}" for n in range(150)]), tmp_path / "captions.parquet")
    assert not pack(str(tmp_path / "captions.parquet"), str(tmp_path / "captions"), workers=1).labeled
    parquet.write_table(table(["", ""]), tmp_path / "none.parquet")
    assert not pack(str(tmp_path / "none.parquet"), str(tmp_path / "none"), workers=1).labeled
    parquet.write_table(table(pa.nulls(2)), tmp_path / "nulls.parquet")
    with pytest.raises(UserError, match="nulls.parquet: column label: holds nothing; --no-labels leaves it out"):
        pack(str(tmp_path / "nulls.parquet"), str(tmp_path / "nulls"), workers=1)
    parquet.write_table(table([3, 5]), tmp_path / "p/c.parquet")
    with pytest.raises(UserError, match="c.parquet: column label: other labels"):
        pack(str(tmp_path / "p"), str(tmp_path / "mixed"), workers=1)
    done = CliRunner().invoke(main, ["pack", str(tmp_path / "p/c.parquet"), str(tmp_path / "numbers")])
    assert done.output.startswith(
        "2 images, with labels, numbers without names (pretraining passes over them; --no-labels leaves them out), 1 shard in"
    )
    assert [label for _, label in contents(tmp_path / "numbers")] == [b"3", b"5"]


def test_parquet_on_a_web_server(photos: list[tuple[bytes, int]], tmp_path: Path) -> None:
    written(tmp_path / "here", photos)
    data = tmp_path / "here" / "data"
    pack(str(data), str(tmp_path / "local"), images_per_shard=25, workers=1)
    served, server = serve(data)
    names = f"{served.url}/train-{{00000..00001}}-of-00002.parquet"
    packed = pack(names, str(tmp_path / "remote"), images_per_shard=25, workers=2)
    assert (packed.images, packed.classes) == (60, ["disc", "square"])
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    kept = [(tmp_path / out / "sources.tsv").read_text() for out in ("local", "remote")]
    assert kept[0] == kept[1]
    pack(names, str(tmp_path / "local"), images_per_shard=25, workers=1)  # the same files in another place
    signed = f"{served.url}/train-00000-of-00002.parquet?signature=a.b"
    assert pack(signed, str(tmp_path / "signed"), workers=1).images == 30
    assert "signature" not in (tmp_path / "signed" / "sources.tsv").read_text()
    for wrong, message in (
        ("none.parquet", "404"),
        ("x/*.parquet", "files are listed in s3://, gs://, hf://; name each file here"),
    ):
        with pytest.raises(UserError, match=message):
            pack(f"{served.url}/{wrong}", str(tmp_path / "none"))
    served.ranges = False
    with pytest.raises(UserError, match="the server sends whole files only"):
        pack(names, str(tmp_path / "none"))
    server.shutdown()
    with pytest.raises(UserError, match="Parquet is read by `mpp pack http"):
        ShardImages("http://127.0.0.1:1/a.parquet", key="data.shards")


def test_parquet_in_a_bucket(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mpp pack` lists a folder or a pattern of a bucket, and reads the files in parts."""
    import boto3
    import pyarrow.parquet

    images = [encoded(drawn_image(i), "PNG") for i in range(20)]
    client = boto3.client("s3", "us-east-1", endpoint_url=bucket, aws_access_key_id="k", aws_secret_access_key="s")
    client.create_bucket(Bucket="tables")
    for part in range(2):
        table = pyarrow.table({"image": images[10 * part : 10 * part + 10]})
        pyarrow.parquet.write_table(table, tmp_path / "part.parquet", row_group_size=4)
        client.upload_file(str(tmp_path / "part.parquet"), "tables", f"photos/data/train-{part}.parquet")
    client.put_object(Bucket="tables", Key="photos/README.md", Body=b"")
    aws = {"ENDPOINT_URL": bucket, "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "REGION": "us-east-1"}
    for name, value in aws.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    for number, place in enumerate(("s3://tables/photos", "s3://tables/photos/data/train-*.parquet")):
        assert pack(place, str(tmp_path / f"{number}"), workers=1).images == 20
    with pytest.raises(UserError, match="s3://tables/none: no Parquet files there"):
        pack("s3://tables/none", str(tmp_path / "none"))


def test_parquet_is_packed_first(photos: list[tuple[bytes, int]], tmp_path: Path) -> None:
    folder = written(tmp_path / "hf", photos, as_struct=True)
    options: dict[str, Any] = {"key": "data.train", "classes": None, "cache_dir": None, "cache_limit_bytes": 1e9}
    for place in (folder, folder / "data", next(folder.rglob("*.parquet"))):
        said = f"Parquet is read by `mpp pack {place} OUT`, whose OUT can be given here"
        with pytest.raises(UserError, match=re.escape(f"data.shards: '{place}': {said}")):
            ShardImages(str(place), key="data.shards")
        with pytest.raises(UserError, match=re.escape(said)):
            open_labeled((str(place),), **options)
    (folder / "data" / "images").mkdir()
    (folder / "data" / "images" / "a.jpg").write_bytes(photos[0][0])
    assert ShardImages(str(folder), key="data.shards").counts == [1], "a table next to images describes them"


def test_a_manifest(image_folder: Path, tmp_path: Path) -> None:
    some = sorted(image_folder.rglob("*.jpg"))[:8]
    rows = [f"{path},{path.parent.name}" for path in some]
    (tmp_path / "a.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    packed = pack(str(tmp_path / "a.csv"), str(tmp_path / "out"), workers=1)
    assert (packed.images, packed.classes) == (8, sorted({p.parent.name for p in some}))
    assert sorted(data for data, _ in contents(tmp_path / "out")) == sorted(p.read_bytes() for p in some)
    (tmp_path / "b.csv").write_text("image\n" + "\n".join(str(p) for p in some) + "\nnone.jpg\n")
    packed = pack(str(tmp_path / "b.csv"), str(tmp_path / "unlabeled"), workers=1)
    assert (packed.images, packed.classes, packed.skipped) == (8, [], [("none.jpg", "No such file or directory")])
    for text, options, message in (
        ("image\na.jpg\n", {"labels": True}, "a.csv:1: needs the columns image and label; got image"),
        ("image,label\na.jpg,\n", {"labels": True}, "a.csv:2: no label"),
        ('image\n"a\tb.jpg"\n', {}, "a.csv:2: image: a tab"),
        ("image,label\na.jpg,cat\nb.jpg,\n", {}, "a.csv:3: no label; --no-labels leaves all of them out"),
        ('image,label\na.jpg,"cat\nb.jpg,dog\n', {}, "a.csv:3: unexpected end of data; is a quote left open?"),
        ('image,label\na.jpg,"cat\nb.jpg,dog"\n', {}, "a.csv:2: label: a line break; is a quote left open?"),
        ("image;label\na.jpg;cat\n", {}, "a.csv:1: needs the column image; got image;label. Columns are separated by"),
        ("image,image\na.jpg,b.jpg\n", {}, "a.csv:1: two columns are called image"),
        ("image,label\n,cat\n", {}, "a.csv:2: no image"),
    ):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            pack(str(tmp_path / "a.csv"), str(tmp_path / "o"), workers=1, **options)


def test_other_shards(shards: Path, tmp_path: Path) -> None:
    packed = pack(str(shards), str(tmp_path / "out"), images_per_shard=16, workers=1)
    assert (packed.shards, packed.images, packed.classes) == (4, 60, ["disc", "square"])
    assert contents(tmp_path / "out") == contents(shards)
    with tarfile.open(tmp_path / "named.tar", "w") as tar:  # names of classes, which WebDataset also has
        for i, (data, _) in enumerate(contents(shards)[:3]):
            for ending, content in (("jpg", data), ("cls", b"a dog")):
                info = tarfile.TarInfo(f"{i}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    assert pack(str(tmp_path / "named.tar"), str(tmp_path / "again"), workers=1).images == 3
    assert {label for _, label in contents(tmp_path / "again")} == {b"a dog"}


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_parts(kind: str, image_folder: Path, photos: list[tuple[bytes, int]], tmp_path: Path) -> None:
    """Each part writes its own shards, and the last one finishes. Together they write what one call writes."""
    source = image_folder if kind == "folder" else written(tmp_path / "hf", photos)
    pack(str(source), str(tmp_path / "one"), images_per_shard=7, workers=1)
    for i in (2, 3, 1):
        packed = pack(str(source), str(tmp_path / "parts"), images_per_shard=7, workers=1, part=(i, 3))
        assert packed.shards == 9
        assert packed.shards_written == 3
        assert packed.shards_missing == {2: 6, 3: 3, 1: 0}[i]
        assert (tmp_path / "parts/sources.tsv").exists() == (i == 1)
    one, parts = (
        {p.name: p.read_bytes() for p in (tmp_path / f).iterdir() if p.suffix != ".npz" and p.name != "index.json"}
        for f in ("one", "parts")
    )
    assert one == parts
    with pytest.raises(UserError, match="--part: expected I/N .*; got 4/3"):
        pack(str(source), str(tmp_path / "x"), part=(4, 3), workers=1)


@pytest.mark.slow
def test_the_command(image_folder: Path, tmp_path: Path) -> None:
    done = command("pack", image_folder, tmp_path / "out", "--images-per-shard", "30", "--part", "2/2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"30 images, 2 classes (pretraining passes over them; --no-labels leaves them out), 2 shards in {tmp_path / 'out'} (1 written now)",
        "1 shards are not here yet; the part that comes last finishes",
    ]
    for words, message in (
        (["--part", "half"], "--part: expected I/N, for example 1/3; got 'half'"),
        (["--part", "0/2"], "--part: expected I/N with I from 1 to N, for example 1/3; got 0/2"),
    ):
        found = CliRunner().invoke(main, ["pack", str(image_folder), str(tmp_path / "x"), *words])
        assert (found.exit_code, found.stderr.startswith(message)) == (2, True), found.stderr


def test_out_is_a_file(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="out: is a file; give a new folder"):
        pack(str(image_folder), str(tmp_path / "out"), workers=1)
    assert (tmp_path / "out").read_text() == "mine"


def test_what_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    for name, message in (
        ("none", "none: no such folder"),
        ("a.txt", "neither a folder nor a .csv, .parquet or .tar file"),
    ):
        with pytest.raises(UserError, match=message):
            sources.open_source(str(tmp_path / name), labels=None, seed=0)
