"""One page about one run, or about several beside each other: an HTML file that needs nothing but itself.

It is drawn from the records in run folders alone; nothing is loaded, trained or fetched. What each part says is decided
here, how it looks in report.html.j2.
"""

from __future__ import annotations

import base64
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from mpp.diagnostics import kept as kept_pictures
from mpp.diagnostics import plots
from mpp.diagnostics.plots import Level, Line
from mpp.errors import UserError, one_line
from mpp.history import INSPECTION, History, read_inspection, read_run, settings_that_differ
from mpp.probes import ARMS, PROTOCOL
from mpp.records import timm_folder
from mpp.symptoms import DAMAGED, Symptom, symptoms
from mpp.verdict import conclude, name_unread, stored_estimate

FILE = "report.html"
TEMPLATE = "report.html.j2"
MOST_BYTES = 5_000_000
"""A page is no larger; pictures are made smaller until it is not."""
LEAST_SCALE = 0.3
MOST_SVG_BYTES = 400_000
"""A drawing of more is put in as pixels."""
SMALL_PNG_BYTES = 150_000
"""A picture of less stays a PNG, sharp; a larger one becomes WebP."""
WEBP_QUALITY = 85
CURVES = (
    ("loss", "Loss"),
    ("skill", "Skill"),
    ("probe_accuracy", "Linear probe, accuracy"),
    ("feature_rank", "Effective rank of the features"),
    ("lr", "Learning rate"),
    ("grad_norm", "Gradient norm"),
    ("images_per_s", "Images a second"),
    ("data_wait", "Part of the time spent waiting for images"),
)
METRICS = {"accuracy": "accuracy", "map": "mAP", "miou": "mIoU"}
FROM_ZERO = ("probe_accuracy", "feature_rank", "images_per_s", "data_wait")


# ---- parts of a page -------------------------------------------------------------------------------------------------


@dataclass
class Picture:
    """Something to look at, with the words for those who cannot."""

    html: Markup
    alt: str
    caption: str = ""
    title: str = ""
    wide: bool = False
    """Not to be squeezed onto a phone: it scrolls there."""


@dataclass
class Table:
    """Rows of words; the first column names the row."""

    head: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass
class Part:
    """A section of the page."""

    id: str
    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    code: str = ""
    folded: list[tuple[str, str]] = field(default_factory=list)
    """(title, text as it is)"""


class Pictures:
    """Makes pictures for a page, none larger than there is room for."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self._drawn = 0

    def plot(self, figure: Any, alt: str, **more: Any) -> Picture:
        """A figure of matplotlib's."""
        self._drawn += 1
        return Picture(Markup(plots.svg(figure, f"p{self._drawn}")), alt, **more)

    def pixels(self, image: Image.Image, alt: str, **more: Any) -> Picture:
        if self.scale < 1:
            size = (max(round(image.width * self.scale), 1), max(round(image.height * self.scale), 1))
            image = image.resize(size, Image.Resampling.LANCZOS)
        data, kind = _encoded(image, "PNG"), "png"
        if len(data) > SMALL_PNG_BYTES:
            data, kind = _encoded(image, "WEBP", quality=WEBP_QUALITY), "webp"
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        html = Markup('<img src="{}" width="{}" height="{}" alt="{}">').format(source, *image.size, alt)
        return Picture(html, alt, **more)

    def file(self, path: Path, alt: str, **more: Any) -> Picture | None:
        """A PNG of a run, beside which there may be the same as SVG; None where it cannot be read."""
        drawing = path.with_suffix(".svg")
        try:
            if self.scale == 1 and drawing.exists() and drawing.stat().st_size <= MOST_SVG_BYTES:
                text = drawing.read_text(encoding="utf-8")
                if plots.is_own_svg(text):
                    return Picture(Markup(text), alt, **more)
            with Image.open(path, formats=("PNG",)) as image:
                return self.pixels(image.convert("RGB"), alt, **more)
        except (OSError, ValueError, Image.DecompressionBombError):
            return None


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---- numbers as words ------------------------------------------------------------------------------------------------


