"""Commands that run a recipe: pretrain, plan, finetune, evaluate."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

import mpp
from mpp.cli.app import JSON, LOADING, RANK, ask_for_patience, leave_process_group, main, progress_aside, to_json
from mpp.errors import UserError

if TYPE_CHECKING:
    from mpp.finetuning.run import FinetuneResult
    from mpp.pretraining.loop import PretrainResult
    from mpp.recipe.sections import Run


def _exit_as_stopped(result: PretrainResult | FinetuneResult) -> None:
    """Exit as the signal that stopped a run would end a program, so that `&&` and `make` stop as well."""
    if result.state == "stopped":
        sys.stdout.flush()
        leave_process_group()
        sys.exit(128 + signal.Signals[str(result.signal)])


def _how_to_begin(resume: str, overwrite: bool) -> str:
    """Return the value of `resume` for the options --resume and --overwrite."""
    if overwrite and resume != "never":
        raise UserError("--overwrite cannot be combined with --resume")
    if resume == "overwrite":
        raise UserError("--resume overwrite: write --overwrite instead")
    return "overwrite" if overwrite else resume


def _start_processes(recipe: Run) -> None:
    """Run this command in as many processes as the recipe's `devices`, and exit as they do.

    Nothing happens if that is one, or if a launcher has started this process.
    """
    if recipe.devices == 1:
        return
    from mpp.parallel.launch import is_launched
    from mpp.parallel.processes import launch, stop_with_launcher
    from mpp.runs.records import read_status

    if is_launched(os.environ):
        return stop_with_launcher()
    code = launch(sys.argv[1:], processes=recipe.devices, device=recipe.device)
    if code > 128:  # after a signal, the run may still have failed to save, or have reached its end
        code = {"failed": 2, "finished": 0}.get(read_status(Path(recipe.out)), code)
    sys.exit(code)


def _with_out(pairs: tuple[str, ...], out: str | None) -> dict[str, object]:
    """Return the overrides of a command, with the run folder of --out among them."""
    from mpp.recipe.overrides import parse_overrides

    given: dict[str, object] = {**parse_overrides(pairs)}
    if out is not None:
        if not out:
            raise UserError("--out: is empty; give a folder")
        if "out" in given:
            raise UserError(f"command line: out: given twice: {given['out']}, {out}")
        given["out"] = Path(out)
    return given


def _summarise(result: PretrainResult, recipe: str, elapsed_s: float) -> str:
    """Return what a finished pretraining run leaves and what can be done next."""
    from mpp.recipe.loading import bundled
    from mpp.runs.log import format_duration
    from mpp.runs.pictures import FOLDER

    name, pictures = Path(recipe).stem, result.out / FOLDER
    to_finetune = name if f"finetune/{name}" in bundled() else "RECIPE"
    lines = [
        f"Finished in {format_duration(elapsed_s)}: {result.step:,} steps, loss {result.loss:.4g}, "
        f"skill {result.skill:.3f}",
        f"  encoder   {result.encoder}",
        f"  pictures  {pictures}" if pictures.is_dir() else "",
        "Next:",
        f"  mpp finetune {to_finetune} encoder={result.out} data.train=FOLDER data.val=FOLDER",
        f"  mpp report {result.out}",
    ]
    return "\n".join(line for line in lines if line)


def _summarise_finetune(result: FinetuneResult, elapsed_s: float) -> str:
    """Return the table of a finished fine-tune, where its models are and what can be done next."""
    from mpp.runs.log import format_duration

    first = result.encoder.parent if result.encoder else result.out
    lines = [
        result.table(),
        f"Finished in {format_duration(elapsed_s)}",
        f"  models    {result.out}/*/encoder",
        f"  plot      {result.plot}" if result.plot else "",
        "Next:",
        f"  mpp predict {first} IMAGES",
        f"  mpp export {first} FOLDER",
        f"  mpp report {result.out}",
    ]
    return "\n".join(line for line in lines if line)


_RESUME = click.option(
    "--resume",
    default="never",
    show_default=True,
    metavar="auto|never|PATH",
    help="Continue a run: auto = newest checkpoint, or start new.",
)
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Delete the run in the run folder first.")
PRESET = click.option(
    "--preset",
    "--scale",
    "preset",
    default=None,
    metavar="NAME",
    help="Apply a preset of the recipe: tiny = smoke test.",
)
_OUT = click.option("-o", "--out", default=None, metavar="FOLDER", help="Run folder (the same as out=FOLDER).")


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@_OUT
@PRESET
@_RESUME
@_OVERWRITE
@JSON
def pretrain(
    recipe: str,
    overrides: tuple[str, ...],
    out: str | None,
    preset: str | None,
    resume: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Pretrain an encoder on unlabeled images

    Pretrain an encoder on unlabeled images. RECIPE is a file or a name from `mpp recipe list`. KEY=VALUE changes
    a setting of the recipe; `mpp recipe keys pretrain` lists them.

    \b
    mpp pretrain vit_small data.shards=photos out=runs/photos
    mpp pretrain vit_small data.shards=photos out=runs/try --preset tiny
    """
    from mpp.recipe.loading import checked
    from mpp.recipe.pretrain import PretrainRecipe

    began_s = time.monotonic()
    begin = _how_to_begin(resume, overwrite)
    recipe_to_run = checked(recipe, PretrainRecipe, _with_out(overrides, out), preset)
    ask_for_patience(LOADING)
    _start_processes(recipe_to_run)
    with progress_aside(as_json):
        result = mpp.pretrain(recipe_to_run, resume=begin)
    if RANK == "0" and as_json:
        click.echo(to_json(result))
    elif RANK == "0" and result.state == "finished":
        click.echo(_summarise(result, recipe, time.monotonic() - began_s))
    _exit_as_stopped(result)


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@PRESET
@click.option(
    "--devices", default=None, type=click.IntRange(min=1), help="Number of devices. Default: the recipe's, or 1."
)
@click.option(
    "--device",
    default=None,
    help="GPU to estimate for: a100, h100, h200, l40s, a10, rtx4090; cpu measures this machine. Default: this machine.",
)
@click.option(
    "--mfu",
    default=None,
    type=float,
    help="Assumed fraction of peak FLOP/s.  [default: 0.3; CPU: measured]",
)
@click.option(
    "--images", default=None, type=click.IntRange(min=1), help="Number of training images. Default: count them."
)
@JSON
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    preset: str | None,
    devices: int | None,
    device: str | None,
    mfu: float | None,
    images: int | None,
    as_json: bool,
) -> None:
    """Estimate memory, time and disk space

    Estimate the memory, time and disk space of a pretraining run without training.

    \b
    mpp plan vit_small data.shards=photos --device h100 --devices 8
    mpp plan small_images data.shards=photos
    """
    from mpp.recipe.overrides import parse_overrides

    given = parse_overrides(overrides)
    for key in ("devices", "device"):
        if key in given:
            raise UserError(f"command line: {key}: here it is an option, --{key} {given[key]}")
    if images is not None:
        given = {"data.shards": "not opened"} | given
    ask_for_patience(LOADING)
    estimate = mpp.plan(recipe, devices=devices, device=device, mfu=mfu, images=images, preset=preset, **given)
    click.echo(to_json(estimate.as_dict()) if as_json else estimate.text())


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@_OUT
@PRESET
@_RESUME
@_OVERWRITE
@JSON
def finetune(
    recipe: str,
    overrides: tuple[str, ...],
    out: str | None,
    preset: str | None,
    resume: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Fine-tune on labels, vs. from scratch

    Fine-tune an encoder on labeled images and compare it with training from scratch. RECIPE is a file or a name
    from `mpp recipe list`. KEY=VALUE changes a setting of the recipe; `mpp recipe keys finetune` lists them.

    encoder= takes the folder of a pretraining run or an export, a timm name, or scratch.

    \b
    mpp finetune vit_small encoder=runs/photos data.train=labeled/train data.val=labeled/val
    """
    from mpp.recipe.finetune import FinetuneRecipe
    from mpp.recipe.loading import checked

    began_s = time.monotonic()
    begin = _how_to_begin(resume, overwrite)
    recipe_to_run = checked(recipe, FinetuneRecipe, _with_out(overrides, out), preset)
    ask_for_patience(LOADING)
    _start_processes(recipe_to_run)
    with progress_aside(as_json):
        result = mpp.finetune(recipe_to_run, resume=begin)
    if RANK == "0" and as_json:
        click.echo(to_json(result))
    elif RANK == "0" and result.state == "finished":
        click.echo(_summarise_finetune(result, time.monotonic() - began_s))
    _exit_as_stopped(result)


@main.command()
@click.argument("encoder")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--recipe", default=None, metavar="FILE", help="Read settings from a YAML file; KEY=VALUE overrides it.")
@_OUT
@PRESET
@_RESUME
@_OVERWRITE
@JSON
def evaluate(
    encoder: str,
    overrides: tuple[str, ...],
    recipe: str | None,
    out: str | None,
    preset: str | None,
    resume: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Probe frozen features (kNN, linear)

    Evaluate frozen features with kNN, linear and attentive probes. ENCODER is the folder of a run or an export, or a
    timm name. Needs data.train= and data.val=; `mpp recipe keys evaluate` lists all settings.

    \b
    mpp evaluate runs/photos data.train=labeled/train data.val=labeled/val
    """
    given = _with_out(overrides, out)
    begin = _how_to_begin(resume, overwrite)
    if "encoder" in given:
        raise UserError("command line: encoder: is the first word, mpp evaluate ENCODER …; give another as compare=")
    ask_for_patience(LOADING)
    with progress_aside(as_json):
        result = mpp.evaluate(encoder, recipe=recipe, resume=begin, preset=preset, **given)
    if as_json:
        return click.echo(to_json(result))
    click.echo(result.table())
    click.echo(f"{result.plot}")
