"""Vectors of images: timm's own features, in every format, continued after an interruption, on several processes."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import mpp
from mpp.cli import main
from mpp.data.readers import AllImages
from mpp.embedding import embed as embedding
from mpp.embedding.vectors import Part, Parts, join, names_file
from mpp.errors import UserError
from mpp.evaluation.features import Place
from tests.conftest import command, drawn_image, pretrain_recipe

SIDE_PX = 16


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    mpp.pretrain(pretrain_recipe(shards, out))
    return out


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 30 images of the encoder's size, so that the central crop is the whole image."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "b").mkdir()
    for i in range(30):
        drawn_image(i, size=SIDE_PX).save(folder / ("b" if i % 3 == 0 else "") / f"{i:02d}.png")
    return folder


def by_timm(run: Path, names: list[str]) -> np.ndarray:
    """Return the features of images as a user of timm would compute them."""
    model = mpp.load_encoder(run, num_classes=0).eval()
    config: Any = model.pretrained_cfg
    assert tuple(config["input_size"]) == (3, SIDE_PX, SIDE_PX)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    pixels = [torch.from_numpy(np.array(Image.open(name).convert("RGB"))).permute(2, 0, 1) for name in names]
    with torch.no_grad():
        features: torch.Tensor = model((torch.stack(pixels) / 255 - mean) / std)
    return features.numpy()


def test_the_vectors_are_the_features_of_timm(run: Path, photos: Path) -> None:
    found = mpp.embed(run, [str(photos)], batch_size=7)
    assert found.names == sorted(map(str, photos.rglob("*.png")))
    assert found.place == Place("out", "own")
    np.testing.assert_allclose(found.vectors, by_timm(run, found.names), rtol=1e-4, atol=1e-5)
    assert len(np.unique(found.vectors.round(4), axis=0)) == 30


def test_each_file_has_the_same_rows(run: Path, photos: Path, shards: Path, tmp_path: Path) -> None:
    """Images of shards come first. A file that is there is replaced."""
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    places = [str(photos), str(tmp_path / "broken.jpg"), str(shards)]
    plain = mpp.embed(run, places)
    assert plain.vectors.dtype == np.float32
    assert len(plain.names) == len(plain.vectors) == 90
    assert plain.names[0].startswith(str(shards / "shard-000000.tar"))
    assert plain.names[60:] == sorted(map(str, photos.rglob("*.png")))
    assert [line.split(": ")[0] for line in plain.unreadable] == [str(tmp_path / "broken.jpg")]
    npy, parquet = tmp_path / "a" / "v.npy", tmp_path / "v.parquet"
    for out in (npy, npy, parquet):
        written = mpp.embed(run, places, out)
        np.testing.assert_array_equal(written.vectors, plain.vectors)
        assert (written.names, written.unreadable) == (plain.names, plain.unreadable)
    np.testing.assert_array_equal(np.load(npy), plain.vectors)
    assert names_file(npy).read_text().splitlines() == plain.names
    table = pyarrow.parquet.read_table(parquet)
    assert table["image"].to_pylist() == plain.names
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), dtype=np.float32), plain.vectors)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "broken.jpg", "v.names.txt", "v.npy", "v.parquet"]


def test_an_interrupted_run_continues(run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "BATCHES_OF_A_PART", 2)
    whole = mpp.embed(run, [str(photos)], batch_size=4)
    compute, made = embedding.compute, list[int]()

    def interrupted(numbers: np.ndarray, *args: Any, **how: Any) -> Part:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(int(numbers[0]))
        return compute(numbers, *args, **how)

    out = tmp_path / "v.npy"
    monkeypatch.setattr(embedding, "compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mpp.embed(run, [str(photos)], out, batch_size=4)
    assert not out.exists()
    (tmp_path / "v.npy.parts" / "part-00002.tmp").mkdir()  # as kill -9 would leave it
    with pytest.raises(UserError, match=r"v\.npy\.parts: begun with other images, another encoder or other settings"):
        mpp.embed(run, [str(photos / "b")], out, batch_size=4)
    with pytest.raises(UserError, match="another encoder or other settings; delete it to begin again"):
        mpp.embed(run, [str(photos)], out, batch_size=4, layer=1)
    rest = list[int]()

    def watched(numbers: np.ndarray, *args: Any, **how: Any) -> Part:
        rest.append(int(numbers[0]))
        return compute(numbers, *args, **how)

    monkeypatch.setattr(embedding, "compute", watched)
    found = mpp.embed(run, [str(photos)], out, batch_size=4)
    assert (made, rest) == ([0, 8], [16, 24])
    np.testing.assert_array_equal(found.vectors, whole.vectors)
    assert found.names == whole.names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.names.txt", "v.npy"]


def test_the_best_layer_of_an_evaluation_is_read(run: Path, photos: Path, shards: Path, tmp_path: Path) -> None:
    evaluated = shutil.copytree(run, tmp_path / "run")
    keys = {"data.train": str(shards / "shard-000001.tar"), "data.val": str(shards / "shard-000000.tar")}
    mpp.evaluate(evaluated, probes=["knn"], controls=False, **keys)  # type: ignore[arg-type]
    best = json.loads((evaluated / "evaluation" / "result.json").read_text())["best"]["encoder"]["knn"]
    found = mpp.embed(evaluated, [str(photos)])
    assert found.place == Place(best["layer"], best["pool"])
    assert found.chosen_by == str(evaluated / "evaluation")
    given = mpp.embed(evaluated, [str(photos)], layer=1)
    assert (given.place, given.chosen_by) == (Place("1", "mean"), None)
    token = mpp.embed(evaluated, [str(photos)], layer=1, pool="token")
    assert not np.allclose(given.vectors, token.vectors)


def test_names_hold_no_secrets(run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AllImages, "name", lambda self, i: f"https://host/s.tar?X-Amz-Signature=SECRET{i}: {i}.jpg")
    assert "SECRET" not in " ".join(mpp.embed(run, [str(photos)]).names)


def test_what_is_refused(run: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").write_bytes(b"no image")
    one = [str(photos)]
    for how, message in (
        ({"out": tmp_path / "v.csv"}, r"--out .*v\.csv: must end in \.npy or \.parquet"),
        ({"pool": "mean"}, "--pool: only with --layer"),
        ({"layer": 0}, "--layer: 0: layers are counted from 1"),
        ({"layer": 1, "pool": "max"}, "--pool: expected mean or token; got 'max'"),
        ({"batch_size": 0}, "--batch-size: at least 1; got 0"),
        ({"layer": 99}, "layers: 99: VisionTransformer has 1 to"),
        ({"images": [str(tmp_path / "none")]}, "IMAGES: not one image can be read; the first: .*a.png"),
        ({"images": [str(tmp_path / "gone")]}, "gone: no such file or folder"),
        ({"encoder": "no_such_model"}, "encoder"),
    ):
        with pytest.raises(UserError, match=message):
            mpp.embed(**{"encoder": run, "images": one} | how)  # type: ignore[arg-type]
    resnet = {"encoder": "test_resnet", "layer": 1, "pool": "token"}
    with pytest.raises(UserError, match="--pool token: test_resnet has no class token; use mean"):
        embedding.open_reader(mpp_model("test_resnet"), Place("1", "token"), str(resnet["encoder"]))


def mpp_model(name: str) -> Any:
    from mpp.encoders.creation import create_timm_model

    return create_timm_model(name, image_size=(64, 64), in_chans=3, pretrained=False, args={})


def test_parts_without_a_description_are_made_again(run: Path, photos: Path, tmp_path: Path) -> None:
    parts = Parts(tmp_path / "v.npy.parts")
    parts.begin({"encoder": "another"})
    parts.write(0, Part(np.arange(30), np.zeros((30, 3), np.float32), []))
    (parts.folder / "embedding.json").unlink()
    found = mpp.embed(run, str(photos), tmp_path / "v.npy")
    np.testing.assert_array_equal(found.vectors, mpp.embed(run, photos).vectors)  # type: ignore[arg-type]


def test_many_parts_need_few_open_files(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    parts = Parts(tmp_path / "v.npy.parts")
    parts.begin({})
    for i in range(120):
        parts.write(i, Part(np.array([i]), np.full((1, 2), i, np.float32), []))
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
    try:
        join(parts, 120, 120, tmp_path / "v.npy", str)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.load(tmp_path / "v.npy")[:, 0].tolist() == list(range(120))


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "v.npy.parts")
    parts.begin({"encoder": "x"})
    parts.write(0, Part(np.arange(2), np.zeros((2, 3), np.float32), []))
    (tmp_path / "v.npy.parts" / "part-00000" / "vectors.npy").write_bytes(b"")
    with pytest.raises(UserError, match="part-00000: cannot be read; delete it and repeat the command"):
        parts.read(0)


def test_the_command(run: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.npy"
    done = CliRunner().invoke(main, ["embed", str(run), str(photos), "--out", str(out)])
    assert (done.exit_code, done.stdout) == (0, f"30 vectors of {np.load(out).shape[1]} numbers in {out} (out)\n")
    told = CliRunner().invoke(main, ["embed", str(run), str(photos), "-o", str(out), "--layer", "1", "--json"])
    assert json.loads(told.stdout)["place"] == "layer 1, mean"


@pytest.mark.slow
def test_two_processes_write_the_same_file(run: Path, photos: Path, tmp_path: Path) -> None:
    single = mpp.embed(run, [str(photos)], batch_size=1)
    out = tmp_path / "v.npy"
    done = command("embed", run, photos, "--out", out, "--batch-size", 1, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("30 vectors") == 1
    np.testing.assert_array_equal(np.load(out), single.vectors)
    assert names_file(out).read_text().splitlines() == single.names
