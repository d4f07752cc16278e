"""Which files of a folder are images: one walk for every command, and a count of what it leaves out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from mpp.errors import UserError

IMAGE = re.compile(r"\.(jpe?g|jpe|jfif|png|webp|bmp|tiff?|gif|p[bgnp]m|npy)$", re.IGNORECASE)
IMAGE_ENDINGS = ".jpg .jpeg .jpe .jfif .png .webp .bmp .tif .tiff .gif .ppm .pgm .pbm .pnm .npy"
"""The same, for messages."""
NOT_FOR_PEOPLE = ("__MACOSX", "@eaDir")
"""Folders that macOS and Synology put beside images: they hold metadata and previews."""
HIDDEN = "hidden"
ARRAY_BESIDE = "array beside an image of the same name"
NOT_BY_NAME = "not an image by its name"


class LeftOut:
    """What was not taken: for each reason how many there were, and the first one's name."""

    def __init__(self, found: dict[str, tuple[int, str]] | None = None) -> None:
        self.found = dict(found or {})

    @classmethod
    def of(cls, names: Iterable[tuple[str, str]]) -> LeftOut:
        """names: (name, reason) of each."""
        left_out = cls()
        for name, reason in names:
            left_out.add(reason, name)
        return left_out

    def add(self, reason: str, name: str, count: int = 1) -> None:
        before, first = self.found.get(reason, (0, name))
        self.found[reason] = (before + count, first)

    def add_all(self, other: LeftOut, prefix: str = "") -> None:
        """prefix: put before the names of the other."""
        for reason, (count, name) in other.found.items():
            self.add(reason, prefix + name, count)

    def __bool__(self) -> bool:
        return bool(self.found)

    def __str__(self) -> str:
        return "left out: " + "; ".join(
            f"{count} ({reason}), {'such as ' * (count > 1)}{name}" for reason, (count, name) in self.found.items()
        )


def is_hidden(name: str) -> bool:
    """Whether the last part of a path is no file or folder that its owner made: `.thumbnails`, `._photo.jpg`."""
    return name.startswith(".") or name in NOT_FOR_PEOPLE


def images_among(names: Iterable[str]) -> set[str]:
    """The names in one folder that are images. An .npy is none if an image of another kind has the same stem: it is
    something else of the same sample then, an embedding or a map of depths."""
    found = {name for name in names if IMAGE.search(name)}
    stems = {os.path.splitext(name)[0] for name in found if not name.lower().endswith(".npy")}
    return {name for name in found if not (name.lower().endswith(".npy") and os.path.splitext(name)[0] in stems)}


def list_images(source: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Walk a folder and everything below it.

    Links to folders are followed, each folder once. A link to a file that is not there counts as an image: it is one
    that cannot be read.

    Returns:
        Paths of images below `source` with /, sorted; (path, reason) of everything that is left out.

    Raises:
        UserError: A folder may not be read. Its images would be missing in silence.
    """
    files, left_out, seen = [], [], dict[str, str]()
    for folder, subfolders, names in os.walk(source, followlinks=True, onerror=_cannot_list):
        below = os.path.relpath(folder, source).replace(os.sep, "/")
        prefix = "" if below == "." else below + "/"
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            left_out.append((below, f"a link to {seen[real]}, which is listed already"))
            continue
        seen[real] = below
        hidden = [name for name in subfolders if is_hidden(name)]
        subfolders[:] = sorted(set(subfolders) - set(hidden))
        images = images_among(name for name in names if not is_hidden(name))
        for name in sorted(names + hidden):
            reason = _reason_against(name, os.path.join(folder, name), name in images)
            if reason:
                left_out.append((prefix + name if reason != _BREAKS_LINES else repr(prefix + name), reason))
            else:
                files.append(prefix + name)
    return sorted(files), left_out


_BREAKS_LINES = "tab or line break in the name"


def _reason_against(name: str, path: str, is_image: bool) -> str | None:
    """Why a name of a folder is not taken; None if it is."""
    if is_hidden(name):
        return HIDDEN
    if not is_image:
        return ARRAY_BESIDE if IMAGE.search(name) else NOT_BY_NAME
    if re.search(r"[\t\n\r]", path):  # records name one file a line, with tabs between the columns
        return _BREAKS_LINES
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would wait for its other end
        return "not a file"
    return None


def images_below(folder: str) -> tuple[list[str], LeftOut]:
    """The images in a folder and below, as paths that can be opened, and what is left out. Raises as `list_images`."""
    files, left_out = list_images(folder)
    return [os.path.join(folder, name) for name in files], LeftOut.of(left_out)


def archives_in(folder: str) -> list[str]:
    """List the tar files of a folder itself by their names, without hidden ones. UserError if it may not be read."""
    try:
        return sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.name.endswith(".tar") and not is_hidden(entry.name) and not entry.is_dir()
        )
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error


def _cannot_list(error: OSError) -> None:
    """For `os.walk`, which otherwise passes over a folder that it may not read, with all that lies in it."""
    raise UserError(f"{error.filename}: {error.strerror}") from error
