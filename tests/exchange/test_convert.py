"""Every format loads in a clean process and returns the encoder's outputs. Exports that differ are refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mpp
from mpp.encoders.checksums import sha256
from mpp.encoders.creation import create_at_size
from mpp.encoders.folder import Origin, pixels_of, pool_patches, save_encoder
from mpp.encoders.support import FAMILIES
from mpp.errors import UserError
from mpp.exchange import convert as converting
from mpp.exchange.verify import Verified, verify_timm_folder
from mpp.finetuning.model import build, save
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import check_recipe
from tests.conftest import command, pretrain_recipe

pytestmark = pytest.mark.slow
OTHERS = [name for name in converting.formats() if name != "timm"]
VIT: dict[str, Any] = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the verification in a clean process, which other tests cover."""
    for place in ("verify.verify_timm_folder", "convert.verify_timm_folder", "convert.verify"):
        monkeypatch.setattr(f"mpp.exchange.{place}", lambda folder: Verified(Path(folder), 0.0, 0))


def origin(size: tuple[int, int], **more: Any) -> Origin:
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    return Origin(mean=mean, std=std, input_size=(3, *size), made="Made.", limits="None.", **more)


def timm_folder(folder: Path, name: str, size: tuple[int, int], classes: list[str] | None = None, **args: Any) -> Path:
    """Write a timm folder as a run does, with random weights about as large as trained ones."""
    torch.manual_seed(0)
    model: Any = create_at_size(name, size, num_classes=len(classes or ()), pretrained=False, **args)
    for value in model.parameters():
        value.data += torch.randn_like(value) * 0.2
    save_encoder(model, folder, origin(size), {}, classes)
    return folder


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    mpp.pretrain(pretrain_recipe(shards, out, **{"optim.steps": 4}))
    return out


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "e"
    return timm_folder(folder, "vit_tiny_patch16_224", (16, 16), ["cat", "dog", "emu"], **VIT)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = {
        "job": "finetune",
        "out": "runs/x",
        "encoder": "scratch",
        "task": "segment",
        "architecture": {"name": "vit_tiny_patch16_224", "args": VIT},
        "data": {"train": "a", "val": "b", "image_size": 16},
        "optim": {"steps": 1},
    }
    recipe = check_recipe(values, FinetuneRecipe)
    trial = tmp_path_factory.mktemp("segmenter") / "trial"
    trial.mkdir()
    save(build(recipe, "scratch", 0, 3), trial, recipe, {}, ["sky", "sea", "sand"])
    return trial / "encoder"


