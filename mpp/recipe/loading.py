"""Load recipes from files, mappings and the command line, and check them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from mpp.errors import UserError
from mpp.recipe.evaluate import EvaluateRecipe
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.flat import JsonMapping, JsonObject, flat_keys
from mpp.recipe.messages import EXAMPLES, error_line, leaves
from mpp.recipe.overrides import apply_overrides, apply_preset
from mpp.recipe.pretrain import PretrainRecipe
from mpp.recipe.sections import Job
from mpp.recipe.yaml_reader import Key, parse_yaml

OPEN = "REQUIRED"
"""Placeholder in `mpp recipe show` for the value of a key that the recipe leaves open."""
RECIPES: dict[str, type[Job]] = {"pretrain": PretrainRecipe, "finetune": FinetuneRecipe, "evaluate": EvaluateRecipe}
R = TypeVar("R", bound=Job)


def bundled() -> dict[str, Path]:
    """Return the recipes that come with mpp by their names, such as pretrain/vit_small.

    They are in the installed package, or in the checkout.
    """
    here = Path(__file__).resolve().parent.parent
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"
    files = {job: sorted((folder / job).glob("*.yaml")) for job in ("pretrain", "finetune")}
    return {f"{job}/{path.stem}": path for job, paths in files.items() for path in paths}


def find_recipe(path: str | Path, job: str | None = None) -> Path:
    """Return the file of a recipe.

    Args:
        path: A file, or the name of a recipe that comes with mpp: pretrain/vit_small, or vit_small.
        job: Job of the recipe, if only the second part of its name is given. None means pretrain, or finetune if there
            is no pretraining recipe of this name.

    Raises:
        UserError: If there is no such recipe.
    """
    place, given = Path(path), str(path)
    try:
        if place.exists() and not place.is_dir():
            return place
    except OSError as error:  # a name that is too long
        raise UserError(f"{given[:100]}: {error.strerror}") from error
    known = bundled()
    name = place.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if name in known:  # the name includes the job
        return known[name]
    alike = [other for other in known if other.split("/")[1] == Path(name).name]
    if given == name == Path(name).name:  # the short name, not a path
        for of_job in (job,) if job else RECIPES:
            if f"{of_job}/{name}" in known:
                return known[f"{of_job}/{name}"]
    if place.is_dir() and not alike:
        raise UserError(f"{path}: is a folder, not a recipe")
    if not alike:
        close = get_close_matches(Path(name).name, sorted({other.split("/")[1] for other in known}), 2)
        alike = [other for other in known if other.split("/")[1] in close]
    what = "no such recipe" if place.suffix == "" else "No such file or directory"
    if place.is_absolute():
        raise UserError(f"{path}: {what}")
    meant = f" Did you mean {' or '.join(alike)}?" if alike else ""
    raise UserError(f"{path}: {what}.{meant} `mpp recipe list` shows the recipes that come with mpp")


def recipe_text(path: str | Path, job: str | None = None) -> str:
    """Return the text of a recipe.

    Args:
        path: A file or a name; see `find_recipe`.
        job: Job of the recipe; see `find_recipe`.

    Raises:
        UserError: If there is no such recipe, or it cannot be read.
    """
    place = find_recipe(path, job)
    try:
        return place.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8") from error


def load_recipe(path: str | Path, job: type[R], overrides: JsonObject | None = None, preset: str | None = None) -> R:
    """Read and check a recipe.

    Args:
        path: A file or a name; see `find_recipe`.
        job: Type of the recipe.
        overrides: Dotted keys and their values.
        preset: Name of one of the recipe's presets, applied before the overrides.

    Raises:
        UserError: If the recipe is wrong. The message has a line for each mistake.
    """
    values, places = parse_yaml(recipe_text(path, job.model_fields["job"].default), str(path))
    apply_preset(values, places, preset, str(path))
    apply_overrides(values, places, overrides or {})
    return check_recipe(values, job, places, str(path))


def load_any(path: str | Path, overrides: JsonObject | None = None, preset: str | None = None) -> Job:
    """Read and check a recipe of the job that it names, by default pretrain; see `load_recipe`."""
    return load_recipe(path, _job_of(path), overrides, preset)


def load_open(path: str | Path, overrides: JsonObject, preset: str | None) -> tuple[Job, list[str]]:
    """Read a recipe that may leave required keys to the command line.

    Args:
        path: A file or a name; see `find_recipe`.
        overrides: Dotted keys and their values.
        preset: Name of one of the recipe's presets.

    Returns:
        (the recipe, in which missing keys have the value OPEN; the missing keys).

    Raises:
        UserError: If anything else in the recipe is wrong. The message has a line for each mistake.
    """
    job = _job_of(path)
    required = [key for key, f in leaves(job).items() if key in EXAMPLES and f.is_required()]
    values, places = parse_yaml(recipe_text(path), str(path))
    apply_preset(values, places, preset, str(path))
    apply_overrides(values, places, overrides)
    given = flat_keys(values)
    left = [key for key in required if given.get(key) is None and _has_section(key, job, values)]
    apply_overrides(values, places, dict.fromkeys(left, OPEN))
    return check_recipe(values, job, places, str(path)), left


def _has_section(key: str, job: type[Job], values: JsonObject) -> bool:
    """Return whether a recipe has, or must have, the section that a key is in."""
    section = key.split(".", maxsplit=1)[0]
    return job.model_fields[section].is_required() or bool(values.get(section))


def _job_of(path: str | Path) -> type[Job]:
    job = parse_yaml(recipe_text(path), str(path))[0].get("job")
    return RECIPES.get(job, PretrainRecipe) if isinstance(job, str) else PretrainRecipe


def checked(recipe: str | Path | JsonMapping | R, job: type[R], overrides: JsonObject, preset: str | None = None) -> R:
    """Return a checked recipe with one of its presets and the overrides applied.

    Args:
        recipe: A file, a mapping of recipe keys, or a checked recipe.
        job: Type of the recipe.
        overrides: Dotted keys and their values.
        preset: Name of one of the recipe's presets.

    Raises:
        UserError: If the recipe is wrong. The message has a line for each mistake.
    """
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, job, overrides, preset)
    if isinstance(recipe, job) and not overrides and preset is None:
        return recipe
    if isinstance(recipe, Mapping):
        values = deepcopy(dict(recipe))
    elif isinstance(recipe, job):
        values = recipe.model_dump(mode="json", exclude_unset=True)  # it may matter which keys were given
    elif isinstance(recipe, Job):
        raise UserError(f"this is a recipe of `mpp {recipe.job}`, not of `mpp {job.model_fields['job'].default}`")
    else:
        raise UserError(f"recipe: a file, a mapping of keys or a checked recipe; got {type(recipe).__name__}")
    places: dict[Key, str] = {}
    apply_preset(values, places, preset, "recipe")
    apply_overrides(values, places, overrides)
    return check_recipe(values, job, places)


def check_recipe(values: JsonObject, job: type[R], places: dict[Key, str] | None = None, source: str = "recipe") -> R:
    """Validate a mapping of a recipe's keys.

    Args:
        values: The mapping.
        job: Type of the recipe.
        places: Place of each key (file:line), for messages.
        source: Place of keys that `places` lacks, for messages.

    Raises:
        UserError: If the recipe is wrong. The message has a line for each mistake.
    """
    expected = job.model_fields["job"].default
    named = values.get("job", "pretrain")
    if isinstance(named, str) and named != expected and named in RECIPES:
        raise UserError(
            f"{source}: job: this is a recipe of `mpp {named}`, not of `mpp {expected}` (which says job: {expected})"
        )
    try:
        return job.model_validate(values)
    except ValidationError as error:
        places = places or {}
        mistakes = error.errors()
        # If items of a list are wrong, do not also report that the list is too short.
        items = {e["loc"][:-1] for e in mistakes if e["loc"] and isinstance(e["loc"][-1], int)}
        mistakes = [e for e in mistakes if not (e["type"] == "too_short" and e["loc"] in items)]
        lines = {error_line(e, job, places, source): None for e in mistakes}
        raise UserError("\n".join(lines)) from None
