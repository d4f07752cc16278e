"""How devices are set up, and the advice on speed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import mpp
from mpp.errors import UserError
from mpp.parallel.devices import advise_on_cpu, choose_device, cores_in_use, prefer_channels_last
from tests.conftest import pretrain_recipe


def test_convolutional_networks_have_channels_last() -> None:
    """Only networks with batch norms have channels last, and only the weights of their two-dimensional convolutions."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv3d(1, 2, 3))
    prefer_channels_last(network)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network[2].weight.is_contiguous()
    patches = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.LayerNorm(4))
    prefer_channels_last(patches)
    assert patches[0].weight.is_contiguous()


@pytest.mark.parametrize(
    ("load", "threads", "said"),
    [(1.5, 2, True), (0.2, 2, False), (3.0, 1, False), (2.5, 4, True), (0.5, 4, False)],
)
def test_threads_that_would_wait_are_spoken_of(
    load: float, threads: int, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = max(threads, 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    expected = f"other work takes {load:.1f} of {cores} cores, so a run is slower than it could be"
    assert cores_in_use() == (expected if said else "")


@pytest.mark.parametrize(
    ("has_bf16", "precision", "said"),
    [
        (True, "auto", "precision=bf16 may take half the time"),
        (False, "bf16", "precision=fp32 takes a third to two thirds of the time"),
        (True, "bf16", None),
        (False, "auto", None),
        (True, "fp32", None),
        (False, "fp32", None),
    ],
)
def test_the_faster_precision_is_named(
    has_bf16: bool, precision: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpp.parallel.devices.cpu_has_bf16", lambda: has_bf16)
    advice = advise_on_cpu(precision, processes=2)
    assert len(advice) == (said is not None)
    assert said is None or said in advice[0]


@pytest.mark.parametrize(
    ("device", "gpus", "kind"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda"), ("cuda:1", 2, "cuda")],
)
def test_the_chosen_device(device: str, gpus: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    current = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    assert choose_device(device) == kind
    assert current == ([1] if device == "cuda:1" else [])


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda", 0, "device: cuda: no CUDA device was found here"),
        ("cuda:2", 2, "device: cuda:2: this machine has 2, from cuda:0 to cuda:1"),
        ("mps", 0, "device: mps: torch finds no Apple GPU here"),
    ],
)
def test_devices_that_are_not_there(device: str, gpus: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        choose_device(device)


def test_how_busy_the_cores_are_is_said_of_a_run_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpp.parallel.devices.cores_in_use", lambda: "busy")
    assert (advise_on_cpu("fp32", 1), advise_on_cpu("fp32", 2)) == (["busy"], [])


def test_pretraining_says_what_would_make_it_faster(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpp.parallel.devices.cores_in_use", lambda: "busy")
    monkeypatch.setattr("mpp.parallel.devices.cpu_has_bf16", lambda: True)
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **{"optim.steps": 1}))
    said = (tmp_path / "run" / "train.log").read_text()
    assert "note: busy\n" in said
    assert "precision=bf16" in said