def _percent(value: Any, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %" if _number(value) else "–"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if _number(value) else "–"


def _duration(hours: float) -> str:
    minutes = 60 * hours
    return f"{minutes:.1f} minutes" if minutes < 90 else f"{hours:.1f} hours"


def _estimate(value: dict[str, Any] | None, *, points: bool = False) -> str:
    """A mean over seeds with its interval, as `verdict` has them."""
    if not value:
        return "–"
    width: Any = value.get("half_width")
    spread = f" ± {100 * width:.1f}" if _number(width) else ""
    mean = f"{100 * value['mean']:+.1f}" if points else f"{100 * value['mean']:.1f}"
    return f"{mean}{spread} {'points' if points else '%'}"


# ---- what is said of a pretraining run -------------------------------------------------------------------------------


def _key_numbers(run: History) -> list[tuple[str, str]]:
    """(value, what it is)"""
    found = [
        (_short(run.last("skill")), "skill: 0 is guessing the mean, 1 is perfect"),
        (_short(run.last("loss")), "loss of the last step"),
    ]
    if run.last("probe_accuracy") is not None:
        found.append((_percent(run.last("probe_accuracy")), "linear probe while training"))
    hours = run.hours()
    found += [
        (f"{run.metrics[-1]['seen']:,}" if run.metrics else "–", "images seen"),
        (_duration(hours[-1]) if hours else "–", "of training"),
    ]
    return found


def _curves(run: History, pictures: Pictures) -> Part:
    part = Part("curves", "Curves")
    for key, title in CURVES:
        steps, values = run.series(key)
        if len(values) < 2 or (key == "lr" and not any(values)):
            continue
        lines: list[Line | Level] = [Line("", steps, values)]
        alt = f"{title} over steps: {_short(values[0])} at first, {_short(values[-1])} at last."
        if key == "skill":
            lines.append(Level("guessing the mean", 0.0))
        limits = {title: (0.0, None)} if key in FROM_ZERO else None
        part.pictures.append(
            pictures.plot(plots.lines({title: lines}, xlabel="step", limits=limits, width=3.6, height=2.4), alt)
        )
    for key in sorted(k for k in run.latest if k.startswith(("target_rank_", "target_share_"))):
        steps, values = run.series(key)
        if len(values) > 1:
            what, name = key.removeprefix("target_").split("_", 1)
            title = f"{'Effective rank of' if what == 'rank' else 'Part that depends on the image:'} target {name}"
            alt = f"{title} over steps: {_short(values[0])} at first, {_short(values[-1])} at last."
            figure = plots.lines({title: [Line("", steps, values)]}, xlabel="step", width=3.6, height=2.4)
            part.pictures.append(pictures.plot(figure, alt))
    targets = sorted(k.removeprefix("skill_") for k in run.latest if k.startswith("skill_"))
    for what in ("loss", "skill"):
        lines = [Line(name, *run.series(f"{what}_{name}")) for name in targets if run.series(f"{what}_{name}")[1]]
        if lines:
            title = f"{what.capitalize()} of each target"
            alt = "; ".join(f"{line.name} {_short(line.y[-1])} at last" for line in lines if isinstance(line, Line))
            part.pictures.append(
                pictures.plot(plots.lines({title: lines}, xlabel="step", width=3.6, height=2.4), f"{title}: {alt}.")
            )
    if not part.pictures:
        part.text.append("No curves yet: metrics.jsonl has no two lines.")
    return part


def _reconstructions(run: History, pictures: Pictures) -> Part | None:
    kept = kept_pictures.read_kept(run.folder)
    if not kept:
        return None
    part = Part(
        "reconstructions",
        "Reconstructions through training",
        [
            "The same held-out images with the same patches hidden; none of them was trained on. "
            "What is visible is pasted in, so that only the hidden patches are predictions."
        ],
    )
    for panel in kept_pictures.pasted(kept):
        count = len(kept[0].panels["original"])
        alt = f"{count} held-out images, masked, and their predictions from step {kept[0].step} to {kept[-1].step:,}."
        caption = (
            "Here every predicted patch is drawn with the mean and contrast of the hidden patch itself, which the "
            "model neither saw nor predicted: the shapes are its own, brightness and colour are borrowed."
            if panel != "pasted"
            else ""
        )
        part.pictures.append(pictures.pixels(kept_pictures.strip(kept, panel), alt, caption=caption, wide=True))
    return part


def _inspection(run: History, pictures: Pictures) -> Part | None:
    index = read_inspection(run.folder)
    if not index:
        return None
    seen = f"Seen through {index.get('images', '?')} images (mpp inspect)."
    if index.get("random_weights"):
        seen += " With random weights: this is a control, not what it learned."
    part = Part("inspect", "What the encoder learned", [seen])
    for view in index.get("views", []):
        name = str(view["name"])
        if not name.isidentifier():
            continue
        found = pictures.file(
            run.folder / INSPECTION / f"{name}.png",
            f"{view['title']}: {view['summary']}.",
            caption=view["caption"],
            title=view["title"],
            wide=True,
        )
        if found:
            part.pictures.append(found)
    if absent := index.get("absent"):
        part.folded.append(("Not drawn for this encoder", "\n".join(f"{k}: {v}" for k, v in absent.items())))
    return part


def _finetune(run: History, pictures: Pictures) -> Part:
    recipe = run.recipe
    task = run.setting("task.name", "classify")
    part = Part(f"finetune-{run.name}", f"Fine-tuning: {run.name}")
    data = run.data
    counts = f" of {data['train_images']:,} labeled images, judged on {data['val_images']:,}" if data else ""
    arms = {"pretrained": "from the pretrained encoder", "scratch": "from scratch"}
    ran = [arms[arm] for arm in _arms_of(run)]
    how = f"The same fine-tune {ran[0]} and {ran[1]}" if len(ran) > 1 else f"Fine-tuned {ran[0]} only"
    seeds = recipe.get("seeds", [])
    part.text.append(
        f"{how}{counts}; task {task}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        + ("; intervals are 95 %, over seeds." if len(seeds) > 1 else ".")
    )
    verdicts = run.result.get("verdicts", [])
    if not verdicts:
        done = sum(bool(c.result) for c in run.cells)
        part.text.append(f"Not finished: {done} of {len(run.cells)} cells that were begun are.")
        return part
    scored = list(verdicts[0]["score"])
    with_gain = any(v.get("gain") for v in verdicts)
    rows = []
    for v in verdicts:
        labels = str(v["labels_per_class"]) if v.get("labels_per_class") else "all"
        gain = [_estimate(v.get("gain"), points=True)] if with_gain else []
        rows.append([labels, *(_estimate(v["score"].get(a)) for a in scored), *gain])
    metric = METRICS.get(str(run.result.get("metric")), "accuracy")
    head = ["labels a class", *(f"{a}, {metric}" for a in scored), *(["gain"] if with_gain else [])]
    part.tables.append(Table(head, rows))
    for v in verdicts:
        if v.get("gain"):
            labels = f"{v['labels_per_class']} labels a class: " if len(verdicts) > 1 else ""
            text = labels + conclude(stored_estimate(v["gain"])).text
            part.text.append(f"{text[0].upper()}{text[1:]}.")
    if unread := run.result.get("unread_classes"):
        part.text.append(f"{name_unread(unread)}.")
    if len(verdicts) > 1:
        lines = []
        for arm in scored:
            found = [(float(v["labels_per_class"]), v["score"][arm]) for v in verdicts]
            widths = [100 * e["half_width"] for _, e in found if _number(e.get("half_width"))]
            lines.append(
                Line(
                    arm,
                    [x for x, _ in found],
                    [100 * e["mean"] for _, e in found],
                    widths if len(widths) == len(found) else None,
                    dashed=arm == "scratch",
                )
            )
        alt = "; ".join(f"{line.name} from {line.y[0]:.1f} to {line.y[-1]:.1f} %" for line in lines)
        figure = plots.lines({"Label efficiency": lines}, xlabel="labels a class", ylabel=f"{metric}, %", log_x=True)
        part.pictures.append(pictures.plot(figure, f"{metric} against labels a class: {alt}."))
    curves = {}
    for cell in run.cells:
        steps, values = cell.series("loss")
        if len(values) > 1:
            curves[cell.name] = Line(cell.name, steps, values, dashed="scratch" in cell.name)
    if curves and len(curves) <= len(plots.COLOURS):
        alt = "; ".join(f"{name} {_short(line.y[-1])} at last" for name, line in curves.items())
        figure = plots.lines({"Loss of each cell": list(curves.values())}, xlabel="step")
        part.pictures.append(pictures.plot(figure, f"Training loss of each cell: {alt}."))
    for cell in run.cells[:2]:
        path = cell.folder / "predictions.png"
        if path.exists() and (shown := pictures.file(path, f"Truth and prediction of {cell.name}", wide=True)):
            shown.title = f"What {cell.name} says of validation images"
            part.pictures.append(shown)
    return part


def _arms_of(run: History) -> list[str]:
    """Which of "pretrained" and "scratch" a fine-tune trains, as its recipe says."""
    if run.recipe.get("encoder") == "scratch":
        return ["scratch"]
    return ["pretrained", "scratch"] if run.recipe.get("beside_scratch", True) else ["pretrained"]


def _evaluation(run: History, pictures: Pictures) -> Part:
    part = Part(f"probes-{run.name}", f"Frozen features: {run.name}")
    best, scores = run.result.get("best", {}), run.result.get("scores", {})
    if not best:
        part.text.append("Not finished yet.")
        return part
    part.text.append(
        f"Probes of the frozen encoder, fitted to {run.result['train_images']:,} labeled images, judged on "
        f"{run.result['val_images']:,}, beside controls. Layer and settings were chosen on training images."
    )
    if any("linear" in found for found in best.values()):
        part.text.append(f"{PROTOCOL[0].upper()}{PROTOCOL[1:]}.")
    probes = list(dict.fromkeys(p for arm in best.values() for p in arm))
    rows = [
        [ARMS.get(arm, arm), *(_at(best[arm].get(p)) for p in probes)] for arm in best
    ] + [["the most frequent class", *[_percent(run.result.get("chance"))] * len(probes)]]  # fmt: skip
    part.tables.append(Table(["", *probes], rows))
    for probe in probes:
        lines: list[Line | Level] = []
        for arm, found in scores.items():
            of_layer: dict[int, float] = {}
            for s in found:
                if s["probe"] == probe and str(s["layer"]).isdigit():
                    layer = int(s["layer"])
                    of_layer[layer] = max(of_layer.get(layer, 0.0), s["accuracy"])
            if of_layer:
                x = sorted(of_layer)
                lines.append(Line(ARMS.get(arm, arm), x, [100 * of_layer[i] for i in x], dashed=arm != "encoder"))
            elif found and (flat := [s["accuracy"] for s in found if s["probe"] == probe]):
                lines.append(Level(ARMS.get(arm, arm), 100 * max(flat)))
        if any(isinstance(line, Line) for line in lines):
            title = f"{probe}: accuracy by layer, best pooling, %"
            alt = f"Accuracy of the {probe} probe by layer; at best {_at(best['encoder'].get(probe))}."
            part.pictures.append(pictures.plot(plots.lines({title: lines}, xlabel="layer", height=3.2), alt))
    return part


def _at(score: dict[str, Any] | None) -> str:
    if not score:
        return "–"
    where = "" if score["pool"] == "own" else f" (layer {score['layer']}, {score['pool']})"
    return _percent(score["accuracy"]) + where


def _what_was_run(run: History, number: str = "run") -> Part:
    env, data = run.env, run.data
    part = Part(number, "What was run")
    rows = [["state", _state(run)]]
    if encoder := run.setting("encoder.name"):
        args = ", ".join(f"{k} {v}" for k, v in (run.setting("encoder.args") or {}).items())
        rows.append(["encoder", f"{encoder}{f' ({args})' if args else ''}"])
    for key in ("mask", "corruption", "target", "loss", "head"):
        section = run.recipe.get(key)
        if isinstance(section, dict):
            rest = ", ".join(f"{k} {v}" for k, v in section.items() if k != "name" and v is not None)
            rows.append([key, f"{section.get('name')}{f' ({rest})' if rest else ''}"])
    if data.get("images"):
        rows.append(["images", f"{data['images']:,} in {data['shards']:,} shards, {data['held_out']:,} more held out"])
    if fingerprint := data.get("fingerprint"):
        rows.append(["data fingerprint", str(fingerprint)])
    hours = run.hours()
    if hours and run.metrics:
        devices, processes = env.get("devices") or ["?"], int(env.get("processes", 1))
        rows.append(
            ["cost", f"{_duration(hours[-1])} on {processes} × {devices[0]}, {run.metrics[-1]['seen']:,} images"]
        )
    if env:
        rows.append(["machine", f"{env.get('platform', '?')}, {env.get('cpu_count', '?')} CPU cores"])
        rows.append(["packages", ", ".join(f"{k} {v}" for k, v in env.get("packages", {}).items())])
    part.tables.append(Table(["", ""], rows))
    part.folded.append((f"{run.folder}/recipe.yaml", yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)))
    return part


