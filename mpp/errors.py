"""Errors and warnings for users. Each is one line (what is wrong, where, what to do) without secrets."""

import os
import re
import shutil

_IN_URL = re.compile(r"(?<=://)[^/\s'\"]*@")
_PARAMETER = re.compile(
    r"(?i)([?&;#](?:[^=&\s'\"]*(?:sign|token|key|secret|credential|passw|pwd|auth|expires|jwt|policy)[^=&\s'\"]*"
    r"|x-amz-[^=&\s'\"]*|x-goog-[^=&\s'\"]*|sig|sas|se|sp|sv|sr|st|spr|skoid|sktid|skt|ske|sks|skv)=)[^&\s'\"]+"
)
"""Secret parameters of signed URLs: those of S3, Google and CloudFront, and the short names of Azure."""


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def without_secrets(text: str) -> str:
    """Return the text with asterisks for the passwords, tokens and signatures of its URLs."""
    return _PARAMETER.sub(r"\1***", _IN_URL.sub("***@", text))


def printable(text: str) -> str:
    """Return the text with control characters written out, because names in files may hold terminal sequences."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


DISTRIBUTION = "maskpatch"
"""The name of the installed package; `mpp` on PyPI is another project."""


class UserError(Exception):
    """An error that the user can correct. The command line prints its message and exits with code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(without_secrets(message)))


class ToldElsewhere(UserError):
    """An error that another process of the run reports to the user. This process ends without a message."""


class BadImage(Exception):
    """An image that cannot be decoded as requested. The loader replaces and counts it."""


class MppWarning(UserWarning):
    """A result or an input that deserves a second look."""


def one_line(error: object) -> str:
    """Return the message of another library's error on one line, without secrets and with at most 300 characters."""
    return without_secrets(" ".join(str(error).split()))[:300]


def reason(error: Exception) -> str:
    """Return why a file could not be written, in the system's words. If there are several errors, use the first."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # copytree's list of (from, to, why)
        return one_line(error.args[0][0][2])
    return getattr(error, "strerror", None) or one_line(error)


def how_to_get(*extras: str) -> str:
    """Return the command that installs the packages of these extras, by the names of the packages."""
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
    """Return the end of a message that suggests a similar name in the folder of a missing file; '' if there is none."""
    import difflib

    folder, base = os.path.split(os.path.abspath(name))
    try:
        like = difflib.get_close_matches(base, os.listdir(folder), n=1)
    except OSError:  # the folder is also missing
        return ""
    return f"; is '{os.path.join(os.path.dirname(name), like[0])}' meant?" if like else ""


def require_existing(*places: str | os.PathLike[str]) -> None:
    """Check that all of these files or folders exist, before heavy packages are imported.

    Raises:
        UserError: If one does not exist; the message names the first.
    """
    for place in places:
        if not os.path.lexists(place):
            raise UserError(f"{place}: no such file or folder{suggest_path(place)}")
