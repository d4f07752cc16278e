"""Find components by name: the name in a recipe is the name of the file, and the file holds the class.

`component("mask", "block")` is the class `BlockMask` in `mpp/objective/masks/block.py`. To add a component, add a file:
its name, class and recipe keys follow from it.

The recipe keys of a component are read from the source of its file, without importing it. So a recipe can be checked
without torch.
"""

from __future__ import annotations

import ast
import importlib
import re
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from mpp.errors import UserError
from mpp.recipe import values
from mpp.recipe.flat import JsonMapping, JsonObject

PACKAGE = Path(__file__).resolve().parent.parent


class Kind(NamedTuple):
    """A kind of component."""

    folder: str
    """Folder below mpp/ with one file for each component."""
    suffix: str
    """Last word of the class names."""
    base: str
    """Name of the class that all components of the kind derive from."""
    states: tuple[str, ...] = ()
    """Class attributes that each component must set to a plain value. They are used to check recipes."""


KINDS = {
    "mask": Kind("objective/masks", "Mask", "Mask"),
    "corruption": Kind("objective/corruptions", "Corruption", "Corruption", ("mechanism", "hidden_enter")),
    "target": Kind("objective/targets", "Target", "Target", ("of",)),
    "loss": Kind("objective/losses", "Loss", "Loss", ("of",)),
    "head": Kind("objective/heads", "Head", "Head", ("needs_hidden_tokens", "reads_visible")),
    "task": Kind("finetuning/tasks", "Task", "Task", ("labels", "headline")),
    "labels": Kind("finetuning/labels", "Labels", "LabelKind"),
}
"""Every kind of component by the recipe key that names it. Labels have no recipe key; tasks name them."""
RECIPE_KEYS = tuple(kind for kind in KINDS if kind != "labels")


class Argument(NamedTuple):
    """A keyword-only constructor argument of a component, which is a recipe key."""

    annotation: Any
    default: Any
    """Default value; `REQUIRED` if there is none."""
    description: str
    """Text in the docstring of the class; empty if there is none."""


REQUIRED: Any = ...
ARGS = "Args:\n"
"""Line of a docstring above its section of arguments."""


@dataclass(frozen=True)
class Declaration:
    """The name, docstring, arguments and constants of a component's class, read from its source."""

    class_name: str
    doc: str
    """The docstring without its section of arguments."""
    arguments: Mapping[str, Argument]
    constants: JsonMapping
    """Attributes of the class that are plain values, such as `of` and `labels`."""


def is_component_key(key: str) -> bool:
    """Return whether a recipe key, or its last part, names a component."""
    return key.split(".")[-1] in RECIPE_KEYS


@cache
def names(kind: str) -> tuple[str, ...]:
    """Return the names of every component of a kind, sorted."""
    files = (PACKAGE / KINDS[kind].folder).glob("*.py")
    return tuple(sorted(path.stem for path in files if path.stem != "__init__"))


