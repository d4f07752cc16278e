"""Commands that look at runs: runs, watch, report, reconstruct, replay, doctor."""

from __future__ import annotations

import sys

import click

import mpp
from mpp.cli.app import JSON, LOADING, ask_for_patience, main, to_json
from mpp.errors import UserError, require_existing


@main.command(hidden=True)
@click.argument("run")
@click.option("--step", default=None, type=click.IntRange(min=0), help="Step to rerun. Default: the last one saved.")
@JSON
def replay(run: str, step: int | None, as_json: bool) -> None:
    """Debug a step with a NaN loss

    Rerun a step of RUN whose loss or gradient was NaN or infinite, and locate where it started.
    """
    ask_for_patience(LOADING)
    replayed = mpp.replay(run, step)
    if as_json:
        return click.echo(to_json(replayed))
    click.echo("\n".join(replayed.lines))
    click.echo(f"{replayed.folder}: " + ("as in the run" if replayed.same else "not as in the run: other losses"))


@main.command()
@click.argument("run")
@click.argument("images", nargs=-1)
@click.option(
    "-o",
    "--out",
    default="reconstructions.png",
    show_default=True,
    metavar="FILE",
    help="Output picture (.png, or .gif for an animation).",
)
def reconstruct(run: str, images: tuple[str, ...], out: str) -> None:
    """Draw predictions for hidden patches

    Draw the predictions of RUN for IMAGES (files or folders). Without IMAGES, draw those of its held-out images
    through training.

    \b
    mpp reconstruct runs/photos photos --out reconstructions.png
    mpp reconstruct runs/photos --out training.gif
    """
    require_existing(run, *images)
    ask_for_patience(LOADING)
    from mpp.inspection.reconstruct import reconstruct as draw

    click.echo(f"{draw(run, images, out)}")


@main.command()
@click.argument("runs", nargs=-1, required=True)
@click.option(
    "--every",
    default=None,
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    help="Refresh every so many seconds until the runs end.",
)
@JSON
def watch(runs: tuple[str, ...], every: float | None, as_json: bool) -> None:
    """Show progress of running jobs

    Show step, time left, metrics, last checkpoint and warnings of one or more runs, read from their files. Of a
    folder that holds runs, show those in progress.

    \b
    mpp watch runs/photos --every 10
    mpp watch runs
    """
    import time

    require_existing(*runs)
    from mpp.runs.listing import runs_to_watch
    from mpp.runs.watch import record, standing

    runs = runs_to_watch(runs, none_is_wrong=not as_json)
    if as_json:
        if every is not None:
            raise UserError("--json cannot be combined with --every")
        return click.echo(to_json([record(run) for run in runs]))
    while True:
        standings = [standing(run) for run in runs]
        if every is not None and sys.stdout.isatty():
            click.clear()
        click.echo("\n".join(text for text, _ in standings))
        if every is None or not any(going for _, going in standings):
            return
        time.sleep(every)


@main.command("runs")
@click.argument("folder", default="runs")
@click.option(
    "--sort",
    default=None,
    metavar="METRIC",
    help="Sort by a metric, the highest first, but the lowest loss. Default: by time.",
)
@JSON
def list_runs(folder: str, sort: str | None, as_json: bool) -> None:
    """List and compare runs

    List the runs in FOLDER and below: state, metrics, and the settings in which runs of the same kind differ.

    \b
    mpp runs runs --sort skill
    """
    require_existing(folder)
    from mpp.runs.listing import find_runs, rows_of, table

    rows = rows_of(find_runs(folder), sort)
    click.echo(to_json(rows) if as_json else "\n".join(table(rows, sort)))


@main.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("-o", "--out", default=None, metavar="FILE", help="Output page. Default: report.html in the first run.")
def report(runs: tuple[str, ...], out: str | None) -> None:
    """Write an HTML report

    Write one HTML page about a pretraining run with its fine-tunes and evaluations, or one that compares several
    pretraining runs.

    \b
    mpp report runs/photos runs/classes
    """
    require_existing(*runs)
    ask_for_patience("writing the report")
    click.echo(f"{mpp.report(runs, out)}")


@main.command()
@click.argument("folder", default=".")
@JSON
def doctor(folder: str, as_json: bool) -> None:
    """Check this machine

    Check Python, packages, GPU, memory, disk and clock for running mpp in FOLDER.
    """
    from mpp.planning.doctor import examine

    findings = []
    for finding in examine(folder):
        findings.append(finding)
        if not as_json:
            click.echo(finding)
    if as_json:
        click.echo(to_json(findings))
    if wrong := [finding for finding in findings if not finding.ok]:
        raise UserError(f"doctor: {len(wrong)} of {len(findings)} lines need attention")
