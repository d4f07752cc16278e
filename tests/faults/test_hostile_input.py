"""Malicious recipes, shards, indexes and checkpoints. Secrets stay where they were given."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpp.data.files import MOST_IMAGE_BYTES
from mpp.data.readers import FileReader
from mpp.data.shards.index import COLUMNS, FORMAT, index_path, index_shard
from mpp.data.shards.reader import MOST_LABEL_BYTES, ShardImages
from mpp.errors import BadImage, UserError, without_secrets
from mpp.recipe.loading import load_recipe
from mpp.recipe.pretrain import PretrainRecipe
from mpp.runs.log import RunLog
from tests.conftest import Runs, drawn_image, encoded
from tests.data.test_loader import shard_of
from tests.faults.conftest import RECIPES
from tests.faults.processes import Nursery
from tests.faults.test_bad_data import tar_of
from tests.http_server import serve
from tests.reporting.test_report import Page

NOT_RUN = "No content of a recipe, shard, index or checkpoint is ever executed (pipes, YAML tags, pickles)"


@pytest.mark.promise(NOT_RUN)
@pytest.mark.parametrize("shards", [
    "pipe:touch MARK", "pipe:cat x.tar", "file:///etc/passwd", "file://localhost/etc/shadow", "FILE:///etc/passwd",
    "simplecache::file:///etc/passwd", "http://a/x.tar::file:///etc/passwd", "zip://x.tar::http://a/b.zip",
    "ftp://a/x.tar", "ssh://a/x.tar", "data://text/x.tar", "jar:file:///x!/y.tar", "memory://x.tar", "local:///etc/passwd",
    "https://[::1", "s3://a/x.tar::local://etc/passwd", "python://x.tar", "gopher://a/x.tar",
])  # fmt: skip
def test_places_that_are_no_shards(shards: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(UserError) as told:
        ShardImages(shards.replace("MARK", str(mark)), key="data.shards", cache_dir=str(tmp_path / "cache"))
    assert len(str(told.value).splitlines()) == 1
    assert not mark.exists()
    record_property("bad inputs tried", 1)


@pytest.mark.promise(NOT_RUN)
def test_an_environment_that_rewrites_urls(monkeypatch: pytest.MonkeyPatch, shards: Path, tmp_path: Path) -> None:
    """webdataset would follow these variables. Shards are not opened through it."""
    monkeypatch.setenv("WDS_REWRITE", f"{shards}=pipe:touch {tmp_path}/mark; cat ")
    monkeypatch.setenv("WDS_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GOPEN_VERBOSE", "1")
    assert sum(ShardImages(str(shards), key="data.shards").counts) == 60
    assert not list(tmp_path.iterdir())


@pytest.mark.promise(NOT_RUN)
@pytest.mark.parametrize("text", [
    "!!python/object/apply:os.system ['touch MARK']", "!!python/object/new:os.system ['touch MARK']",
    "out: !!python/name:os.system", "data: !!python/module:os", "out: !!python/object/apply:subprocess.run [[touch, MARK]]",
    "a: &a [*a, *a]", "out: !<tag:yaml.org,2002:python/object/apply:os.system> ['touch MARK']",
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nout: *c",
])  # fmt: skip
def test_recipes_with_tags(text: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    mark, path = tmp_path / "mark", tmp_path / "recipe.yaml"
    path.write_text(text.replace("MARK", str(mark)))
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        load_recipe(path, PretrainRecipe)
    assert not mark.exists()
    record_property("bad inputs tried", 1)


@pytest.mark.promise(NOT_RUN)
def test_pickles(nursery: Nursery, shards: Path, folder: Path) -> None:
    mark = folder / "mark"
    poison = pickle.dumps(Runs(mark))
    # next to the images of a shard, with every extension that some decoder opens
    members = {f"{i}.jpg": encoded(drawn_image(i), "JPEG") for i in range(40)}
    members |= {
        f"{i}.{kind}": poison for i, kind in enumerate(("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "ten"))
    }
    members |= {f"{i}.cls": b"0" for i in range(40)}
    (folder / "poisoned").mkdir()
    tar_of(folder / "poisoned" / "a.tar", members)
    path = RECIPES["pretrain"](folder / "poisoned", folder / "r.yaml", folder / "run")
    nursery.start("pretrain", path, log=folder / "log").ends_well()
    # as an index
    index_path(str(folder / "poisoned" / "a.tar")).write_bytes(poison)
    assert sum(ShardImages(str(folder / "poisoned"), key="data.shards").counts) == 40
    np.savez(
        folder / "objects.npz", format=np.array([Runs(mark)], dtype=object), table=np.array([Runs(mark)], dtype=object)
    )
    index_path(str(folder / "poisoned" / "a.tar")).write_bytes((folder / "objects.npz").read_bytes())
    assert sum(ShardImages(str(folder / "poisoned"), key="data.shards").counts) == 40
    # as weights: a file, a folder as transformers writes it, files of a checkpoint
    (folder / "weights.pth").write_bytes(poison)
    (folder / "hub").mkdir()
    (folder / "hub" / "pytorch_model.bin").write_bytes(poison)
    (folder / "hub" / "config.json").write_text(
        json.dumps({"architecture": "vit_tiny_patch16_224", "num_features": 192})
    )
    for source in (folder / "weights.pth", folder / "hub"):
        run = nursery.start("inspect", source, folder / "poisoned", log=folder / f"log-{source.name}")
        assert run.wait() == [2]
        assert "pickled weights are never opened" in run.said()
        run = nursery.start("pretrain", path, "--resume", source, log=folder / f"resume-{source.name}")
        assert run.wait() == [2]
        assert "no such checkpoint" in run.said()
    for words, said in (((), "a pickle, which may run any code"), (("--trust",), "not of torch.save: UnpicklingError")):
        words = ("--model", "vit_tiny_patch16_224", *words)
        run = nursery.start("import", folder / "weights.pth", folder / "e", *words, log=folder / f"import{len(words)}")
        assert run.wait() == [2]
        assert said in run.said()
        assert not (folder / "e").exists()
    saves = folder / "run" / "checkpoints"
    newest = max(saves.iterdir())
    for name in ("optimizer.safetensors", "model.safetensors", "state.json"):
        import hashlib

        before = (newest / name).read_bytes()
        manifest = json.loads((newest / "manifest.json").read_text())
        (newest / name).write_bytes(poison)
        (newest / "manifest.json").write_text(json.dumps({**manifest, name: hashlib.sha256(poison).hexdigest()}))
        run = nursery.start("pretrain", path, "--resume", "auto", log=folder / f"resume-{name}")
        assert run.wait() == [2], run.said()
        assert "Traceback" not in run.said()
        (newest / name).write_bytes(before)
        (newest / "manifest.json").write_text(json.dumps(manifest))
    assert not mark.exists()


BOMBS = "Indexes and tar members that claim huge sizes are refused before memory is allocated"


def index_of(**changes: Any) -> dict[str, Any]:
    return {"format": np.int64(FORMAT), "size_bytes": np.int64(0), "mtime_ns": np.int64(0), **changes}


@pytest.mark.promise(BOMBS)
@pytest.mark.parametrize("row", [
    [512, 1 << 50, -1, -1, 0], [1 << 60, 100, -1, -1, 0], [-512, 100, -1, -1, 0], [512, -5, -1, -1, 0],
    [512, 100, 1 << 61, 1 << 61, 0], [512, 100, 512, 1 << 40, 1], [2**63 - 1, 2**63 - 1, -1, -1, 0],
])  # fmt: skip
def test_an_index_that_points_elsewhere(
    row: list[int], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    shard = shard_of(tmp_path / "a.tar", [encoded(drawn_image(i), "JPEG") for i in range(4)])
    stat = shard.stat()
    table = np.array([row] * 2, dtype=np.int64)
    np.savez(
        index_path(str(shard)),
        **index_of(table=table, size_bytes=np.int64(stat.st_size), mtime_ns=np.int64(stat.st_mtime_ns)),
    )
    assert len(index_shard(str(shard), str(tmp_path)).table) == 4, "the index must be built again"
    record_property("bad inputs tried", 1)


@pytest.mark.promise(BOMBS)
def test_a_zip_bomb_for_an_index(tmp_path: Path) -> None:
    """The index holds 1 GB of zeros in 1 MB."""
    shard = shard_of(tmp_path / "a.tar", [encoded(drawn_image(i), "JPEG") for i in range(4)])
    with (
        zipfile.ZipFile(index_path(str(shard)), "w", zipfile.ZIP_DEFLATED) as z,
        z.open("table.npy", "w", force_zip64=True) as f,
    ):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<i8", "fortran_order": False, "shape": (25_000_000, len(COLUMNS))}
        )
        f.write(header.getvalue())
        for _ in range(1000):
            f.write(bytes(1_000_000))
    with zipfile.ZipFile(index_path(str(shard)), "a") as z, z.open("format.npy", "w") as f:
        np.save(f, np.int64(FORMAT))
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(index_shard(str(shard), str(tmp_path)).table) == 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.promise(BOMBS)
def test_a_member_of_many_gigabytes(tmp_path: Path) -> None:
    """The tar is sparse and quick to make. Its header gives an image of 3 GB."""
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("huge.jpg")
    info.size = 3 << 30
    with open(path, "wb") as f:
        f.write(info.tobuf(tarfile.GNU_FORMAT))
        f.truncate(512 + info.size + 1024)
    images = ShardImages(str(path), key="data.shards", cache_dir=str(tmp_path))
    with pytest.raises(BadImage, match=f"a file of {3 << 30} bytes; expected at most {MOST_IMAGE_BYTES}"):
        images.read(0, 0)
    with open(tmp_path / "huge.jpg", "wb") as f:
        f.truncate(3 << 30)
    with pytest.raises(BadImage, match=f"a file of {3 << 30} bytes; expected at most {MOST_IMAGE_BYTES}"):
        FileReader([str(tmp_path / "huge.jpg")]).read(0)


@pytest.mark.promise(BOMBS)
def test_a_label_of_many_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (("a.jpg", encoded(drawn_image(1), "JPEG")), ("a.cls", b"1" * (MOST_LABEL_BYTES + 1))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    images = ShardImages(str(path), key="data.train", cache_dir=str(tmp_path))
    with pytest.raises(
        UserError, match=f"a label of {MOST_LABEL_BYTES + 1} bytes; expected at most {MOST_LABEL_BYTES}"
    ):
        images.read_label(0, 0)


# ---- secrets

SECRET = "s3cr3tS1gn4tur3"
URLS = [
    f"http://user:{SECRET}@HOST/none.tar",
    f"http://user:a@b{SECRET}@HOST/none.tar",
    f"http://HOST/none.tar?jwt={SECRET}#access_token={SECRET}",
    f"http://HOST/none.tar?pwd={SECRET};sas={SECRET}&Policy={SECRET}",
    f"http://HOST/none.tar?X-Amz-Signature={SECRET}&X-Amz-Expires=60",
    f"http://HOST/none.tar?sv=2024&sig={SECRET}",
    f"http://HOST/none.tar?token={SECRET}",
    f"http://HOST/none.tar?part=1&api_key={SECRET}",
]
KEPT = "Passwords, tokens and URL signatures appear in no message, log or record of a run"


@pytest.mark.promise(KEPT)
@pytest.mark.parametrize("url", URLS)
def test_messages(url: str, nursery: Nursery, folder: Path, shards: Path) -> None:
    assert SECRET not in without_secrets(f"{url}: not there; see '{url}'")
    served, server = serve(shards)
    url = url.replace("HOST", served.url.removeprefix("http://"))
    path = RECIPES["pretrain"](shards, folder / "r.yaml", folder / "run")
    run = nursery.start(
        "pretrain", path, f"data.shards={url}", "data.cache_dir=" + str(folder / "cache"), log=folder / "log"
    )
    assert run.wait() == [2]
    server.shutdown()
    assert "/none.tar" in run.said()
    assert SECRET not in run.said()
    assert not [p for p in folder.rglob("*") if SECRET in p.name]


def told_nowhere(folder: Path) -> None:
    for p in folder.rglob("*"):
        assert SECRET not in p.name
        if p.is_file() and p.name != "r.yaml":
            assert SECRET.encode() not in p.read_bytes(), p


@pytest.mark.promise(KEPT)
def test_records(nursery: Nursery, folder: Path, shards: Path) -> None:
    """The run reads remote shards with one signature and resumes with another."""
    served, server = serve(shards)
    signed = f"{served.url}/shard-00000{{0..2}}.tar?X-Amz-Expires=9&X-Amz-Signature="
    path = RECIPES["pretrain"](shards, folder / "r.yaml", folder / "run")
    words = ["data.cache_dir=" + str(folder / "cache")]
    nursery.start("pretrain", path, f"data.shards={signed}{SECRET}", *words, log=folder / "log", world=2).ends_well()
    told_nowhere(folder)
    again = nursery.start(
        "pretrain", path, f"data.shards={signed}another", *words, "--resume", "auto", log=folder / "log", world=2
    )
    again.ends_well()
    server.shutdown()
    told_nowhere(folder)
    assert served.whole(".tar") == 3, "another signature must not make another shard"
    assert "X-Amz-Signature=***" in (folder / "run" / "recipe.yaml").read_text()


@pytest.mark.promise(KEPT)
def test_lines_of_the_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path, steps=1, resumed_at=0, active=True)
    log.say(f"unreadable: https://h/a.tar?X-Amz-Signature={SECRET}: b.jpg: trunc")
    log.note(f"unreadable: https://user:{SECRET}@h/a.tar: b.jpg: trunc")
    log.close()
    text = (tmp_path / "train.log").read_text()
    assert SECRET not in text
    assert text.count("***") == 2


# ---- other people's runs


@pytest.mark.promise(NOT_RUN)
def test_a_run_folder_from_elsewhere(nursery: Nursery, shards: Path, folder: Path) -> None:
    path, out = RECIPES["pretrain"](shards, folder / "r.yaml", folder / "run", **{"optim.steps": 3}), folder / "run"
    nursery.start("pretrain", path, log=folder / "log").ends_well()
    recipe, mark = out / "recipe.yaml", folder / "mark"
    recipe.write_text(recipe.read_text() + f"\nextra: !!python/object/apply:os.system ['touch {mark}']\n")
    for words in (
        ["report", out, "--out", folder / "page.html"],
        ["watch", out],
        ["runs", out],
        ["reconstruct", out],
        ["replay", out],
    ):
        run = nursery.start(*words, log=folder / "log")
        assert run.wait() == [2], (words, run.said())
        assert "Traceback" not in run.said(), run.said()
    assert not mark.exists()


@pytest.mark.promise("HTML in names of classes, folders and recipes is shown as text in the report")
def test_html_in_names(nursery: Nursery, image_folder: Path, folder: Path) -> None:
    hostile = ["<img src=x onerror=alert(1)>", "b&b<script>alert(2)<∕script>"]
    for name, source in zip(hostile, sorted(p for p in image_folder.iterdir() if p.is_dir()), strict=False):
        shutil.copytree(source, folder / "images" / name)
    changes = {"data.train": str(folder / "images"), "data.val": str(folder / "images"), "optim.steps": 4}
    path, out = folder / "r.yaml", folder / "<script>alert(3)<∕script>"
    RECIPES["finetune"](folder, path, out, **changes)
    path.write_text(path.read_text() + "\n# <script>alert(4)</script>\n")
    nursery.start("finetune", path, log=folder / "log").ends_well()
    nursery.start("report", out, "--out", folder / "page.html", log=folder / "log").ends_well()
    text = (folder / "page.html").read_text()
    page = Page(text)
    assert not {"script", "object", "iframe"} & {tag for tag, _ in page.tags}
    assert not [attributes for _, attributes in page.tags if any(key.startswith("on") for key in attributes)]
    assert not [a for tag, a in page.tags if tag == "img" and not (a.get("src") or "").startswith("data:image/")]
    assert "&lt;script&gt;alert(3)" in text
