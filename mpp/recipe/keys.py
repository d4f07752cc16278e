"""List every key of a recipe with text, default and allowed values, for the command line and the documentation."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from textwrap import wrap
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mpp.recipe.messages import bounds_of, job_of, section_types
from mpp.recipe.registry import RECIPE_KEYS, declaration
from mpp.recipe.sections import Chosen, Job

FILLED_IN = {("evaluate", "out"): "RUN/evaluation"}
"""Values that jobs use if a required key is left out, by (job, key)."""


@dataclass(frozen=True)
class RecipeKey:
    """A key, as `mpp recipe keys` and the reference show it."""

    name: str
    """Dotted name with sections, such as optim.base_lr."""
    text: str
    """Meaning of the key, with its unit."""
    default: str
    """The default, written as in a recipe. "required" if there is none, empty for a section."""
    allowed: str
    """Choices or limits; empty if the key has none."""
    component: str = ""
    """The component that the key belongs to, such as block for mask.min_block. Empty for all other keys."""

    @property
    def summary(self) -> str:
        """The first sentence of the text."""
        return re.split(r"(?<=\.) (?=[A-Z])", self.text, maxsplit=1)[0]

    @property
    def title(self) -> str:
        """The key with its default, and with the component that it belongs to."""
        of_component = f"  (with {self.name.rpartition('.')[0]}={self.component})" if self.component else ""
        return f"{self.name}: {self.default}{of_component}".removesuffix(": ")


def keys_of(job: type[Job]) -> list[RecipeKey]:
    """Return every key of a job's recipes, in order. Keys of components are repeated for each component."""
    return list(_keys_of(job, ""))


def find_keys(job: type[Job], pattern: str) -> list[RecipeKey]:
    """Return the keys that a pattern selects.

    Args:
        job: Type of the recipes.
        pattern: A key or a section, a pattern such as optim.*, or words that a key contains.
    """
    keys = keys_of(job)
    if any(key.name == pattern for key in keys):
        return [key for key in keys if key.name == pattern or key.name.startswith(f"{pattern}.")]
    if set(pattern) & set("*?["):
        return [key for key in keys if fnmatchcase(key.name, pattern)]
    return [key for key in keys if all(word in key.name for word in pattern.split())]


def explain(job: type[Job], name: str) -> str:
    """Return the full description of a key or a section as text; empty if a job's recipes do not have it."""
    lines = []
    name = re.sub(r"\.args\..*", ".args", name)  # keys below args belong to timm
    keys = keys_of(job)
    for key in (key for key in keys if key.name == name):
        lines += [key.title, *wrap(key.text, 100, initial_indent="    ", subsequent_indent="    ")]
        if key.name in RECIPE_KEYS:
            for choice in key.allowed.split(", "):
                lines += [f"    {choice}: {_summary(key.name, choice)}"]
        elif key.allowed:
            lines += [f"    Allowed: {key.allowed}"]
        elif not key.default:
            lines += [f"    Its keys: {', '.join(k.name for k in keys if k.name.rpartition('.')[0] == name)}"]
    return "\n".join(lines)


def _summary(kind: str, name: str) -> str:
    """Return the first sentence about a component."""
    return declaration(kind, name).doc.partition("\n\n")[0].replace("\n", " ")


def _keys_of(section: type[BaseModel], prefix: str) -> Iterator[RecipeKey]:
    for name, field in section.model_fields.items():
        key, inner = prefix + name, section_types(field.annotation)
        text = field.description or (inspect.getdoc(inner[0]) if inner else "") or ""
        if name in RECIPE_KEYS:
            first = [s for s in inner if not issubclass(s, Chosen)]
            choices = ", ".join(s.model_fields["name"].default for s in inner)
            yield RecipeKey(key, _one_line(text), first[0].model_fields["name"].default, choices)
            for component in inner:
                yield from _of_component(component, key)
        elif inner and get_origin(field.annotation) is tuple:  # a list of sections; keys of its first item are shown
            yield RecipeKey(key, _one_line(text), _default(field), "")
            yield from (k for k in _keys_of(inner[0], f"{key}.0.") if not k.component)
        elif inner:
            is_there = field.is_required() or isinstance(field.default, BaseModel)
            yield RecipeKey(key, _one_line(text), "" if is_there else "null", "")
            yield from _keys_of(inner[0], f"{key}.")
        else:
            default = FILLED_IN.get((job_of(section), name)) or _default(field)
            yield RecipeKey(key, _one_line(text), default, _allowed(field, section, name))


def _of_component(component: type[BaseModel], key: str) -> Iterator[RecipeKey]:
    for name, field in component.model_fields.items():
        if name != "name":
            chosen = component.model_fields["name"].default
            allowed = _allowed(field, component, name)
            yield RecipeKey(f"{key}.{name}", _one_line(field.description or ""), _default(field), allowed, chosen)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "" if value is PydanticUndefined else _written(value)


def _written(value: Any) -> str:
    """Return a value in the notation of a recipe."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_written, value))}]"
    return str(value)


def _allowed(field: FieldInfo, section: type[BaseModel], name: str) -> str:
    choices = [_written(choice) for choice in _choices(field.annotation)]
    return ", ".join(choices) or " and ".join(_limits(bounds_of((name,), section)))


def _limits(bounds: str) -> list[str]:
    """Return the limits that are informative: without those from a billion on, and without "> 0" next to ">="."""
    limits = [limit for limit in bounds.split(" and ") if limit and float(limit.split()[1]) < 1e9]
    return [limit for limit in limits if limit != "> 0" or not any(other.startswith(">= ") for other in limits)]


def _choices(annotation: Any) -> list[Any]:
    """Return the values of every Literal in an annotation."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for inner in get_args(annotation) for choice in _choices(inner)]


def _one_line(text: str) -> str:
    return " ".join(text.split())
