"""`devices=N` starts N processes. tests/faults/test_signals.py signals and kills them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import mpp
from mpp.cli.app import main
from mpp.errors import UserError
from mpp.parallel.devices import cores
from mpp.parallel.processes import launch
from tests.conftest import ROOT, pretrain_recipe, pretrain_values


@pytest.mark.parametrize(
    ("device", "processes", "gpus", "message"),
    [
        ("auto", 8, 0, "devices: 8: no CUDA device was found here .* device=cpu starts 8 processes on the CPU"),
        ("cuda", 8, 2, "devices: 8: this machine has 2; give at most as many"),
        ("cpu", 10_000, 0, f"devices: 10000: this machine has {cores()} CPU cores"),
        ("mps", 2, 0, "devices: 2: machines with device=mps have one"),
    ],
)
def test_more_processes_than_devices(
    device: str, processes: int, gpus: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(UserError, match=message):
        launch(["pretrain", "none.yaml"], processes=processes, device=device)


def test_one_device_cannot_be_several() -> None:
    with pytest.raises(UserError, match="devices: 2: cuda:1 is a single device; use device=cuda"):
        pretrain_recipe("none", "none", devices=2, device="cuda:1")
    with pytest.raises(UserError, match="device: must be auto, cpu, cuda, one CUDA device such as cuda:1, or mps"):
        pretrain_recipe("none", "none", device="gpu")


def test_a_plan_takes_the_number_as_an_option() -> None:
    done = CliRunner().invoke(main, ["plan", "vit_small", "data.shards=none", "devices=8"])
    assert (done.exit_code, done.output) == (2, "command line: devices: here it is an option, --devices 8\n")


def test_python_starts_no_processes(shards: Path, tmp_path: Path) -> None:
    recipe = pretrain_recipe(shards, tmp_path / "run", devices=2, device="cpu")
    with pytest.raises(UserError, match="devices: 2: Python runs in one process; use the command `mpp`"):
        mpp.pretrain(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "code"), [(8, 0), (7, 2)])
def test_two_processes(batch: int, code: int, shards: Path, tmp_path: Path) -> None:
    """They end as one process would: with its summary, or each with its line about what is wrong."""
    recipe = tmp_path / "recipe.yaml"
    values = {"optim.steps": 2, "optim.global_batch_size": batch}
    recipe.write_text(yaml.safe_dump(pretrain_values(shards, tmp_path / "run", **values)))
    words = [sys.executable, "-m", "mpp", "pretrain", str(recipe), "devices=2", "device=cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stderr
    if code:
        line = "optim.global_batch_size: 7 cannot be divided among 2 processes; expected a multiple of 2"
        assert sorted(done.stderr.splitlines()) == [line, f"process 1: {line}"]
    else:
        assert "2 steps of 8 images (2 processes × 4)" in done.stdout
        assert done.stdout.count("Finished in") == 1
