"""Commands about recipes, and shell completion."""

from __future__ import annotations

from pathlib import Path

import click

from mpp.cli.app import JSON, Commands, main, to_json
from mpp.cli.train import PRESET
from mpp.errors import UserError


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell-completion script

    Print the completion script for SHELL. Add this line to the start-up file of your shell:

    \b
    eval "$(mpp completion bash)"
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "mpp", "_MPP_COMPLETE").source())


@main.group(cls=Commands)
def recipe() -> None:
    """List, explain, copy and check recipes"""


JOB = click.Choice(["pretrain", "finetune", "evaluate"])


@recipe.command("list")
@JSON
def list_recipes(as_json: bool) -> None:
    """List the recipes that come with mpp

    Each line has a name that `mpp pretrain` or `mpp finetune` takes, and what the recipe is for.
    """
    from mpp.recipe.loading import bundled

    texts = {name: path.read_text(encoding="utf-8") for name, path in bundled().items()}
    summaries = {name: text.splitlines()[0].lstrip("# ") for name, text in texts.items()}
    width = max(map(len, summaries))
    marks = {name: "*" if "Expected: not run by us" in text else " " for name, text in texts.items()}
    lines = [f"{name:<{width}} {marks[name]} {summary}" for name, summary in summaries.items()]
    click.echo(to_json(summaries) if as_json else "\n".join([*lines, "", "* not yet trained in full by us"]))


@recipe.command()
@click.argument("job", type=JOB)
@click.argument("pattern", default="*")
@JSON
def keys(job: str, pattern: str, as_json: bool) -> None:
    """List the settings of a recipe

    List every key of the recipes of JOB with its default. PATTERN limits the list: a section, words that a key
    contains, or a pattern such as 'optim.*'.

    \b
    mpp recipe keys pretrain
    mpp recipe keys finetune lr
    """
    from mpp.recipe.keys import find_keys
    from mpp.recipe.loading import RECIPES

    found = find_keys(RECIPES[job], pattern)
    if not found:
        raise UserError(f"recipe keys: no key of {job} matches '{pattern}'")
    lines = (line for key in found for line in (key.title, f"    {key.summary}"))
    click.echo(to_json(found) if as_json else "\n".join(lines))


@recipe.command()
@click.argument("key")
def explain(key: str) -> None:
    """Explain a setting

    Print the text, default and allowed values of KEY, in every job that has it.

    \b
    mpp recipe explain optim.base_lr
    mpp recipe explain mask
    """
    from mpp.recipe.keys import explain as explain_key
    from mpp.recipe.loading import RECIPES
    from mpp.recipe.messages import meant_by

    jobs: dict[str, list[str]] = {}  # by text, as jobs share many keys
    for job, kind in RECIPES.items():
        if text := explain_key(kind, key):
            jobs.setdefault(text, []).append(f"mpp {job}")
    if not jobs:
        meant = next((m for kind in RECIPES.values() if (m := meant_by(tuple(key.split(".")), [], kind))), None)
        hint = f" Did you mean '{meant}'?" if meant else " `mpp recipe keys pretrain` lists the keys of a job"
        raise UserError(f"recipe explain: {key}: unknown key.{hint}")
    click.echo("\n".join(f"{', '.join(names)}\n{text}" for text, names in jobs.items()))


@recipe.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@PRESET
def show(path: Path, overrides: tuple[str, ...], preset: str | None) -> None:
    """Print a recipe with all defaults

    Check the recipe PATH, a file or a name from `mpp recipe list`, and print it with every default.
    """
    from mpp.recipe.dump import dump_recipe
    from mpp.recipe.loading import OPEN, load_open
    from mpp.recipe.overrides import parse_overrides

    open_recipe, required = load_open(path, parse_overrides(overrides), preset)
    if required:
        click.echo(f"# {OPEN} marks what you must still give: {', '.join(required)}")
    click.echo(dump_recipe(open_recipe), nl=False)


@recipe.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
def copy(name: str, file: Path) -> None:
    """Copy a recipe to a file of your own

    Copy the recipe NAME from `mpp recipe list` to the new FILE, to be edited.

    \b
    mpp recipe copy vit_small mine.yaml
    mpp recipe copy finetune/vit_small mine-classes.yaml
    """
    from mpp.recipe.loading import bundled, find_recipe, recipe_text

    text = recipe_text(name)
    found = find_recipe(name)
    try:
        with open(file, "x", encoding="utf-8") as new:
            new.write(text)
    except FileExistsError:
        raise UserError(f"{file}: exists already; choose another name") from None
    click.echo(f"{file}")
    others = [other for other, path in bundled().items() if path.stem == found.stem and path != found]
    if others and name == found.stem:
        click.echo(f"copied {found.parent.name}/{found.stem}; there is also {', '.join(others)}", err=True)


@recipe.command()
@click.argument("job", type=JOB)
def schema(job: str) -> None:
    """Print the JSON schema of recipes

    Print the JSON schema of the recipes of JOB, for completion and checks in an editor.
    """
    import json

    from mpp.recipe.dump import json_schema

    click.echo(json.dumps(json_schema(job), indent=1))
