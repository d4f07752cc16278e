"""Find the images among the members of a tar shard, and the label of each image.

In WebDataset's naming, members with the same path up to the first dot of the file name are one sample: `a/7.jpg` and
`a/7.cls`. File names may contain more dots (`scan_v1.000.jpg`). So a label belongs first of all to the image that has
the same name except for the ending.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from mpp.data.walk import ARRAY_BESIDE, HIDDEN, SHARED_NAME, LeftOut, is_hidden
from mpp.recipe.values import IMAGE

LABEL = re.compile(r"\.(cls|json)$", re.IGNORECASE)
PREFERRED = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "tif", "tiff", "bmp", "gif")
"""Order in which one of several images of a sample is chosen by its ending: photographs before possible masks."""
ANOTHER_IMAGE = "another image of the same sample; data.image_extension chooses which"
REPLACED = "replaced by a later member of the same name"
ONE_LABEL = "label of a name up to the first dot that several images have"
SEVERAL_LABELS = "one of several labels of a sample"
REASONS = (HIDDEN, ARRAY_BESIDE, ANOTHER_IMAGE, REPLACED, ONE_LABEL, SEVERAL_LABELS, SHARED_NAME)
"""All reasons that an index may contain. Indexes with other reasons, for example from a server, are refused."""

Member = tuple[str, int, int]
"""(name, offset, size) of a file in a tar."""
Row = tuple[int, int, int, int, int]
"""(image offset, image size, label offset, label size, 1 for a JSON label or 0). The label's offset and size are -1 if
there is none."""


def key_of(name: str) -> str:
    """Return WebDataset's key of a sample: the member's path up to the first dot of its last part."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.')[0]}"


def samples_among(members: Iterable[Member], image_extension: str | None = None) -> tuple[list[Row], LeftOut]:
    """Find the images of a tar and their labels.

    Args:
        members: Members of the tar, in its order.
        image_extension: Part of an image's name after the key of its sample, such as rgb.png, to take one image for
            each sample. None means to guess:

            * `7.seg.png` is left out if there is `7.jpg`.
            * Of `7.jpg` and `7.png`, the one whose ending comes first in PREFERRED is used.
            * `7.rgb.png` and `7.depth.png` may be images of two samples, and both are used. If such names occur
              repeatedly, they are counted under SHARED_NAME.

    Returns:
        (a row for each image, by ascending offset, and the members that were left out).
    """
    named, left_out = _by_name(members)
    images: dict[str, list[str]] = {}
    labels: dict[str, list[str]] = {}
    for name in named:
        if IMAGE.search(name):
            images.setdefault(key_of(name), []).append(name)
        elif LABEL.search(name):
            labels.setdefault(key_of(name), []).append(name)
    rows = []
    several: dict[tuple[str, ...], list[str]] = {}
    for key, image_names in images.items():
        label_names = labels.get(key, [])
        chosen = (
            _with_extension(image_names, image_extension) if image_extension else _one_each(image_names, label_names)
        )
        for name in sorted(set(image_names) - set(chosen)):
            left_out.add(ARRAY_BESIDE if name.lower().endswith(".npy") else ANOTHER_IMAGE, name)
        pairs = _labeled(chosen, label_names, left_out)
        if len(pairs) > 1 and not any(label for _, label in pairs):
            several.setdefault(tuple(sorted(_extension(name) for name in chosen)), []).extend(chosen)
        for name, label in pairs:
            *_, offset, size = named[name]
            place = named[label][1:] if label else (-1, -1)
            rows.append((offset, size, *place, int(label is not None and _is_json(label))))
    for names in several.values():
        if len({key_of(name) for name in names}) > 1:  # the key of v1.000.jpg and v1.001.jpg occurs once
            left_out.add(SHARED_NAME, names[0], len(names))
    return sorted(rows), left_out


def _extension(name: str) -> str:
    """Return the part of a member's name after the key, in lower case."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _by_name(members: Iterable[Member]) -> tuple[dict[str, Member], LeftOut]:
    """Return the images and labels among the members, by name, and the members that were left out.

    Of several members with the same name, the last one is used, as tar does.
    """
    by_name: dict[str, Member] = {}
    left_out = LeftOut()
    for member in members:
        name = member[0].removeprefix("./")
        if not (IMAGE.search(name) or LABEL.search(name)):
            continue
        if any(is_hidden(part) for part in name.split("/") if part not in (".", "..")):
            left_out.add(HIDDEN, name)
            continue
        if by_name.pop(name, None):
            left_out.add(REPLACED, name)
        by_name[name] = member
    return by_name, left_out


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _with_extension(images: list[str], image_extension: str) -> list[str]:
    """Return the images whose file name after the first dot equals this extension."""
    return [name for name in images if _extension(name) == image_extension]


def _one_each(images: list[str], labels: list[str]) -> list[str]:
    """Return one image for each sample among images with the same key.

    If the stem of an image continues the whole stem of another one (`7.seg.png` and `7.jpg`), both are one sample. If
    the longer one has its own class label (`7.seg.cls`), it is a separate sample.
    """
    if len(images) == 1:
        return images
    stems = {_stem(name) for name in images}
    own_labels = {_stem(name) for name in labels if name.lower().endswith(".cls")}
    samples: dict[str, list[str]] = {}
    for name in images:
        stem = _stem(name)
        folder, _, base = stem.rpartition("/")
        parts = base.split(".")
        prefixes = [f"{folder}/{'.'.join(parts[:n])}" if folder else ".".join(parts[:n]) for n in range(1, len(parts))]
        owner = stem if stem in own_labels else next((prefix for prefix in prefixes if prefix in stems), stem)
        samples.setdefault(owner, []).append(name)

    def rank(name: str) -> tuple[int, int, str]:
        ending = name.rpartition(".")[2].lower()
        return len(_stem(name)), PREFERRED.index(ending) if ending in PREFERRED else len(PREFERRED), name

    return [min(names, key=rank) for names in samples.values()]


def _labeled(images: list[str], labels: list[str], left_out: LeftOut) -> list[tuple[str, str | None]]:
    """Return (image, label or None) for each of the images with the same key.

    A .cls file is preferred to a .json file, which may hold anything. A label with the same stem as an image belongs to
    that image. Another label of the key is used only if the key has a single image, because it could belong to any of
    several.
    """
    label_of_each = []
    by_stem: dict[str, list[str]] = {}
    for label in labels:
        by_stem.setdefault(_stem(label), []).append(label)
    for name in images:
        same_stem = by_stem.pop(_stem(name), [])
        label_of_each.append((name, min(same_stem, key=_is_json) if same_stem else None))
    rest = sorted(label for of_stem in by_stem.values() for label in of_stem)
    missing = [name for name, label in label_of_each if label is None]
    if not rest or not missing:
        return label_of_each
    classes = [label for label in rest if not _is_json(label)] or rest
    if len(images) == len(classes) == 1:
        return [(images[0], classes[0])]
    left_out.add(ONE_LABEL if len(images) > 1 else SEVERAL_LABELS, classes[0], len(classes))
    return label_of_each


def _is_json(label: str) -> bool:
    return label.lower().endswith(".json")