@cache
def declaration(kind: str, name: str) -> Declaration:
    """Read what a component declares from its source.

    Raises:
        KeyError: If there is no such file.
        UserError: If the file lacks the class or one of the attributes that it must set, or if an annotation is not
            from `mpp.recipe.values` or `typing`.
    """
    path = _file(kind, name)
    expected = _class_name(kind, name)
    module = ast.parse(path.read_text(encoding="utf-8"))
    cls = next((n for n in module.body if isinstance(n, ast.ClassDef) and n.name == expected), None)
    if cls is None:
        raise UserError(f"{_shown(path)}: class {expected} is missing")
    constructor = next((n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    doc, _, of_arguments = (ast.get_docstring(cls) or "").partition(ARGS)
    known, described, arguments = _types_of(module), _described(of_arguments), dict[str, Argument]()
    if constructor is not None:
        for argument, default in zip(constructor.args.kwonlyargs, constructor.args.kw_defaults, strict=True):
            place = f"{_shown(path)}:{argument.lineno}: {argument.arg}"
            annotation = _evaluate(argument.annotation, known, place)
            value = REQUIRED if default is None else _evaluate(default, known, place)
            arguments[argument.arg] = Argument(annotation, value, described.get(argument.arg, ""))
    constants: JsonObject = {}
    for node in cls.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name):
            with suppress(ValueError):  # not a plain value
                constants[target.id] = ast.literal_eval(node.value)
    for required in KINDS[kind].states:
        if required not in constants:
            raise UserError(f"{_shown(path)}: class {expected} must set `{required}` to a plain value")
    return Declaration(expected, doc.strip(), arguments, constants)


def _described(of_arguments: str) -> dict[str, str]:
    """Return the text of each argument in the `Args:` section of a docstring, on one line each."""
    texts: dict[str, str] = {}
    name = ""
    for line in of_arguments.splitlines():
        if found := re.match(r"    (\w+): (.*)", line):
            name, texts[found[1]] = found[1], found[2]
        elif line.startswith("        ") and name:
            texts[name] += f" {line.strip()}"
    return texts


def named_with(kind: str, **constants: object) -> list[str]:
    """Return the names of the components of a kind whose class attributes have these values."""
    return [name for name in names(kind) if constants.items() <= declaration(kind, name).constants.items()]


def component(kind: str, name: str) -> Any:
    """Import the class of a component.

    Raises:
        KeyError: If there is no such file.
        UserError: If the file lacks the class, or if the class does not derive from the base class of its kind.
    """
    path, expected = _file(kind, name), _class_name(kind, name)
    module = importlib.import_module("mpp." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    try:
        cls = getattr(module, expected)
    except AttributeError as error:
        raise UserError(f"{_shown(path)}: class {expected} is missing") from error
    if KINDS[kind].base not in {base.__name__ for base in cls.__mro__}:
        raise UserError(f"{_shown(path)}: class {expected} must derive from {KINDS[kind].base}")
    return cls


def build(key: str, section: BaseModel, *args: object) -> Any:
    """Build the component that a section of a recipe names.

    Args:
        key: Dotted key of the section, such as `head` or `extra_targets.0.head`.
        section: The section: `name` and the keyword arguments of the component.
        args: Positional arguments, which the toolkit gives.

    Raises:
        UserError: If the constructor raises ValueError.
    """
    chosen = section.model_dump()
    cls = component(key.split(".")[-1], chosen.pop("name"))
    try:
        return cls(*args, **chosen)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error


def _file(kind: str, name: str) -> Path:
    if name not in names(kind):
        raise KeyError(f"{KINDS[kind].folder} has no '{name}'; it has {', '.join(names(kind))}")
    return PACKAGE / KINDS[kind].folder / f"{name}.py"


def _class_name(kind: str, name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_")) + KINDS[kind].suffix


def _shown(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def _types_of(module: ast.Module) -> JsonObject:
    """Return the types that annotations may use, by name.

    They come from `typing`, from `mpp.recipe.values`, and from assignments in the file that combine these.
    """
    known = {**vars(typing), **vars(values)}
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            with suppress(NameError, AttributeError):  # the assignment uses other names, so it is not such a type
                known[node.targets[0].id] = _evaluate(node.value, known, "")
    return known


def _evaluate(expression: ast.expr | None, known: JsonObject, place: str) -> Any:
    """Evaluate an annotation or a default.

    Raises:
        NameError: If the expression uses an unknown name and no place is given.
        UserError: If the expression is missing, or uses an unknown name and a place is given.
    """
    if expression is None:
        raise UserError(f"{place}: a recipe key needs an annotation")
    code = compile(ast.Expression(expression), place, "eval")
    try:
        return eval(code, known)
    except NameError as error:
        if not place:
            raise
        raise UserError(f"{place}: {error}; recipe keys have types of mpp.recipe.values or typing") from error
