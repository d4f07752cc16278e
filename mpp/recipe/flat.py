"""Flatten nested mappings to dotted keys, and compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]
"""An object of JSON or YAML. Its values are checked when they are used."""
JsonMapping: TypeAlias = Mapping[str, Any]
"""A read-only object of JSON or YAML."""


def differing(flat: Sequence[JsonMapping]) -> list[str]:
    """Return the keys whose values are not the same in all of these mappings, sorted."""
    keys = sorted({key for f in flat for key in f})
    return [key for key in keys if any(f.get(key) != flat[0].get(key) for f in flat[1:])]


def flat_keys(value: JsonMapping, prefix: str = "") -> JsonObject:
    """Return the values of a nested mapping by their dotted keys."""
    flat: JsonObject = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            flat.update(flat_keys(inner, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = inner
    return flat
