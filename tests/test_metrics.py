"""Lines of a run's records."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from mpp.errors import MppWarning
from mpp.metrics import Lines


def test_lines_wait_where_there_is_no_space_and_come_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("first\n")
    lines = Lines(path)
    file, full = os.dup(lines._file.fileno()), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, lines._file.fileno())
    with pytest.warns(MppWarning, match=r"metrics\.jsonl: No space left on device; its lines wait"):
        lines.write("second")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        lines.write("third")
    os.dup2(file, lines._file.fileno())
    lines.write("fourth")
    assert path.read_text() == "first\nsecond\nthird\nfourth\n"
    lines.close()
    os.close(file)
    os.close(full)
