"""Error lines for users."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from mpp.errors import UserError, how_to_get, one_line, require_existing


def test_somebody_elses_error_is_one_line_without_secrets() -> None:
    said = one_line(OSError("first\n  https://me:word@host/a.tar?X-Amz-Signature=abc \n" + "x" * 1000))
    assert said.startswith("first https://***@host/a.tar?X-Amz-Signature=*** xxx")
    assert len(said) == 300


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert str(UserError("a\x1b[31m\x07.jpg:\tbad\nb: bad")) == "a\\x1b[31m\\x07.jpg:\tbad\nb: bad"


def test_nor_has_one_of_ours_secrets() -> None:
    assert str(UserError("s3://a:b@c/d.tar: gone")) == "s3://***@c/d.tar: gone"


def test_how_to_get_what_an_extra_brings() -> None:
    """Extras are given by the names of their packages, because `mpp` may be another project on the index."""
    assert how_to_get("parquet") == "pip install 'pyarrow>=20'"
    said = how_to_get("onnx", "lora")
    assert all(f"{name}" in said for name in ("onnx", "onnxscript", "onnxruntime", "peft"))
    assert "mpp" not in said


def test_how_to_get_it_in_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", gone)
    assert how_to_get("onnx", "lora") == "pip install '.[onnx,lora]'"


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    require_existing(tmp_path, tmp_path / "photos")
    with pytest.raises(UserError, match=r"fotos: no such file or folder; is '.*photos' meant\?$"):
        require_existing(tmp_path, tmp_path / "fotos")
    with pytest.raises(UserError, match=r"/deeper: no such file or folder$"):
        require_existing(tmp_path / "nothing like it" / "deeper")
