"""Errors and warnings that speak to the user: one clear line each (what, where, what is allowed)."""


class UserError(Exception):
    """An input the user can correct. The command line prints each line of it and exits with code 2."""


class ToldElsewhere(UserError):
    """One that another process of the run tells its user; this one ends in silence."""


class BadImage(Exception):
    """An image that cannot be decoded as asked; the loader replaces it, counts it and goes on."""


class MppWarning(UserWarning):
    """A result or an input that deserves a second look."""


def one_line(error: BaseException) -> str:
    """What somebody else's error says, for a line of ours: without its line breaks, and no more than fits."""
    return " ".join(str(error).split())[:300]
