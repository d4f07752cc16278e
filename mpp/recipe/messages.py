"""Turn each validation error into one line: place, key, what is wrong, what to write."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Collection
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from mpp.errors import one_line
from mpp.recipe.flat import JsonObject
from mpp.recipe.registry import RECIPE_KEYS, declaration, names
from mpp.recipe.sections import Job
from mpp.recipe.yaml_reader import Key, dotted

EXAMPLES = {
    "data.shards": "FOLDER",
    "data.train": "FOLDER",
    "data.val": "FOLDER",
    "encoder": "RUN",
    "out": "FOLDER",
    "unlabeled.images": "FOLDER",
    "distill.teacher": "RUN",
}
"""Required keys that recipes for users' own images leave open, and a placeholder for each value. If a recipe may lack a
section, keys of the section are required only in recipes that have it."""


WRITTEN_FOR = {
    ("optim.base_lr",): ("lr", "learning_rate"),
    ("optim.global_batch_size", "data.batch_size"): ("batch_size",),
    ("optim.epochs",): ("num_epochs",),
    ("optim.steps",): ("max_steps",),
    ("optim.warmup_epochs",): ("warmup",),
    ("optim.name",): ("optimizer",),
    ("encoder.name", "encoder"): ("model", "arch", "backbone", "checkpoint"),
    ("encoder.args", "architecture.args"): ("patch_size", "embed_dim", "depth", "num_heads"),
    ("data.image_size",): ("img_size", "resolution"),
    ("data.workers",): ("num_workers",),
    ("data.shards", "data.train"): ("dataset", "data_dir", "images"),
    ("data.labels_per_class",): ("labels",),
    ("mask.ratio",): ("mask_ratio", "masking_ratio"),
    ("head",): ("decoder",),
    ("out",): ("output_dir", "output", "save_dir"),
    ("seed", "seeds"): ("seed",),
    ("precision",): ("amp", "fp16"),
    ("trackers",): ("tracker", "wandb"),
    ("beside",): ("baseline", "compare"),
}
"""Our keys, and what other projects call them. The first key that a job has is suggested."""
SLIPS = {word: keys for keys, words in WRITTEN_FOR.items() for word in words}
"""The name of a key in another project -> our keys for it."""
SLIPPED_SECTIONS = ("data", "optim", "encoder", "architecture")
"""Sections in which an unknown key may stand for a key of another section (see SLIPS)."""
MOST_LISTED = 12
"""Most keys of a section that a message lists if it also suggests a key."""
MAIN_KEYS = {"data": ("data.shards", "data.train"), "encoder": ("encoder.name",)}
"""Keys that are suggested if a section itself is given a value."""


def meant_by(key: Key, allowed: Collection[str], job: type[Job]) -> str | None:
    """Return the key that an unknown key likely stands for; None if no key is similar.

    Args:
        key: The unknown key.
        allowed: Keys of the section that the unknown key is in.
        job: Type of the recipe.
    """
    known, last, section = leaves(job), str(key[-1]), dotted(key[:-1])
    here = [name for meant in SLIPS.get(last, ()) if (name := meant.rpartition(".")[2]) in allowed]
    if section and here:
        return dotted((*key[:-1], here[0], *([last] if here[0] == "args" else [])))
    named = [meant for meant in SLIPS.get(last, ()) if meant in known or meant in job.model_fields]
    if section in ("", *SLIPPED_SECTIONS) and named:
        meant = f"{named[0]}.{last}" if named[0].endswith(".args") else named[0]
        return meant if meant != dotted(key) else None
    is_component = any(part in RECIPE_KEYS for part in key[:-1])  # a component has few keys, and all are its own
    elsewhere = [name for name in known if name.rpartition(".")[2] == last and not name.startswith("extra_targets.")]
    if not is_component and elsewhere and elsewhere[0] != dotted(key):
        return elsewhere[0]
    close = difflib.get_close_matches(last, allowed, 1, 0.75)
    return dotted((*key[:-1], close[0])) if close else None


def _owners(key: Key) -> str:
    """Return a sentence that names the components with a key that the chosen component lacks; "" if none has it."""
    kind = next((str(part) for part in reversed(key[:-1]) if part in RECIPE_KEYS), None)
    if kind is None:
        return ""
    owners = [f"{kind}={name}" for name in names(kind) if key[-1] in declaration(kind, name).arguments]
    if not owners:
        return ""
    several = ", ".join(owners[:-1])
    return f" It belongs to {several} and {owners[-1]}." if several else f" It belongs to {owners[0]}."


def error_line(error: Any, job: type[Job], places: dict[Key, str], source: str) -> str:
    key, fields = _without_tags(tuple(error["loc"]), job)
    kind, context, got = error["type"], error.get("ctx", {}), error.get("input")
    place = next((places[key[:n]] for n in range(len(key), -1, -1) if key[:n] in places), source)
    if kind == "extra_forbidden":
        meant = meant_by(key, fields, job)
        hint = f" Did you mean '{meant}'?" if meant else _owners(key)
        if len(fields) > MOST_LISTED and meant:
            return f"{place}: {dotted(key)}: unknown key.{hint} `mpp recipe keys {job_of(job)}` lists all keys"
        return f"{place}: {dotted(key)}: unknown key.{hint} Known keys: {', '.join(sorted(fields))}"
    if kind == "missing":
        name, known = dotted(key), leaves(job)
        left = [
            k for k in EXAMPLES if k == name or (k.startswith(f"{name}.") and k in known and known[k].is_required())
        ]
        example = f"; add {' '.join(f'{k}={EXAMPLES[k]}' for k in left)}" if left else ""
        return f"{place}: {name}: required{example}"
    if kind in ("union_tag_invalid", "literal_error"):
        choices = str(context.get("expected_tags") or context.get("expected", ""))
        words = re.findall(r"'([^']*)'", choices) or re.split(r", | or ", choices)
        name = dotted((*key, "name")) if kind == "union_tag_invalid" else dotted(key)
        place = places.get((*key, "name"), place)
        value = context.get("tag", got)
        close = [] if str(value) in words else difflib.get_close_matches(str(value), words, 1, 0.5)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return f"{place}: {name}: no such choice; got {value!r}.{hint} Choose from {', '.join(words)}"
    if kind == "value_error" and not key:
        message = str(context["error"])
        at = (message.partition(": ")[0],)
        return f"{places.get((*at, 'name'), places.get(at, source))}: {message}"
    if kind == "value_error" and isinstance(got, dict):
        inner = str(context["error"])
        head, _, rest = inner.partition(": ")
        if rest and re.fullmatch(r"\w+", head):
            inner_key = (*key, head)
            return f"{places.get(inner_key, place)}: {dotted(inner_key)}: {rest}"
        return f"{place}: {dotted(key)}: {inner}"
    limits = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
    message = error["msg"].removeprefix("Value error, ")
    bounds = bounds_of(key, job)
    if kind in limits and bounds:
        message = "must be " + bounds
    elif kind in ("tuple_type", "list_type"):
        message = "must be one number or [height, width]" if key[-1] == "image_size" else "must be a list, [a, b, …]"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "must be keys with values" + (f": {', '.join(sorted(set(fields)))}" if fields else "")
        meant = next((name for name in MAIN_KEYS.get(dotted(key), ()) if name in leaves(job)), None)
        if meant and isinstance(got, str):
            return f"{place}: {dotted(key)}: has keys of its own. Did you mean {meant}={one_line(got)}?"
    else:
        message = message[0].lower() + message[1:]
    return f"{place}: {dotted(key)}: {message}; got {got!r}"


def job_of(job: type[BaseModel]) -> str:
    """Return the name of a recipe's job; "" if the type is only a section."""
    return str(job.model_fields["job"].default) if "job" in job.model_fields else ""


