"""Images that cannot be read: looked for before a run begins, counted while it runs, and not too many of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from mpp.data.decoding.decode import Deep, decode_crop, deep_values
from mpp.data.readers import LabeledImages, Reader
from mpp.data.shards.reader import evenly
from mpp.errors import BadImage, UserError
from mpp.parallel.team import Team
from mpp.recipe.sections import Decoding
from mpp.runs.log import RunLog

LOOKED_AT = 64
"""Images that are opened before a run begins; more if there are more classes, one of each (a guess)."""
MOST_LOOKED_AT = 256
"""Images that are opened of many classes (a guess)."""
LEAST_UNREADABLE = 2
"""Of labeled images looked at, before they are too many: a single one ends no run."""
LEAST_IN_TRAINING = 100
"""Unreadable images before they are too many during a run."""
SMALL_PX = 32
"""Side to which images are decoded here; a small one is quick."""
USED_PART = 4
"""Images whose largest value is this many times smaller than what their type holds are dark, or coarse."""


def check_images(images: LabeledImages, key: str, decoding: Decoding, max_bad_fraction: float) -> list[str]:
    """Open some labeled images, of every class if there are few classes, before anything is trained.

    Args:
        images: What `open_labeled`, `open_segmented` or `open_detected` returned.
        key: Where the recipe names them, for messages.
        decoding: As `decode_crop` takes it.

    Returns:
        Warnings: what is not among the images, classes of which no image could be read, images of 16 bit that would be
        read too coarsely.

    Raises:
        UserError: More than `max_bad_fraction` of the files are missing, or of those opened cannot be read.
    """
    reader: Reader = images.reader
    missing = np.flatnonzero(reader.sizes() < 0)
    _check_count(len(missing), len(images), key, max_bad_fraction, lambda: _reason(reader, int(missing[0])))
    chosen = _spread(images)
    # one after the other: decoding changes settings of Pillow and of Python's warnings, which all threads share
    faults, deep = {}, list[Deep]()
    for i in chosen:
        try:
            deep += _look_at(reader.read(i), decoding)
        except BadImage as error:
            faults[i] = f"{reader.name(i)}: {error}"
    _check_count(len(faults), len(chosen), key, max_bad_fraction, lambda: next(iter(faults.values())))
    warnings = [f"{key}: {images.left_out}"] if images.left_out else []
    lost = unread_classes(images, [i for i in chosen if i not in faults], chosen)
    if lost:
        warnings.append(f"{key}: of {', '.join(lost)} not one of the images looked at can be read")
    return warnings + _name_coarse(deep, key, decoding)


def unread_classes(images: LabeledImages, read: Sequence[int], tried: Sequence[int]) -> list[str]:
    """Return names of the classes that have images, and none among those read; [] if images have no one class.

    Args:
        images: Labeled images.
        read: Numbers of images that could be read.
        tried: Numbers of the images that were tried.
    """
    labels = images.class_of_each()
    if labels is None:
        return []
    lost = set(labels[list(tried)].tolist()) - set(labels[list(read)].tolist())
    return [images.classes[label] for label in sorted(lost)]


def find_coarse_images(reader: Reader, numbers: Sequence[int], key: str, decoding: Decoding) -> list[str]:
    """Find out whether images of 16 bit use a small part of their range, which `data.value_range` does not say.

    Args:
        reader: Of the images.
        numbers: Those that are looked at.
        key: Of the recipe, for the lines.
        decoding: How the recipe has them decoded.

    Returns:
        A line for a warning, or none.
    """
    deep_images: list[Deep] = []
    for i in numbers if _range_is_open(decoding) else ():
        with suppress(BadImage):
            deep_images += filter(None, [deep_values(reader.read(i), decoding)])
    return _name_coarse(deep_images, key, decoding)


def _range_is_open(decoding: Decoding) -> bool:
    """Whether the recipe leaves open which values count."""
    return decoding.get("value_range") in (None, "type")


def _look_at(data: bytes, decoding: Decoding) -> list[Deep]:
    """Decode an image; its values if it is of 16 bit and the recipe leaves open which count. BadImage."""
    decode_crop(data, lambda width, height: (0, 0, width, height), (SMALL_PX, SMALL_PX), **decoding)
    deep = deep_values(data, decoding) if _range_is_open(decoding) else None
    return [] if deep is None else [deep]


def _name_coarse(deep_images: Sequence[Deep], key: str, decoding: Decoding) -> list[str]:
    """A line if these values of images use a small part of the range of their type."""
    if not deep_images:
        return []
    smallest, largest = min(deep.smallest for deep in deep_images), max(deep.largest for deep in deep_images)
    most = max(deep.most for deep in deep_images)
    if largest * USED_PART > most or largest <= 0:
        return []
    high = 2 ** math.ceil(math.log2(largest + 1)) - 1 if smallest >= 0 else int(largest)
    advice = f"data.value_range=[{int(min(smallest, 0))},{high}]"
    count = len(deep_images)
    what = f"{key}: values of {count} images run from {smallest:g} to {largest:g}, of {most:g} that their type holds"
    if "value_range" in decoding:
        return [f"{what}: they are read as dark; {advice} reads them in full"]
    levels = int(largest) // 257 + 1
    return [f"{what}: read as 8 bit they keep {levels} grey levels. data.channels=1 {advice} reads all of them"]


def count_unreadable(
    team: Team, before: int, new: int, lines: list[str], *, seen: int, max_bad_fraction: float, log: RunLog
) -> int:
    """Count images that a loader replaced, and name them in the log. Every process calls this with the same numbers.

    Args:
        team: The processes of the run.
        before: Unreadable images of the steps before.
        new: Those of this step, over all processes.
        lines: A line for each file that this process passed over: several for one image if its neighbours cannot be
            read either.
        seen: Images of all steps so far.
        max_bad_fraction: Of the recipe.
        log: Of the run.

    Returns:
        The new count. It is logged at the 1st, 10th, 100th ….

    Raises:
        UserError: There are more than `max_bad_fraction`, and at least LEAST_IN_TRAINING.
    """
    if not new:
        return before
    bad, lines = before + new, team.gather(lines)
    for line in lines:
        log.note(f"unreadable: {line}")
    if before == 0 or math.floor(math.log10(bad)) > math.floor(math.log10(before)):
        log.say(f"{bad} unreadable images so far, replaced by their neighbours; last: {lines[-1]}")
    if bad >= LEAST_IN_TRAINING and bad > max_bad_fraction * seen:
        raise UserError(
            f"data.max_bad_fraction: {bad} of {seen} images could not be read, more than {max_bad_fraction:.2%}; "
            f"they are named in {log.out}/train.log"
        )
    return bad


def _spread(images: LabeledImages) -> list[int]:
    """Choose the images to look at, ascending: as many of each class as LOOKED_AT allows, and one at least; of at most
    MOST_LOOKED_AT classes."""
    labels = images.class_of_each()
    if labels is None:
        return evenly(len(images), LOOKED_AT)
    by_class = np.argsort(labels, kind="stable")
    members = np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1)
    members = [members[i] for i in evenly(len(members), MOST_LOOKED_AT)]
    each = max(LOOKED_AT // max(len(members), 1), 1)
    return sorted(int(of_class[at]) for of_class in members for at in evenly(len(of_class), each))


def _reason(reader: Reader, i: int) -> str:
    """`name: why` of a file that is not there."""
    try:
        reader.read(i)
    except BadImage as error:
        return f"{reader.name(i)}: {error}"
    return f"{reader.name(i)}: came back meanwhile"


def _check_count(bad: int, of: int, key: str, max_bad_fraction: float, first: Callable[[], str]) -> None:
    """UserError for too many. first: names the first one, with the reason."""
    if bad and bad == of:
        raise UserError(f"{key}: not one image can be read; the first: {first()}")
    if bad >= LEAST_UNREADABLE and bad > max_bad_fraction * of:
        raise UserError(
            f"{key}: {bad} of {of} images looked at cannot be read; the first: {first()}. data.max_bad_fraction allows "
            f"{max_bad_fraction:.2%}"
        )
