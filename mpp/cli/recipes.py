"""Commands about recipes, and shell completion."""

from __future__ import annotations

from pathlib import Path

import click

from mpp.cli.app import JSON, Commands, main, to_json
from mpp.cli.train import SCALE


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """What makes SHELL complete mpp's commands and options: eval "$(mpp completion bash)" in its start-up file."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "mpp", "_MPP_COMPLETE").source())


@main.group(cls=Commands)
def recipe() -> None:
    """Look at recipes."""


@recipe.command("list")
@JSON
def list_recipes(as_json: bool) -> None:
    """Recipes that come with mpp: their names, which stand for their files, and what each is."""
    from mpp.recipe.loading import bundled

    summaries = {name: path.read_text().splitlines()[0].lstrip("# ") for name, path in bundled().items()}
    width = max(map(len, summaries))
    lines = (f"{name:<{width}}  {summary}" for name, summary in summaries.items())
    click.echo(to_json(summaries) if as_json else "\n".join(lines))


@recipe.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@SCALE
def show(path: Path, overrides: tuple[str, ...], scale: str | None) -> None:
    """Check a recipe and print it with every default."""
    from mpp.recipe.dump import dump_recipe
    from mpp.recipe.loading import OPEN, load_open
    from mpp.recipe.overrides import parse_overrides

    open_recipe, required = load_open(path, parse_overrides(overrides), scale)
    if required:
        click.echo(f"# {OPEN} stands for what must still be given: {', '.join(required)}")
    click.echo(dump_recipe(open_recipe), nl=False)


@recipe.command()
@click.argument("job", type=click.Choice(["pretrain", "finetune", "evaluate"]))
def schema(job: str) -> None:
    """JSON schema of a job's recipes, for editors."""
    import json

    from mpp.recipe.dump import json_schema

    click.echo(json.dumps(json_schema(job), indent=1))
