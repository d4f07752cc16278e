"""Commands that take an encoder: predict, export, upload, import, verify, inspect, models."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

import mpp
from mpp.cli.app import JSON, LOADING, OUT, RANK, ask_for_patience, encodable, main, one_out, progress_aside, to_json
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
@click.option(
    "--top", default=1, show_default=True, type=click.IntRange(min=1), help="Number of top classes to report."
)
@click.option(
    "--views",
    default="1",
    show_default=True,
    type=click.Choice(["1", "2", "10"]),
    help="Test-time crops to average: 1 centre, 2 adds a flip, 10 adds corners.",
)
@click.option("-o", "--out", default=None, metavar="FILE", help="Write the CSV to this file instead of the terminal.")
@click.option(
    "--report",
    default=None,
    metavar="FOLDER",
    help="Write a report to this folder: confusion matrix and worst mistakes (images must be in class folders), "
    "or masks and overlays.",
)
def predict(encoder: str, images: tuple[str, ...], top: int, views: str, out: str | None, report: str | None) -> None:
    """Predict with a fine-tuned model

    Run a fine-tuned model on IMAGES (files or folders) and write the predictions as CSV. ENCODER is a fine-tuned
    model, such as runs/classes/pretrained-seed0, or its export.

    \b
    mpp predict runs/classes/pretrained-seed0 photos --out predictions.csv
    mpp predict runs/classes/pretrained-seed0 labeled/val --report mistakes
    """
    import csv

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files are bytes
    ask_for_patience(LOADING)
    rows, unreadable, judged = mpp.predict(encoder, images, views=int(views), top=top, out=out, report=report)
    if out is None:
        writer = csv.writer(sys.stdout)
        if rows:
            writer.writerow(rows[0])
        writer.writerows([[f"{v:.4f}" if isinstance(v, float) else v for v in row.values()] for row in rows])
    for name, why in unreadable.items():
        click.echo(encodable(f"unreadable: {name}: {why}"), err=True)
    if judged is not None:
        click.echo(f"accuracy {judged.accuracy:.2%} of {judged.counts.sum()} images", err=True)
    written = ([f"{len(rows)} rows in {out}"] if out else []) + ([f"report in {report}"] if report else [])
    if written:
        click.echo(", ".join(written), err=True)


@main.command()
@click.argument("encoder")
@click.argument("images", nargs=-1, required=True)
@click.option(
    "-o",
    "--out",
    required=True,
    metavar="FILE",
    help="Output file: .npy (v.npy with the names in v.names.txt) or .parquet.",
)
@click.option(
    "--layer",
    default=None,
    type=click.IntRange(min=1),
    help="Block or stage to read. Default: the best one of RUN/evaluation, else the encoder's output.",
)
@click.option(
    "--pool",
    default=None,
    type=click.Choice(["mean", "token"]),
    help="Pooling at --layer: mean of the patches, or class token. Default: mean.",
)
@click.option(
    "--batch-size", default=256, show_default=True, type=click.IntRange(min=1), help="Images in memory at once."
)
@click.option("--workers", default=0, show_default=True, type=click.IntRange(min=0), help="Processes that read images.")
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "fp32", "tf32", "bf16"]),
    help="Number format of the encoder, as in a recipe.",
)
@JSON
def embed(
    encoder: str,
    images: tuple[str, ...],
    out: str,
    layer: int | None,
    pool: str | None,
    batch_size: int,
    workers: int,
    precision: str,
    as_json: bool,
) -> None:
    """Write a feature vector for each image

    Compute a feature vector for each image with a frozen encoder. ENCODER is a run, an export or a timm name. IMAGES
    are shards, files or folders. If interrupted, run the same command again to continue.

    \b
    mpp embed runs/photos photos --out vectors.parquet
    """
    ask_for_patience(LOADING)
    with progress_aside(as_json):
        found = mpp.embed(
            encoder, images, out, layer=layer, pool=pool, batch_size=batch_size, workers=workers, precision=precision
        )
    if RANK != "0":
        return
    for line in found.unreadable:
        click.echo(encodable(f"unreadable: {line}"), err=True)
    count, width = found.vectors.shape
    place = f"{found.place}" + (f", the best of {found.chosen_by}" if found.chosen_by else "")
    if as_json:
        numbers = {"out": out, "images": count, "width": width, "place": f"{found.place}"}
        return click.echo(to_json({**numbers, "chosen_by": found.chosen_by, "unreadable": found.unreadable}))
    click.echo(f"{count:,} vectors of {width} numbers in {out} ({place})")


@main.command()
@click.argument("run")
@click.argument("out", required=False, default=None)
@OUT
@click.option(
    "--format",
    "format",
    default="timm",
    show_default=True,
    type=click.Choice(["timm", "onnx", "safetensors", "torch_export", "transformers"]),
    help="Output format.",
)
@JSON
def export(run: str, out: str | None, out_option: str | None, format: str, as_json: bool) -> None:
    """Export an encoder (timm, ONNX, …)

    Export the encoder of RUN to the new folder OUT and verify it in a fresh process. RUN is a pretraining run, a
    fine-tuned model, such as runs/classes/pretrained-seed0, or an export.

    \b
    mpp export runs/photos encoders/photos
    mpp export runs/photos encoders/photos-onnx --format onnx
    """
    require_existing(run)
    _clear_away_when_ended()
    folder = one_out(out, out_option)
    ask_for_patience("exporting, and loading the export in a fresh process")
    verified = mpp.export(run, folder, format)
    _say_verified(verified, as_json)
    if not as_json and format == "timm":
        click.echo(f'use it: timm.create_model("local-dir:{folder}", pretrained=True)')


@main.command()
@click.argument("folder")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Make a newly created repository public. Default: private.")
def upload(folder: str, repository: str, public: bool) -> None:
    """Upload to the Hugging Face Hub

    Verify the exported FOLDER and upload it. Reads HF_TOKEN and HF_ENDPOINT.
    """
    click.echo(mpp.upload(folder, repository, public=public))


@main.command("import")
@click.argument("file")
@click.argument("out", required=False, default=None)
@click.argument("args", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--model",
    default=None,
    metavar="NAME",
    help="timm name, for example vit_small_patch16_224, or with a tag (.dino), which gives mean and std. Not needed "
    "for transformers and timm folders.",
)
@click.option(
    "--image-size",
    "side_px",
    default=None,
    type=click.IntRange(min=1),
    help="Side of the images in pixels. Default: the model's.",
)
@click.option(
    "--channels",
    default=None,
    type=click.IntRange(min=1),
    help="Channels of the images. Default: the folder's, else 3.",
)
@click.option(
    "--mean",
    default=None,
    metavar="R,G,B",
    help="Mean used in training, for pixels in [0, 1]. Default: that of the folder or timm name.",
)
@click.option(
    "--std",
    default=None,
    metavar="R,G,B",
    help="Standard deviation used in training, for pixels in [0, 1]. Default: as --mean.",
)
@click.option(
    "--prefix", default=None, help="Name prefix of the encoder's weights, if the file holds several encoders."
)
@click.option("--partial", is_flag=True, help="Allow missing weights, which stay random.")
@OUT
@click.option("--trust", is_flag=True, help="Allow pickle files (only tensors and plain containers are read).")
@JSON
def import_(
    file: str,
    out: str | None,
    out_option: str | None,
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
    """Import weights from other projects

    Convert the weights in FILE to the new encoder folder OUT. Fails if a weight is missing; see --partial. FILE holds
    weights of MAE, SimMIM, mmpretrain, transformers, lightly, torchvision or timm, or is a transformers or timm folder.
    KEY=VALUE are arguments of the model, such as patch_size=8.

    \b
    mpp import mae.pth encoders/mae --model vit_base_patch16_224.mae --trust
    """
    require_existing(file)
    if out is not None and "=" in out and out_option is not None:  # an argument of the model, in the place of OUT
        args, out = (out, *args), None
    folder = one_out(out, out_option)
    check_new(Path(folder))
    from mpp.recipe.overrides import apply_overrides, parse_overrides

    _clear_away_when_ended()
    values: JsonObject = {}
    apply_overrides(values, {}, parse_overrides(args, example="patch_size=8"))
    imported = mpp.import_weights(
        file,
        folder,
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
    """Verify an exported encoder

    Load the export in FOLDER in a fresh process and compare its output with the original.
    """
    require_existing(folder)
    ask_for_patience("loading the export in a fresh process")
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
@click.option(
    "-o", "--out", default=None, metavar="FOLDER", help="Output folder. Default: RUN/inspect, or inspect/NAME."
)
@click.option("--compare", default=None, metavar="ENCODER", help="Another encoder to compare layers with.")
@click.option(
    "--count", default=128, show_default=True, type=click.IntRange(min=4), help="Number of images to measure."
)
@click.option("--shown", default=4, show_default=True, type=click.IntRange(1, 16), help="Number of images to draw.")
@click.option("--random", is_flag=True, help="Use random weights as a control (also for --compare).")
def inspect(
    encoder: str, images: tuple[str, ...], out: str | None, compare: str | None, count: int, shown: int, random: bool
) -> None:
    """Plot attention, CKA, PCA features

    Plot what an encoder has learned: attention, similarity of layers (CKA), PCA of features, and more. ENCODER is a
    run, an export or a timm name. IMAGES are shards, files or folders.

    \b
    mpp inspect runs/photos photos
    """
    ask_for_patience(LOADING)
    inspection = mpp.inspect(encoder, images, out=out, compare=compare, images=count, shown=shown, random=random)
    click.echo(inspection.table())
    click.echo(f"{inspection.out}")


@main.command()
@click.argument("name", required=False, metavar="[NAME|PATTERN]")
@click.option("--check", is_flag=True, help="Run every contract test on the model NAME.")
@JSON
def models(name: str | None, check: bool, as_json: bool) -> None:
    """List and check supported encoders

    Without a word, list the supported families. With a PATTERN, list the timm names that match it. With a NAME, try
    that timm model and show which ways of masking it supports.

    \b
    mpp models
    mpp models 'vit_*'
    mpp models resnet18 --check
    """
    from mpp.encoders import support

    if name is not None and (not name or (check and any(c in name for c in "*?["))):
        raise UserError(f"models: '{name}': expected the name of one timm model")
    if name is None:
        if check:
            raise UserError("--check: requires a name: mpp models NAME --check")
        rows = [dict(zip(support.COLUMNS, row, strict=True)) for row in support.support_rows()]
        click.echo(to_json(rows) if as_json else support.text())
        return
    ask_for_patience(LOADING)
    from mpp.encoders.creation import timm_names
    from mpp.inspection import survey as known

    if check:
        if as_json:
            raise UserError("--json cannot be combined with --check; use the exit code")
        text, held = known.check(name)
        click.echo(text)
        if not held:
            raise UserError(f"models: {name}: some checks failed")
    elif any(c in name for c in "*?["):
        names = timm_names(name, "models")
        click.echo(to_json(names) if as_json else "\n".join(names))
    else:
        probed = known.probe(name)
        click.echo(to_json(probed) if as_json else known.probe_text(probed))
