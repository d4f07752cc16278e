"""Commands that take an encoder: predict, export, upload, import, verify, inspect, models."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

import mpp
from mpp.cli.app import JSON, main, to_json
from mpp.errors import UserError, require_existing
from mpp.recipe.flat import JsonObject
from mpp.runs.records import check_new

if TYPE_CHECKING:
    from mpp.exchange.verify import Verified


def _clear_away_when_ended() -> None:
    """Exit on SIGTERM and SIGHUP as on Ctrl-C, so that a command removes its unfinished folder."""
    for asked in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(asked) is not signal.SIG_IGN:  # by nohup
            signal.signal(asked, lambda number, _: sys.exit(128 + number))


@main.command()
@click.argument("encoder")
@click.argument("images", nargs=-1, required=True)
@click.option("--top", default=1, show_default=True, type=click.IntRange(min=1), help="Classes named for each image.")
@click.option(
    "--views",
    default="1",
    show_default=True,
    type=click.Choice(["1", "2", "10"]),
    help="Crops of each image: 1 is the centre; 2 adds its mirror image; 10 adds the corners.",
)
@click.option("--out", default=None, metavar="FILE", help="Write the rows there, not to the terminal.")
@click.option(
    "--report",
    default=None,
    metavar="FOLDER",
    help="Write the confusion matrix and worst mistakes there (images must be in class folders); or masks, overlays.",
)
def predict(encoder: str, images: tuple[str, ...], top: int, views: str, out: str | None, report: str | None) -> None:
    """What a fine-tuned ENCODER says of IMAGES (files or folders), as CSV."""
    import csv

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files are bytes
    rows, unreadable, judged = mpp.predict(encoder, images, views=int(views), top=top, out=out, report=report)
    if out is None:
        writer = csv.writer(sys.stdout)
        if rows:
            writer.writerow(rows[0])
        writer.writerows([[f"{v:.4f}" if isinstance(v, float) else v for v in row.values()] for row in rows])
    for name, why in unreadable.items():
        click.echo(f"unreadable: {name}: {why}".encode("utf-8", "backslashreplace").decode(), err=True)
    if judged is not None:
        click.echo(f"accuracy {judged.accuracy:.2%} of {judged.counts.sum()} images; see {report}", err=True)


@main.command()
@click.argument("run")
@click.argument("out")
@click.option(
    "--format",
    "format",
    default="timm",
    show_default=True,
    type=click.Choice(["timm", "onnx", "safetensors", "torch_export", "transformers"]),
)
@JSON
def export(run: str, out: str, format: str, as_json: bool) -> None:
    """Write the encoder of RUN (a run, a fine-tuned cell, an export) to the new folder OUT, and verify it there."""
    require_existing(run)
    _clear_away_when_ended()
    _say_verified(mpp.export(run, out, format), as_json)


@main.command()
@click.argument("folder")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Where the repository is made now; private otherwise.")
def upload(folder: str, repository: str, public: bool) -> None:
    """Verify an exported FOLDER and send it to a Hugging Face hub (HF_ENDPOINT, HF_TOKEN)."""
    click.echo(mpp.upload(folder, repository, public=public))


@main.command("import")
@click.argument("file")
@click.argument("out")
@click.argument("args", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--model",
    default=None,
    help="Of timm's, perhaps with a tag (vit_small_patch16_224.dino), whose mean and std are taken then. Folders of "
    "transformers' and timm's say it themselves.",
)
@click.option("--image-size", "side_px", default=None, type=click.IntRange(min=1), help="In px; default: the model's.")
@click.option("--channels", default=None, type=click.IntRange(min=1), help="Default: 3, or as the folder says.")
@click.option(
    "--mean", default=None, metavar="R,G,B", help="Of pixels from 0 to 1, that the weights were trained with."
)
@click.option("--std", default=None, metavar="R,G,B", help="The same.")
@click.option("--prefix", default=None, help="Of the weights that are meant, where there are several encoders.")
@click.option("--partial", is_flag=True, help="Let some of the encoder's weights be missing; they stay random.")
@click.option("--trust", is_flag=True, help="Open a pickle, as tensors and plain containers alone.")
@JSON
def import_(
    file: str,
    out: str,
    args: tuple[str, ...],
    model: str | None,
    side_px: int | None,
    channels: int | None,
    mean: str | None,
    std: str | None,
    prefix: str | None,
    partial: bool,
    trust: bool,
    as_json: bool,
) -> None:
    """Weights from elsewhere in FILE -> the new folder OUT, a timm folder, verified there. All fit, or none.

    FILE may be a folder of transformers', or a file with weights named as by MAE, SimMIM, mmpretrain, transformers,
    lightly, torchvision or timm, perhaps nested and with a prefix. KEY=VALUE: arguments of the model (patch_size=8).
    """
    require_existing(file)
    check_new(Path(out))
    from mpp.recipe.overrides import apply_overrides, parse_overrides

    _clear_away_when_ended()
    values: JsonObject = {}
    apply_overrides(values, {}, parse_overrides(args, example="patch_size=8"))
    imported = mpp.import_weights(
        file,
        out,
        model=model,
        args=values,
        image_size=(side_px, side_px) if side_px else None,
        channels=channels,
        mean=_numbers(mean, "--mean"),
        std=_numbers(std, "--std"),
        prefix=prefix,
        partial=partial,
        trust=trust,
    )
    if as_json:
        return click.echo(to_json(imported))
    _say_verified(imported.verified)
    click.echo(imported)


def _numbers(text: str | None, key: str) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{key}: numbers with commas between them, such as 0.5,0.5,0.5; got '{text}'") from error


@main.command()
@click.argument("folder")
@JSON
def verify(folder: str, as_json: bool) -> None:
    """Load an exported FOLDER in a clean process, as its users do, and compare what it gives."""
    require_existing(folder)
    _say_verified(mpp.verify(folder), as_json)


def _say_verified(verified: Verified, as_json: bool = False) -> None:
    click.echo(
        to_json(verified)
        if as_json
        else f"{verified.folder}: verified: {verified.parameters} parameters load through {verified.through}; "
        f"features differ by {verified.difference:.1e}"
    )


@main.command()
@click.argument("encoder")
@click.argument("images", nargs=-1, required=True)
@click.option("--out", default=None, metavar="FOLDER", help="Default: RUN/inspect, or inspect/NAME.")
@click.option("--compare", default=None, metavar="ENCODER", help="Another encoder, for the similarity of layers.")
@click.option("--count", default=128, show_default=True, type=click.IntRange(min=4), help="Images that are measured.")
@click.option("--shown", default=4, show_default=True, type=click.IntRange(1, 16), help="Images that are drawn.")
@click.option("--random", is_flag=True, help="With random weights, as a control; --compare, too.")
def inspect(
    encoder: str, images: tuple[str, ...], out: str | None, compare: str | None, count: int, shown: int, random: bool
) -> None:
    """What ENCODER (a run, an export, a timm name) learned, seen through IMAGES: shards, files or folders."""
    inspection = mpp.inspect(encoder, images, out=out, compare=compare, images=count, shown=shown, random=random)
    click.echo(inspection.table())
    click.echo(f"{inspection.out}")


@main.command()
@click.argument("name", required=False, metavar="[NAME|PATTERN]")
@click.option("--check", is_flag=True, help="Run every contract test on NAME, whatever its family.")
@JSON
def models(name: str | None, check: bool, as_json: bool) -> None:
    """Encoders: the support table; or what a probe of timm's model NAME finds; or the names that fit a PATTERN."""
    from mpp.encoders import support

    if name is not None and (not name or (check and any(c in name for c in "*?["))):
        raise UserError(f"models: '{name}': give the name of one model of timm's")
    if name is None:
        if check:
            raise UserError("--check: of which model? mpp models --check NAME")
        rows = [dict(zip(support.COLUMNS, row, strict=True)) for row in support.support_rows()]
        click.echo(to_json(rows) if as_json else support.text())
        return
    from mpp.encoders.creation import timm_names
    from mpp.inspection import survey as known

    if check:
        if as_json:
            raise UserError("--json: not with --check, whose exit code says it all")
        text, held = known.check(name)
        click.echo(text)
        if not held:
            raise UserError(f"models: {name}: not every check holds")
    elif any(c in name for c in "*?["):
        names = timm_names(name, "models")
        click.echo(to_json(names) if as_json else "\n".join(names))
    else:
        probed = known.probe(name)
        click.echo(to_json(probed) if as_json else known.probe_text(probed))
