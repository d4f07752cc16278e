"""The commands: arguments in, one function called, its result printed. No logic, and no torch before it is needed."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
import warnings
from typing import Any, ClassVar, NoReturn

import click

import mpp
from mpp.errors import MppWarning, ToldElsewhere, UserError, printable, without_secrets
from mpp.parallel.streams import keep_output_open

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a lost connection it prints pages; we say who is gone
RANK = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") not in ("", "1") else "0"
LESS_MEMORY = (
    "Lower optim.max_batch_per_device; in pretraining, encoder.grad_checkpointing=true and fsdp=true also save memory. "
    "`mpp plan` says what fits"
)
OF_THE_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a write to storage that is full or read-only. They do not name a file."""
TRAINING = ("pretrain", "finetune")


def _say_usage(error: click.UsageError) -> NoReturn:
    """Print a wrong use of a command in one line, where click prints four, and exit."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        raise error
    command = error.ctx.command_path if error.ctx else "mpp"
    message = error.format_message()
    if (
        isinstance(error, click.NoSuchOption)
        and error.ctx
        and any(p.name == "overrides" for p in error.ctx.command.params)
    ):
        from mpp.recipe.loading import RECIPES
        from mpp.recipe.messages import meant_by

        key = error.option_name.lstrip("-").replace("-", "_")
        key = meant_by((key,), [], RECIPES.get(error.ctx.info_name or "", RECIPES["pretrain"])) or key
        message = (
            f"No such option '{error.option_name}'. A setting of the recipe is written without dashes: {key}=VALUE."
        )
    click.echo(f"{command}: {message} See {command} --help", err=True)
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
    """Drop what is buffered for a stdout that cannot be written. Python would try again at exit and print an error."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message: object, category: type[Warning], filename: str, lineno: int, *rest: object) -> None:
    """Print warnings of mpp as one line for users. Other warnings keep their place in the code."""
    message = printable(without_secrets(str(message)))
    text = f"warning: {message}" if issubclass(category, MppWarning) else f"{filename}:{lineno}: {message}"
    click.echo(text, err=True)


def leave_process_group() -> None:
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
            leave_process_group()
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
                click.echo("output pipe closed, run stopped; continue with --resume auto", err=True)
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


class Main(Commands):
    """The command `mpp`, whose help shows the commands in groups, in the order of their use."""

    GROUPS: ClassVar = {
        "Data": ("pack", "index", "duplicates"),
        "Train": ("plan", "pretrain", "finetune"),
        "Evaluate": ("evaluate", "embed", "predict", "inspect", "reconstruct"),
        "Monitor": ("runs", "watch", "report"),
        "Share": ("export", "verify", "import", "upload"),
        "Help": ("recipe", "models", "doctor", "completion"),
    }

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in self.GROUPS.items():
            with formatter.section(title):
                commands = [(name, self.get_command(ctx, name)) for name in names]
                formatter.write_dl([(name, command.get_short_help_str(60)) for name, command in commands if command])


@click.group(
    cls=Main,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  mpp pretrain vit_small data.shards=photos out=runs/photos
  mpp finetune vit_small encoder=runs/photos data.train=labeled/train data.val=labeled/val
  mpp export runs/photos encoders/photos
  mpp pretrain --help         what a command takes
  mpp recipe keys pretrain    every setting of a recipe, with its default""",
)
@click.version_option(mpp.__version__)
def main() -> None:
    """Pretrain a vision encoder on unlabeled images, fine-tune it on a few labels, and export it."""


def ask_for_patience(what: str) -> None:
    """Print what takes seconds, if somebody waits for it at a terminal.

    Args:
        what: In a few words.
    """
    if RANK == "0" and sys.stderr.isatty():
        click.echo(f"{what} …", err=True)


LOADING = "loading PyTorch"
"""What takes seconds at the start of commands that compute, for `ask_for_patience`."""


def to_json(value: object) -> str:
    """Return JSON of a result. Numbers that are not finite become null."""
    import dataclasses
    import json
    import math

    def plain(item: object) -> Any:
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


JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON (progress goes to stderr).")
OUT = click.option("-o", "--out", "out_option", default=None, metavar="FOLDER", help="The same as OUT.")


def one_out(argument: str | None, option: str | None) -> str:
    """Return the new folder of a command, which is given once: as its last word or by --out."""
    given = [value for value in (argument, option) if value is not None]
    if len(given) != 1:
        raise click.UsageError(f"OUT: given {'twice' if given else 'neither as a word nor by --out'}.")
    return given[0]


def encodable(line: str) -> str:
    """Return a line that any output can encode. Names of files in it may hold any bytes, which are written out."""
    return line.encode("utf-8", "backslashreplace").decode()


def progress_aside(as_json: bool) -> contextlib.AbstractContextManager[object]:
    """Send progress to stderr if a script reads the result from stdout."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
