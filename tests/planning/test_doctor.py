"""Problems of a machine are reported with what to do, and what is in order is reported."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mpp.planning import doctor
from tests.conftest import ROOT, command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DECODING_S", 0.02)
    monkeypatch.setattr(doctor, "WRITTEN_BYTES", 1 << 20)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    done = command("doctor", tmp_path, "--json")
    found = {f["what"]: f for f in json.loads(done.stdout)}
    assert found.keys() >= {"python", "packages", "cores", "GPU", "precision", "decoding", "memory", "writing", "clock"}
    assert done.returncode == (0 if all(f["ok"] for f in found.values()) else 2)
    assert int(found["decoding"]["found"].split()[0]) > 10
    assert int(found["writing"]["found"].split()[0]) > 0


@pytest.mark.usefixtures("quick")
def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, Usage = importlib.util.find_spec, type(shutil.disk_usage("/"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else own(name))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 99, 1))
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=99", "numpy>=2", "peft>=99; extra == 'lora'"])
    monkeypatch.setattr(doctor.time, "time", lambda: 0.0)
    found = list(doctor.examine(str(tmp_path / "not" / "there")))
    wrong = {f.what: str(f) for f in found if not f.ok}
    assert wrong.keys() >= {"packages", "disk, runs", "disk, cache", "clock"}
    assert wrong["packages"].startswith("problem packages")
    assert wrong["packages"].endswith("; needs torch>=99\n                         pip install 'torch>=99'")
    assert "timedatectl" in wrong["clock"]
    assert any("pip install " in f.advice and "peft" in f.advice for f in found)
    assert {str(f).split()[0] for f in found} == {"ok", "note", "problem"}


@pytest.mark.usefixtures("quick")
def test_nobody_is_sent_to_another_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's `mpp` is another project, with a higher version."""
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=99", "no-such-package-here>=1"])
    found = "\n".join(str(f) for f in doctor.examine(str(tmp_path)))
    assert (
        "no-such-package-here is not installed; needs no-such-package-here>=1\n                         pip install"
        in found
    )
    assert not re.search(r"pip install (-U |--upgrade )?'?mpp\b", found)
    for file in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("mpp/**/*.py")]:
        assert not re.search(r"pip install (-U |--upgrade )?'?mpp\b", file.read_text()), file


@pytest.mark.usefixtures("quick")
def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", full)
    (line,) = [f for f in doctor.examine(str(tmp_path)) if f.what == "writing"]
    assert str(line).splitlines() == [
        f"problem writing          {tmp_path}: No space left on device",
        "                         give another folder: mpp doctor FOLDER",
    ]
