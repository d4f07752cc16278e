"""Read YAML 1.2 and record the line of each key."""

from __future__ import annotations

import re

import yaml

from mpp.errors import UserError
from mpp.recipe.flat import JsonObject


class Loader(yaml.SafeLoader):
    """A loader with the numbers and booleans of YAML 1.2's core schema. Whole numbers are decimal only.

    PyYAML's own loader reads `1e-4` as a string, `yes` as true, `010` as 8 and `12:30` as 750.
    """


KEPT = ("null", "merge", "value")
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[1] in KEPT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false|True|False)$"), list("tTfF"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$|^[-+]?[0-9]+[eE][-+]?[0-9]+$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)

TEXT_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "merge", "value"))
Key = tuple[str | int, ...]


def parse_yaml(text: str, source: str) -> tuple[JsonObject, dict[Key, str]]:
    """Read YAML.

    Returns:
        (the mapping, the place of each key as "file:line").

    Raises:
        UserError: If the text is not valid YAML or not a mapping, or if a key is not text or is given twice.
    """
    places: dict[Key, str] = {}
    errors: list[str] = []

    def walk(node: yaml.Node, key: Key) -> None:
        places.setdefault(key, f"{source}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.MappingNode):
            for k, v in node.value:
                inner = (*key, k.value)
                place = f"{source}:{k.start_mark.line + 1}"
                if not isinstance(k, yaml.ScalarNode) or k.tag not in TEXT_TAGS:
                    shown = k.value if isinstance(k, yaml.ScalarNode) else "a list or mapping"
                    errors.append(f"{place}: {dotted((*key, shown))}: keys must be text; put quotes around this one")
                elif inner in places:
                    errors.append(
                        f"{place}: {dotted(inner)}: given twice; first at line {places[inner].rsplit(':')[-1]}"
                    )
                else:
                    places[inner] = place
                    walk(v, inner)
        elif isinstance(node, yaml.SequenceNode):
            for i, v in enumerate(node.value):
                walk(v, (*key, i))

    try:
        node = yaml.compose(text, Loader)
        value = yaml.load(text, Loader)
        if node is not None:
            walk(node, ())
    # Constructors of tags such as !!float and !!timestamp raise many kinds of errors. An alias may contain itself.
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{source}{line}: not valid YAML: {problem}") from error
    if node is None:
        return {}, places
    if errors:
        raise UserError("\n".join(errors))
    if not isinstance(value, dict):
        raise UserError(f"{source}:1: a recipe is a mapping of keys to values; got {type(value).__name__}")
    return value, places


def dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)
