"""Write a report on one run, or a comparison of several runs, as one self-contained HTML file.

Reports are made only from the records in run folders; nothing is loaded, trained or downloaded. This package determines
the content of the page, report.html.j2 its appearance.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from mpp.errors import UserError, one_line
from mpp.reporting.compare import curves_of_all, keys_that_differ, names_of_runs, side_by_side
from mpp.reporting.parts import (
    Part,
    curves_part,
    estimate_text,
    evaluation_part,
    finetune_part,
    inspection_part,
    key_numbers,
    loading_code,
    number_text,
    percent_text,
    reconstructions_part,
    state_of_run,
    what_was_run,
)
from mpp.reporting.pictures import LEAST_SCALE, Pictures
from mpp.runs.history import History, read_run
from mpp.runs.records import timm_folder
from mpp.runs.symptoms import DAMAGED, Symptom, symptoms
from mpp.runs.verdict import compare_approaches, conclude, stored_estimate

FILE = "report.html"
TEMPLATE = "report.html.j2"
MOST_BYTES = 5_000_000
"""Largest size of a page. Pictures are shrunk until the page fits."""


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write a report on runs: one HTML file of at most 5 MB, without scripts, links or anything from a network.

    Args:
        folders: A pretraining run with the fine-tunes and evaluations of its encoder, or several pretraining runs to
            compare. An evaluation inside a run's folder is included.
        out: File to write. None means report.html in the first run.

    Returns:
        The file.

    Raises:
        UserError: If a folder is not a run folder, the page is too large, or `out` cannot be written.
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
        raise UserError(f"{path}: {len(page) / 1e6:.1f} MB; expected at most {MOST_BYTES / 1e6:.0f}; give fewer runs")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(page)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    return path


def _attempted(make: Callable[..., Part | None], *given: object) -> Part | None:
    """Return the part that `make` builds. If the records are damaged, return a part that reports this instead.

    The other parts of the page are not affected.
    """
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

    def add(make: Callable[..., Part | None], *given: object, **renamed: str) -> None:
        part = _attempted(make, *given)
        if part is not None:
            for key, value in renamed.items():
                setattr(part, key, value)
            parts.append(part)

    subject = pretrained[0] if len(pretrained) == 1 else None
    if len(pretrained) > 1:
        of_run = {r.folder: [o for o in others if _reads(o, r)] for r in pretrained}
        add(side_by_side, pretrained, of_run)
        add(keys_that_differ, pretrained)
        add(curves_of_all, pretrained, pictures)
        for run, name in zip(pretrained, names_of_runs(pretrained), strict=True):
            title = f"Reconstructions through training: {name}"
            add(reconstructions_part, run, pictures, id=f"reconstructions-{name}", title=title)
    elif subject:
        add(curves_part, subject, pictures)
        add(reconstructions_part, subject, pictures)
    for run in others:
        add(finetune_part if run.job == "finetune" else evaluation_part, run, pictures)
        parts[-1].text += [text for other in others if (text := _better_frozen(run, other))]
        if subject and run.recipe.get("encoder") != "scratch" and not _reads(run, subject):
            parts[-1].text.insert(0, f"Not this run's encoder, but {run.recipe.get('encoder')}.")
    if subject:
        add(inspection_part, subject, pictures)
        add(loading_code, subject)
        add(what_was_run, subject)
    names = names_of_runs(runs)
    seen: list[tuple[str, Symptom]] = [
        (name if len(runs) > 1 else "", s) for run, name in zip(runs, names, strict=True) for s in symptoms(run)
    ]
    title = ", ".join(names_of_runs(pretrained or runs))
    if len(pretrained) > 1:
        title = f"Comparison of {title}"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("mpp.reporting").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        title=title,
        lead=_lead(subject, [o for o in others if subject and _reads(o, subject)]),
        numbers=key_numbers(subject) if subject else [],
        looked_for=_looked_for(runs),
        symptoms=seen,
        parts=parts,
        others=[(_attempted(what_was_run, r, f"run-{i}"), names[i]) for i, r in enumerate(runs) if r is not subject],
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def _reads(other: History, run: History) -> bool:
    """Return whether a fine-tune or evaluation reads this run's encoder, from its folder or an export of it."""
    made_with = other.made_with()
    if made_with is None:
        return False
    weights = _weights(run.folder)
    return made_with.resolve() == run.folder.resolve() or (weights is not None and _weights(made_with) == weights)


