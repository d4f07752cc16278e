"""Turn a validation error into one line: place, key, what is wrong, what to write."""

from __future__ import annotations

import difflib
import inspect
import re
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from mpp.recipe.flat import JsonObject
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
"""Required keys that recipes for one's own images leave open, and what to write. Those of a section that a recipe may
lack are required where it has the section."""


def error_line(error: Any, job: type[Job], places: dict[Key, str], source: str) -> str:
    key, fields = _without_tags(tuple(error["loc"]), job)
    kind, context, got = error["type"], error.get("ctx", {}), error.get("input")
    place = next((places[key[:n]] for n in range(len(key), -1, -1) if key[:n] in places), source)
    if kind == "extra_forbidden":
        # a slip of the pen, or a key that belongs elsewhere
        here = difflib.get_close_matches(str(key[-1]), fields, 1, 0.6)
        close = [dotted((*key[:-1], here[0]))] if here else [k for k in leaves(job) if k.split(".")[-1] == key[-1]]
        hint = f" Did you mean '{close[0]}'?" if close and close[0] != dotted(key) else ""
        return f"{place}: {dotted(key)}: unknown key.{hint} Allowed here: {', '.join(sorted(fields))}"
    if kind == "missing":
        example = f"; add {dotted(key)}={EXAMPLES[dotted(key)]}" if dotted(key) in EXAMPLES else ""
        return f"{place}: {dotted(key)}: required{example}"
    if kind in ("union_tag_invalid", "literal_error"):
        choices = str(context.get("expected_tags") or context.get("expected", ""))
        words = re.findall(r"'([^']*)'", choices) or re.split(r", | or ", choices)
        name = dotted((*key, "name")) if kind == "union_tag_invalid" else dotted(key)
        place = places.get((*key, "name"), place)
        value = context.get("tag", got)
        close = [] if str(value) in words else difflib.get_close_matches(str(value), words, 1, 0.5)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return f"{place}: {name}: no such choice; got {value!r}.{hint} Allowed: {', '.join(words)}"
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
    bounds = _bounds(key, job)
    if kind in limits and bounds:
        message = "must be " + bounds
    elif kind in ("tuple_type", "list_type"):
        message = "must be one number or [height, width]" if key[-1] == "image_size" else "must be a list, [a, b, …]"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "must be keys with values" + (f": {', '.join(sorted(set(fields)))}" if fields else "")
    else:
        message = message[0].lower() + message[1:]
    return f"{place}: {dotted(key)}: {message}; got {got!r}"


def _section_types(annotation: Any) -> list[type[BaseModel]]:
    """The recipe sections inside an annotation: unions and Annotated are looked through."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [t for a in get_args(annotation) for t in _section_types(a)]


def _without_tags(loc: Key, job: type[BaseModel]) -> tuple[Key, list[str]]:
    """pydantic puts the chosen component's name into the path; take it out. Also the keys allowed at the end."""
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
            sections = [t for f in inner for t in _section_types(f.annotation)]
        elif part != loc[-1] and not isinstance(part, int):
            key.pop()  # a branch label of a plain union
    return tuple(key), [name for s in sections for name in s.model_fields]


def leaves(job: type[BaseModel], prefix: str = "") -> JsonObject:
    """Every dotted key of a recipe and its field."""
    fields: JsonObject = {}
    for name, f in job.model_fields.items():
        sections = _section_types(f.annotation)
        for s in sections:
            fields.update(leaves(s, f"{prefix}{name}."))
        if not sections:
            fields[prefix + name] = f
    return fields


def _bounds(key: Key, job: type[BaseModel]) -> str:
    """The numeric limits of a key in words: "> 0 and < 1"."""
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
