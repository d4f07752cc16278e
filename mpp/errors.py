"""Errors and warnings that speak to the user: one clear line each (what, where, what is allowed), without secrets."""

import os
import re
import shutil

_IN_URL = re.compile(r"(?<=://)[^/\s'\"]*@")
_PARAMETER = re.compile(
    r"(?i)([?&;#](?:[^=&\s'\"]*(?:sign|token|key|secret|credential|passw|pwd|auth|expires|jwt|policy)[^=&\s'\"]*"
    r"|x-amz-[^=&\s'\"]*|x-goog-[^=&\s'\"]*|sig|sas|se|sp|sv|sr|st|spr|skoid|sktid|skt|ske|sks|skv)=)[^&\s'\"]+"
)
"""Of signed URLs: S3, Google and CloudFront by their names, Azure by its short ones."""


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def without_secrets(text: str) -> str:
    """Return the text with asterisks for the passwords, tokens and signatures of its URLs."""
    return _PARAMETER.sub(r"\1***", _IN_URL.sub("***@", text))


def printable(text: str) -> str:
    """With what a terminal would obey, escape sequences above all, written out: names in files may hold it."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


DISTRIBUTION = "maskpatch"
"""The name of the installed package; `mpp` on PyPI is another project."""


class UserError(Exception):
    """An input the user can correct. The command line prints each line of it and exits with code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(without_secrets(message)))


class ToldElsewhere(UserError):
    """One that another process of the run tells its user; this one ends in silence."""


class BadImage(Exception):
    """An image that cannot be decoded as asked; the loader replaces it and counts it."""


class MppWarning(UserWarning):
    """A result or an input that deserves a second look."""


def one_line(error: object) -> str:
    """What somebody else's error says, for a line of ours: without its line breaks, and no more than fits."""
    return without_secrets(" ".join(str(error).split()))[:300]


def reason(error: Exception) -> str:
    """Why a file could not be written: in the system's words, of several the first one's."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # of copytree: (from, to, why) each
        return one_line(error.args[0][0][2])
    return getattr(error, "strerror", None) or one_line(error)


def how_to_get(*extras: str) -> str:
    """The command that installs what these extras of mpp's bring, by the packages' own names."""
    import shlex
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    try:
        listed = [Requirement(line) for line in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:  # not installed: run from a checkout
        listed = []
    wanted = [r for r in listed if r.marker and any(r.marker.evaluate({"extra": extra}) for extra in extras)]
    words = [shlex.quote(f"{r.name}{r.specifier}") for r in wanted]
    return f"pip install {' '.join(words)}" if words else f"pip install '.[{','.join(extras)}]'"


def suggest_path(name: str | os.PathLike[str]) -> str:
    """Return a similar name in the folder of a missing file, as the end of a message; or ''."""
    import difflib

    folder, base = os.path.split(os.path.abspath(name))
    try:
        like = difflib.get_close_matches(base, os.listdir(folder), n=1)
    except OSError:  # its folder is missing as well
        return ""
    return f"; is '{os.path.join(os.path.dirname(name), like[0])}' meant?" if like else ""


def require_existing(*places: str | os.PathLike[str]) -> None:
    """Check that all of these are there, before anything heavy is imported.

    Raises:
        UserError: For the first that is not.
    """
    for place in places:
        if not os.path.lexists(place):
            raise UserError(f"{place}: no such file or folder{suggest_path(place)}")
