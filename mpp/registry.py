"""Components by name: the name in a recipe is the file, and the file holds the class.

`component("masks", "block")` is `mpp.masks.block.BlockMask`. Adding a component is adding a file.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from mpp.errors import UserError

SUFFIX = {
    "masks": "Mask",
    "corruptions": "Corruption",
    "targets": "Target",
    "losses": "Loss",
    "heads": "Head",
    "tasks": "Task",
}
"""Folder -> last word of the class names in it."""


def names(folder: str) -> list[str]:
    """Every component of a folder, sorted."""
    package = importlib.import_module(f"mpp.{folder}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def component(folder: str, name: str) -> Any:
    """The class of a component. KeyError for a name that is no file of the folder, UserError for a file without it."""
    if name not in names(folder):
        raise KeyError(f"{folder} has no '{name}'; it has {', '.join(names(folder))}")
    module = importlib.import_module(f"mpp.{folder}.{name}")
    wanted = "".join(word.capitalize() for word in name.split("_")) + SUFFIX[folder]
    if not hasattr(module, wanted):
        raise UserError(f"{module.__file__}: wants a class {wanted}")
    return getattr(module, wanted)


def recipe_arguments(cls: type) -> dict[str, inspect.Parameter]:
    """The keyword-only constructor arguments of a component: its recipe keys. The others the toolkit gives."""
    parameters = inspect.signature(cls, eval_str=True).parameters
    return {n: p for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
