"""Commands that look at runs: watch, report, reconstruct, replay, doctor."""

from __future__ import annotations

import sys

import click

import mpp
from mpp.cli.app import JSON, main, to_json
from mpp.errors import UserError, require_existing


@main.command()
@click.argument("run")
@click.option("--step", default=None, type=click.IntRange(min=0), help="Default: the last one that was kept.")
@JSON
def replay(run: str, step: int | None, as_json: bool) -> None:
    """Run a step of RUN again whose loss or gradient was not finite, and say where that began."""
    replayed = mpp.replay(run, step)
    if as_json:
        return click.echo(to_json(replayed))
    click.echo("\n".join(replayed.lines))
    click.echo(f"{replayed.folder}: " + ("as in the run" if replayed.same else "not as in the run: other losses"))


@main.command()
@click.argument("run")
@click.argument("images", nargs=-1)
@click.option("--out", default="reconstructions.png", show_default=True)
def reconstruct(run: str, images: tuple[str, ...], out: str) -> None:
    """Draw what RUN predicts for hidden patches of IMAGES, files or folders; without any, its own through training."""
    require_existing(run, *images)
    from mpp.inspection.reconstruct import reconstruct as draw

    click.echo(f"{draw(run, images, out)}")


@main.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--every", default=None, type=click.FloatRange(min=0.1), metavar="SECONDS", help="Again, until they end.")
@JSON
def watch(runs: tuple[str, ...], every: float | None, as_json: bool) -> None:
    """Where RUNS stand: step, time left, skill, throughput, last checkpoint, warnings; from their files."""
    import time

    require_existing(*runs)
    from mpp.runs.watch import record, standing

    if as_json:
        if every is not None:
            raise UserError("--json: once; a script asks again itself, without --every")
        return click.echo(to_json([record(run) for run in runs]))
    while True:
        standings = [standing(run) for run in runs]
        if every is not None and sys.stdout.isatty():
            click.clear()
        click.echo("\n".join(text for text, _ in standings))
        if every is None or not any(going for _, going in standings):
            return
        time.sleep(every)


@main.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--out", default=None, metavar="FILE", help="Default: report.html in the first run.")
def report(runs: tuple[str, ...], out: str | None) -> None:
    """One HTML page about RUNS: a pretraining run with its fine-tunes and evaluations, or several compared."""
    require_existing(*runs)
    click.echo(f"{mpp.report(runs, out)}")


@main.command()
@click.argument("folder", default=".")
@JSON
def doctor(folder: str, as_json: bool) -> None:
    """What this machine has and lacks for runs in FOLDER: versions, devices, precision, speed, memory, disk, clock."""
    from mpp.planning.doctor import examine

    findings = []
    for finding in examine(folder):
        findings.append(finding)
        if not as_json:
            click.echo(finding)
    if as_json:
        click.echo(to_json(findings))
    if wrong := [finding for finding in findings if not finding.ok]:
        raise UserError(f"doctor: {len(wrong)} of {len(findings)} lines want attention")
