"""Commands that run a recipe: pretrain, plan, finetune, evaluate."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import TYPE_CHECKING

import click

import mpp
from mpp.cli.app import JSON, RANK, leave_process_group, main, to_json
from mpp.errors import UserError

if TYPE_CHECKING:
    from mpp.finetuning.run import FinetuneResult
    from mpp.pretraining.loop import PretrainResult


def _exit_as_stopped(result: PretrainResult | FinetuneResult) -> None:
    """Exit as the signal that stopped a run would end a program, so that `&&` and `make` stop as well."""
    if result.state == "stopped":
        sys.stdout.flush()
        leave_process_group()
        sys.exit(128 + signal.Signals[str(result.signal)])


def _progress_aside(as_json: bool) -> contextlib.AbstractContextManager[object]:
    """What a job says while it goes on belongs elsewhere than what a script reads."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


_RESUME = click.option(
    "--resume", default="never", show_default=True, metavar="auto|never|PATH", help="Go on from a checkpoint."
)
SCALE = click.option("--scale", default=None, metavar="NAME", help="Apply one of the recipe's `scales`, such as tiny.")


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@_RESUME
@SCALE
@JSON
def pretrain(recipe: str, overrides: tuple[str, ...], resume: str, scale: str | None, as_json: bool) -> None:
    """Pretrain an encoder on unlabeled shards, as RECIPE says; KEY=VALUE changes it (optim.epochs=10)."""
    from mpp.recipe.overrides import parse_overrides

    with _progress_aside(as_json):
        result = mpp.pretrain(recipe, resume=resume, scale=scale, **parse_overrides(overrides))
    if RANK == "0" and as_json:
        click.echo(to_json(result))
    elif RANK == "0" and result.state == "finished":
        click.echo(f"skill {result.skill:.3f}, loss {result.loss:.4f} after {result.step} steps: {result.encoder}")
    _exit_as_stopped(result)


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@SCALE
@click.option("--devices", default=1, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--device", default="a100", show_default=True, help="a100, h100, h200, l40s, a10, rtx4090, or cpu: this one."
)
@click.option(
    "--mfu",
    default=None,
    type=float,
    help="Part of the devices' peak that the run reaches; default: 0.3; on a CPU, what its timed steps reach.",
)
@click.option(
    "--images", default=None, type=click.IntRange(min=1), help="How many there are; default: data are opened."
)
@JSON
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    scale: str | None,
    devices: int,
    device: str,
    mfu: float | None,
    images: int | None,
    as_json: bool,
) -> None:
    """What pretraining as RECIPE says will take: parameters, FLOP, memory of a device, time, disk. Keeps nothing."""
    from mpp.recipe.overrides import parse_overrides

    given = parse_overrides(overrides)
    if images is not None:
        given = {"data.shards": "not opened"} | given
    estimate = mpp.plan(recipe, devices=devices, device=device, mfu=mfu, images=images, scale=scale, **given)
    click.echo(to_json(estimate.as_dict()) if as_json else estimate.text())


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@_RESUME
@SCALE
@JSON
def finetune(recipe: str, overrides: tuple[str, ...], resume: str, scale: str | None, as_json: bool) -> None:
    """Fine-tune on labeled images, beside other roads. encoder=RUN|FOLDER|TIMM_NAME|scratch"""
    from mpp.recipe.overrides import parse_overrides

    with _progress_aside(as_json):
        result = mpp.finetune(recipe, resume=resume, scale=scale, **parse_overrides(overrides))
    if RANK == "0" and as_json:
        click.echo(to_json(result))
    elif RANK == "0" and result.state == "finished":
        click.echo(result.table())
        click.echo(f"{result.encoder}")
    _exit_as_stopped(result)


@main.command()
@click.argument("encoder")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--recipe", default=None, metavar="FILE", help="Keys from a file, under those given here.")
@_RESUME
@SCALE
@JSON
def evaluate(
    encoder: str, overrides: tuple[str, ...], recipe: str | None, resume: str, scale: str | None, as_json: bool
) -> None:
    """Probe the frozen features of ENCODER (a run, an export or a timm name): data.train=… data.val=…"""
    from mpp.recipe.overrides import parse_overrides

    given = parse_overrides(overrides)
    if "encoder" in given:
        raise UserError("command line: encoder: is the first word, mpp evaluate ENCODER …; give another as compare=")
    with _progress_aside(as_json):
        result = mpp.evaluate(encoder, recipe=recipe, resume=resume, scale=scale, **given)
    if as_json:
        return click.echo(to_json(result))
    click.echo(result.table())
    click.echo(f"{result.plot}")