def _weights(source: Path) -> str | None:
    """Return the checksum of the weights that export.json of a run's or an export's encoder records, or None."""
    folder = timm_folder(source)
    try:
        return str(json.loads((folder / "export.json").read_text())["weights_sha256"]) if folder else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _looked_for(runs: Sequence[History]) -> list[str]:
    """Return the kinds of symptoms that the records allowed to check."""
    symptoms = []
    if any(r.series("loss")[1] for r in runs if r.job == "pretrain"):
        symptoms += ["a loss that does not fall or rises again", "waiting for images", "unreadable images"]
    if any(r.series("skill")[1] for r in runs):
        symptoms.append("a skill below the trivial prediction")
    if any(k.startswith(("feature_rank", "target_rank")) for r in runs for k in r.latest):
        symptoms.append("collapse of features or targets")
    if any(r.data.get("val_in_train") for r in runs):
        symptoms.append("validation images among training images")
    if any(r.result.get("verdicts") for r in runs):
        symptoms.append("a gain from pretraining that is not shown")
    if any(r.job == "evaluate" and r.result.get("best") for r in runs):
        symptoms.append("features no better than their controls")
    return symptoms


def _lead(run: History | None, others: list[History]) -> str:
    """Return the first lines of the page: how the encoder was pretrained and what its fine-tunes showed."""
    if run is None:
        return ""
    target, mask = run.setting("target.name", "?"), run.setting("mask.ratio")
    hidden = f"{mask:.0%} of each image hidden" if number_text(mask) else "parts of each image hidden"
    text = (
        f"{run.setting('encoder.name', '?')}, pretrained with {hidden} and {target} as the target: {state_of_run(run)}."
    )
    for other in others:
        try:
            text += _gained(other)
        except DAMAGED:
            continue  # its own part reports the damage
    return text


def _better_frozen(finetune: History, evaluation: History) -> str:
    """Return a sentence if a probe of the same encoder on the same labels beats the fine-tune; else ""."""
    alike = finetune.job == "finetune" and evaluation.job == "evaluate" and _reads_the_same(finetune, evaluation)
    if not alike or finetune.setting("frozen") == 1 or finetune.result.get("metric") != "accuracy":
        return ""
    try:
        (verdict,) = finetune.result["verdicts"]
        tuned = verdict["score"]["pretrained"]
        probes = evaluation.result["best"]["encoder"]
        name, best = max(((name, score["accuracy"]) for name, score in probes.items()), key=lambda item: item[1])
        if not number_text(tuned["half_width"]) or best <= tuned["mean"] + tuned["half_width"]:  # nan for one seed
            return ""
    except DAMAGED:  # or the run is not finished
        return ""
    other = "" if finetune.recipe.get("lora") else ", lora: {}"
    return (
        f"The {name} probe of the frozen encoder does better, {percent_text(best)} ({evaluation.folder}): fine-tuning "
        f"loses more than it adds. A lower optim.base_lr{other} or frozen: 0.5 may keep it; frozen: 1 fits the head."
    )


def _reads_the_same(finetune: History, evaluation: History) -> bool:
    """Return whether both runs use the same encoder and all labels of the same data.

    Subsets of labels are drawn by seeds, so they are not the same.
    """
    keys = ("train", "val", "labels_per_class", "fraction")
    data = [[run.setting(f"data.{key}") for key in keys] for run in (finetune, evaluation)]
    weights = [_weights(source) if (source := run.made_with()) else None for run in (finetune, evaluation)]
    same_encoder = weights[0] is not None and weights[0] == weights[1]
    return same_encoder and data[0] == data[1] and data[0][2:] == [None, None]


def _gained(other: History) -> str:
    """Return sentences about what a fine-tune shows of pretraining; "" for other jobs."""
    text = ""
    for v in other.result.get("verdicts", [])[-1:]:
        if v.get("gain"):
            text += f" Fine-tuned, {estimate_text(v['score'].get('pretrained'))}; from scratch "
            text += f"{estimate_text(v['score'].get('scratch'))}; gain {estimate_text(v['gain'], points=True)}"
            text += f"; {conclude(stored_estimate(v['gain'])).text}."
        score = {approach: stored_estimate(value) for approach, value in v["score"].items()}
        if compared := compare_approaches(score):
            text += f" {compared.text[0].upper()}{compared.text[1:]}."
    return text
