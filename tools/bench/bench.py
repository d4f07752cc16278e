"""Compare mpp with what a user could choose instead, interleaved in one run: `make bench`.

    python tools/bench/bench.py [--only step memory …] [--rounds 7] [--peers PYTHON] [--write]

step    one training step, at the sizes of sizes.py: images/s, GFLOP per image, share of the machine's own GEMM peak;
        in heats of a few processes, each of which also has ours and the GEMM
memory  peak memory of three of these steps, one process at a time
input   reading, cropping and normalising JPEGs: images per second of one core
whole   training commands from their start: time to the end of the first step, images/s after it, peak memory

keep    saving a checkpoint, resuming from it, exporting an encoder (ours is synced, checksummed and verified); the kNN
        accuracy of an encoder on 16 images with 16 others as neighbours
embed   vectors of a folder of JPEGs of 32 px: images per second of two encoders
growth  cost of ours with more images, patches, blocks, processes

--write puts the figures into recipes/RESULTS.csv (rows `bench-…`), the tables into docs/benchmarks.md, a summary into
README.md and the plot into docs/bench.png.
If a contestant cannot run, its last words are printed and the exit code is 1. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import growth
import pictures
import whole
from sizes import EMBEDDERS, SIZES
from timing import Contestant, Failed, Spread, core_rates, interleave, rates, ratio

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))
import results  # noqa: E402  the table has one writer

RESULTS = ROOT / "recipes" / "RESULTS.csv"
PAGE, PLOT = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "bench.png"
MARKS = ("<!-- benchmark: made by `make bench` -->", "<!-- end of benchmark -->")
OURS = "mpp late, 1 block, a third"
"""Ours: mask tokens of a third of the hidden cells join at the last block, the default of `vit_small`."""
HEATS = (
    ("transformers MAE", "lightly MAE", "stable-pretraining MAE", "vit-pytorch MAE"),
    ("vit-pytorch SimMIM", "transformers SimMIM", "stable-pretraining SimMIM", "vit-pytorch MPP"),
    ("stable-pretraining CrossMAE", "mpp CrossMAE", "mpp MAE", "mpp SimMIM"),
    ("mpp late, 2 blocks, a third", "mpp late, 1 block", f"{OURS}, compiled"),
)
"""Contestants that run together. A heat is small, because each contestant keeps a process in memory."""
LIKE = {"MAE": "MAE", "SimMIM": "SimMIM", "MPP": "SimMIM", "CrossMAE": "CrossMAE"}
"""Kind of a contestant by the last word of its name."""
STEPS = (
    ("32px", "small", "fp32", HEATS),
    ("vit_s", "small", "fp32", HEATS),
    ("vit_s", "mae", "fp32", HEATS[:1]),
    ("vit_s", "small", "bf16", (*HEATS[:2], HEATS[3])),
)
"""Size, decoder of the MAE-like models, precision, heats."""
INPUT_BATCH = {"32px": 64, "375x500": 32, "3000px": 4}
BENCHES = ("step", "memory", "input", "whole", "keep", "embed", "growth")
TURN_S = 0.7
WHOLE_STEPS = 24
WHOLE_RUNS = 3


class Row(NamedTuple):
    """One figure of recipes/RESULTS.csv."""

    run: str
    contestant: str
    metric: str
    value: float


@contextmanager
def contest(
    names: Sequence[str], bench: str, settings: dict[str, Any], given: argparse.Namespace, failed: list[str]
) -> Iterator[list[Contestant]]:
    """Yield the contestants that started, and add errors of the others to `failed`. Peers run only with `--peers`."""
    up: list[Contestant] = []
    try:
        for name in names:
            own = name.startswith("mpp") or name == "GEMM"
            if own or given.peers:
                python = sys.executable if own else given.peers
                try:
                    up.append(Contestant(name, python, "ours" if own else "peers", bench, settings))
                except Failed as error:
                    failed.append(str(error))
        yield up
    finally:
        for c in up:
            c.end()


def _spread(run: str, name: str, metric: str, spread: Spread) -> Iterator[Row]:
    for suffix, value in zip(("", "_q1", "_q3"), (spread.median, spread.low, spread.high), strict=True):
        yield Row(run, name, metric + suffix, value)


def steps(given: argparse.Namespace, failed: list[str]) -> Iterator[Row]:
    for size, decoder, precision, heats in given.steps:
        run = f"bench-step-{size}-{decoder}-{precision}"
        for number, names in enumerate(heats):
            settings = {"size": size, "decoder": decoder, "precision": precision}
            with contest(("GEMM", OURS, *names), "STEP", settings, given, failed) as (gemm, first, *others):
                interleave((gemm, first, *others), rounds=given.rounds, turn_s=given.turn_s)
                peak = rates(gemm).median * gemm.facts["gflop_per_image"]
                if number == 0:
                    yield Row(run, "GEMM", "gflop_per_s", peak)
                for c in [first] * (number == 0) + others:
                    yield from _spread(run, c.name, "images_per_s", rates(c))
                    yield from _spread(run, c.name, "mpp_is_times_as_fast", ratio(first, c))
                    yield Row(run, c.name, "gflop_per_image", c.facts["gflop_per_image"])
                    reached = rates(c).median * c.facts["gflop_per_image"] / peak
                    yield Row(run, c.name, "part_of_gemm_peak", reached)


def memory(given: argparse.Namespace, failed: list[str]) -> Iterator[Row]:
    """Measure one contestant at a time, three steps each."""
    for size, decoder, precision, heats in given.steps[:2]:
        names = [OURS, *(name for heat in heats for name in heat)]
        settings = {"size": size, "decoder": decoder, "precision": precision}
        for name in names:
            with contest([name], "STEP", settings, given, failed) as alone:
                for c in alone:
                    yield Row(f"bench-memory-{size}-{decoder}-{precision}", name, "peak_mib", c.turn(3).peak_mib)


def inputs(given: argparse.Namespace, failed: list[str]) -> Iterator[Row]:
    for size, batch in INPUT_BATCH.items():
        settings = {"pictures": f"{given.pictures}/{size}", "side_px": 32 if size == "32px" else 224, "batch": batch}
        names = ("mpp", "torchvision ImageFolder", "webdataset + torchvision", "lightly")
        with contest(names, "INPUT", settings, given, failed) as all_of_them:
            interleave(all_of_them, rounds=given.rounds, turn_s=given.turn_s, warm_up=1)
            for c in all_of_them:
                yield from _spread(f"bench-input-{size}", c.name, "images_per_core_s", core_rates(c))
                of_ours = ratio(all_of_them[0], c, per_core=True)
                yield from _spread(f"bench-input-{size}", c.name, "mpp_is_times_as_fast", of_ours)


def wholes(given: argparse.Namespace, failed: list[str]) -> Iterator[Row]:
    place, size = f"{given.pictures}/375x500", SIZES["vit_s"]
    late: dict[str, Any] = {
        "corruption": "token", "corruption.enter": size.depth - 1, "head": "linear", "predict_fraction": 0.34,
        "optim.global_batch_size": size.batch,
    }  # fmt: skip
    commands = [whole.ours(place, 1, **late)]
    for model, loader in (
        ("transformers MAE", "torchvision ImageFolder"),
        ("lightly MAE", "lightly"),
        ("vit-pytorch SimMIM", "webdataset + torchvision"),
    ):
        if given.peers:
            commands.append(whole.peer(given.peers, model, loader, "vit_s", place, 1))
    found: dict[str, list[whole.Whole]] = {c.name: [] for c in commands}
    for _ in range(given.whole_runs):
        for command in commands:
            try:
                done = whole.run(command, steps=given.whole_steps, batch=size.batch, out=Path(given.pictures) / "run")
                found[command.name].append(done)
            except Failed as error:
                failed.append(str(error))
    for name, runs in found.items():
        for metric in whole.Whole._fields:
            if runs:
                yield from _spread("bench-whole-vit_s", name, metric, Spread.of([getattr(r, metric) for r in runs]))


def kept(given: argparse.Namespace, failed: list[str]) -> Iterator[Row]:
    names = (
        "mpp: save", "torch.save", "mpp: resume", "torch.load", "mpp: export", "transformers save_pretrained",
        "mpp: evaluate", "timm, lightly knn_predict",
    )  # fmt: skip
    with contest(names, "KEEP", {"size": "vit_s", "folder": given.pictures}, given, failed) as all_of_them:
        interleave(all_of_them, rounds=given.rounds, turn_s=given.turn_s, warm_up=1)
        for c in all_of_them:
            yield from _spread("bench-keep-vit_s", c.name, "s", Spread.of([t.wall_s / t.images for t in c.turns]))


def embedded(given: argparse.Namespace, failed: list[str]) -> Iterator[Row]:
    for encoder in EMBEDDERS:
        settings = {"encoder": encoder, "folder": given.pictures, "images": f"{given.pictures}/32px"}
        with contest(("mpp", "timm + torchvision"), "EMBED", settings, given, failed) as all_of_them:
            interleave(all_of_them, rounds=given.rounds, turn_s=given.turn_s, warm_up=1)
            for c in all_of_them:
                yield from _spread(f"bench-embed-{encoder}", c.name, "images_per_s", rates(c))
                yield from _spread(f"bench-embed-{encoder}", c.name, "mpp_is_times_as_fast", ratio(all_of_them[0], c))


def grown(given: argparse.Namespace, failed: list[str]) -> Iterator[Row]:
    try:
        yield from (Row(*figure) for figure in growth.figures(Path(given.pictures)))
    except Failed as error:
        failed.append(str(error))


def read(table: Path) -> list[Row]:
    """Return the stored rows in the order of `BENCHES`."""
    with open(table, newline="") as file:
        found = [
            Row(r["run"], r["approach"], r["metric"], float(r["value"]))
            for r in csv.DictReader(file)
            if r["task"] == "bench"
        ]
    return sorted(found, key=lambda row: BENCHES.index(row.run.split("-")[1]))


def written(rows: Sequence[Row], table: Path) -> None:
    """Write rows into the table of results, in place of older rows of the same runs."""
    new = [
        {"run": r.run, "task": "bench", "approach": r.contestant, "metric": r.metric, "value": f"{r.value:.4g}"}
        for r in rows
    ]
    results.replace({row.run for row in rows}, new, table)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _values(rows: Sequence[Row], run: str) -> dict[str, dict[str, float]]:
    """Return the values of a run by contestant and metric."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.run == run:
            found.setdefault(row.contestant, {})[row.metric] = row.value
    return found


