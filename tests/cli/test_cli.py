"""The command line: a user's error gives no traceback and exit code 2, and no work is lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import timm
import torch
from click.testing import CliRunner

import mpp
from mpp.cli.app import Main, main
from tests.conftest import ROOT, command, drawn_image, encoded
from tests.data.shards.test_index import write_tar

WRONG: dict[str, list[str]] = {
    "no such recipe": ["pretrain", "none.yaml"],
    "no such recipe to fine-tune": ["finetune", "none.yaml"],
    "no such recipe to show": ["recipe", "show", "none.yaml"],
    "a recipe of the other job": ["finetune", "RECIPE"],
    "wrong override": ["pretrain", "RECIPE", "mask.ratio=7"],
    "no such shards": ["pretrain", "RECIPE", "data.shards=/none"],
    "a pipe": ["pretrain", "RECIPE", "data.shards=pipe:touch /tmp/never"],
    "no such encoder": ["pretrain", "RECIPE", "encoder.name=vit_tine"],
    "what timm cannot build": ["pretrain", "RECIPE", "encoder.args={depth: 2, num_heads: 5}"],
    "an encoder argument of the wrong kind": ["pretrain", "RECIPE", "encoder.args={depth: two}"],
    "out is a file": ["pretrain", "RECIPE", "out=FILE"],
    "out below a file": ["pretrain", "RECIPE", "out=FILE/run"],
    "resume from nowhere": ["pretrain", "RECIPE", "--resume", "/none"],
    "held-out more than there is": ["pretrain", "RECIPE", "data.held_out=50"],
    "a mean of two": ["pretrain", "RECIPE", "data.mean=[0, 0]"],
    "no shards": ["pretrain", "RECIPE", "data.shards=[]"],
    "a list for a job": ["pretrain", "RECIPE", "job=[a]"],
    "betas of 1": ["pretrain", "RECIPE", "optim.betas=[0.9, 1.0]"],
    "a range that falls": ["pretrain", "RECIPE", "data.crop_scale=[1.0, 0.2]"],
    "another range that falls": ["pretrain", "RECIPE", "data.crop_ratio=[1.3, 0.7]"],
    "endless": ["pretrain", "RECIPE", "optim.epochs=.inf"],
    "endless aspect": ["pretrain", "RECIPE", "mask=block", "mask.max_aspect=.inf"],
    "no heads": ["pretrain", "RECIPE", "encoder.args={num_heads: 0}"],
    "an argument without a value": ["pretrain", "RECIPE", "encoder.args={depth:3}"],
    "a teacher's folder that is not there": ["pretrain", "RECIPE", "target=teacher", "target.teacher=/none/here"],
    "a copy that never moves": ["pretrain", "RECIPE", "target=ema_teacher", "target.decay=1"],
    "a copy that moves faster in the end": ["pretrain", "RECIPE", "target=ema_teacher", "target.decay_end=0.5"],
    "no patches": ["pretrain", "RECIPE", "encoder.args={patch_size: 0}"],
    "no depth": ["pretrain", "RECIPE", "encoder.args={depth: 0}"],
    "no such norm": ["pretrain", "RECIPE", "encoder.args={norm_layer: foo}"],
    "patches dropped twice": ["pretrain", "RECIPE", "encoder.args={patch_drop_rate: 0.5}"],
    "drop path of 2": ["pretrain", "RECIPE", "encoder.args={drop_path_rate: 2}"],
    "pooled by attention": ["pretrain", "RECIPE", "encoder.args={global_pool: map, class_token: false}"],
    "true for channels": ["pretrain", "RECIPE", "data.channels=true"],
    "a bad value": ["pretrain", "RECIPE", "seed=!!int abc"],
    "no path": ["pretrain", "RECIPE", 'out="a\\0b"'],
    "no formats": ["pretrain", "RECIPE", "data.formats=[]"],
    "heads of the head that was named first": [
        "pretrain",
        "RECIPE",
        "head.num_heads=3",
        "head=transformer",
        "head.dim=16",
    ],
    "patches that are not square": ["pretrain", "RECIPE", "encoder.args={patch_size: [8, 4]}"],
    "heads below none": ["pretrain", "RECIPE", "encoder.args={num_heads: -2}"],
    "a folder for a shard": ["pretrain", "RECIPE", "data.shards=SHARDS/*"],
    "a folder among shards to index": ["index", "FOLDER.tar"],
    "two values": ["pretrain", "RECIPE", "data.shards=a", "data.shards=b"],
    "a picture over an image": ["reconstruct", "FOLDER", "FILE", "--out", "FILE"],
    "no such source": ["pack", "/none", "OUT"],
    "no such shard to index": ["index", "/none"],
    "no such run": ["export", "/none", "OUT"],
    "no such export": ["verify", "/none"],
    "no such run to draw": ["reconstruct", "/none", "FILE"],
}


@pytest.mark.parametrize("what", WRONG)
def test_user_errors(what: str, recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder.tar").mkdir()
    places = {
        "RECIPE": str(recipe_file()), "FILE": str(tmp_path / "file"), "OUT": str(tmp_path / "o"),
        "FOLDER.tar": str(tmp_path / "folder.tar"), "SHARDS": str(tmp_path), "FOLDER": str(tmp_path),
    }  # fmt: skip
    words = []
    for word in WRONG[what]:
        for name, value in places.items():
            word = word.replace(name, value) if word != "--resume" else word
        words.append(word)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2, (done.output, done.exception)
    assert isinstance(done.exception, SystemExit), "the user must not see a traceback"
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_an_error_in_a_process_of_its_own(recipe_file: Callable[..., Path]) -> None:
    done = command("pretrain", recipe_file(), "mask.ratoi=0.5")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "command line: mask.ratoi: unknown key. Did you mean 'mask.ratio'? Known keys: name, ratio, unit_px"
    ]
    assert done.stdout == ""


def every_command() -> dict[tuple[str, ...], click.Command]:
    """Return all commands by the words that call them."""
    recipes = main.commands["recipe"]
    assert isinstance(recipes, click.Group)
    found = {(name,): command for name, command in main.commands.items()}
    return found | {("recipe", name): command for name, command in recipes.commands.items()}


def test_the_help_shows_every_command_uncut() -> None:
    shown = CliRunner().invoke(main, ["--help"]).output
    grouped = [name for names in Main.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(name for name, command in main.commands.items() if not command.hidden)
    for name in grouped:
        (line,) = re.findall(rf"^  {name} +(.+)$", shown, re.MULTILINE)
        assert len(line) <= 45
        assert line == (main.commands[name].help or "").splitlines()[0]
        assert line[0].isupper()
        assert not line.endswith("…")


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_help_of_a_command(words: tuple[str, ...]) -> None:
    command = every_command()[words]
    done = CliRunner().invoke(main, [*words, "--help"])
    assert done.exit_code == 0
    assert "Usage:" in done.output
    assert len((command.help or "").splitlines()[0]) <= 45
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{option.name} has no help text"
            assert option.help[0].isupper() or option.help.startswith("timm"), option.name


def test_examples_of_the_help_are_commands() -> None:
    """Each example begins with a command of mpp, and its recipes and options exist."""
    from mpp.recipe.loading import find_recipe

    texts = [main.epilog, *(command.help for command in every_command().values())]
    examples = [line.split() for text in texts for line in re.findall(r"^ *mpp (.+)$", text or "", re.MULTILINE)]
    assert len(examples) > 20
    for name, *words in examples:
        command = main.commands[name]
        if name in ("pretrain", "finetune", "plan") and words[0] != "--help":
            assert find_recipe(words[0], "finetune" if name == "finetune" else "pretrain").is_file()
        known = {option for p in command.params if isinstance(p, click.Option) for option in p.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= known


def test_keys_are_listed_and_explained(tmp_path: Path) -> None:
    def said(*words: str) -> str:
        done = CliRunner().invoke(main, ["recipe", *words])
        assert done.exit_code == 0, done.output
        return done.output

    assert "optim.base_lr: 0.00015\n    Learning rate for a batch of 256 images" in said("keys", "pretrain")
    assert "mask.min_block: 16  (with mask=block)" in said("keys", "pretrain", "mask.*")
    assert [key["name"] for key in json.loads(said("keys", "finetune", "crop_scale", "--json"))] == [
        "data.crop_scale",
        "unlabeled.weak_crop_scale",
    ]
    assert "mpp pretrain, mpp finetune\noptim.min_lr: 0" in said("explain", "optim.min_lr")
    assert "grid: Keep one unit" in said("explain", "mask")
    assert said("explain", "encoder.args.depth") == said("explain", "encoder.args"), (
        "keys below encoder.args are timm's"
    )
    assert "Its keys: optim.name, optim.base_lr" in said("explain", "optim")
    assert "out: RUN/evaluation" in said("keys", "evaluate", "out")
    assert "mask.ratio: 0.6  (with mask=uniform)" in said("keys", "pretrain", "mask")
    assert "extra_targets.0.weight: 1" in said("keys", "pretrain", "weight")
    assert said("keys", "pretrain", "lr base").startswith("optim.base_lr: ")
    for words in (["explain", "lr"], ["explain", "colour"], ["keys", "pretrain", "colour"]):
        done = CliRunner().invoke(main, ["recipe", *words])
        assert done.exit_code == 2
        assert len(done.stderr.splitlines()) == 1
    assert "Did you mean 'optim.base_lr'?" in CliRunner().invoke(main, ["recipe", "explain", "lr"]).stderr


def test_a_recipe_is_copied_once(tmp_path: Path) -> None:
    words = ["recipe", "copy", "pretrain/vit_small", str(tmp_path / "mine.yaml")]
    assert CliRunner().invoke(main, words).exit_code == 0
    assert (tmp_path / "mine.yaml").read_bytes() == (ROOT / "recipes/pretrain/vit_small.yaml").read_bytes()
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    done = CliRunner().invoke(main, ["recipe", "copy", str(tmp_path / "binary.yaml"), str(tmp_path / "other.yaml")])
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)


def test_out_is_an_option_everywhere(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """`--out` replaces out=FOLDER, and the last word of export and import. Both together are refused."""
    recipe = str(recipe_file(**{"optim.steps": 1}))
    done = CliRunner().invoke(main, ["pretrain", recipe, "-o", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert f"  encoder   {tmp_path}/run/encoder" in done.output
    assert f"  mpp finetune RECIPE encoder={tmp_path}/run data.train=FOLDER data.val=FOLDER" in done.output
    done = CliRunner().invoke(main, ["export", str(tmp_path / "run"), "--out", str(tmp_path / "export")])
    assert done.exit_code == 0, done.output
    assert f'use it: timm.create_model("local-dir:{tmp_path}/export", pretrained=True)' in done.stdout
    for words in (
        ["pretrain", recipe, "out=a", "-o", "b"],
        ["pretrain", recipe, "-o", ""],
        ["export", str(tmp_path / "run"), "a", "--out", "b"],
        ["export", str(tmp_path / "run")],
        ["import", str(recipe_file())],
    ):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 2
        assert len(done.stderr.splitlines()) == 1
        assert "out" in done.stderr.lower()


def test_index_reports_good_and_bad_shards(shards: Path, tmp_path: Path) -> None:
    good = write_tar(tmp_path / "good.tar", {"a.jpg": b"x", "a.cls": b"0"})
    cut = tmp_path / "cut.tar"
    cut.write_bytes(good.read_bytes()[:700])
    done = CliRunner().invoke(main, ["index", str(good), str(cut), str(shards)])
    assert done.exit_code == 2
    assert "61 images, 61 with labels, in 4 good shards of 5" in done.stdout
    assert done.stderr.startswith(f"{cut}: cut off")
    assert (tmp_path / "good.tar.index.npz").exists()


def test_a_short_name_means_the_pretraining_recipe(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["recipe", "copy", "vit_small", str(tmp_path / "mine.yaml")])
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'mine.yaml'}\n")
    assert done.stderr == "copied pretrain/vit_small; there is also finetune/vit_small\n"
    assert (tmp_path / "mine.yaml").read_bytes() == (ROOT / "recipes/pretrain/vit_small.yaml").read_bytes()
    other = CliRunner().invoke(main, ["recipe", "copy", "vit_base", str(tmp_path / "other.yaml")])
    assert (other.exit_code, other.stderr) == (0, "")


def test_settings_are_no_options() -> None:
    done = CliRunner().invoke(main, ["finetune", "vit_small", "--lr", "1e-3"])
    assert done.exit_code == 2
    assert (
        "No such option '--lr'. A setting of the recipe is written without dashes: optim.base_lr=VALUE." in done.stderr
    )


def test_pack_says_what_it_skipped(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded(drawn_image(0)))
    for i in range(12):
        (tmp_path / "in" / f"{i}.txt").touch()
    done = CliRunner().invoke(main, ["pack", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--workers", "1"])
    assert done.exit_code == 0
    assert "1 images, no labels, 1 shard in" in done.output
    assert "… 12 files skipped in all; see" in done.output


def test_show_and_schema(recipe_file: Callable[..., Path]) -> None:
    shown = CliRunner().invoke(main, ["recipe", "show", str(recipe_file()), "head=mlp"])
    assert "name: mlp" in shown.output
    assert json.loads(CliRunner().invoke(main, ["recipe", "schema", "finetune"]).output)["title"] == "FinetuneRecipe"


def test_reconstruct_draws_a_picture(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    from PIL import Image

    path = recipe_file(**{"optim.steps": 2})
    (tmp_path / "a.png").write_bytes(encoded(drawn_image(0, 50)))
    runner = CliRunner()
    assert runner.invoke(main, ["pretrain", str(path)]).exit_code == 0
    done = runner.invoke(
        main, ["reconstruct", str(tmp_path / "run"), str(tmp_path / "a.png"), "--out", str(tmp_path / "o" / "r.png")]
    )
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "o" / "r.png") as picture:
        assert picture.width > 4 * 150


def test_a_device_without_memory_left(recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one line that says what to do. Other errors of torch keep their traceback."""

    def fail(error: Exception) -> Any:
        def pretrain(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(mpp, "pretrain", pretrain)
        return CliRunner().invoke(main, ["pretrain", str(recipe_file())])

    done = fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words."))
    assert done.exit_code == 2
    assert done.stderr.startswith(
        "out of memory on the device: CUDA out of memory. Tried to allocate 2 GiB. Lower optim.max"
    )
    assert done.stderr.count("\n") == 1
    assert isinstance(fail(RuntimeError("shapes")).exception, RuntimeError)


def test_json_of_what_stands_and_is_known(shards: Path, tmp_path: Path) -> None:
    """With --json, commands print one object or list and nothing else on stdout."""
    from tests.runs.test_watch import LINES, run_of

    def said(*words: str) -> Any:
        done = CliRunner().invoke(main, [*words, "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    assert said("index", str(shards)) == {"images": 60, "labeled": 60, "shards": 3, "faults": [], "left_out": {}}
    (tmp_path / "cut.tar").write_bytes((shards / "shard-000000.tar").read_bytes()[:5000])
    bad = CliRunner().invoke(main, ["index", str(tmp_path / "cut.tar"), "--json"])
    assert bad.exit_code == 2
    assert [str(tmp_path / "cut.tar") in fault for fault in json.loads(bad.stdout)["faults"]] == [True]
    run = run_of(tmp_path / "run", metrics=LINES)
    (found,) = said("watch", str(run))
    assert (found["run"], found["state"], found["going_on"], found["step"], found["steps"]) == (
        str(run),
        "running",
        True,
        200,
        1000,
    )
    assert found["metrics"]["loss"] == 0.8
    assert 60 < found["seconds_left"] <= 80
    assert found["warnings"] == []
    assert CliRunner().invoke(main, ["watch", str(run), "--json", "--every", "1"]).exit_code == 2
    table = said("models")
    assert {"family", "timm models", "stem"} <= set(table[0])
    assert "vit_tiny_patch16_224" in said("models", "vit_tiny_*")
    probed = said("models", "vit_tiny_patch16_224")
    assert (probed["family"], probed["stride_px"], probed["leak"], probed["may_be_trained"]) == (
        "VisionTransformer",
        16,
        None,
        "yes",
    )
    assert said("models", "vgg11")["may_be_trained"] in ("yes", "yes, with a warning", "no")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--foo"], "mpp: No such option"),
        (["foo"], "mpp: No such command 'foo'. See mpp --help"),
        (["export", "a", "b", "--format", "onx"], "mpp export: Invalid value for '--format': 'onx' is not one of"),
        (
            ["pack", "a", "b", "--images-per-shard", "0"],
            "mpp pack: Invalid value for '--images-per-shard': 0 is not in",
        ),
        (["watch"], "mpp watch: Missing argument 'RUNS...'. See mpp watch --help"),
        (["recipe", "schema", "x"], "mpp recipe schema: Invalid value for"),
        (["import", str(ROOT / "LICENSE"), "new", "foo"], "command line: 'foo': write key=value, such as patch_size=8"),
        (
            ["recipe", "show", "pretrain/vit_small", "optm.steps=3"],
            "command line: optm: unknown key. Did you mean 'optim'?",
        ),
        (["recipe", "show", "pretrain/vit_small", "mask..ratio=3"], "command line: 'mask..ratio=3': write key=value"),
    ],
)
def test_slips_on_the_command_line_take_a_line(words: list[str], line: str) -> None:
    done = CliRunner().invoke(main, words, prog_name="mpp")
    assert done.exit_code == 2
    assert done.stderr.startswith(line)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["export", "{run}", "{full}"], "not empty; give a new folder"),
        (["export", "{run}", "{full}", "--format", "onnx"], "not empty; give a new folder"),
        (["export", "{full}", "{new}"], "neither a run nor an exported encoder"),
        (["predict", "{run}", "{new}"], "no such file or folder"),
        (["predict", "{full}", "{full}"], "neither a run nor an exported encoder"),
        (["report", "{full}"], "not a run folder"),
        (["verify", "{new}"], "no such file or folder"),
        (["import", "{new}", "{full}"], "no such file or folder"),
    ],
)
def test_what_is_refused_is_refused_before_torch_is_imported(words: list[str], line: str, tmp_path: Path) -> None:
    places = {"run": tmp_path / "run", "full": tmp_path / "full", "new": tmp_path / "new"}
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "run" / "encoder").mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / "encoder" / name).write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    given = [word.format(**places) for word in words]
    program = "import sys; from mpp.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert line in done.stderr
    assert done.stdout == "False\n"