def _state(run: History) -> str:
    state = str(run.status.get("state", "unknown"))
    step, steps = run.step, run.status.get("steps")
    return f"{state}, step {step:,} of {steps:,}" if _number(step) and _number(steps) else state


def _loading(run: History) -> Part | None:
    folder = timm_folder(run.folder)
    if folder is None:
        return None
    config = json.loads((folder / "config.json").read_text())
    # timm's distilled DeiTs read two tokens that nothing trains
    distilled = "_distilled_" in config.get("architecture", "")
    class_token = config.get("global_pool") == "token" and not distilled  # of runs of earlier releases
    given = "its class token" if class_token else "the mean of its patch tokens"
    read = "model.eval().forward_features(images)[:, 2:].mean(1)" if distilled else "model.eval()(images)"
    code = (
        "import timm\n\n"
        f"model = timm.create_model({'local-dir:' + str(folder)!r}, pretrained=True)\n"
        "# images (N, channels, height, width), normalised with model.pretrained_cfg['mean'] and ['std']\n"
        f"embedding = {read}  # (N, width): of a ViT, {given}\n"
    )
    text = f"A plain timm folder; mpp export {run.folder} OUT copies and verifies it."
    return Part("load", "Load the encoder", [text], code=code)


# ---- several runs ----------------------------------------------------------------------------------------------------


