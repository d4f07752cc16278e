"""The commands: arguments in, one function called, its result printed. No logic, and no torch before it is needed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click

import mpp
from mpp.errors import MppWarning, ToldElsewhere, UserError, printable, there, without_secrets
from mpp.records import check_new
from mpp.streams import keep_output_open

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a lost connection it prints pages; we say who is gone
RANK = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") not in ("", "1") else "0"
LESS_MEMORY = (
    "Allowed: a smaller optim.max_batch_per_device; in pretraining encoder.grad_checkpointing=true and fsdp=true, too. "
    "`mpp plan` says what fits"
)


OF_THE_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Of errors that name no file: a write says no more."""
TRAINING = ("pretrain", "finetune")


def _say_usage(error: click.UsageError) -> NoReturn:
    """In a line; click would take four."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        raise error
    command = error.ctx.command_path if error.ctx else "mpp"
    click.echo(f"{command}: {error.format_message()} See {command} --help", err=True)
    sys.exit(2)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe that was closed at its other end."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


def _no_more_output() -> None:
    """What is buffered for a stdout that takes nothing is dropped; Python would try again, and complain, at the end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _clear_away_when_ended() -> None:
    """A command that fills a folder beside the new one takes it away when it is asked to end, as on Ctrl-C."""
    for asked in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(asked) is not signal.SIG_IGN:  # by nohup
            signal.signal(asked, lambda number, _: sys.exit(128 + number))


