"""Recipes: each mistake is reported in one line with file and line number, and valid recipes survive a round trip."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

import mpp
from mpp.errors import MppWarning, UserError
from mpp.recipe.dump import dump_recipe, json_schema
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import RECIPES, bundled, checked, find_recipe, load_any, load_open, load_recipe
from mpp.recipe.overrides import apply_overrides, parse_overrides
from mpp.recipe.pretrain import PretrainRecipe
from mpp.recipe.resume import differences
from mpp.recipe.yaml_reader import parse_yaml
from mpp.runs.records import read_metrics
from tests.conftest import ROOT, pretrain_recipe

BASE = """\
out: runs/x
data:
  shards: a.tar
  image_size: 32
optim:
  epochs: 3
"""


def errors(text: str, tmp_path: Path, *overrides: str, job: Any = PretrainRecipe) -> list[str]:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(path, job, parse_overrides(overrides))
    return [line.replace(str(path), "r.yaml") for line in str(error.value).splitlines()]


WRONG = {
    # mistake -> (lines added, overrides, beginning of the one line that reports it)
    "unknown key": (
        "mask:\n  ratoi: 0.5\n", [],
        "r.yaml:8: mask.ratoi: unknown key. Did you mean 'mask.ratio'? Known keys: name, ratio, unit_px",
    ),
    "unknown section": ("maks: {}\n", [], "r.yaml:7: maks: unknown key. Did you mean 'mask'?"),
    "a key that belongs elsewhere": ("epochs: 3\n", [], "r.yaml:7: epochs: unknown key. Did you mean 'optim.epochs'?"),
    "out of range": ("mask:\n  ratio: 1.5\n", [], "r.yaml:8: mask.ratio: must be > 0 and < 1; got 1.5"),
    "out of range on the command line": (
        "", ["mask.ratio=1.5"], "command line: mask.ratio: must be > 0 and < 1; got 1.5",
    ),
    "given twice": ("out: runs/y\n", [], "r.yaml:7: out: given twice; first at line 1"),
    "given twice, deeper": ("mask: {ratio: 0.5, ratio: 0.6}\n", [], "r.yaml:7: mask.ratio: given twice; first at line 7"),
    "true for a number": ("seed: true\n", [], "r.yaml:7: seed: true/false is not a number; got True"),
    "yes for true": ("encoder: {pretrained: yes}\n", [], "r.yaml:7: encoder.pretrained: input should be a valid boolean; got 'yes'"),
    "a word for a number": ("seed: many\n", [], "r.yaml:7: seed: input should be a valid integer"),
    "a fraction for a count": ("corruption: {enter: 1.5}\n", [], "r.yaml:7: corruption.enter: input should be a valid integer"),
    "unknown component": (
        "mask: {name: blok}\n", [], "r.yaml:7: mask.name: no such choice; got 'blok'. Did you mean 'block'? Choose from attention, block, complementary, grid, inverse_block, noise, uniform",
    ),
    "unknown component, short form": ("head: lineer\n", [], "r.yaml:7: head.name: no such choice; got 'lineer'. Did you mean 'linear'?"),
    "another component's key": ("head: {name: linear, depth: 2}\n", [], "r.yaml:7: head.depth: unknown key. It belongs to head=cross_attention and head=transformer. Known keys: name"),
    "unknown choice": ("precision: fp16\n", [], "r.yaml:7: precision: no such choice; got 'fp16'. Did you mean 'bf16'? Choose from auto, fp32, tf32, bf16"),
    "both of two": ("", ["optim.steps=5", "optim.epochs=2"], "command line: optim.epochs: give one of epochs and steps, not both; epochs: null or steps: null takes one away"),
    "mean of other channels": ("", ["data.mean=[0.5]"], "command line: data.mean: has 1 values for 3 channels"),
    "a number for a section": ("mask: 3\n", [], "r.yaml:7: mask: "),
    "a key below a value": ("", ["out.x=3"], "command line: out.x: out has no keys; it is 'runs/x'"),
    "no key=value": ("", ["mask.ratio"], "command line: 'mask.ratio': write key=value"),
    "not YAML": ("mask: {ratio: 0.5\n", [], "r.yaml:8: not valid YAML: "),
    "a tag that would run code": ("mask: !!python/object/apply:os.system [ls]\n", [], "r.yaml:7: not valid YAML: could not determine a constructor"),
    "a tag that cannot be read": ("seed: !!float abc\n", [], "r.yaml: not valid YAML: "),
    "a value that holds itself": ("encoder: &a {args: *a}\n", [], "r.yaml"),
    "another job": ("job: finetune\n", [], "r.yaml: job: this is a recipe of `mpp finetune`, not of `mpp pretrain`"),
    "overridden twice": ("", ["seed=1", "out=x", "seed=2"], "command line: seed: given twice: 1, 2. "),
    "a size in words": ("", ["data.image_size=32x32"], "command line: data.image_size: must be one number or [height, width]; got '32x32'"),
    "a number for a list": ("", ["optim.betas=0.9"], "command line: optim.betas: must be a list, [a, b, …]; got 0.9"),
    "a format in small letters": ("", ["data.formats=[jpeg]"], "command line: data.formats.0: no such choice; got 'jpeg'. Choose from JPEG"),
    "a word for a section": ("", ["encoder=vit"], "command line: encoder: has keys of its own. Did you mean encoder.name=vit?"),
    "a mean of 8-bit pixels": ("", ["data.mean=[123.7, 0.5, 0.5]"], "command line: data.mean.0: must be >= 0 and <= 1; got 123.7"),
    "a range the wrong way round": ("mask: {ratio: [0.8, 0.5]}\n", [], "r.yaml:7: mask.ratio: the lower end comes first; got [0.8, 0.5]"),
    "a range of three": ("mask: {ratio: [0.1, 0.5, 0.8]}\n", [], "r.yaml:7: mask.ratio: must be one number or [lowest, highest]"),
    "classes compared by distance": ("target: mean_color\nloss: mse\n", [], "r.yaml:8: loss: mse is not for classes, which target mean_color has; use one of cross_entropy"),
    "values compared as classes": ("loss: cross_entropy\n", [], "r.yaml:7: loss: cross_entropy is not for values, which target norm_pixels has; use one of cosine, l1, mse, smooth_l1"),
    "a preset that is not a mapping": ("presets: {tiny: 3}\n", [], "r.yaml:7: presets.tiny: must be keys with values, such as optim.steps: 3; got 3"),
    "a number with a leading zero": ("", ["optim.clip_grad_norm=12:30"], "command line: optim.clip_grad_norm: input should be a valid number"),
    "minutes for a count": ("", ["seed=12:30"], "command line: seed: input should be a valid integer"),
    "a number far too large": ("", ["data.window=1" + "0" * 400], "command line: data.window: must be at most 10^15"),
    "a key that is a number": ("5: 1\n", [], "r.yaml:7: 5: keys must be text; put quotes around this one"),
    "a key that is true": ("encoder: {true: 1}\n", [], "r.yaml:7: encoder.true: keys must be text"),
    "a tag of another type": ("seed: !!bool maybe\n", [], "r.yaml: not valid YAML: "),
    "no for a switch of timm's": ("", ["encoder.args.qkv_bias=no"], "command line: encoder.args.qkv_bias: 'no' is text; write true or false"),
    "a member that is no image": ("", ["data.image_extension=cls"], "command line: data.image_extension: what follows the name of a sample"),
    "a preset of numbers": ("presets: {tiny: {3: 1}}\n", [], "r.yaml:7: presets.tiny.3: keys must be text"),
    "twice in one value": ("", ["mask={name: block, ratio: 0.4, ratio: 0.5}"], "command line: mask:1: ratio: given twice"),
    "a preset on the command line": ("", ["presets.tiny.seed=3"], "command line: presets.tiny.seed: presets can only be changed in the recipe; give the key itself"),
    "an endless block": ("", ["mask=block", "mask.max_aspect=1e308"], "command line: mask.max_aspect: must be >= 1 and <= 100"),
    "nothing for a component": ("target: null\n", [], "r.yaml:7: target: must be keys with values: args, bits, "),
    "predict none": ("predict_fraction: 0\n", [], "r.yaml:7: predict_fraction: must be > 0 and <= 1; got 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_each_wrong_recipe_has_its_line(what: str, tmp_path: Path) -> None:
    added, overrides, line = WRONG[what]
    lines = errors(BASE + added, tmp_path, *overrides)
    assert len(lines) == 1
    assert lines[0].startswith(line)


def test_numbers_are_what_people_read(tmp_path: Path) -> None:
    """A leading zero does not mean an octal number as in YAML 1.1, and folders may have numbers as names."""
    path = tmp_path / "r.yaml"
    path.write_text(BASE + "seed: 010\n")
    given = {"out": "010", "data.shards": "2024", "data.image_extension": ".rgb.png"}
    recipe = load_recipe(path, PretrainRecipe, given)
    assert (recipe.seed, recipe.out, recipe.data.shards) == (10, "010", ("2024",))
    assert recipe.data.image_extension == "rgb.png"


def test_a_length_on_the_command_line_replaces_that_of_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(BASE + "presets: {tiny: {optim.steps: 7, optim.warmup_steps: 2}}\n")

    def length(overrides: dict[str, Any], preset: str | None = None) -> tuple[float | None, ...]:
        optim = load_recipe(path, PretrainRecipe, overrides, preset).optim
        return optim.epochs, optim.steps, optim.warmup_epochs, optim.warmup_steps

    assert length({}) == (3, None, 0, None)
    assert length({"optim.steps": "5"}) == (None, 5, 0, None)
    assert length({"optim.warmup_epochs": "1"}, "tiny") == (None, 7, 1, None)
    assert length({"optim.epochs": "2"}, "tiny") == (2, None, 0, 2)
    assert length({"optim.steps": "null"}) == (3, None, 0, None)
    assert length({"optim.epochs": "null", "optim.steps": "4"}) == (None, 4, 0, None)


def test_epochs_on_the_command_line_count_without_the_least_number_of_steps() -> None:
    given = {"encoder": "runs/x", "data.train": "x", "data.val": "x"}
    assert load_recipe("vit_small", FinetuneRecipe, given).optim.min_steps > 0
    assert load_recipe("vit_small", FinetuneRecipe, given | {"optim.epochs": "1"}).optim.min_steps == 0


def test_formats_may_be_added_when_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(BASE)
    few, more = (load_recipe(path, PretrainRecipe, {"data.formats": f}) for f in ("[PNG]", "[GIF, PNG]"))
    assert differences(few, more) == []
    assert differences(more, few) == ["data.formats: was ['GIF', 'PNG'], now ['PNG']"]


def test_all_errors_at_once(tmp_path: Path) -> None:
    lines = errors("out: 3\ndata: {image_size: -1}\noptim: {epochs: x}\nfoo: 1\n", tmp_path, "mask.ratio=2")
    said = " ".join(lines)
    assert all(
        key in said
        for key in (
            "data.shards: required; add data.shards=FOLDER",
            "data.image_size",
            "optim.epochs",
            "foo",
            "mask.ratio",
            "out",
        )
    )
    assert len(lines) >= 6


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n"])
def test_what_is_no_mapping(text: str, tmp_path: Path) -> None:
    assert errors(text, tmp_path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        load_recipe(tmp_path / "none.yaml", PretrainRecipe)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        load_any(tmp_path / "b.yaml")


def test_numbers_are_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(BASE + "predict_fraction: 1e-1\n")
    recipe = load_recipe(
        path, PretrainRecipe, {"optim.base_lr": "1e-4", "optim.weight_decay": "5E-2", "data.flip": ".5"}
    )
    assert recipe.predict_fraction == 0.1
    assert (recipe.optim.base_lr, recipe.optim.weight_decay, recipe.data.flip) == (1e-4, 0.05, 0.5)


def test_overrides_change_components(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(BASE + "head: {name: transformer, dim: 64}\nmask: block\n")
    recipe = load_recipe(
        path, PretrainRecipe, parse_overrides(("head.name=mlp", "head.hidden_dim=8", "mask.ratio=0.3"))
    )
    assert recipe.head.model_dump() == {"name": "mlp", "hidden_dim": 8}
    turned = load_recipe(path, PretrainRecipe, parse_overrides(("head.hidden_dim=8", "head=mlp")))
    assert turned.head == recipe.head, "the order of the overrides must not matter"
    assert (recipe.mask.name, recipe.mask.ratio) == ("block", 0.3)
    assert recipe.corruption.name == "token"
    assert recipe.target.name == "norm_pixels"
    assert recipe.data.image_size == (32, 32)


def test_an_encoder_keeps_its_arguments(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(BASE + "encoder: {name: vit_tiny_patch16_224, args: {depth: 2}, grad_checkpointing: true}\n")
    words = ("encoder.args.num_heads=2", "encoder.name=vit_small_patch16_224")
    for order in (words, words[::-1]):
        encoder = load_recipe(path, PretrainRecipe, parse_overrides(order)).encoder
        assert encoder.name == "vit_small_patch16_224"
        assert (encoder.args, encoder.grad_checkpointing) == ({"depth": 2, "num_heads": 2}, True)


def test_paths_are_what_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    path = tmp_path / "r.yaml"
    path.write_text(BASE)
    for given, read in (
        ("runs/try #2", "runs/try #2"),
        ("~/x", "/home/me/x"),
        (Path("a b"), "a b"),
        ("'a: b'", "a: b"),
    ):
        assert load_recipe(path, PretrainRecipe, {"out": given}).out == read
    recipe = load_recipe(path, PretrainRecipe, {"data.shards": "*.tar"})
    assert recipe.data.shards == ("*.tar",)
    assert load_recipe(path, PretrainRecipe, {"data.shards": "[~/a, b]"}).data.shards == ("/home/me/a", "b")


def test_a_recipe_may_be_a_mapping() -> None:
    values = {"out": "o", "data": {"shards": "s", "image_size": 32}, "optim": {"epochs": 1}}
    recipe = checked(values, PretrainRecipe, {"mask.ratio": 0.3})
    assert (recipe.mask.ratio, "mask" in values) == (0.3, False)
    with pytest.raises(UserError, match="recipe: a file, a mapping of keys or a checked recipe; got NoneType"):
        checked(None, PretrainRecipe, {})


def all_recipes() -> list[Path]:
    return sorted(path for job in ("pretrain", "finetune") for path in (ROOT / "recipes" / job).glob("*.yaml"))


def given_to(path: Path) -> dict[str, Any]:
    """Return placeholders for the keys that a recipe leaves to the command line."""
    return dict.fromkeys(load_open(path, {}, None)[1], "given")


@pytest.mark.parametrize("path", all_recipes(), ids=lambda p: p.stem)
def test_every_recipe_round_trips(path: Path, tmp_path: Path) -> None:
    recipe = load_any(path, given_to(path))
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert load_any(tmp_path / "r.yaml") == recipe
    assert recipe.job == path.parent.name


def test_a_key_of_a_section_is_left_open_where_the_section_is_there() -> None:
    path = ROOT / "recipes" / "finetune" / "small_images_unlabeled.yaml"
    assert set(given_to(path)) == {"data.train", "data.val", "unlabeled.images"}
    with pytest.raises(
        UserError, match=r"unlabeled_?.*yaml:\d+: unlabeled\.images: required; add unlabeled\.images=FOLDER"
    ):
        load_any(path)
    assert set(given_to(path.with_stem("small_images"))) == {"data.train", "data.val"}


@pytest.mark.parametrize("path", all_recipes(), ids=lambda p: p.stem)
def test_every_recipe_opens_with_source_command_cost_and_score(path: Path) -> None:
    head = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    for word in ("Source:", "Command:", "Cost:", "Expected:"):
        assert word in head, f"{path}: its comments lack {word}"


def test_every_command_of_a_recipe_gives_what_its_keys_need() -> None:
    tried = 0
    for path in all_recipes():
        for line in re.findall(r"^# .*?\bmpp (?:pretrain|finetune) (\w+\b.*)$", path.read_text(), re.MULTILINE):
            name, *rest = shlex.split(line.partition("   (")[0])
            given = dict(word.split("=", 1) for word in rest if "=" in word and not word.startswith("-"))
            assert load_recipe(name, RECIPES[path.parent.name], given).job == path.parent.name, path
            tried += 1
    assert tried >= 15


PRETRAINING = [p for p in all_recipes() if p.parent.name == "pretrain"]
SLOW = dict.fromkeys(("mae_vit_l16", "simmim_swin_b", "hybrid_r50_b16"), pytest.mark.slow)
# 630 M parameters, otherwise like mae_vit_l16
SLOW |= dict.fromkeys(("mae_vit_h14", "pixio_vit_h16"), pytest.mark.exhaustive)


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem, marks=SLOW.get(p.stem, ())) for p in PRETRAINING])
def test_every_pretraining_recipe_builds(path: Path) -> None:
    from mpp.objective.build import build_model

    recipe = load_recipe(path, PretrainRecipe, given_to(path))
    offline: dict[str, Any] = {"target.pretrained": False} if recipe.target.name == "teacher" else {}
    offline |= {"encoder.pretrained": False} if recipe.encoder.pretrained else {}
    recipe = load_recipe(path, PretrainRecipe, given_to(path) | offline)
    model, grid = build_model(recipe)
    assert grid[0] * model.unit_px == recipe.data.image_size[0]
    if recipe.encoder.free_blocks:
        free = {name.split(".")[1] for name, p in model.encoder.model.named_parameters() if p.requires_grad}
        assert free == set(map(str, range(12 - recipe.encoder.free_blocks, 12)))


WITH_PRESETS = [p for p in PRETRAINING if "presets:" in p.read_text()]


@pytest.mark.parametrize("path", WITH_PRESETS, ids=lambda p: p.stem)
def test_every_recipe_runs_with_the_preset_tiny(path: Path, shards: Path, tmp_path: Path) -> None:
    changes = {"data.shards": str(shards), "out": str(tmp_path / "run")}
    result = mpp.pretrain(path, preset="tiny", **changes)
    assert result.step == 3
    assert all(m["loss"] > 0 for m in read_metrics(result.out))
    assert "presets: {}" in (result.out / "recipe.yaml").read_text()


FINETUNING = [path for name, path in sorted(bundled().items()) if name.startswith("finetune/")]
CLASSIFYING = [
    p for p in FINETUNING if "task: {name: segment" not in p.read_text() and "task: {name: detect" not in p.read_text()
]


@pytest.fixture(scope="module")
def tiny_encoder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "run"
    mpp.pretrain(bundled()["pretrain/vit_small"], preset="tiny", **{"data.shards": str(shards), "out": str(out)})
    return out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:data.channels. 1, but the encoder:mpp.errors.MppWarning")
@pytest.mark.parametrize("path", CLASSIFYING, ids=lambda p: p.stem)
def test_every_fine_tune_runs_with_the_preset_tiny(
    path: Path, tiny_encoder: Path, shards: Path, tmp_path: Path
) -> None:
    """The tests of the guides run the recipes for segmentation and detection."""
    places = {"data.train": f"{shards}/shard-00000[12].tar", "data.val": f"{shards}/shard-000000.tar"}
    recipe = load_recipe(path, FinetuneRecipe, given_to(path))
    if recipe.unlabeled:
        places["unlabeled.images"] = str(shards)
    result = mpp.finetune(path, preset="tiny", encoder=str(tiny_encoder), out=str(tmp_path / "run"), **places)
    assert result.state == "finished"
    trials = [f"{approach}-seed0" for approach in ("pretrained", *recipe.beside)]
    assert sorted(p.name for p in result.out.glob("*-seed0")) == sorted(trials)


def test_every_recipe_has_the_preset_tiny() -> None:
    assert {p.stem for p in PRETRAINING} == {p.stem for p in WITH_PRESETS}
    assert [p.stem for p in FINETUNING if "  tiny:" not in p.read_text()] == []


@pytest.mark.parametrize("section", ["presets", "scales"])
def test_presets_come_before_overrides_and_keep_their_place(section: str, tmp_path: Path) -> None:
    """Older recipes call presets scales."""
    path = tmp_path / "r.yaml"
    path.write_text(BASE + f"{section}:\n  tiny: {{data.image_size: 8, optim.epochs: 1}}\n  odd:\n    mask.ratio: 3\n")
    recipe = load_recipe(path, PretrainRecipe, {"optim.epochs": 2}, "tiny")
    assert (recipe.data.image_size, recipe.optim.epochs, recipe.presets) == ((8, 8), 2, {})
    assert load_recipe(path, PretrainRecipe).data.image_size == (32, 32)
    with pytest.raises(UserError, match=r"r.yaml:10: mask.ratio: must be > 0 and < 1; got 3"):
        load_recipe(path, PretrainRecipe, None, "odd")
    assert load_recipe(path, PretrainRecipe).presets == {}, "a run may be resumed although a preset changed"
    both = tmp_path / "both.yaml"
    both.write_text(path.read_text() + "presets: {}\n" if section == "scales" else path.read_text() + "scales: {}\n")
    with pytest.raises(UserError, match=r"both.yaml:\d+: scales: is called presets now"):
        load_recipe(both, PretrainRecipe)
    with pytest.raises(UserError, match="scale: is called preset now"):
        load_recipe(path, PretrainRecipe, {"scale": "tiny"})
    with pytest.raises(UserError, match=r"--preset huge: not in .*r.yaml; its presets are tiny, odd"):
        load_recipe(path, PretrainRecipe, None, "huge")


def test_differences_name_keys_that_matter(tmp_path: Path) -> None:
    a = pretrain_recipe("x", "y")
    b = pretrain_recipe("x", "z", **{"mask.ratio": 0.5, "data.workers": 3, "log_every_steps": 9})
    assert differences(a, b) == ["mask.ratio: was 0.6, now 0.5"]


def test_which_runs_can_be_made_longer() -> None:
    def asked(before: int, after: int, **changes: Any) -> list[str]:
        return differences(*(pretrain_recipe("s", "o", **{**changes, "optim.steps": n}) for n in (before, after)))

    wsd = {"optim.schedule": "wsd"}
    teacher = {**wsd, "target": {"name": "ema_teacher", "decay": 0.9}}
    assert asked(20, 30, **wsd) == asked(20, 30, **{"optim.schedule": "constant"}) == []
    assert asked(30, 20, **wsd) == ["optim.steps: was 30, now 20"]
    (line,) = asked(20, 30)
    assert line.endswith(
        "now 30 (a pretraining that is to be made longer needs optim.schedule: wsd or constant from the start)"
    )
    (line,) = asked(20, 30, **teacher)
    assert line.endswith(
        "(a moving teacher whose decay rises depends on the length; give decay_end the value of decay)"
    )
    assert asked(20, 30, **{**teacher, "target": {**teacher["target"], "decay_end": 0.9}}) == []
    extra = {**wsd, "extra_targets": [{"target": {"name": "ema_teacher"}}]}
    assert len(asked(20, 30, **extra)) == 1


EVALUATE = "job: evaluate\nencoder: runs/a\ndata: {train: a, val: [b, c]}\nprobes: knn\n"


def complaints(job: str, text: str) -> list[str]:
    """Return the errors that an editor reports for a recipe."""
    values = parse_yaml(text, "r.yaml")[0]
    return [error.message for error in Draft202012Validator(json_schema(job)).iter_errors(values)]


@pytest.mark.parametrize("job", sorted(RECIPES))
def test_schema_describes_every_key(job: str) -> None:
    schema = json_schema(job)
    Draft202012Validator.check_schema(schema)
    assert "description" in schema
    assert schema["properties"].keys() >= {"out", "data", "job"}


@pytest.mark.parametrize("name", sorted(bundled()))
def test_schema_takes_every_recipe(name: str) -> None:
    """The schema accepts a recipe with its short forms, as written, and the recipe written out in full."""
    path, job = bundled()[name], name.split("/")[0]
    assert complaints(job, path.read_text()) == []
    assert complaints(job, dump_recipe(load_any(path, given_to(path)))) == []


def test_schema_takes_an_evaluation() -> None:
    assert complaints("evaluate", EVALUATE) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("mask: block", ""),
        ("mask: {ratio: 0.5}", ""),
        ("mask: {name: block, ratio: 0.5}", ""),
        ("head: {name: transformer, depth: 2}\nextra_targets: [{target: hog, weight: 0.5}]", ""),
        ("data: {shards: [a, b], image_size: [32, 64]}", ""),
        ("trackers: wandb", ""),
        ("loss: null", ""),
        ("mask: blok", "'blok' is not valid"),
        ("mask: {name: block, ratoi: 0.5}", "is not valid"),
        ("mask: {ratio: 2}", "is not valid"),
        ("mask: {min_block: 4}", "is not valid"),  # a key of block, which is not the default
        ("msk: block", "'msk' was unexpected"),
        ("data: {shards: [], image_size: 32}", "is not valid"),
        ("data: {shards: a, image_size: 0}", "is not valid"),
        ("log_every_steps: 0", "less than the minimum of 1"),
        ("optim: {steps: 1, base_lr: 0}", "less than or equal to the minimum of 0"),
        ("encoder: {pretrained: 1}", "1 is not of type 'boolean'"),
    ],
)
def test_schema_knows_short_forms_and_slips(change: str, told: str) -> None:
    given = {"out": "out: o", "data": "data: {shards: a, image_size: 32}", "optim": "optim: {steps: 1}"}
    given |= {line.partition(":")[0]: line for line in change.splitlines()}
    found = complaints("pretrain", "\n".join(given.values()))
    assert (len(found) == 1 and told in found[0]) if told else found == []


def test_finetune_recipes_check_across_keys(tmp_path: Path) -> None:
    base = "job: finetune\nout: o\nencoder: scratch\ndata: {train: a, val: b, image_size: 8}\noptim: {steps: 1}\n"
    assert errors(base, tmp_path, job=FinetuneRecipe) == [
        "r.yaml:3: encoder: scratch requires architecture.name, a timm name"
    ]
    base = base.replace("scratch", "runs/a")
    assert (
        "give labels_per_class or fraction"
        in errors(base, tmp_path, "data.fraction=0.5", "data.labels_per_class=3", job=FinetuneRecipe)[0]
    )
    assert errors(base, tmp_path, "seeds=[1,1]", job=FinetuneRecipe)[0] == "command line: seeds: each once; got [1, 1]"


def test_the_file_is_read_once_written(recipe_file: Callable[..., Path]) -> None:
    recipe = load_recipe(recipe_file(), PretrainRecipe)
    assert yaml.safe_load(dump_recipe(recipe))["optim"]["steps"] == 20


def test_naming_the_component_that_is_there_keeps_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        BASE.replace("mask: {name: uniform", "mask: {name: uniform") + "corruption: {name: token, enter: 2}\n"
    )
    kept = load_recipe(path, PretrainRecipe, {"corruption": "token"}).corruption
    assert kept == load_recipe(path, PretrainRecipe, {"corruption.name": "token"}).corruption
    assert kept.enter == 2
    assert load_recipe(path, PretrainRecipe, {"corruption": "drop"}).corruption.name == "drop", "drop has other keys"


def test_recipes_that_come_with_it_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names work in any folder and as the README writes them, but an existing file comes first."""
    monkeypatch.chdir(tmp_path)
    files = {
        f"{p.parent.name}/{p.stem}" for job in ("pretrain", "finetune") for p in (ROOT / "recipes" / job).glob("*.yaml")
    }
    assert set(bundled()) == files
    shards = {"data.shards": "given"}
    for name in ("pretrain/vit_small", "pretrain/vit_small.yaml", "recipes/pretrain/vit_small.yaml"):
        assert load_recipe(name, PretrainRecipe, shards).encoder.name == "vit_small_patch16_224"
    assert load_any("finetune/demo").job == "finetune"
    (tmp_path / "pretrain").mkdir()
    text = (ROOT / "recipes" / "pretrain" / "vit_small.yaml").read_text()
    (tmp_path / "pretrain" / "vit_small.yaml").write_text(text.replace("image_size: 224", "image_size: 112"))
    assert load_recipe("pretrain/vit_small.yaml", PretrainRecipe, shards).data.image_size == (112, 112)
    for _ in range(2):  # first without a folder of that name, then with one, which is not a recipe
        assert load_recipe("vit_small", PretrainRecipe, shards).job == "pretrain"
        found = find_recipe("vit_small"), find_recipe("vit_small", "finetune"), find_recipe("vit_base")
        assert [path.parent.name for path in found] == ["pretrain", "finetune", "finetune"]
        (tmp_path / "vit_small").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=r"pretrain: is a folder, not a recipe"):
        load_any("pretrain")
    for path in ("vit_small.yaml", "./vit_small.yaml", "elsewhere/vit_small"):  # paths of files that do not exist
        with pytest.raises(
            UserError, match=r"vit_small.*: (No such file|no such recipe).* Did you mean pretrain/vit_small"
        ):
            load_recipe(path, PretrainRecipe, shards)
    with pytest.raises(UserError, match=r"File name too long"):
        load_recipe("x" * 300, PretrainRecipe)
    with pytest.raises(
        UserError, match=r"vit_smal: no such recipe. Did you mean .*pretrain/vit_small.* `mpp recipe list`"
    ):
        load_recipe("vit_smal", PretrainRecipe)
    with pytest.raises(UserError, match=r"mae_vit_b16: no such recipe. Did you mean pretrain/mae_vit_b16\?"):
        load_recipe("mae_vit_b16", FinetuneRecipe)
    with pytest.raises(UserError, match=r"mine.yaml: No such file or directory. `mpp recipe list` shows"):
        load_recipe("mine.yaml", FinetuneRecipe)


def test_a_recipe_from_before_resize_on_was_removed(tmp_path: Path) -> None:
    """Older runs wrote the key into their folders. The loader now always resizes, as with `cpu`."""
    path = tmp_path / "r.yaml"
    path.write_text(BASE.replace("  image_size: 32\n", "  image_size: 32\n  resize_on: cpu\n"))
    assert "resize_on" not in dump_recipe(load_recipe(path, PretrainRecipe))
    path.write_text(path.read_text().replace("cpu", "device"))
    with pytest.warns(MppWarning, match=r"data.resize_on: removed"):
        assert "resize_on" not in dump_recipe(load_recipe(path, PretrainRecipe))


def test_a_component_of_a_list_is_set_after_the_list(tmp_path: Path) -> None:
    values: dict[str, Any] = {}
    apply_overrides(values, {}, {"extra_targets": "[{target: pixels, head: linear}]", "extra_targets.0.head": "mlp"})
    assert values["extra_targets"][0]["head"] == "mlp"