def _side_by_side(runs: list[History], parts_of: dict[Path, list[History]]) -> Part:
    names = _names(runs)
    table = Part("compare", "Side by side")
    rows = [["state", *(_state(r) for r in runs)]]
    for label, value in (
        ("skill", lambda r: _short(r.last("skill"))),
        ("loss", lambda r: _short(r.last("loss"))),
        ("linear probe", lambda r: _percent(r.last("probe_accuracy"))),
        ("effective rank of the features", lambda r: _short(r.last("feature_rank"))),
        ("images seen", lambda r: f"{r.metrics[-1]['seen']:,}" if r.metrics else "–"),
        ("training", lambda r: _duration(r.hours()[-1]) if r.metrics else "–"),
        ("images a second", lambda r: _short(r.last("images_per_s"))),
    ):
        of_run: Callable[[History], str] = value
        cells = [of_run(r) for r in runs]
        if any(c != "–" for c in cells):
            rows.append([label, *cells])
    metrics: dict[str, list[str]] = {}
    for i, run in enumerate(runs):
        for other in parts_of[run.folder]:
            for key, shown in _headline(other):
                metrics.setdefault(key, ["–"] * len(runs))[i] = shown
    rows += [[key, *cells] for key, cells in metrics.items()]
    table.tables.append(Table(["", *names], rows))
    return table


