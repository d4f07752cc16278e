"""The site: `make docs` builds it into docs/_site and fails at the first warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpp import __version__
from mpp.recipe import registry

HERE = Path(__file__).resolve().parent

project, author = "mpp", "the mpp authors"
copyright = "the mpp authors; Apache-2.0"
release = version = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "sphinx_copybutton"]
exclude_patterns = ["_site", "jupyter_execute"]
html_theme = "furo"
html_title = "mpp"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
suppress_warnings = ["myst.strikethrough"]

# Notebooks are run again when the site is built: one that fails, fails the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

# Docstrings are plain sentences, in which `x` is code and a * is a star.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": True, "exclude-members": "model_config"}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

TITLES = {kind: f"{kind.capitalize()}s".replace("sss", "sses") for kind in registry.RECIPE_KEYS}


def components() -> str:
    """One page of every component that is a file in its folder."""
    lines = ["Components", "==========", "", "Each is one file, whose name is the name in a recipe; the keyword-only"]
    lines += ["arguments of its class are its keys. See :doc:`../extending`.", ""]
    for kind, title in TITLES.items():
        lines += [title, "-" * len(title), ""]
        for name in registry.names(kind):
            found = registry.declaration(kind, name)
            lines += [f"``{name}``", "^" * (len(name) + 4), "", *found.doc.splitlines(), ""]
            if not found.arguments:
                continue
            lines += [".. list-table::", "   :header-rows: 1", "   :widths: 25 15 60", ""]
            lines += ["   * - key", "     - default", "     - what it is"]
            for key, argument in found.arguments.items():
                default = "required" if argument.default is ... else f"``{argument.default!r}``"
                text = argument.description.replace("|", "\\|").replace("*", "\\*")
                lines += [f"   * - ``{kind}.{key}``", f"     - {default}", f"     - {text}"]
            lines += [""]
    return "\n".join(lines)


def recipes() -> str:
    """Return a page with every key of every recipe by its full path, one table for each section."""
    from mpp.recipe.keys import keys_of
    from mpp.recipe.loading import RECIPES

    lines = ["Keys of recipes", "===============", ""]
    lines += ["``mpp recipe keys pretrain`` prints the same list, and ``mpp recipe explain optim.base_lr`` one key."]
    lines += ["The keys of masks, corruptions, targets, losses, heads and tasks are on :doc:`components`.", ""]
    for job, kind in RECIPES.items():
        title = f"``mpp {job}``"
        lines += [title, "-" * len(title), ""]
        keys = [key for key in keys_of(kind) if not key.component]
        for section in dict.fromkeys(key.name.rpartition(".")[0] for key in keys):
            title = f"``{section}``" if section else "Top level"
            lines += [title, "^" * len(title), "", ".. list-table::", "   :header-rows: 1", "   :widths: 25 15 60", ""]
            lines += ["   * - key", "     - default", "     - what it is"]
            for key in (key for key in keys if key.name.rpartition(".")[0] == section):
                allowed = f" Allowed: {key.allowed}." if key.allowed else ""
                text = f"{key.text}{allowed}".replace("|", "\\|").replace("*", "\\*")
                lines += [f"   * - ``{key.name}``", f"     - ``{key.default}``" if key.default else "     -"]
                lines += [f"     - {text}"]
            lines += [""]
    return "\n".join(lines)


made = HERE / "reference"
made.mkdir(exist_ok=True)
(made / "components.rst").write_text(components())
(made / "recipes.rst").write_text(recipes())


def setup(app: Any) -> None:
    """Let links to the log lead to its page on the site. Read in the repository, they lead to the file itself."""

    def link_to_page(_: Any, __: str, source: list[str]) -> None:
        source[0] = source[0].replace("](../recipes/LOG.md)", "](log.md)")

    app.connect("source-read", link_to_page)
