"""Weights of an encoder under other names: which of theirs each of timm's is made of, and the way back.

A layout (`mpp/layouts/`, a file a project) is a list of rules. A rule says for some of timm's names under which names a
project keeps the same numbers. Several names, parted by blanks, are stacked along the first dimension, as timm stacks
queries, keys and values. Where a project had several namings in its time, the one it writes itself comes first.
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
    """Where the weights lie whose names in timm fit `ours`, whole."""

    ours: re.Pattern[str]
    theirs: tuple[Template, ...]
    change: Callable[[Tensor], Tensor] | None
    """From their order of numbers to timm's, where that differs."""


@dataclass(frozen=True)
class MadeOf:
    """Their names of one of timm's weights, and what is to be done with the numbers."""

    names: tuple[str, ...]
    change: Callable[[Tensor], Tensor] | None = None

    def of(self, weights: Mapping[str, Tensor], prefix: str = "") -> Tensor:
        parts = [weights[prefix + name] for name in self.names]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        return self.change(value) if self.change else value


@dataclass(frozen=True)
class Trained:
    """How a project's own weights were trained, as far as the names and shapes in a file tell."""

    by: str
    """Whose weights they are, in a message."""
    marks: tuple[str, ...] = ()
    """Regular expressions, each found among the names of such a file; none: the layout itself says it."""
    square: str | None = None
    """A regular expression of one of the names, whose weight has as many rows as columns."""
    mean_std: tuple[tuple[float, float, float], tuple[float, float, float]] | None = IMAGENET
    """Of R, G and B, of pixels in [0, 1]; None if the project published weights trained with different ones."""
    masked: bool = False
    """By masked patches, so that the embedding of an image is the mean of its patch tokens."""


def trained(weights: Mapping[str, Tensor], layout: str) -> Trained | None:
    """How these weights, named as in this layout, were trained; None if they do not tell."""
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
    """Make a rule that says what weights of timm's are made of.

    Args:
        ours: A regular expression for timm's names.
        *theirs: Names in the file, in which `{0}`, `{1}` stand for its groups; or functions of the match.
        change: What is done to the weights of the file; None: nothing.
    """
    return Rule(re.compile(ours), theirs, change)


def names() -> list[str]:
    """Every layout, timm's own first."""
    package = importlib.import_module("mpp.exchange.naming")
    return sorted((m.name for m in pkgutil.iter_modules(package.__path__)), key=lambda n: (n != "timm", n))


def rules(layout: str) -> tuple[Rule, ...]:
    return importlib.import_module(f"mpp.exchange.naming.{layout}").RULES


def made_of(name: str, of: Iterable[Rule]) -> list[MadeOf]:
    """What one of timm's weights may be made of there, likeliest first; nothing where that project has none."""
    candidates = []
    for one in of:
        if match := one.ours.fullmatch(name):
            for template in one.theirs:
                theirs = template(match) if callable(template) else template.format(*match.groups())
                candidates.append(MadeOf(tuple(theirs.split()), one.change))
    return candidates


def coverage(weights: Mapping[str, Tensor], wanted: Iterable[str], layout: str) -> dict[str, dict[str, MadeOf]]:
    """Find out what each wanted weight can be made of, by what stands before the names in the file.

    Args:
        weights: Of the file.
        wanted: Names of timm's.
        layout: The naming whose rules are tried.

    Returns:
        By prefix (`module.`, `teacher.backbone.`, nothing): what each wanted weight is made of.
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
    """A timm state under their names, and those of its weights for which they have none."""
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