def _keys_that_differ(runs: list[History]) -> Part:
    names = _names(runs)
    changed = settings_that_differ(runs)
    keys = Part("keys", "Recipe keys that differ")
    if changed:
        keys.tables.append(Table(["key", *names], [[key, *values] for key, values in changed]))
    else:
        keys.text.append("None: the recipes are the same.")
    return keys


def _curves_of_all(runs: list[History], pictures: Pictures) -> Part:
    names = _names(runs)
    curves = Part(
        "curves", "Curves", ["Over steps, images and hours of training: which is fair depends on what costs."]
    )
    for key, title in (("loss", "Loss"), ("skill", "Skill"), ("probe_accuracy", "Linear probe, accuracy")):
        for axis in ("step", "images", "hours"):
            lines: list[Line] = []
            for name, run in zip(names, runs, strict=True):
                points = [
                    (_along(axis, m, h), m[key])
                    for m, h in zip(run.metrics, run.hours(), strict=True)
                    if _number(m.get(key))
                ]
                if points:
                    later = len(lines) >= len(plots.COLOURS)  # the colours come again, dashed
                    lines.append(Line(name, [x for x, _ in points], [y for _, y in points], dashed=later))
            if len(lines) > 1:
                alt = "; ".join(f"{line.name} {_short(line.y[-1])} at last" for line in lines)
                figure = plots.lines({f"{title} over {axis}": lines}, xlabel=axis, width=3.6, height=2.5)
                curves.pictures.append(pictures.plot(figure, f"{title} over {axis}: {alt}."))
    return curves


