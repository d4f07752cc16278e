"""Unreadable images: find them before a run begins, count them during the run, and stop if there are too many."""

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
"""Images that are opened before a run begins. If there are more classes, one image of each is opened (a guess)."""
MOST_LOOKED_AT = 256
"""Greatest number of classes that are checked, by one image each (a guess)."""
LEAST_UNREADABLE = 2
"""Least number of unreadable labeled images that may stop a run before it begins: one does not stop it."""
LEAST_IN_TRAINING = 100
"""Least number of unreadable images that may stop a run while it trains."""
SMALL_PX = 32
"""Side in pixels to which images are decoded here. Small images are decoded faster."""
USED_PART = 4
"""Images are dark or coarse if the largest value of their type is at least this many times their largest value."""


def check_images(images: LabeledImages, key: str, decoding: Decoding, max_bad_fraction: float) -> list[str]:
    """Open some labeled images before training begins, from every class if there are few classes.

    Args:
        images: Result of `open_labeled`, `open_segmented` or `open_detected`.
        key: Recipe key of the images, for messages.
        decoding: Decoding settings, see `decode_cut`.
        max_bad_fraction: Greatest share of images that may be missing or unreadable.

    Returns:
        Warnings about files that are left out, classes without a readable image, and 16-bit images that would be
        read too coarsely.

    Raises:
        UserError: If more than `max_bad_fraction` of the files are missing, or of the opened images cannot be read. A
            single image does not stop the run, unless it is the only one.
    """
    reader: Reader = images.reader
    missing = np.flatnonzero(reader.sizes() < 0)
    _check_count(len(missing), len(images), key, max_bad_fraction, lambda: _reason(reader, int(missing[0])))
    chosen = _spread(images)
    # not in threads: decoding changes settings of Pillow and of Python's warnings, which all threads share
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
    """Return the names of the classes with images among `tried`, but none among `read`.

    Return [] if an image may have several classes, or none.

    Args:
        images: Labeled images.
        read: Numbers of the images that could be read.
        tried: Numbers of the images that were tried.
    """
    labels = images.class_of_each()
    if labels is None:
        return []
    lost = set(labels[list(tried)].tolist()) - set(labels[list(read)].tolist())
    return [images.classes[label] for label in sorted(lost)]


def find_coarse_images(reader: Reader, numbers: Sequence[int], key: str, decoding: Decoding) -> list[str]:
    """Check whether 16-bit images use a small part of their range although `data.value_range` is not set.

    Args:
        reader: Reader of the images.
        numbers: Numbers of the images to check.
        key: Recipe key of the images, for the warning.
        decoding: Decoding settings of the recipe.

    Returns:
        One line for a warning, or no line.
    """
    deep_images: list[Deep] = []
    for i in numbers if _range_is_open(decoding) else ():
        with suppress(BadImage):
            deep_images += filter(None, [deep_values(reader.read(i), decoding)])
    return _name_coarse(deep_images, key, decoding)


def _range_is_open(decoding: Decoding) -> bool:
    """Check whether the recipe gives no explicit range of values."""
    return decoding.get("value_range") in (None, "type")


def _look_at(data: bytes, decoding: Decoding) -> list[Deep]:
    """Decode an image, and return its range of values if it has 16 bits and the recipe gives no explicit range.

    Raises:
        BadImage: If the image cannot be decoded.
    """
    decode_crop(data, lambda width, height: (0, 0, width, height), (SMALL_PX, SMALL_PX), **decoding)
    deep = deep_values(data, decoding) if _range_is_open(decoding) else None
    return [] if deep is None else [deep]


def _name_coarse(deep_images: Sequence[Deep], key: str, decoding: Decoding) -> list[str]:
    """Return one line if the values of these images use a small part of the range of their type."""
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
    """Count the images that a loader replaced, and record them in the log. Every process must pass the same numbers.

    Args:
        team: Processes of the run.
        before: Number of unreadable images in earlier steps.
        new: Number of unreadable images in this step, over all processes.
        lines: One line for each file that this process skipped. One image has several lines if its neighbours cannot be
            read either.
        seen: Number of images in all steps so far.
        max_bad_fraction: Greatest share of images that may be unreadable.
        log: Log of the run.

    Returns:
        The new count. It is printed at the 1st, 10th, 100th … image.

    Raises:
        UserError: If at least LEAST_IN_TRAINING images, and more than `max_bad_fraction`, are unreadable.
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
    """Choose the images to open, ascending.

    LOOKED_AT images are shared evenly among at most MOST_LOOKED_AT classes, with at least one image of each class.
    """
    labels = images.class_of_each()
    if labels is None:
        return evenly(len(images), LOOKED_AT)
    by_class = np.argsort(labels, kind="stable")
    members = np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1)
    members = [members[i] for i in evenly(len(members), MOST_LOOKED_AT)]
    each = max(LOOKED_AT // max(len(members), 1), 1)
    return sorted(int(of_class[at]) for of_class in members for at in evenly(len(of_class), each))


def _reason(reader: Reader, i: int) -> str:
    """Return `name: reason` for a missing file."""
    try:
        reader.read(i)
    except BadImage as error:
        return f"{reader.name(i)}: {error}"
    return f"{reader.name(i)}: came back meanwhile"


def _check_count(bad: int, of: int, key: str, max_bad_fraction: float, first: Callable[[], str]) -> None:
    """Raise UserError if too many images are bad. `first` returns the name of the first bad image, with the reason."""
    if bad and bad == of:
        raise UserError(f"{key}: not one image can be read; the first: {first()}")
    if bad >= LEAST_UNREADABLE and bad > max_bad_fraction * of:
        raise UserError(
            f"{key}: {bad} of {of} images looked at cannot be read; the first: {first()}. data.max_bad_fraction allows "
            f"{max_bad_fraction:.2%}"
        )
