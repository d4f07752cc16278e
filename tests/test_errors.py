"""Lines for users."""

from __future__ import annotations

from mpp.errors import UserError, one_line


def test_somebody_elses_error_is_one_line_without_secrets() -> None:
    said = one_line(OSError("first\n  https://me:word@host/a.tar?X-Amz-Signature=abc \n" + "x" * 1000))
    assert said.startswith("first https://***@host/a.tar?X-Amz-Signature=*** xxx")
    assert len(said) == 300


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert str(UserError("a\x1b[31m\x07.jpg:\tbad\nb: bad")) == "a\\x1b[31m\\x07.jpg:\tbad\nb: bad"


def test_nor_has_one_of_ours_secrets() -> None:
    assert str(UserError("s3://a:b@c/d.tar: gone")) == "s3://***@c/d.tar: gone"