def _along(axis: str, m: dict[str, Any], hours: float) -> float:
    return {"step": float(m["step"]), "images": float(m["seen"]), "hours": hours}[axis]


def _headline(run: History) -> list[tuple[str, str]]:
    """The figures of a fine-tune or an evaluation, for a row of a table."""
    if run.job == "evaluate":
        own = run.result.get("best", {}).get("encoder", {})
        return [(f"{probe} probe", _percent(s["accuracy"])) for probe, s in own.items()]
    found = []
    for v in run.result.get("verdicts", []):
        labels = f", {v['labels_per_class']} labels a class" if v.get("labels_per_class") else ""
        found += [(f"fine-tuned{labels}", _estimate(v["score"].get("pretrained")))]
        found += [(f"gain over scratch{labels}", _estimate(v.get("gain"), points=True))]
    return found


def _names(runs: Sequence[History]) -> list[str]:
    """Folder names with their parents', as many as tell them apart."""
    for depth in range(2, 6):
        names = ["/".join(run.folder.absolute().parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]


# ---- the page --------------------------------------------------------------------------------------------------------


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write a page about runs: one HTML file without scripts, links or anything from a network, 5 MB at most.

    folders: a pretraining run with the fine-tunes and evaluations of its encoder; or several pretraining runs, which
    are compared. An evaluation inside a run's folder comes with it. out: default report.html in the first run.
    UserError where a folder is no run, or `out` cannot be written.
    """
    runs = [read_run(f) for f in {Path(f).resolve(): str(f) for f in reversed(folders)}.values()][::-1]
    given = {r.folder.resolve() for r in runs}
    for run in list(runs):
        inner = run.folder / "evaluation"
        if run.job == "pretrain" and (inner / "recipe.yaml").exists() and inner.resolve() not in given:
            runs.append(read_run(inner))
    path = Path(out) if out is not None else runs[0].folder / FILE
    scale = 1.0
    while True:
        page = _page(runs, Pictures(scale)).encode("utf-8", "xmlcharrefreplace")
        if len(page) <= MOST_BYTES or scale < LEAST_SCALE:
            break
        scale *= 0.7
    if len(page) > MOST_BYTES:
        raise UserError(f"{path}: {len(page) / 1e6:.1f} MB, allowed are {MOST_BYTES / 1e6:.0f}; give fewer runs")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(page)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    return path


def _attempted(make: Callable[..., Part | None], *given: Any) -> Part | None:
    """A part that damaged records make impossible says so; the others stand."""
    try:
        return make(*given)
    except DAMAGED as error:
        name = make.__name__.strip("_")
        text = f"The records cannot be read: {type(error).__name__}: {one_line(error)}"
        which = "-".join(str(g) if isinstance(g, str) else g.name for g in given if isinstance(g, str | History))
        return Part(f"{name}-{which}", f"{name.replace('_', ' ').capitalize()}: damaged records", [text])


def _page(runs: list[History], pictures: Pictures) -> str:
    pretrained = [r for r in runs if r.job == "pretrain"]
    others = [r for r in runs if r.job != "pretrain"]
    parts: list[Part] = []

    def add(make: Callable[..., Part | None], *given: Any, **renamed: str) -> None:
        found = _attempted(make, *given)
        if found is not None:
            for key, value in renamed.items():
                setattr(found, key, value)
            parts.append(found)

    subject = pretrained[0] if len(pretrained) == 1 else None
    if len(pretrained) > 1:
        of_run = {r.folder: [o for o in others if _reads(o, r)] for r in pretrained}
        add(_side_by_side, pretrained, of_run)
        add(_keys_that_differ, pretrained)
        add(_curves_of_all, pretrained, pictures)
        for run, name in zip(pretrained, _names(pretrained), strict=True):
            title = f"Reconstructions through training: {name}"
            add(_reconstructions, run, pictures, id=f"reconstructions-{name}", title=title)
    elif subject:
        add(_curves, subject, pictures)
        add(_reconstructions, subject, pictures)
    for run in others:
        add(_finetune if run.job == "finetune" else _evaluation, run, pictures)
        parts[-1].text += [text for other in others if (text := _better_frozen(run, other))]
        if subject and run.recipe.get("encoder") != "scratch" and not _reads(run, subject):
            parts[-1].text.insert(0, f"Not this run's encoder, but {run.recipe.get('encoder')}.")
    if subject:
        add(_inspection, subject, pictures)
        add(_loading, subject)
        add(_what_was_run, subject)
    names = _names(runs)
    seen: list[tuple[str, Symptom]] = [
        (name if len(runs) > 1 else "", s) for run, name in zip(runs, names, strict=True) for s in symptoms(run)
    ]
    title = ", ".join(_names(pretrained or runs))
    if len(pretrained) > 1:
        title = f"Comparison of {title}"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("mpp").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        title=title,
        lead=_lead(subject, [o for o in others if subject and _reads(o, subject)]),
        numbers=_key_numbers(subject) if subject else [],
        looked_for=_looked_for(runs),
        symptoms=seen,
        parts=parts,
        others=[(_attempted(_what_was_run, r, f"run-{i}"), names[i]) for i, r in enumerate(runs) if r is not subject],
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def _reads(other: History, run: History) -> bool:
    """Whether a fine-tune or an evaluation is of this run's encoder, in its folder or as an export with its weights."""
    made_with = other.made_with()
    if made_with is None:
        return False
    weights = _weights(run.folder)
    return made_with.resolve() == run.folder.resolve() or (weights is not None and _weights(made_with) == weights)


def _weights(source: Path) -> str | None:
    """Checksum of a run's or an export's encoder, as its export states it."""
    folder = timm_folder(source)
    try:
        return str(json.loads((folder / "export.json").read_text())["weights_sha256"]) if folder else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _looked_for(runs: Sequence[History]) -> list[str]:
    """What the records allowed to look for."""
    found = []
    if any(r.series("loss")[1] for r in runs if r.job == "pretrain"):
        found += ["a loss that does not fall or rises again", "waiting for images", "unreadable images"]
    if any(r.series("skill")[1] for r in runs):
        found.append("a skill below the trivial prediction")
    if any(k.startswith(("feature_rank", "target_rank")) for r in runs for k in r.latest):
        found.append("collapse of features or targets")
    if any(r.data.get("val_in_train") for r in runs):
        found.append("validation images among training images")
    if any(r.result.get("verdicts") for r in runs):
        found.append("a gain from pretraining that is not shown")
    if any(r.job == "evaluate" and r.result.get("best") for r in runs):
        found.append("features no better than their controls")
    return found


def _lead(run: History | None, others: list[History]) -> str:
    """One sentence: what was done and what came of it."""
    if run is None:
        return ""
    target, mask = run.setting("target.name", "?"), run.setting("mask.ratio")
    hidden = f"{mask:.0%} of each image hidden" if _number(mask) else "parts of each image hidden"
    text = f"{run.setting('encoder.name', '?')}, pretrained with {hidden} and {target} as the target: {_state(run)}."
    for other in others:
        try:
            text += _gained(other)
        except DAMAGED:
            continue  # its own part says so
    return text


def _better_frozen(finetune: History, evaluation: History) -> str:
    """Where a probe of the same encoder, from the same labels, does better than the fine-tune: a sentence."""
    alike = finetune.job == "finetune" and evaluation.job == "evaluate" and _reads_the_same(finetune, evaluation)
    if not alike or finetune.setting("frozen") == 1 or finetune.result.get("metric") != "accuracy":
        return ""
    try:
        (verdict,) = finetune.result["verdicts"]
        tuned = verdict["score"]["pretrained"]
        probes = evaluation.result["best"]["encoder"]
        name, best = max(((name, found["accuracy"]) for name, found in probes.items()), key=lambda item: item[1])
        if not _number(tuned["half_width"]) or best <= tuned["mean"] + tuned["half_width"]:  # one seed says little
            return ""
    except DAMAGED:  # or not finished
        return ""
    other = "" if finetune.recipe.get("lora") else ", lora: {}"
    return (
        f"The {name} probe of the frozen encoder does better, {_percent(best)} ({evaluation.folder}): fine-tuning "
        f"loses more than it adds. A lower optim.base_lr{other} or frozen: 0.5 may keep it; frozen: 1 fits the head."
    )


def _reads_the_same(finetune: History, evaluation: History) -> bool:
    """Whether both are of one encoder and of all labels of the same places: parts of them are drawn by seeds."""
    keys = ("train", "val", "labels_per_class", "fraction")
    data = [[run.setting(f"data.{key}") for key in keys] for run in (finetune, evaluation)]
    weights = [_weights(source) if (source := run.made_with()) else None for run in (finetune, evaluation)]
    same_encoder = weights[0] is not None and weights[0] == weights[1]
    return same_encoder and data[0] == data[1] and data[0][2:] == [None, None]


def _gained(other: History) -> str:
    """What a fine-tune says of pretraining, in a sentence; "" for other jobs."""
    text = ""
    for v in other.result.get("verdicts", [])[-1:]:
        if v.get("gain"):
            text += f" Fine-tuned, {_estimate(v['score'].get('pretrained'))}; from scratch "
            text += f"{_estimate(v['score'].get('scratch'))}; gain {_estimate(v['gain'], points=True)}"
            text += f"; {conclude(stored_estimate(v['gain'])).text}."
    return text
