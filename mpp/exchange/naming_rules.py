"""Translate names of weights between timm and other projects, in both directions.

A layout (`mpp/exchange/naming/`, one file for each project) is a list of rules. A rule maps some of timm's names to the
names under which a project keeps the same numbers. If there are several names separated by spaces, their tensors are
concatenated along the first dimension, as timm does with queries, keys and values. If a project has used several
namings, the one that it writes itself comes first.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Template = str | Callable[[re.Match[str]], str]


@dataclass(frozen=True)
class Rule:
    """The names in a project of the weights whose full names in timm match `ours`."""

    ours: re.Pattern[str]
    theirs: tuple[Template, ...]
    change: Callable[[Tensor], Tensor] | None
    """Function that reorders the project's numbers as in timm. None if the order is the same."""


@dataclass(frozen=True)
class MadeOf:
    """The names in a file that one of timm's weights is made of, and a change to the concatenated numbers."""

    names: tuple[str, ...]
    change: Callable[[Tensor], Tensor] | None = None

    def of(self, weights: Mapping[str, Tensor], prefix: str = "") -> Tensor:
        parts = [weights[prefix + name] for name in self.names]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        return self.change(value) if self.change else value


@dataclass(frozen=True)
class Trained:
    """Training settings of a project's published weights, which are recognised by names and shapes in a file."""

    by: str
    """Name of the project, for messages."""
    marks: tuple[str, ...] = ()
    """Regular expressions that must all be found among the names in the file. If empty, the layout is enough."""
    square: str | None = None
    """Regular expression for the name of a weight that must have as many rows as columns."""
    mean_std: tuple[tuple[float, float, float], tuple[float, float, float]] | None = IMAGENET
    """Mean and std of R, G and B, for pixels in [0, 1]. None if the project published weights with different values."""
    masked: bool = False
    """Whether the weights were trained on masked patches, so that the embedding of an image is the mean of its patch
    tokens."""


def trained(weights: Mapping[str, Tensor], layout: str) -> Trained | None:
    """Return how weights that are named as in a layout were trained; None if they are not recognised."""
    for name in names():
        for known in importlib.import_module(f"mpp.exchange.naming.{name}").TRAINED:
            marked = all(any(re.search(mark, n) for n in weights) for mark in known.marks)
            if known.square is not None:
                shapes = [value.shape for n, value in weights.items() if re.search(known.square, n)]
                marked = marked and any(len(shape) == 2 and shape[0] == shape[1] for shape in shapes)
            if marked and (known.marks or name == layout):
                return known
    return None


def rule(ours: str, *theirs: Template, change: Callable[[Tensor], Tensor] | None = None) -> Rule:
    """Return a rule for some of timm's weights.

    Args:
        ours: Regular expression for timm's names.
        *theirs: Names in the file, in which `{0}`, `{1}` stand for groups of the match; or functions of the match.
        change: Function that is applied to the weights of the file. None means no change.
    """
    return Rule(re.compile(ours), theirs, change)


def names() -> list[str]:
    """Return the names of all layouts, timm's own first."""
    package = importlib.import_module("mpp.exchange.naming")
    return sorted((m.name for m in pkgutil.iter_modules(package.__path__)), key=lambda n: (n != "timm", n))


def rules(layout: str) -> tuple[Rule, ...]:
    return importlib.import_module(f"mpp.exchange.naming.{layout}").RULES


def made_of(name: str, of: Iterable[Rule]) -> list[MadeOf]:
    """Return the candidates for what one of timm's weights is made of, most likely first. Empty if no rule matches.

    Args:
        name: timm's name of the weight.
        of: Rules of a layout.
    """
    candidates = []
    for one in of:
        if match := one.ours.fullmatch(name):
            for template in one.theirs:
                theirs = template(match) if callable(template) else template.format(*match.groups())
                candidates.append(MadeOf(tuple(theirs.split()), one.change))
    return candidates


def coverage(weights: Mapping[str, Tensor], wanted: Iterable[str], layout: str) -> dict[str, dict[str, MadeOf]]:
    """Find out what each wanted weight can be made of, for each prefix of the names in a file.

    Args:
        weights: Tensors of the file by name.
        wanted: timm's names of the weights.
        layout: Layout whose rules are tried.

    Returns:
        What each wanted weight is made of, by prefix (`module.`, `teacher.backbone.` or empty) and timm's name.
    """
    endings: dict[str, list[str]] = {}
    for name in weights:
        parts = name.split(".")
        for i in range(len(parts)):
            endings.setdefault(".".join(parts[i:]), []).append(name)
    covered: dict[str, dict[str, MadeOf]] = {}
    the_rules = rules(layout)
    for timm_name in wanted:
        for candidate in made_of(timm_name, the_rules):
            first = candidate.names[0]
            for whole in endings.get(first, []):
                prefix = whole[: len(whole) - len(first)]
                if all(prefix + name in weights for name in candidate.names):
                    covered.setdefault(prefix, {}).setdefault(timm_name, candidate)
    return covered


def renamed(state: Mapping[str, Tensor], of: Iterable[Rule]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the weights of a timm model.

    Args:
        state: The weights by timm's names.
        of: Rules of a layout.

    Returns:
        (weights by the project's names, timm's names of weights that cannot be renamed).
    """
    of = list(of)
    theirs: dict[str, Tensor] = {}
    left = []
    for name, value in state.items():
        candidates = made_of(name, of)
        if not candidates or candidates[0].change is not None:
            left.append(name)
            continue
        parts = value.chunk(len(candidates[0].names))
        theirs |= {their: part.contiguous() for their, part in zip(candidates[0].names, parts, strict=True)}
    return theirs, left
