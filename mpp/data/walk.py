"""Find the images of a folder, in the same way for every command, and count what is left out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from mpp.errors import UserError, printable
from mpp.recipe.values import IMAGE

NOT_FOR_PEOPLE = ("__MACOSX", "@eaDir")
"""Folders with metadata and previews that macOS and Synology create next to images."""
HIDDEN = "hidden"
ARRAY_BESIDE = "array beside an image of the same name"
NOT_BY_NAME = "not an image by its name"
BREAKS_LINES = "tab or line break in the name"
SHARED_NAME = (
    "share their name up to the first dot with others and are all read; data.image_extension takes one of each"
)
"""Reason recorded for images that are used although several of them may belong to one sample."""
MOST_LETTERS = 300
"""Greatest length of a name that is shown, in characters."""


class LeftOut:
    """Files and members that were left out: their number and the name of the first one, for each reason."""

    def __init__(self, found: dict[str, tuple[int, str]] | None = None) -> None:
        self.found = dict(found or {})

    @classmethod
    def of(cls, names: Iterable[tuple[str, str]]) -> LeftOut:
        """Count (name, reason) pairs."""
        left_out = cls()
        for name, reason in names:
            left_out.add(reason, name)
        return left_out

    def add(self, reason: str, name: str, count: int = 1) -> None:
        before, first = self.found.get(reason, (0, name[:MOST_LETTERS]))
        self.found[reason] = (before + count, first)

    def add_all(self, other: LeftOut, prefix: str = "") -> None:
        """Add the counts of another record, with `prefix` before its names."""
        for reason, (count, name) in other.found.items():
            self.add(reason, prefix + name, count)

    def __bool__(self) -> bool:
        return bool(self.found)

    def __str__(self) -> str:
        parts = [
            f"{count} ({reason}), {'such as ' * (count > 1)}{name}"
            for reason, (count, name) in self.found.items()
            if reason != SHARED_NAME
        ]
        lines = [f"left out: {'; '.join(parts)}"] if parts else []
        if SHARED_NAME in self.found:
            count, name = self.found[SHARED_NAME]
            lines.append(f"{count} images {SHARED_NAME}, such as {name}")
        return printable("; ".join(lines))


def is_hidden(name: str) -> bool:
    """Check whether a name is that of a file or folder that no user made, such as `.thumbnails` or `._photo.jpg`."""
    return name.startswith(".") or name in NOT_FOR_PEOPLE


def images_among(names: Iterable[str]) -> set[str]:
    """Return the names in one folder that are images.

    An .npy file is not an image if an image of another kind has the same stem. It is then other data of the same
    sample, such as an embedding or a depth map.
    """
    images = {name for name in names if IMAGE.search(name)}
    stems = {os.path.splitext(name)[0] for name in images if not name.lower().endswith(".npy")}
    return {name for name in images if not (name.lower().endswith(".npy") and os.path.splitext(name)[0] in stems)}


def list_images(source: str) -> tuple[list[str], list[tuple[str, str]]]:
    """List the images in a folder and everything below it.

    Links to folders are followed, but each folder is read once. An image that is a link to a missing file counts as an
    unreadable image.

    Returns:
        Sorted paths of the images below `source`, with /, and (path, reason) of everything that is left out.

    Raises:
        UserError: If a folder cannot be read, because its images would be missing without notice.
    """
    files, left_out, seen = [], [], dict[str, str]()
    folders, links = [""], list[str]()
    while folders or links:
        below = folders.pop() if folders else links.pop(0)  # links last, so that a folder keeps its real name
        place = os.path.join(source, below).rstrip("/") or "/"
        real = os.path.realpath(place)
        if real in seen:
            left_out.append((below.rstrip("/"), f"the same folder as {seen[real] or 'the one it is in'}"))
            continue
        seen[real] = below.rstrip("/")
        inner: list[str] = []
        entries = _entries(place)
        images = images_among(entry.name for entry in entries if not is_hidden(entry.name))
        for entry in entries:
            name = below + entry.name
            if entry.is_dir() and not is_hidden(entry.name):
                (links if entry.is_symlink() else inner).append(name + "/")
            elif re.search(r"[\t\n\r]", name):  # records have one line for each file and tabs between columns
                left_out.append((repr(name), BREAKS_LINES))
            elif reason := _reason_against(entry, entry.name in images):
                left_out.append((name, reason))
            else:
                files.append(name)
        folders += reversed(inner)  # the list is read from its end
    return sorted(files), left_out


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Return the content of a folder, sorted by name. Raise UserError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}") from error


def _reason_against(entry: os.DirEntry[str], is_image: bool) -> str | None:
    """Return the reason why a file of a folder is left out; None if it is an image."""
    if is_hidden(entry.name):
        return HIDDEN
    if not is_image:
        return ARRAY_BESIDE if IMAGE.search(entry.name) else NOT_BY_NAME
    # reading a pipe would block; a link to a missing file counts as an unreadable image
    if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
        return None
    return "not a file"


def images_below(folder: str) -> tuple[list[str], LeftOut]:
    """Return the paths of the images in and below a folder, and the files that are left out, see `list_images`."""
    files, left_out = list_images(folder)
    return [os.path.join(folder, name) for name in files], LeftOut.of(left_out)


def archives_in(folder: str) -> list[str]:
    """List the names of the tar files directly in a folder, without hidden ones.

    Raises:
        UserError: If the folder cannot be read.
    """
    entries = _entries(folder)
    return [e.name for e in entries if e.name.endswith(".tar") and not is_hidden(e.name) and not e.is_dir()]
