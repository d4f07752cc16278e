"""Write recipes as YAML, as flat settings for trackers, and as JSON schema for editors."""

from __future__ import annotations

from typing import Any

import yaml

from mpp.errors import without_secrets
from mpp.recipe.flat import JsonObject, flat_keys
from mpp.recipe.loading import RECIPES
from mpp.recipe.messages import EXAMPLES
from mpp.recipe.overrides import OLD_PRESETS, PRESETS
from mpp.recipe.sections import Job


def json_schema(job: str) -> JsonObject:
    """Return the JSON schema of a job's recipes, with every short form, for editors.

    Rules between several keys are not part of the schema.
    """
    schema: JsonObject = _with_limits(RECIPES[job].model_json_schema())
    open_keys = {key.rsplit(".", maxsplit=1)[-1] for key in EXAMPLES}  # keys that recipes may leave to the command line
    for section in (schema, *schema.get("$defs", {}).values()):
        if "required" in section:
            section["required"] = [key for key in section["required"] if key not in open_keys]
    schema["properties"][OLD_PRESETS] = schema["properties"][PRESETS] | {"deprecated": True}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


_LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def _with_limits(node: object) -> Any:
    """Rename limits in a schema from pydantic's names to those of JSON schema.

    pydantic keeps its own names if a function checks the value before, but editors ignore these names.
    """
    if isinstance(node, dict):
        return {_LIMITS.get(k, k) if isinstance(v, int | float) else k: _with_limits(v) for k, v in node.items()}
    return [_with_limits(item) for item in node] if isinstance(node, list) else node


def dump_recipe(recipe: Job) -> str:
    """Return a recipe as YAML, from which `load_recipe` reads the same recipe, except for secrets in URLs."""
    return yaml.safe_dump(_blotted(recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _blotted(value: object) -> Any:
    if isinstance(value, dict):
        return {k: _blotted(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_blotted(v) for v in value]
    return without_secrets(value) if isinstance(value, str) else value


def settings_of(recipe: Job) -> JsonObject:
    """Return the values of a recipe by their dotted keys, for trackers, without secrets in URLs."""
    return flat_keys(_blotted(recipe.model_dump(mode="json")))
