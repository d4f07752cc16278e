"""The site: `make docs` builds it into docs/_site and fails at the first warning."""

from __future__ import annotations

import inspect
from pathlib import Path

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

# Notebooks are stored without outputs and run when the site is built: one that fails, fails the build.
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
            for key, argument in found.arguments.items():
                default = "required" if argument.default is ... else f"default ``{argument.default!r}``"
                lines += [f"``{key}``, {default}", f"   {argument.description}"]
            lines += [""]
    return "\n".join(lines)


def recipes() -> str:
    """One page of every key of every recipe, in the schema's own words."""
    from pydantic_core import PydanticUndefined

    from mpp.recipe import evaluate, finetune, pretrain, sections
    from mpp.recipe.sections import Section

    lines = ["Keys of recipes", "===============", ""]
    lines += ["A key of a section is written with a dot: ``data.shards``, ``optim.base_lr``. What a key may be is in"]
    lines += ["the schema, too: ``mpp recipe schema pretrain``.", ""]
    modules = (sections, pretrain, finetune, evaluate)
    found = {n: c for m in modules for n, c in vars(m).items() if getattr(c, "__module__", "") == m.__name__}
    for name, cls in found.items():
        if not (inspect.isclass(cls) and issubclass(cls, Section)) or name in (
            "Section",
            "Job",
            "Run",
            "ImageData",
            "LabeledData",
            "Optim",
        ):
            continue  # those that others are made from
        job = f"mpp {name.removesuffix('Recipe').lower()}"
        title = f"``{job}``" if name.endswith("Recipe") else f"Section ``{name}``"
        lines += [title, "-" * len(title), "", *inspect.cleandoc(cls.__doc__ or "").splitlines(), ""]
        for key, field in cls.model_fields.items():
            factory = field.default is PydanticUndefined
            default = "required" if field.is_required() else "" if factory else f"default ``{field.default!r}``"
            said = " ".join((field.description or "").split()).replace("|", "\\|").replace("*", "\\*")
            lines += [f"``{key}``", f"   {'; '.join(p for p in (said.rstrip('.'), default) if p)}.", ""]
    return "\n".join(lines)


made = HERE / "reference"
made.mkdir(exist_ok=True)
(made / "components.rst").write_text(components())
(made / "recipes.rst").write_text(recipes())
