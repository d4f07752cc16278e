"""Build the parts of a report on one run: key numbers, curves, reconstructions, fine-tunes, probes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import yaml

from mpp.drawing import plots
from mpp.drawing.plots import Level, Line
from mpp.evaluation.probes import ARMS, PROTOCOL
from mpp.recipe.flat import JsonObject
from mpp.reporting.pictures import Picture, Pictures
from mpp.runs import pictures as kept_pictures
from mpp.runs.history import INSPECTION, History, approaches_of_finetune, read_inspection
from mpp.runs.records import timm_folder
from mpp.runs.verdict import (
    APPROACHES,
    Conclusion,
    compare_approaches,
    conclude,
    line_of_scores,
    name_unread,
    stored_cost,
    stored_estimate,
)

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


@dataclass
class Table:
    """A table of text; the first column names each row."""

    head: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass
class Part:
    """A section of the report."""

    id: str
    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    code: str = ""
    folded: list[tuple[str, str]] = field(default_factory=list)
    """(title, preformatted text) of each block that is folded at first"""


def percent_text(value: Any, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %" if number_text(value) else "–"


def number_text(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short_number(value: object) -> str:
    return f"{value:.4g}" if number_text(value) else "–"


def duration(hours: float) -> str:
    minutes = 60 * hours
    return f"{minutes:.1f} minutes" if minutes < 90 else f"{hours:.1f} hours"


def estimate_text(value: JsonObject | None, *, points: bool = False) -> str:
    """Return a mean over seeds with its interval, from an estimate as result.json stores it.

    Args:
        value: The stored estimate. None gives "–".
        points: Whether the value is a difference in percentage points, which is shown with its sign.
    """
    if not value:
        return "–"
    width: Any = value.get("half_width")
    spread = f" ± {100 * width:.1f}" if number_text(width) else ""
    mean = f"{100 * value['mean']:+.1f}" if points else f"{100 * value['mean']:.1f}"
    return f"{mean}{spread} {'points' if points else '%'}"


def key_numbers(run: History) -> list[tuple[str, str]]:
    """Return the key numbers of a run, as (value, description)."""
    numbers = [
        (short_number(run.last("skill")), "skill: 0 is guessing the mean, 1 is perfect"),
        (short_number(run.last("loss")), "loss of the last step"),
    ]
    if run.last("probe_accuracy") is not None:
        before = run.last("probe_at_start")
        start = f", {percent_text(before)} at the start" if before is not None else ""
        numbers.append((percent_text(run.last("probe_accuracy")), f"linear probe while training{start}"))
    hours = run.hours()
    numbers += [
        (f"{run.images_seen():,}" if run.metrics else "–", "images seen"),
        (duration(hours[-1]) if hours else "–", "of training"),
    ]
    return numbers


def curves_part(run: History, pictures: Pictures) -> Part:
    part = Part("curves", "Curves")
    for key, title in CURVES:
        steps, values = run.series(key)
        if len(values) < 2 or (key == "lr" and not any(values)):
            continue
        lines: list[Line | Level] = [Line("", steps, values)]
        alt = f"{title} over steps: {short_number(values[0])} at first, {short_number(values[-1])} at last."
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
            alt = f"{title} over steps: {short_number(values[0])} at first, {short_number(values[-1])} at last."
            figure = plots.lines({title: [Line("", steps, values)]}, xlabel="step", width=3.6, height=2.4)
            part.pictures.append(pictures.plot(figure, alt))
    for what in ("loss", "skill"):
        targets = sorted(k.removeprefix(f"{what}_") for k in run.latest if k.startswith(f"{what}_"))
        lines = [Line(name, *run.series(f"{what}_{name}")) for name in targets if run.series(f"{what}_{name}")[1]]
        if lines:
            title = f"{what.capitalize()} of each target"
            alt = "; ".join(
                f"{line.name} {short_number(line.y[-1])} at last" for line in lines if isinstance(line, Line)
            )
            part.pictures.append(
                pictures.plot(plots.lines({title: lines}, xlabel="step", width=3.6, height=2.4), f"{title}: {alt}.")
            )
    if not part.pictures:
        part.text.append("No curves yet: metrics.jsonl has no two lines.")
    return part


def reconstructions_part(run: History, pictures: Pictures) -> Part | None:
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


def inspection_part(run: History, pictures: Pictures) -> Part | None:
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
        picture = pictures.file(
            run.folder / INSPECTION / f"{name}.png",
            f"{view['title']}: {view['summary']}.",
            caption=view["caption"],
            title=view["title"],
            wide=True,
        )
        if picture:
            part.pictures.append(picture)
    if absent := index.get("absent"):
        part.folded.append(("Not drawn for this encoder", "\n".join(f"{k}: {v}" for k, v in absent.items())))
    return part


def finetune_part(run: History, pictures: Pictures) -> Part:
    recipe = run.recipe
    task = run.setting("task.name", "classify")
    part = Part(f"finetune-{run.name}", f"Fine-tuning: {run.name}")
    data = run.data
    counts = f" of {data['train_images']:,} labeled images, judged on {data['val_images']:,}" if data else ""
    ran = [APPROACHES[approach] for approach in approaches_of_finetune(recipe)]
    how = f"Trained on the same labels: {', '.join(ran)}" if len(ran) > 1 else f"Trained: {ran[0]} alone"
    seeds = recipe.get("seeds", [])
    part.text.append(
        f"{how}{counts}; task {task}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        + ("; intervals are 95 %, over seeds." if len(seeds) > 1 else ".")
    )
    verdicts = run.result.get("verdicts", [])
    if not verdicts:
        done = sum(bool(trial.result) for trial in run.trials)
        part.text.append(f"Not finished: {done} of {len(run.trials)} models begun so far are trained.")
        return part
    scored = list(verdicts[0]["score"])
    metric = METRICS.get(str(run.result.get("metric")), "accuracy")
    part.tables.append(_scores(verdicts, metric))
    for v in verdicts:
        labels = f"{v['labels_per_class']} labels a class: " if len(verdicts) > 1 else ""
        for conclusion in _conclusions(v):
            text = labels + conclusion.text
            part.text.append(f"{text[0].upper()}{text[1:]}.")
    if unread := run.result.get("unread_classes"):
        part.text.append(f"{name_unread(unread)}.")
    if len(verdicts) > 1:
        lines = []
        for approach in scored:
            points = [(float(v["labels_per_class"]), stored_estimate(v["score"][approach])) for v in verdicts]
            lines.append(line_of_scores(approach, points, dashed=approach == "scratch"))
        alt = "; ".join(f"{line.name} from {line.y[0]:.1f} to {line.y[-1]:.1f} %" for line in lines)
        figure = plots.lines({"Label efficiency": lines}, xlabel="labels a class", ylabel=f"{metric}, %", log_x=True)
        part.pictures.append(pictures.plot(figure, f"{metric} against labels a class: {alt}."))
    curves = {}
    for trial in run.trials:
        steps, values = trial.series("loss")
        if len(values) > 1:
            curves[trial.name] = Line(trial.name, steps, values, dashed="scratch" in trial.name)
    if curves and len(curves) <= len(plots.COLOURS):
        alt = "; ".join(f"{name} {short_number(line.y[-1])} at last" for name, line in curves.items())
        figure = plots.lines({"Loss of each model": list(curves.values())}, xlabel="step")
        part.pictures.append(pictures.plot(figure, f"Training loss of each model: {alt}."))
    for trial in run.trials[:2]:
        path = trial.folder / "predictions.png"
        if path.exists() and (shown := pictures.file(path, f"Truth and prediction of {trial.name}", wide=True)):
            shown.title = f"Predictions of {trial.name} on validation images"
            part.pictures.append(shown)
    return part


def _scores(verdicts: list[JsonObject], metric: str) -> Table:
    """Return the table of scores: a row for each approach, or for each number of labels if there are several.

    The rows of approaches include the training time.
    """
    approaches = list(verdicts[0]["score"])
    with_gain = any(v.get("gain") for v in verdicts)
    if len(verdicts) == 1:
        (verdict,) = verdicts
        cost = stored_cost(verdict.get("cost"))
        rows = [
            [approach, estimate_text(verdict["score"][approach]), (cost.text(approach) if cost else "") or "–"]
            for approach in approaches
        ]
        rows += [["gain", estimate_text(verdict["gain"], points=True), ""]] if with_gain else []
        return Table(["", metric, "trained for"], rows)
    rows = []
    for v in verdicts:
        gain = [estimate_text(v.get("gain"), points=True)] if with_gain else []
        rows.append(
            [str(v["labels_per_class"]), *(estimate_text(v["score"].get(approach)) for approach in approaches), *gain]
        )
    head = ["labels a class", *(f"{approach}, {metric}" for approach in approaches), *(["gain"] if with_gain else [])]
    return Table(head, rows)


def _conclusions(verdict: JsonObject) -> list[Conclusion]:
    """Return the conclusions of a verdict: on the gain from pretraining, and on other approaches if there are any."""
    conclusions = [conclude(stored_estimate(verdict["gain"]))] if verdict.get("gain") else []
    score = {approach: stored_estimate(value) for approach, value in verdict["score"].items()}
    if compared := compare_approaches(score):
        conclusions.append(compared)
    return conclusions


def evaluation_part(run: History, pictures: Pictures) -> Part:
    part = Part(f"probes-{run.name}", f"Frozen features: {run.name}")
    best, scores = run.result.get("best", {}), run.result.get("scores", {})
    if not best:
        part.text.append("Not finished yet.")
        return part
    part.text.append(
        f"Probes of the frozen encoder, fitted to {run.result['train_images']:,} labeled images, judged on "
        f"{run.result['val_images']:,}, beside controls. Layer and settings were chosen on training images."
    )
    if any("linear" in arm_scores for arm_scores in best.values()):
        part.text.append(f"{PROTOCOL[0].upper()}{PROTOCOL[1:]}.")
    probes = list(dict.fromkeys(p for arm in best.values() for p in arm))
    rows = [
        [ARMS.get(arm, arm), *(value_at(best[arm].get(p)) for p in probes)] for arm in best
    ] + [["the most frequent class", *[percent_text(run.result.get("chance"))] * len(probes)]]  # fmt: skip
    part.tables.append(Table(["", *probes], rows))
    for probe in probes:
        lines: list[Line | Level] = []
        for arm, arm_scores in scores.items():
            of_layer: dict[int, float] = {}
            for s in arm_scores:
                if s["probe"] == probe and str(s["layer"]).isdigit():
                    layer = int(s["layer"])
                    of_layer[layer] = max(of_layer.get(layer, 0.0), s["accuracy"])
            if of_layer:
                x = sorted(of_layer)
                lines.append(Line(ARMS.get(arm, arm), x, [100 * of_layer[i] for i in x], dashed=arm != "encoder"))
            elif arm_scores and (flat := [s["accuracy"] for s in arm_scores if s["probe"] == probe]):
                lines.append(Level(ARMS.get(arm, arm), 100 * max(flat)))
        if any(isinstance(line, Line) for line in lines):
            title = f"{probe}: accuracy by layer, best pooling, %"
            alt = f"Accuracy of the {probe} probe by layer; at best {value_at(best['encoder'].get(probe))}."
            part.pictures.append(pictures.plot(plots.lines({title: lines}, xlabel="layer", height=3.2), alt))
    return part


def value_at(score: JsonObject | None) -> str:
    if not score:
        return "–"
    where = "" if score["pool"] == "own" else f" (layer {score['layer']}, {score['pool']})"
    return percent_text(score["accuracy"]) + where


def what_was_run(run: History, number: str = "run") -> Part:
    env, data = run.env, run.data
    part = Part(number, "What was run")
    rows = [["state", state_of_run(run)]]
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
        rows.append(["cost", f"{duration(hours[-1])} on {processes} × {devices[0]}, {run.images_seen():,} images"])
    if env:
        rows.append(["machine", f"{env.get('platform', '?')}, {env.get('cpu_count', '?')} CPU cores"])
        rows.append(["packages", ", ".join(f"{k} {v}" for k, v in env.get("packages", {}).items())])
    part.tables.append(Table(["", ""], rows))
    part.folded.append((f"{run.folder}/recipe.yaml", yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)))
    return part


def state_of_run(run: History) -> str:
    state = str(run.status.get("state", "unknown"))
    step, steps = run.step, run.status.get("steps")
    return f"{state}, step {step:,} of {steps:,}" if number_text(step) and number_text(steps) else state


def loading_code(run: History) -> Part | None:
    folder = timm_folder(run.folder)
    if folder is None:
        return None
    config = json.loads((folder / "config.json").read_text())
    # timm's distilled DeiTs pool two tokens that mpp never trains
    distilled = "_distilled_" in config.get("architecture", "")
    class_token = config.get("global_pool") == "token" and not distilled  # in exports of earlier releases
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
