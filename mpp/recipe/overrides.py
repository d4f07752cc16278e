"""Apply presets and the command line's `key=value` arguments to the keys of a recipe."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import yaml

from mpp.errors import UserError
from mpp.recipe.flat import JsonObject
from mpp.recipe.registry import RECIPE_KEYS, is_component_key
from mpp.recipe.yaml_reader import Key, Loader, dotted, parse_yaml

COMMAND_LINE = "command line"
REPLACED = {
    "epochs": ("steps", "min_steps"),
    "steps": ("epochs",),
    "warmup_epochs": ("warmup_steps",),
    "warmup_steps": ("warmup_epochs",),
}
"""Lengths in section `optim`, and the recipe's keys that no longer count if an override gives this length."""
PRESETS, OLD_PRESETS = "presets", "scales"
"""The key with a recipe's named sets of overrides, and its old name."""


def apply_preset(values: JsonObject, places: dict[Key, str], preset: str | None, source: str) -> None:
    """Apply one of the recipe's presets in place, and remove the key `presets`.

    Args:
        values: Keys of the recipe with their values, changed in place.
        places: Place of each key (file:line), changed in place.
        preset: Name of the preset. None means that no preset is applied.
        source: The recipe, for messages.

    Raises:
        UserError: If the recipe has no preset of this name, or if its presets are not valid.
    """
    if OLD_PRESETS in values and PRESETS in values:
        place = places.get((OLD_PRESETS,), source)
        raise UserError(
            f"{place}: {OLD_PRESETS}: is called {PRESETS} now, which is given as well; leave out {OLD_PRESETS}"
        )
    section = OLD_PRESETS if OLD_PRESETS in values else PRESETS
    presets = values.pop(section, None) or {}
    if not isinstance(presets, dict):
        raise UserError(f"{places.get((section,), source)}: {section}: must be names with keys; got {presets!r}")
    for name, chosen in presets.items():
        if not isinstance(chosen, dict) or not all(isinstance(key, str) for key in chosen):
            place = places.get((section, str(name)), source)
            raise UserError(
                f"{place}: {section}.{name}: must be keys with values, such as optim.steps: 3; got {chosen!r}"
            )
    if preset is None:
        return
    if preset not in presets:
        known = f"its presets are {', '.join(map(str, presets))}" if presets else "it has no presets"
        raise UserError(f"--preset {preset}: not in {source}; {known}")
    given_at = {key: places.get((section, preset, key), source) for key in presets[preset]}
    apply_overrides(values, places, presets[preset], given_at)


def apply_overrides(
    values: JsonObject, places: dict[Key, str], overrides: JsonObject, given_at: Mapping[str, str] | None = None
) -> None:
    """Set dotted keys in place. Values that are strings are read as YAML, as on the command line.

    Args:
        values: Keys of the recipe with their values, changed in place.
        places: Place of each key (file:line), changed in place.
        overrides: Dotted keys and their values.
        given_at: Place of each override. None means the command line.

    Raises:
        UserError: If a key cannot be set, or a value is not YAML.
    """
    # The name of a component comes before its keys, in whatever order they were given.
    names_first = sorted(overrides.items(), key=lambda item: item[0].removesuffix(".name") not in RECIPE_KEYS)
    for name, value in names_first:
        *outer, last = name.split(".")
        place = (given_at or {}).get(name, COMMAND_LINE)
        if name == "scale":
            raise UserError(f"{place}: scale: is called preset now")
        if name.split(".")[0] in (PRESETS, OLD_PRESETS):
            raise UserError(f"{place}: {name}: presets can only be changed in the recipe; give the key itself")
        node: Any = values
        key: list[str | int] = []
        for part in outer:
            if isinstance(node, list):  # extra_targets.0.weight
                key.append(_item(f"{place}: {name}", node, part))
                inner = node[int(part)]
            else:
                key.append(part)
                if part not in node:
                    places[tuple(key)] = place
                inner = node.setdefault(part, {})
                if isinstance(inner, str) and is_component_key(part):  # `mask: block` and then mask.ratio=0.5
                    inner = node[part] = {"name": inner}
            if not isinstance(inner, dict | list):
                raise UserError(f"{place}: {name}: {dotted(tuple(key))} has no keys; it is {inner!r}")
            node = inner
        value = os.fspath(value) if isinstance(value, os.PathLike) else _override_value(f"{place}: {name}", value)
        if isinstance(node, list):
            key.append(_item(f"{place}: {name}", node, last))
            node[int(last)] = value
        else:
            if last == "name" and outer and is_component_key(outer[-1]) and node.get("name", value) != value:
                node.clear()  # another component has other keys
            key.append(last)
            same = isinstance(value, str) and is_component_key(last) and isinstance(node.get(last), dict)
            if same and node[last].get("name") == value:
                continue  # `mask=uniform` on a recipe that already has this mask keeps the keys of the mask
            node[last] = value
        for old in [k for k in places if k[: len(key)] == tuple(key)]:
            del places[old]
        places[tuple(key)] = place
    optim = values.get("optim")
    for length, others in REPLACED.items():
        if f"optim.{length}" in overrides and isinstance(optim, dict) and optim.get(length) is not None:
            for other in others:
                if f"optim.{other}" not in overrides:
                    optim.pop(other, None)