@pytest.mark.parametrize("format", OTHERS)
def test_formats(format: str, run: Path, tmp_path: Path) -> None:
    found = mpp.export(run, tmp_path / "e", format)
    assert found.difference < 1e-5
    assert found.through.startswith(f"{format} (")
    about = json.loads((tmp_path / "e" / "export.json").read_text())
    assert about["files_sha256"].keys() == {p.name for p in (tmp_path / "e").iterdir()} - {
        "export.json", "README.md", "recipe.yaml",
    }  # fmt: skip
    card = (tmp_path / "e" / "README.md").read_text()
    assert "library_name: timm" not in card
    for title in ("Use", "Input", "Data", "Recipe", "Cost", "Probes", "Limits"):
        assert card.count(f"## {title}\n") == 1, title
    assert "48 for training in 3 shards, 12 more held out" in card
    assert "4 steps, 64 images seen, " in card
    # change a byte of a written file
    name = next(n for n in about["files_sha256"] if n.startswith(("model.", "weights.")))
    data = bytearray((tmp_path / "e" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "e" / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: does not match the checksum of its export"):
        mpp.verify(tmp_path / "e")


@pytest.mark.parametrize("format", ["timm", *OTHERS])
def test_the_embedding_is_the_mean_of_the_patches(format: str, run: Path, tmp_path: Path) -> None:
    """In every format, its card also reads the mean of the patches: the class token of this run was never trained."""
    mpp.export(run, tmp_path / "e", format)
    encoder: Any = mpp.load_encoder(run).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = encoder.forward_features(images)
    expected = tokens[:, 1:].mean(1)
    reference = load_file(tmp_path / "e" / "reference.safetensors")
    torch.testing.assert_close(reference["embedding"], reference["features"][:, 1:].mean(1))
    torch.testing.assert_close(as_its_card_reads(tmp_path / "e", images), expected, rtol=1e-4, atol=1e-5)


def as_its_card_reads(folder: Path, images: torch.Tensor) -> torch.Tensor:
    """Return the embedding that the code of a model card computes."""
    card = (folder / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace("local-dir:FOLDER", f"local-dir:{folder}")
    code = code.replace(f'"{folder.name}/', f'"{folder}/').replace(f'"{folder.name}"', f'"{folder}"')
    code = code.replace('**processor(images, return_tensors="pt")', "images")  # the processor takes photographs
    named: dict[str, Any] = {"images": images.numpy() if "onnxruntime" in code else images}
    with torch.no_grad():
        exec(code, named)
    return torch.as_tensor(named["embedding"])


@pytest.mark.parametrize("format", ["timm", *OTHERS])
@pytest.mark.usefixtures("unverified")
def test_cards_of_distilled_encoders_average_the_patches_themselves(format: str, tmp_path: Path) -> None:
    """timm would return the mean of two tokens that pretraining does not train."""
    source = timm_folder(tmp_path / "timm", "deit_tiny_distilled_patch16_224", (16, 16), **VIT)
    mpp.export(source, tmp_path / "e", format)
    images, encoder = torch.randn(2, 3, 16, 16), mpp.load_encoder(source)
    with torch.no_grad():
        expected = encoder.eval().forward_features(images)[:, 2:].mean(1)
    torch.testing.assert_close(as_its_card_reads(tmp_path / "e", images), expected, rtol=1e-4, atol=1e-4)


def test_beits_norm_before_its_mean(tmp_path: Path) -> None:
    """The weights of SimMIM and data2vec are imported in this form. transformers' pooler returns the class token for
    them.
    """
    pytest.importorskip("transformers")
    args = VIT | {"init_values": 0.1, "global_pool": "avg", "use_fc_norm": False}
    source = timm_folder(tmp_path / "timm", "beit_base_patch16_224", (16, 16), **args)
    mpp.export(source, tmp_path / "e", "transformers")
    assert json.loads((tmp_path / "e/export.json").read_text())["kind"] == "transformers' own BeitModel"
    images, encoder = torch.randn(2, 3, 16, 16), mpp.load_encoder(source)
    with torch.no_grad():
        expected = encoder.eval()(images)
    torch.testing.assert_close(as_its_card_reads(tmp_path / "e", images), expected, rtol=1e-4, atol=1e-4)


def test_attention_that_pools_gives_way_to_the_mean(tmp_path: Path) -> None:
    """Pretraining never trains attention pooling, so an exported or fine-tuned SigLIP uses the mean of its patches."""
    model: Any = create_at_size("vit_base_patch16_siglip_224", (16, 16), num_classes=0, pretrained=False, **VIT)
    timm_folder(tmp_path / "map", "vit_base_patch16_siglip_224", (16, 16), **VIT)
    pool_patches(model)
    save_encoder(model, tmp_path / "e", origin((16, 16)), {})
    images, encoder = torch.randn(2, 3, 16, 16), mpp.load_encoder(tmp_path / "e").eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), encoder.forward_features(images).mean(1))
    assert verify_timm_folder(tmp_path / "e")
    values = {
        "job": "finetune",
        "out": "runs/x",
        "encoder": str(tmp_path / "map"),
        "data": {"train": "a", "val": "b", "image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3},
        "optim": {"steps": 1},
    }
    classifier = build(check_recipe(values, FinetuneRecipe), "pretrained", 0, 2)
    assert classifier.encoder.global_pool == "avg"
    assert not any(name.startswith("attn_pool") for name in classifier.encoder.state_dict())


def test_what_gives_something_else_is_found(classifier: Path, tmp_path: Path) -> None:
    """Verification must find changed numbers even if the checksums match."""
    mpp.export(classifier, tmp_path / "e", "onnx")
    reference = load_file(tmp_path / "e" / "reference.safetensors")
    about = json.loads((tmp_path / "e" / "export.json").read_text())
    assert about["classes"] == ["cat", "dog", "emu"]

    def change(logits: torch.Tensor) -> None:
        save_file(reference | {"logits": logits}, tmp_path / "e" / "reference.safetensors")
        about["files_sha256"]["reference.safetensors"] = sha256(tmp_path / "e" / "reference.safetensors")
        (tmp_path / "e" / "export.json").write_text(json.dumps(about))

    change(reference["logits"] + 0.01 * reference["logits"].abs().max())
    with pytest.raises(UserError, match=r"outputs differ by (9\.9|1\.0)\de-0\d, more than 1e-04"):
        mpp.verify(tmp_path / "e")
    change(reference["logits"].fill_(torch.nan))
    with pytest.raises(UserError, match="outputs differ by nan, more than 1e-04"):
        mpp.verify(tmp_path / "e")


def test_onnx_stands_alone(classifier: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    done = command("export", classifier, tmp_path / "e", "--format", "onnx")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    session = onnxruntime.InferenceSession(tmp_path / "e" / "model.onnx")
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == ["cat", "dog", "emu"]
    assert json.loads(said["mean"]) == [0.1, 0.2, 0.3]
    assert [o.name for o in session.get_outputs()] == ["features", "embedding", "logits"]
    model: Any = mpp.load_encoder(classifier).eval()
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
    logits = session.run(["logits"], {"images": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
def test_heads_of_segmentation(format: str, segmenter: Path, tmp_path: Path) -> None:
    found = mpp.export(segmenter, tmp_path / "e", format)
    assert found.difference < 1e-5
    reference = load_file(tmp_path / "e" / "reference.safetensors")
    assert reference["logits"].shape == (2, 3, 16, 16)
    assert json.loads((tmp_path / "e" / "export.json").read_text())["classes"] == ["sky", "sea", "sand"]


NATIVE: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "ViTModel": ("vit_tiny_patch16_224", VIT, (16, 24)),
    "DeiTModel": ("deit_tiny_distilled_patch16_224", VIT, (16, 16)),
    "BeitModel": ("beit_base_patch16_224", VIT | {"init_values": 0.1}, (16, 16)),
    "SwinModel": (
        "swin_tiny_patch4_window7_224",
        {"patch_size": 2, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4},
        (32, 32),
    ),
    "PvtV2Model": (
        "pvt_v2_b0",
        {"depths": (1, 2, 1, 1), "embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2)},
        (64, 64),
    ),
}


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.usefixtures("unverified")
def test_models_of_transformers(name: str, tmp_path: Path) -> None:
    """The export has transformers' own class and, loaded by an Auto class, timm's features. The same holds for a
    classifier.
    """
    hub = pytest.importorskip("transformers")
    timm_name, args, size = NATIVE[name]
    source = timm_folder(tmp_path / "timm", timm_name, size, **args)
    mpp.export(source, tmp_path / "hf", "transformers")
    assert json.loads((tmp_path / "hf/export.json").read_text())["kind"] == f"transformers' own {name}"
    model = hub.AutoModel.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == name
    x = torch.randn(2, 3, *size)
    ours: Any = mpp.load_encoder(source).eval()
    with torch.no_grad():
        found, expected = model.eval()(x), ours.forward_features(x)
        torch.testing.assert_close(found.last_hidden_state.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)
        if name in ("ViTModel", "DeiTModel"):
            torch.testing.assert_close(found.pooler_output, expected[:, 0], rtol=1e-4, atol=1e-4)
    known = {} if (tmp_path / "hf" / "preprocessor_config.json").exists() else {"mean": [0.1] * 3, "std": [0.2] * 3}
    again = mpp.import_weights(tmp_path / "hf", tmp_path / "back", **known)
    assert (again.layout, again.missing) == ("transformers", [])
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("timm", "back"))
    assert all(torch.equal(first[n], second[n]) for n in first), "export and import must return the same weights"

    tuned = timm_folder(tmp_path / "tuned", timm_name, size, ["a", "b", "c"], **args)
    mpp.export(tuned, tmp_path / "hf-tuned", "transformers")
    kind = json.loads((tmp_path / "hf-tuned/export.json").read_text())["kind"]
    assert kind.startswith(f"transformers' own {name.removesuffix('Model')}ForImageClassification")
    model = hub.AutoModelForImageClassification.from_pretrained(tmp_path / "hf-tuned").eval()
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    with torch.no_grad():
        expected = mpp.load_encoder(tuned).eval()(x)
        torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "args", "classes"),
    [
        ("vit_tiny_patch16_224", VIT | {"global_pool": "avg", "fc_norm": False}, ["a", "b"]),
        ("vit_tiny_patch16_224", VIT | {"qk_norm": True}, None),
        ("vit_base_patch14_reg4_dinov2", VIT, None),
    ],
)
@pytest.mark.usefixtures("unverified")
def test_what_transformers_has_no_model_for_is_timms(
    name: str, args: dict[str, Any], classes: list[str] | None, tmp_path: Path
) -> None:
    hub = pytest.importorskip("transformers")
    source = timm_folder(tmp_path / "timm", name, (16, 16), classes, **args)
    mpp.export(source, tmp_path / "hf", "transformers")
    assert "TimmWrapper" in json.loads((tmp_path / "hf/export.json").read_text())["kind"]
    assert not (tmp_path / "hf/preprocessor_config.json").exists()
    auto = hub.AutoModelForImageClassification if classes else hub.AutoModel
    model = auto.from_pretrained(tmp_path / "hf").eval()
    x = torch.randn(2, 3, 16, 16)
    ours: Any = mpp.load_encoder(source).eval()
    with torch.no_grad():
        found = model(x).logits if classes else model(x).last_hidden_state
        torch.testing.assert_close(found, ours(x) if classes else ours.forward_features(x), rtol=1e-4, atol=1e-4)


def test_image_processors_read_as_the_encoder_learned(tmp_path: Path) -> None:
    """An image processor that preprocesses differently is found by the verification."""
    pytest.importorskip("transformers")
    for number, (args, classes) in enumerate(
        ((VIT, None), (VIT | {"global_pool": "avg", "fc_norm": False}, ["a", "b"]))
    ):
        cut = timm_folder(tmp_path / f"timm{number}", "vit_tiny_patch16_224", (16, 16), classes, **args)
        config = json.loads((cut / "config.json").read_text())
        config["pretrained_cfg"]["crop_pct"] = 0.875  # 18.3 px: other roundings crop elsewhere
        (cut / "config.json").write_text(json.dumps(config))
        mpp.export(cut, tmp_path / f"hf{number}", "transformers")
        assert "AutoImageProcessor" in (tmp_path / f"hf{number}/README.md").read_text()
    source = timm_folder(tmp_path / "timm", "vit_tiny_patch16_224", (16, 16), **VIT)
    mpp.export(source, tmp_path / "hf", "transformers")
    file = tmp_path / "hf/preprocessor_config.json"
    about = json.loads((tmp_path / "hf/export.json").read_text())
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"do_center_crop": False, "size": {"height": 16, "width": 16}})
    )
    about["files_sha256"][file.name] = sha256(file)
    (tmp_path / "hf/export.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="hf: (outputs differ by|cannot be loaded)"):
        mpp.verify(tmp_path / "hf")


@pytest.mark.usefixtures("unverified")
def test_where_no_image_processor_fits(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    wide = timm_folder(tmp_path / "wide", "vit_tiny_patch16_224", (16, 24), **VIT)
    deep = timm_folder(tmp_path / "deep", "vit_tiny_patch16_224", (16, 16), **VIT)
    (deep / "recipe.yaml").write_text("data: {value_range: [0, 4095]}\n")
    for source, words in ((wide, "pixels in [0, 1]"), (deep, "values scaled to [0, 1] from [0, 4095]")):
        mpp.export(source, tmp_path / f"{source.name}-hf", "transformers")
        assert not (tmp_path / f"{source.name}-hf/preprocessor_config.json").exists()
        card = (tmp_path / f"{source.name}-hf/README.md").read_text()
        assert "AutoImageProcessor" not in card
        about = json.loads((tmp_path / f"{source.name}-hf/export.json").read_text())
        assert pixels_of(about["normalisation"]["value_range"]) == words


@pytest.mark.usefixtures("unverified")
def test_several_labels_an_image(classifier: Path, tmp_path: Path) -> None:
    """Each class has a score of its own."""
    hub = pytest.importorskip("transformers")
    source = shutil.copytree(classifier, tmp_path / "several")
    (source / "recipe.yaml").write_text("data: {}\ntask: {name: multilabel}\n")
    mpp.export(source, tmp_path / "hf", "transformers")
    model = hub.AutoModelForImageClassification.from_pretrained(tmp_path / "hf")
    assert model.config.problem_type == "multi_label_classification"
    assert json.loads((tmp_path / "hf/export.json").read_text())["task"] == "multilabel"


@pytest.mark.usefixtures("unverified")
def test_an_export_of_an_export_has_one_card(run: Path, tmp_path: Path) -> None:
    mpp.export(run, tmp_path / "a")
    mpp.export(tmp_path / "a", tmp_path / "b", "safetensors")
    card = (tmp_path / "b/README.md").read_text()
    assert all(card.count(f"## {title}\n") == 1 for title in ("Data", "Recipe", "Cost", "Probes"))
    with pytest.raises(UserError, match="b: is an export as safetensors; give the run or the timm folder"):
        mpp.export(tmp_path / "b", tmp_path / "c")


def test_what_is_refused(
    run: Path, segmenter: Path, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(source: Path, format: str, message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            mpp.export(source, tmp_path / "e", format)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "e").exists()

    asked(run, "tflite", "--format: expected one of timm, onnx, safetensors, torch_export, transformers; got 'tflite'")
    asked(segmenter, "transformers", "has no place for a head of task: segment; use timm, safetensors, onnx, torch")
    asked(tmp_path, "onnx", "neither a run nor an exported encoder")
    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else own(name))
    asked(run, "onnx", r"--format onnx: needs onnxscript: pip install 'onnx")


@pytest.mark.usefixtures("unverified")
def test_folders_that_are_read_as_what_they_are(classifier: Path, tmp_path: Path) -> None:
    """A folder of transformers is refused as an encoder until it has been imported."""
    mpp.export(classifier, tmp_path / "hf", "transformers")
    with pytest.raises(UserError, match="hf: a transformers folder; `mpp import .*hf OUT` converts it"):
        mpp.load_encoder(tmp_path / "hf")
    about = json.loads((tmp_path / "hf/export.json").read_text())
    for change, message in (
        ({"format_version": 9}, "of a newer release: format transformers, version 9"),
        ({"format": "tflite"}, "of a newer release: format tflite"),
        ({"files_sha256": {}}, "no readable export.json"),
        ({"tolerance": None}, "no readable export.json"),
    ):
        (tmp_path / "hf/export.json").write_text(json.dumps(about | change))
        with pytest.raises(UserError, match=message):
            VERIFY(tmp_path / "hf")


VERIFY = converting.verify


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", OTHERS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.title)
def test_every_family(family: Any, format: str, tmp_path: Path) -> None:
    source = timm_folder(tmp_path / "timm", family.example, family.image_size, **family.args)
    assert mpp.export(source, tmp_path / "e", format).difference < 1e-4
