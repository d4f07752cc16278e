"""Sections of a model card about the encoder's run: data, recipe, cost, probes. Only the run's records are used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mpp.encoders.resolve import stored_recipe
from mpp.errors import UserError, without_secrets
from mpp.evaluation.probes import PROTOCOL
from mpp.recipe.flat import JsonObject
from mpp.runs.history import History, read_run

PRETRAINING = (
    "encoder.name",
    "data.image_size",
    "mask",
    "corruption",
    "target",
    "loss",
    "head",
    "predict_fraction",
    "agreement",
)
FINETUNING = (
    "encoder",
    "architecture",
    "task",
    "data.image_size",
    "data.labels_per_class",
    "data.fraction",
    "frozen",
    "drop_path_rate",
    "unlabeled",
)
OPTIM = (
    "optim.name",
    "optim.epochs",
    "optim.steps",
    "optim.global_batch_size",
    "optim.base_lr",
    "precision",
    "seed",
    "seeds",
)


def sections(source: str | Path) -> list[tuple[str, str]]:
    """Return the sections, (title, text), for a run or a trial of a fine-tuning run. Empty if the folder is neither."""
    place = Path(source)
    place = place.parent if place.name == "encoder" else place
    if not (place / "status.json").exists():
        return []  # an export, which has a card already
    try:
        run, trial = read_run(place), None
    except UserError:
        try:
            run, trial = read_run(place.parent), place.name
        except UserError:
            return []
        if run.job != "finetune":
            return []
        run = replace(run, recipe=stored_recipe(place / "encoder") or run.recipe)  # approaches differ in some keys
    shown = _pretrained(run) if run.job == "pretrain" else _finetuned(run, trial) if run.job == "finetune" else []
    return [(title, without_secrets(text)) for title, text in shown if text]


def _pretrained(run: History) -> list[tuple[str, str]]:
    data, places = run.data, run.setting("data.shards", [])
    lines = [f"Images without labels from {_list(places)}."]
    if "images" in data:
        lines.append(
            f"{data['images']} for training in {data.get('shards', '?')} shards, {data.get('held_out', 0)} more held "
            f"out to measure the skill. Fingerprint `{str(data.get('fingerprint', ''))[:16]}`."
        )
    if bad := run.last("skipped_images"):
        lines.append(f"{int(bad)} could not be read.")
    probes = []
    if (skill := run.last("skill")) is not None:
        probes.append(
            f"Skill on held-out images: {skill:.3f} (0: as good as guessing the mean, 1: every hidden patch exactly)."
        )
    if (probed := run.last("probe_accuracy")) is not None:
        probes.append(f"Linear probe while it trained: {probed:.1%}, of the best layer on the images it was judged by.")
    probes += _evaluated(run.folder / "evaluation")
    probes.append("`mpp finetune` measures what it gains on your task, compared with random weights.")
    return [
        ("Data", " ".join(lines)),
        ("Recipe", _table(run, (*PRETRAINING, *OPTIM))),
        ("Cost", _cost(run, run.env)),
        ("Probes", "\n\n".join(probes)),
    ]


def _finetuned(run: History, trial: str | None) -> list[tuple[str, str]]:
    exported = next((t for t in run.trials if t.name == trial), None)
    places = (
        f"Labeled images from {_list(run.setting('data.train', []))}, judged on {_list(run.setting('data.val', []))}."
    )
    return [
        ("Data", places),
        ("Recipe", _table(run, (*FINETUNING, *OPTIM))),
        ("Cost", _cost(exported, run.env) if exported else ""),
    ]


def _evaluated(folder: Path) -> list[str]:
    """Return the scores of `mpp evaluate` and of its controls, as a table and a text. Empty if there are none."""
    try:
        result = read_run(folder).result
        best, chance = result["best"], float(result["chance"])
        probes = list(best["encoder"])
        compared = {"encoder": "this encoder", "random": "at random initialisation", "pixels": "raw pixels"}
        rows = [
            f"| {words} | " + " | ".join(_percent(best.get(name, {}).get(p)) for p in probes) + " |"
            for name, words in compared.items()
        ]
        head = [f"| frozen features | {' | '.join(probes)} |", "|---" * (len(probes) + 1) + "|"]
        last = [f"| the most frequent class | {' | '.join([f'{100 * chance:.1f} %'] * len(probes))} |"]
        protocol = f"Fitted to {result['train_images']} labeled images, judged on {result['val_images']}."
        if "linear" in probes:
            protocol += f" {PROTOCOL[0].upper()}{PROTOCOL[1:]}."
        return ["\n".join([*head, *rows, *last]), protocol]
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return []


def _percent(score: JsonObject | None) -> str:
    return f"{100 * float(score['accuracy']):.1f} %" if score else "–"


def _cost(run: History, env: JsonObject) -> str:
    if not run.metrics:
        return ""
    devices, processes = env.get("devices", []), env.get("processes", 1)
    # env.json only has the devices of one machine. A run on several machines has more.
    kind = f"{processes} process{'es' if processes != 1 else ''}, on {', '.join(sorted(set(map(str, devices)))) or '?'}"
    if devices == ["cpu"]:
        kind += f" ({env.get('torch_threads', '?')} threads each)"
    last, hours = run.metrics[-1], run.hours()[-1]
    took = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    return f"{last['step']} steps, {run.images_seen()} images seen, {took} of training; {kind}."


def _table(run: History, keys: tuple[str, ...]) -> str:
    rows = []
    for key in keys:
        value = run.setting(key)
        if value is None or value == "auto":
            continue
        if isinstance(value, dict):
            rest = ", ".join(f"{k} {v}" for k, v in value.items() if k != "name" and v is not None)
            value = f"{value.get('name', '')}{f' ({rest})' if rest else ''}".strip()
        rows.append(f"| {key} | {value} |")
    return "\n".join(["| key | value |", "|---|---|", *rows, "", "All of it: `recipe.yaml`."])


def _list(places: Any) -> str:
    return ", ".join(f"`{p}`" for p in ([places] if isinstance(places, str) else places)) or "?"