def _item(what: str, items: list[Any], part: str) -> int:
    """Return the index of the list item that an override names.

    Args:
        what: The override, for the error.
        items: The list.
        part: Index as text.

    Raises:
        UserError: If the list has no such item.
    """
    if not part.isdecimal() or int(part) >= len(items):
        raise UserError(f"{what}: '{part}': the list has items 0 to {len(items) - 1}")
    return int(part)


def _override_value(what: str, value: Any) -> Any:
    """Return the value of an override. Strings are read as YAML, unless they must be paths: `*.tar`, `runs/try #2`.

    Args:
        what: The override, for the error.
        value: The value as given.

    Raises:
        UserError: If a string is not valid YAML.
    """
    if not isinstance(value, str) or value.startswith(("*", "&", "!", "@", "%", "`")):
        return value
    if re.search(r"[\ud800-\udfff]", value):  # bytes of a file name that are not valid text, which YAML refuses
        return value
    try:
        node = yaml.compose(value, Loader)
        if node is not None and value[node.end_mark.index :].lstrip().startswith("#"):
            return value  # `#` is part of a path; YAML would read a comment
        if isinstance(node, yaml.MappingNode):
            return parse_yaml(value, what)[0]  # reports keys that are given twice
        return yaml.load(value, Loader)
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"{what}: not a YAML value: {value}") from error


def parse_overrides(pairs: tuple[str, ...], example: str = "optim.base_lr=1e-4") -> dict[str, str]:
    """Parse the `key=value` arguments of the command line.

    Args:
        pairs: The arguments.
        example: Example for the message.

    Returns:
        Values as text, by key.

    Raises:
        UserError: If an argument has another form, is an option of the command, or is given twice.
    """
    for pair in pairs:
        if not re.match(r"[A-Za-z_]\w*(\.\w+)*=", pair):
            raise UserError(f"{COMMAND_LINE}: '{pair}': write key=value, such as {example}")
    given: dict[str, str] = {}
    for word, option in (("recipe", "recipe"), ("resume", "resume"), ("preset", "preset"), ("scale", "preset")):
        if any(pair.startswith(f"{word}=") for pair in pairs):
            raise UserError(f"{COMMAND_LINE}: {word}: not a key of a recipe; use the option --{option}")
    for key, _, value in (pair.partition("=") for pair in pairs):
        if key in given:
            raise UserError(
                f"{COMMAND_LINE}: {key}: given twice: {given[key]}, {value}. Several values are a list, "
                f"'{key}=[a, b]'; quote braces, or the shell makes several words of them"
            )
        given[key] = value
    return given