def test_threads_fall_asleep_soon_unless_the_user_said_otherwise() -> None:
    """GNU's OpenMP reads the setting when torch is imported, so mpp leaves it alone after that."""
    said = "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"
    own = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for given, before, expected in (
        ({}, "", "1000 None"),
        ({"GOMP_SPINCOUNT": "7"}, "", "7 None"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "", "None ACTIVE"),
        ({}, "sys.modules['torch'] = None; ", "None None"),
    ):
        program = f"import os, sys; {before}import mpp; {said}"
        done = subprocess.run([sys.executable, "-c", program], env=own | given, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


def process(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mpp", *map(str, words)], stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_output_that_nobody_takes() -> None:
    with open("/dev/full", "w") as full:
        done = process("recipe", "list", stdout=full)
    assert (done.returncode, done.stderr) == (2, "a file, or the output: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    done = process("recipe", "list", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
def test_a_full_disk(image_folder: Path, shards: Path, tmp_path: Path) -> None:
    """A limit on file sizes has the effect of a full disk. Beyond it, the system's error names no file."""
    import resource

    def limited(most_bytes: int) -> Any:
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    state = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2
    ).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    model = [
        "--model",
        "vit_tiny_patch16_224.augreg_in21k",
        "--image-size",
        "16",
        "patch_size=4",
        "embed_dim=32",
        "depth=2",
        "num_heads=2",
    ]
    for name, words in {
        "shards": ["pack", image_folder, tmp_path / "shards"],
        "encoder": ["import", tmp_path / "weights.pth", tmp_path / "encoder", "--trust", *model],
    }.items():
        done = process(*words, stdout=subprocess.DEVNULL, preexec_fn=limited(20_000))
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "File too large" in done.stderr
        assert name in done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.suffix == ".tmp" or p.name.startswith(".export-")]
    assert process("pack", image_folder, tmp_path / "shards", stdout=subprocess.DEVNULL).returncode == 0, (
        "packing must succeed once there is space"
    )