def _show_warning(message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    """Ours are for the user, one line; other people's keep their place in the code."""
    message = printable(without_secrets(str(message)))
    text = f"warning: {message}" if issubclass(category, MppWarning) else f"{filename}:{lineno}: {message}"
    click.echo(text, err=True)


def _part() -> None:
    """Leave the process group in good order: a process that just ends may abort on a thread that still waits for it."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


class Commands(click.Group):
    """A user's error is one line for each thing that is wrong, and exit code 2; never a traceback."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)
        except click.UsageError as error:
            _say_usage(error)

    def invoke(self, ctx: click.Context) -> Any:
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        keep_output_open()
        try:
            result = super().invoke(ctx)
            _part()
            return result
        except ToldElsewhere:
            sys.exit(2)
        except UserError as error:
            who = "" if RANK == "0" else f"process {RANK}: "
            for line in str(error).splitlines():
                click.echo(who + line, err=True)
            sys.exit(2)
        except click.UsageError as error:
            _say_usage(error)
        except BrokenPipeError:
            if not _nobody_reads():
                raise
            _no_more_output()
            if ctx.invoked_subcommand in TRAINING:
                click.echo("nobody reads the output any more; go on with --resume auto", err=True)
            sys.exit(128 + signal.SIGPIPE)  # as a program that the signal itself ends
        except OSError as error:
            if error.filename is None and error.errno not in OF_THE_STORAGE:  # not about the user's files
                raise
            where = "a file, or the output" if error.filename is None else os.fsdecode(error.filename)
            if error.filename is None:
                _no_more_output()
            click.echo(f"{where}: {error.strerror}", err=True)
            sys.exit(2)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
                raise
            click.echo(f"out of memory on the device: {str(error).splitlines()[0]} {LESS_MEMORY}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("mpp: interrupted", err=True)
            sys.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mpp.__version__)
def main() -> None:
    """Masked-patch pretraining on unlabeled images, fine-tuning on labeled ones, export of the encoder."""


def _exit_as_stopped(result: Any) -> None:
    """Exit as the signal that stopped a run would end a program, so that `&&` and `make` stop as well."""
    if result.state == "stopped":
        sys.stdout.flush()
        _part()
        sys.exit(128 + signal.Signals[result.signal])


def _json(value: Any) -> str:
    """One object, in which numbers that are none are null."""
    import dataclasses
    import json
    import math

    def plain(item: Any) -> Any:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return {field.name: plain(getattr(item, field.name)) for field in dataclasses.fields(item)}
        if isinstance(item, dict):
            return {str(key): plain(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple | set):
            return [plain(inner) for inner in item]
        if isinstance(item, float) and not math.isfinite(item):
            return None
        return item if isinstance(item, str | int | float | bool | None) else str(item)

    return json.dumps(plain(value), indent=1)


def _progress_aside(as_json: bool) -> Any:
    """What a job says while it goes on belongs elsewhere than what a script reads."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


_JSON = click.option(
    "--json", "as_json", is_flag=True, help="For scripts: the result as JSON; what is said meanwhile goes to stderr."
)


def _check_extension(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """As a recipe's `data.image_extension` is checked."""
    from mpp.data.walk import checked_extension

    try:
        return None if value is None else checked_extension(value)
    except ValueError as error:
        raise UserError(f"--image-extension: '{value}': {error}") from error


_EXTENSION = click.option(
    "--image-extension",
    default=None,
    metavar="EXT",
    callback=_check_extension,
    help="Ending of the image to read of each sample, such as rgb.png; default: see docs/inputs.md.",
)


@main.command()
@click.argument("source")
@click.argument("out")
@click.option("--images-per-shard", default=1000, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--labels/--no-labels",
    default=None,
    help="Class folders become labels; default: if every image is in one.",
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**56 - 1), help="Of the order of the images."
)
@click.option("--workers", default=os.cpu_count() or 1, show_default=True, type=click.IntRange(min=1))
@click.option("--part", default="1/1", show_default=True, metavar="I/N", help="The I-th of N such calls into one OUT.")
@_EXTENSION
@_JSON
def pack(
    source: str,
    out: str,
    images_per_shard: int,
    labels: bool | None,
    seed: int,
    workers: int,
    part: str,
    image_extension: str | None,
    as_json: bool,
) -> None:
    """Images of SOURCE -> shards with their indexes in OUT. Interrupted, the same call goes on.

    SOURCE: a folder of images, a CSV file (image, label), Parquet files or a folder of them, tar shards to pack anew.
    """
    from tqdm import tqdm

    from mpp.data import pack as packing

    share = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", part)
    if share is None:
        raise UserError(f"--part: '{part}': the first of three is 1/3, the last 3/3")
    with tqdm(unit="shard", disable=not sys.stderr.isatty()) as bar:

        def on_shard(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        packed = packing.pack(
            source,
            out,
            images_per_shard=images_per_shard,
            labels=labels,
            seed=seed,
            workers=workers,
            part=(int(share[1]), int(share[2])),
            image_extension=image_extension,
            on_shard=on_shard,
        )
    if as_json:
        return click.echo(_json(packed))
    named = f"{len(packed.classes)} classes" if packed.classes else "with labels, numbers without names"
    kind = f"{named} (pretraining passes over them; --no-labels leaves them out)" if packed.labeled else "no labels"
    click.echo(f"{packed.images} images, {kind}, {packed.shards} shards in {out} ({packed.shards_written} written now)")
    if packed.shards_missing:
        click.echo(f"{packed.shards_missing} shards are not here yet; the part that comes last finishes")
    for path, why in packed.skipped[:10]:
        click.echo(f"skipped: {path}: {why}".encode("utf-8", "backslashreplace").decode())
    if len(packed.skipped) > 10:
        click.echo(f"… {len(packed.skipped)} files skipped in all; see {os.path.join(out, packing.SKIPPED)}")


@main.command()
@click.argument("shards", nargs=-1, required=True)
@click.option("--cache-dir", default=None, help="For remote shards, and where the shards' folder cannot be written.")
@_EXTENSION
@_JSON
def index(shards: tuple[str, ...], cache_dir: str | None, image_extension: str | None, as_json: bool) -> None:
    """Check tar shards made elsewhere and write their indexes: folders, files, patterns or URLs."""
    from mpp.data.index import expand
    from mpp.data.listing import write_listing
    from mpp.data.remote import is_remote
    from mpp.data.store import Store
    from mpp.data.walk import LeftOut

    store, faults, left_out = Store(cache_dir, image_extension=image_extension), list[str](), LeftOut()
    good = dict[str, dict[str, Any]]()  # indexes by folder and name
    images = labeled = 0
    names = expand(shards, "SHARDS")
    for name in names:
        try:
            local = str(store.fetch(name)) if is_remote(name) else name
            found = store.index_local(local, fresh=True)
            table = found.table
        except UserError as error:
            faults.append(str(error))
            continue
        if not is_remote(name):
            good.setdefault(os.path.dirname(name), {})[os.path.basename(name)] = found
        left_out.add_all(found.left_out, f"{without_secrets(name)}: ")
        images, labeled = images + len(table), labeled + int((table[:, 3] >= 0).sum())
        if len(table) == 0:
            click.echo(f"warning: {name}: no images in it", err=True)
    if image_extension is None:  # a listing is of the indexes that everybody reads
        for folder, indexes in good.items():
            write_listing(folder or ".", indexes)
    known = {"images": images, "labeled": labeled, "shards": len(names), "faults": faults, "left_out": left_out.found}
    said = f"{images} images, {labeled} with labels, in {len(names) - len(faults)} good shards of {len(names)}"
    click.echo(_json(known) if as_json else said)
    if left_out and not as_json:
        click.echo(left_out)
    if faults:
        raise UserError("\n".join(faults))


_RESUME = click.option(
    "--resume", default="never", show_default=True, metavar="auto|never|PATH", help="Go on from a checkpoint."
)
_SCALE = click.option("--scale", default=None, metavar="NAME", help="Apply one of the recipe's `scales`, such as tiny.")


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@_RESUME
@_SCALE
@_JSON
def pretrain(recipe: str, overrides: tuple[str, ...], resume: str, scale: str | None, as_json: bool) -> None:
    """Pretrain an encoder on unlabeled shards, as RECIPE says; KEY=VALUE changes it (optim.epochs=10)."""
    from mpp.recipe import parse_overrides

    with _progress_aside(as_json):
        result = mpp.pretrain(recipe, resume=resume, scale=scale, **parse_overrides(overrides))
    if RANK == "0" and as_json:
        click.echo(_json(result))
    elif RANK == "0" and result.state == "finished":
        click.echo(f"skill {result.skill:.3f}, loss {result.loss:.4f} after {result.step} steps: {result.encoder}")
    _exit_as_stopped(result)


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@_SCALE
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
@_JSON
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
    from mpp.recipe import parse_overrides

    given: Any = parse_overrides(overrides)
    if images is not None:
        given = {"data.shards": "not opened"} | given
    found = mpp.plan(recipe, devices=devices, device=device, mfu=mfu, images=images, scale=scale, **given)
    click.echo(_json(found.as_dict()) if as_json else found.text())


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@_RESUME
@_SCALE
@_JSON
def finetune(recipe: str, overrides: tuple[str, ...], resume: str, scale: str | None, as_json: bool) -> None:
    """Fine-tune on labeled images, beside the same from scratch. encoder=RUN|FOLDER|TIMM_NAME|scratch"""
    from mpp.recipe import parse_overrides

    with _progress_aside(as_json):
        result = mpp.finetune(recipe, resume=resume, scale=scale, **parse_overrides(overrides))
    if RANK == "0" and as_json:
        click.echo(_json(result))
    elif RANK == "0" and result.state == "finished":
        click.echo(result.table())
        click.echo(f"{result.encoder}")
    _exit_as_stopped(result)


@main.command()
@click.argument("encoder")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--recipe", default=None, metavar="FILE", help="Keys from a file, under those given here.")
@_RESUME
@_SCALE
@_JSON
def evaluate(
    encoder: str, overrides: tuple[str, ...], recipe: str | None, resume: str, scale: str | None, as_json: bool
) -> None:
    """Probe the frozen features of ENCODER (a run, an export or a timm name): data.train=… data.val=…"""
    from mpp.recipe import parse_overrides

    given = parse_overrides(overrides)
    if "encoder" in given:
        raise UserError("command line: encoder: is the first word, mpp evaluate ENCODER …; give another as compare=")
    with _progress_aside(as_json):
        result = mpp.evaluate(encoder, recipe=recipe, resume=resume, scale=scale, **given)
    if as_json:
        return click.echo(_json(result))
    click.echo(result.table())
    click.echo(f"{result.plot}")


@main.command()
@click.argument("encoder")
@click.argument("images", nargs=-1, required=True)
@click.option("--top", default=1, show_default=True, type=click.IntRange(min=1), help="Classes named for each image.")
@click.option(
    "--views",
    default="1",
    show_default=True,
    type=click.Choice(["1", "2", "10"]),
    help="1: the central crop; 2: and mirrored; 10: the corners, too.",
)
@click.option("--out", default=None, metavar="FILE", help="Write the rows there, not to the terminal.")
@click.option(
    "--report",
    default=None,
    metavar="FOLDER",
    help="Images lie in class folders: write confusion matrix and worst mistakes there. Of places: masks and overlays.",
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
@_JSON
def export(run: str, out: str, format: str, as_json: bool) -> None:
    """Write the encoder of RUN (a run, a fine-tuned cell, an export) to the new folder OUT, and verify it there."""
    there(run)
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
@_JSON
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
    there(file)
    check_new(Path(out))
    from mpp.recipe import apply_overrides, parse_overrides

    _clear_away_when_ended()
    values: dict[str, Any] = {}
    apply_overrides(values, {}, parse_overrides(args, example="patch_size=8"))
    found = mpp.import_weights(
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
        return click.echo(_json(found))
    _say_verified(found.verified)
    click.echo(found)


def _numbers(text: str | None, key: str) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{key}: numbers with commas between them, such as 0.5,0.5,0.5; got '{text}'") from error


@main.command()
@click.argument("folder")
@_JSON
def verify(folder: str, as_json: bool) -> None:
    """Load an exported FOLDER in a clean process, as its users do, and compare what it gives."""
    there(folder)
    _say_verified(mpp.verify(folder), as_json)


def _say_verified(verified: Any, as_json: bool = False) -> None:
    click.echo(
        _json(verified)
        if as_json
        else f"{verified.folder}: verified: {verified.parameters} parameters load through {verified.through}; "
        f"features differ by {verified.difference:.1e}"
    )


@main.command()
@click.argument("run")
@click.option("--step", default=None, type=click.IntRange(min=0), help="Default: the last one that was kept.")
@_JSON
def replay(run: str, step: int | None, as_json: bool) -> None:
    """Run a step of RUN again whose loss or gradient was not finite, and say where that began."""
    found = mpp.replay(run, step)
    if as_json:
        return click.echo(_json(found))
    click.echo("\n".join(found.lines))
    click.echo(f"{found.folder}: " + ("as in the run" if found.same else "not as in the run: other losses"))


@main.command()
@click.argument("run")
@click.argument("images", nargs=-1)
@click.option("--out", default="reconstructions.png", show_default=True)
def reconstruct(run: str, images: tuple[str, ...], out: str) -> None:
    """Draw what RUN predicts for hidden patches of IMAGES, files or folders; without any, its own through training."""
    there(run, *images)
    from mpp.diagnostics.reconstruct import reconstruct as draw

    click.echo(f"{draw(run, images, out)}")


@main.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--every", default=None, type=click.FloatRange(min=0.1), metavar="SECONDS", help="Again, until they end.")
@_JSON
def watch(runs: tuple[str, ...], every: float | None, as_json: bool) -> None:
    """Where RUNS stand: step, time left, skill, throughput, last checkpoint, warnings; from their files."""
    import time

    there(*runs)
    from mpp.watching import record, standing

    if as_json:
        if every is not None:
            raise UserError("--json: once; a script asks again itself, without --every")
        return click.echo(_json([record(run) for run in runs]))
    while True:
        found = [standing(run) for run in runs]
        if every is not None and sys.stdout.isatty():
            click.clear()
        click.echo("\n".join(text for text, _ in found))
        if every is None or not any(going for _, going in found):
            return
        time.sleep(every)


@main.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--out", default=None, metavar="FILE", help="Default: report.html in the first run.")
def report(runs: tuple[str, ...], out: str | None) -> None:
    """One HTML page about RUNS: a pretraining run with its fine-tunes and evaluations, or several compared."""
    there(*runs)
    click.echo(f"{mpp.report(runs, out)}")


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
    found = mpp.inspect(encoder, images, out=out, compare=compare, images=count, shown=shown, random=random)
    click.echo(found.table())
    click.echo(f"{found.out}")


@main.command()
@click.argument("name", required=False, metavar="[NAME|PATTERN]")
@click.option("--check", is_flag=True, help="Run every contract test on NAME, whatever its family.")
@_JSON
def models(name: str | None, check: bool, as_json: bool) -> None:
    """Encoders: the support table; or what a probe of timm's model NAME finds; or the names that fit a PATTERN."""
    from mpp.diagnostics import models as known
    from mpp.encoders.timm_encoder import timm_names

    if name is not None and (not name or (check and any(c in name for c in "*?["))):
        raise UserError(f"models: '{name}': give the name of one model of timm's")
    if name is None:
        if check:
            raise UserError("--check: of which model? mpp models --check NAME")
        rows = [dict(zip(known.COLUMNS, row, strict=True)) for row in known.support_rows()]
        click.echo(_json(rows) if as_json else known.text())
        return
    if check:
        if as_json:
            raise UserError("--json: not with --check, whose exit code says it all")
        found, held = known.check(name)
        click.echo(found)
        if not held:
            raise UserError(f"models: {name}: not every check holds")
    elif any(c in name for c in "*?["):
        names = timm_names(name, "models")
        click.echo(_json(names) if as_json else "\n".join(names))
    else:
        probed = known.probe(name)
        click.echo(_json(probed) if as_json else known.probe_text(probed))


@main.command()
@click.argument("folder", default=".")
@_JSON
def doctor(folder: str, as_json: bool) -> None:
    """What this machine has and lacks for runs in FOLDER: versions, devices, precision, speed, memory, disk, clock."""
    from mpp.doctor import examine

    found = []
    for finding in examine(folder):
        found.append(finding)
        if not as_json:
            click.echo(finding)
    if as_json:
        click.echo(_json(found))
    if wrong := [finding for finding in found if not finding.ok]:
        raise UserError(f"doctor: {len(wrong)} of {len(found)} lines want attention")


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """What makes SHELL complete mpp's commands and options: eval "$(mpp completion bash)" in its start-up file."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "mpp", "_MPP_COMPLETE").source())


@main.group(cls=Commands)
def recipe() -> None:
    """Look at recipes."""


@recipe.command("list")
@_JSON
def list_recipes(as_json: bool) -> None:
    """Recipes that come with mpp: their names, which stand for their files, and what each is."""
    from mpp.recipe import bundled

    found = {name: path.read_text().splitlines()[0].lstrip("# ") for name, path in bundled().items()}
    width = max(map(len, found))
    click.echo(_json(found) if as_json else "\n".join(f"{name:<{width}}  {said}" for name, said in found.items()))


@recipe.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@_SCALE
def show(path: Path, overrides: tuple[str, ...], scale: str | None) -> None:
    """Check a recipe and print it with every default."""
    from mpp.recipe import OPEN, dump_recipe, load_open, parse_overrides

    found, required = load_open(path, parse_overrides(overrides), scale)
    if required:
        click.echo(f"# {OPEN} stands for what must still be given: {', '.join(required)}")
    click.echo(dump_recipe(found), nl=False)


@recipe.command()
@click.argument("job", type=click.Choice(["pretrain", "finetune", "evaluate"]))
def schema(job: str) -> None:
    """JSON schema of a job's recipes, for editors."""
    import json

    from mpp.recipe import json_schema

    click.echo(json.dumps(json_schema(job), indent=1))
