"""Nested mappings by dotted keys, and where two of them differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]
"""An object as JSON or YAML has it; its values are checked where they are used."""
JsonMapping: TypeAlias = Mapping[str, Any]
"""The same, not to be changed."""


def differing(flat: Sequence[JsonMapping]) -> list[str]:
    """The keys that are not the same in all of these, sorted."""
    keys = sorted({key for f in flat for key in f})
    return [key for key in keys if any(f.get(key) != flat[0].get(key) for f in flat[1:])]


def flat_keys(value: JsonMapping, prefix: str = "") -> JsonObject:
    """Values by their dotted keys."""
    flat: JsonObject = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            flat.update(flat_keys(inner, f"{prefix}{key}."))
        else:
            flat[prefix + key] = inner
    return flat