def section_types(annotation: Any) -> list[type[BaseModel]]:
    """Return the types of recipe sections in an annotation, including those inside unions and Annotated."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [t for a in get_args(annotation) for t in section_types(a)]


def _without_tags(loc: Key, job: type[BaseModel]) -> tuple[Key, list[str]]:
    """Remove the names of components, which pydantic adds to the path of an error.

    Returns:
        (the key, the keys that are allowed in its section).
    """
    key: list[str | int] = []
    sections: list[type[BaseModel]] = [job]
    tag = None
    for part in loc:
        names = {s.model_fields["name"].default: s for s in sections if "name" in s.model_fields}
        if len(sections) > 1 and part in names and tag is None:
            sections, tag = [names[part]], part
            continue
        tag = None
        key.append(part)
        inner = [s.model_fields[part] for s in sections if isinstance(part, str) and part in s.model_fields]
        if inner:
            sections = [t for f in inner for t in section_types(f.annotation)]
        elif part != loc[-1] and not isinstance(part, int):
            key.pop()  # the label of a branch of a plain union
    return tuple(key), [name for s in sections for name in s.model_fields]


def leaves(job: type[BaseModel], prefix: str = "") -> JsonObject:
    """Return the fields of a recipe by their dotted keys, without those of sections."""
    fields: JsonObject = {}
    for name, f in job.model_fields.items():
        sections = section_types(f.annotation)
        for s in sections:
            fields.update(leaves(s, f"{prefix}{name}."))
        if not sections:
            fields[prefix + name] = f
    return fields


def bounds_of(key: Key, job: type[BaseModel]) -> str:
    """Return the numeric limits of a key as text, such as "> 0 and < 1"; "" if there are none."""
    field = leaves(job).get(dotted(tuple(k for k in key if isinstance(k, str))))
    if field is None:
        return ""
    operators = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds: list[str] = []

    def walk(metadata: Any) -> None:
        for item in metadata:
            for attribute, operator in operators.items():
                if getattr(item, attribute, None) is not None and not isinstance(item, type):
                    bounds.append(f"{operator} {getattr(item, attribute)}")
            walk(getattr(item, "metadata", ()))

    def annotations(annotation: Any) -> None:
        if get_origin(annotation) is Annotated:
            walk(annotation.__metadata__)
        for a in get_args(annotation):
            annotations(a)

    walk(field.metadata)
    annotations(field.annotation)
    return " and ".join(dict.fromkeys(bounds))