def _table_of_rates(title: str, unit: str, metric: str, values: dict[str, dict[str, float]]) -> list[str]:
    """Return a table of each contestant's rate with quartiles, and how many times as fast mpp is."""
    lines = ["", title, "", f"| | {unit} | mpp is … times as fast |", "|---|---|---|"]
    for name, v in values.items():
        rate, low, high = (_number(v[f"{metric}{suffix}"]) for suffix in ("", "_q1", "_q3"))
        lines.append(f"| {name} | {rate} ({low} – {high}) | {v['mpp_is_times_as_fast']:.2f} |")
    return lines


def tables(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown, a table for each run."""
    lines: list[str] = []
    for run in dict.fromkeys(row.run for row in rows):
        values = _values(rows, run)
        _, kind, *what = run.split("-", 2)
        if kind == "step":
            peak = values.pop("GEMM")["gflop_per_s"]
            lines += [
                "", f"{', '.join(what[0].split('-'))}; GEMM {peak:.0f} GFLOP/s:", "",
                "| | images/s (quartiles) | mpp is … times as fast | GFLOP an image | of the GEMM peak |",
                "|---|---|---|---|---|",
            ]  # fmt: skip
            for name, v in sorted(values.items(), key=lambda item: -item[1]["images_per_s"]):
                rate, low, high = (_number(v[f"images_per_s{suffix}"]) for suffix in ("", "_q1", "_q3"))
                lines.append(
                    f"| {name} | {rate} ({low} – {high}) | {v['mpp_is_times_as_fast']:.2f} "
                    f"| {v['gflop_per_image']:.3g} | {v['part_of_gemm_peak']:.2f} |"
                )
        elif kind == "input":
            lines += _table_of_rates(f"JPEGs of {what[0]}:", "images a core-second", "images_per_core_s", values)
        elif kind == "memory":
            lines += [
                "",
                f"Peak memory of a training step, {', '.join(what[0].split('-'))}:",
                "",
                "| | MiB |",
                "|---|---|",
            ]
            lines += [
                f"| {n} | {v['peak_mib']:.0f} |" for n, v in sorted(values.items(), key=lambda i: i[1]["peak_mib"])
            ]
        elif kind == "keep":
            lines += ["", f"Checkpoints, exports, evaluation, {what[0]}:", "", "| | s (quartiles) |", "|---|---|"]
            lines += [f"| {name} | {v['s']:.3g} ({v['s_q1']:.3g} – {v['s_q3']:.3g}) |" for name, v in values.items()]
        elif kind == "embed":
            lines += _table_of_rates(f"Vectors of JPEGs of 32 px, {what[0]}:", "images/s", "images_per_s", values)
        elif kind == "growth":
            metrics = list(next(iter(values.values())))
            lines += [
                "",
                f"With more {what[0]}:",
                "",
                f"| | {' | '.join(metrics)} |",
                "|---" * (1 + len(metrics)) + "|",
            ]
            lines += [f"| {name} | {' | '.join(f'{v[m]:.3g}' for m in metrics)} |" for name, v in values.items()]
        else:
            lines += ["", f"Commands, {what[0]}:", "", "| | s to the first step | images/s after it | peak MiB |"]
            lines += ["|---|---|---|---|"]
            for name, v in values.items():
                lines.append(
                    f"| {name} | {v['first_step_s']:.1f} | {_number(v['images_per_s'])} | {v['peak_mib']:.0f} |"
                )
    return "\n".join(lines).strip()


def _nearest(values: dict[str, dict[str, float]], kind: str | None = None) -> str:
    """Return how many times as fast as the fastest peer ours is, and the peer's name. With a kind, only its peers
    count.
    """
    peers = {n: v for n, v in values.items() if not n.startswith("mpp") and n != "GEMM"}
    if kind:
        peers = {n: v for n, v in peers.items() if LIKE[n.split()[-1]] == kind}
    if not peers:
        return ""
    name = min(peers, key=lambda n: peers[n]["mpp_is_times_as_fast"])
    return f"{peers[name]['mpp_is_times_as_fast']:.2f} × ({name})"


def page(rows: Sequence[Row]) -> str:
    """Return the generated part of docs/benchmarks.md: the summary, then every table."""
    folded = f"<details>\n<summary>A table for each run</summary>\n\n{tables(rows)}\n\n</details>"
    return f"{summary(rows)}\n\n## All measurements\n\n{folded}"


def summary(rows: Sequence[Row]) -> str:
    """Return a summary in Markdown that compares ours with the fastest peer of each kind."""
    steps_, inputs_, wholes_ = [], [], []
    for run in dict.fromkeys(row.run for row in rows):
        values = _values(rows, run)
        _, kind, what = run.split("-", 2)
        if kind == "step":
            v = values[OURS]
            cells = [_nearest(values, like) for like in ("MAE", "SimMIM", "CrossMAE")]
            steps_.append(
                f"| {what.replace('-', ', ')} | {_number(v['images_per_s'])} images/s | {' | '.join(cells)} |"
            )
        elif kind == "input":
            rate = values["mpp"]["images_per_core_s"]
            inputs_.append(f"| JPEGs of {what} | {_number(rate)} images a core-second | {_nearest(values)} |")
        elif kind == "whole":
            for name, v in values.items():
                wholes_.append(
                    f"| {name} | {v['first_step_s']:.1f} | {_number(v['images_per_s'])} | {v['peak_mib']:.0f} |"
                )
    found: list[str] = []
    if steps_:
        found += [
            "| training step | mpp, joining late | as fast as MAE | as SimMIM | as CrossMAE |",
            "|---|---|---|---|---|",
        ]
        found += [*steps_, ""]
    if inputs_:
        found += ["| input | mpp | as fast as |", "|---|---|---|", *inputs_, ""]
    if wholes_:
        found += ["| command | s to the first step | images/s after it | peak MiB |", "|---|---|---|---|", *wholes_]
    return "\n".join(found).strip()


def put_between_marks(text: str, made: str) -> str:
    """Replace the text between the marks.

    Raises:
        ValueError: If the marks are missing.
    """
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise ValueError(f"{MARKS[0]} … {MARKS[1]} is missing")
    return f"{before}{mark}\n{made}\n{end}{after}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot the images/s of a training step as bars, a panel for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [run for run in dict.fromkeys(r.run for r in rows) if "-step-" in run]
    bars = [len(_values(rows, run)) for run in runs]
    size = (8, 0.17 * sum(bars) + 0.7 * len(runs))
    figure, axes = plt.subplots(len(runs), 1, figsize=size, squeeze=False, gridspec_kw={"height_ratios": bars})
    for axis, run in zip(axes[:, 0], runs, strict=True):
        values = {n: v for n, v in _values(rows, run).items() if n != "GEMM"}
        names = sorted(values, key=lambda n: values[n]["images_per_s"])
        middle = [values[n]["images_per_s"] for n in names]
        low = [m - values[n]["images_per_s_q1"] for m, n in zip(middle, names, strict=True)]
        high = [values[n]["images_per_s_q3"] - m for m, n in zip(middle, names, strict=True)]
        colours = ["#c44e52" if n.startswith("mpp") else "#8c8c8c" for n in names]
        axis.barh(names, middle, xerr=[low, high], color=colours, ecolor="#333333")
        axis.set_title(run.removeprefix("bench-step-").replace("-", ", "), fontsize=9)
        axis.set_xlabel("images/s of one training step", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=BENCHES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn-s", type=float, default=TURN_S)
    parser.add_argument("--size", choices=SIZES, help="of steps, in fp32; else those of the page")
    parser.add_argument("--peers", metavar="PYTHON", help="that has requirements.txt; else only ours run")
    parser.add_argument("--write", action="store_true", help="into docs/ and recipes/RESULTS.csv")
    given = parser.parse_args(words)
    given.steps = [(given.size, "small", "fp32", HEATS)] if given.size else STEPS
    given.whole_steps, given.whole_runs = WHOLE_STEPS, WHOLE_RUNS
    failed: list[str] = []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        given.pictures = folder
        if set(given.only) != {"step"}:
            pictures.main(Path(folder))
        for name, bench in zip(BENCHES, (steps, memory, inputs, wholes, kept, embedded, grown), strict=True):
            if name in given.only:
                rows += [row._replace(value=float(f"{row.value:.4g}")) for row in bench(given, failed)]
    print(tables(rows))
    if given.write:
        written(rows, RESULTS)
        rows = read(RESULTS)  # rows of other benchmarks stay as measured
        PAGE.write_text(put_between_marks(PAGE.read_text(), page(rows)))
        plot(rows, PLOT)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
