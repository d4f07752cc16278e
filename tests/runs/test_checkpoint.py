"""Checkpoints are complete or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpp.errors import MppWarning, ToldElsewhere, UserError
from mpp.runs import checkpoint
from mpp.runs.records import checkpoints_in


def trained(steps: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(steps):
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def saved(folder: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        checkpoint.save(folder, step, *trained(), {"data_fingerprint": "f", "seen": step}, keep=keep)


def test_everything_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    path = checkpoint.save(tmp_path, 3, model, optimizer, {"seen": 12}, keep=2)
    other, other_optimizer = trained(1)
    checkpoint.load(path, other, other_optimizer)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    tensors = [checkpoint.optimizer_tensors(m, o) for m, o in ((model, optimizer), (other, other_optimizer))]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(v, tensors[1][k]) for k, v in tensors[0].items())
    assert checkpoint.read_state(path)["seen"] == 12


def test_where_none_holds_the_user_is_asked(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step-{step:08d}" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"(?s)00002: state\.json does not match.*remove them to begin again"):
        checkpoint.newest(tmp_path)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert [p.name for p in checkpoints_in(tmp_path)] == ["step-00000004", "step-00000003"]


def test_the_one_just_written_is_never_removed(tmp_path: Path) -> None:
    """Checkpoints of later steps may be broken, or the run may have been resumed from an older one."""
    saved(tmp_path, 15, 20, keep=9)
    saved(tmp_path, 5, keep=2)
    assert [p.name for p in checkpoints_in(tmp_path)] == ["step-00000005"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path: Path, name: str, damage: str) -> None:
    saved(tmp_path, 1, 2)
    file = tmp_path / "step-00000002" / name
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    with pytest.warns(MppWarning, match="step-00000002: .*" + ("" if name == "manifest.json" else name)):
        assert checkpoint.newest(tmp_path) == tmp_path / "step-00000001"


def test_a_folder_that_was_not_finished_does_not_count(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "step-00000009.tmp").mkdir()
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000001"
    assert checkpoint.newest(tmp_path / "none") is None


def test_one_that_cannot_be_written_leaves_the_others(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "step-00000002.tmp").write_text("in the way")  # a file in place of the folder
    with pytest.raises(UserError, match=r"step-00000002: cannot be saved: .* GB free there"):
        saved(tmp_path, 2)
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000001"


def test_other_formats_and_other_models_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    path = tmp_path / "step-00000001"
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="does not fit this recipe") as error:
        checkpoint.load(path, model, torch.optim.AdamW(model.parameters()))
    assert "\n" not in str(error.value)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(UserError, match="checkpoint format 99; this version reads 2"):
        checkpoint.read_state(path)
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.read_state(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "3", "{}", '{"..": "0"}', '{"model.safetensors": "0"}'])
def test_a_manifest_that_is_none_is_a_damaged_checkpoint(tmp_path: Path, text: str) -> None:
    (tmp_path / checkpoint.MANIFEST).write_text(text)
    assert checkpoint.broken(tmp_path) is not None


@pytest.mark.parametrize("text", ["[]", "null", "3"])
def test_counters_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError, match="not a checkpoint: state.json holds no counters"):
        checkpoint.read_state(tmp_path)


@pytest.mark.parametrize(("rank", "told"), [(0, UserError), (1, ToldElsewhere)])
def test_what_stops_one_process_stops_all(rank: int, told: type[UserError], tmp_path: Path) -> None:
    """Each process writes its part. If one cannot, nothing is left of the checkpoint, and one process reports it."""
    calls = 0

    def gathered(own: list[Any]) -> list[Any]:
        nonlocal calls
        calls += 1
        other = ("step-00000003: cannot be saved: no space", None) if calls == 2 else (None, None)
        return [*own, other] if rank == 0 else [other, *own]

    (tmp_path / "step-00000003.tmp").mkdir()  # made by the first process
    with pytest.raises(UserError, match=r"^step-00000003: cannot be saved: no space$") as raised:
        checkpoint.save(tmp_path, 3, *trained(), {}, keep=2, writers=checkpoint.Writers(rank, 2, gathered))
    assert raised.type is told
    assert not checkpoints_in(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ([] if rank == 0 else ["step-00000003.tmp"])


@pytest.mark.parametrize("stem", ["model", "optimizer"])
def test_a_file_that_is_not_there_is_missed(stem: str, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 3, *trained(), {}, keep=1)
    (path / f"{stem}.safetensors").unlink()
    with pytest.raises(UserError, match=rf"does not fit this recipe: {stem}\.safetensors is missing"):
        checkpoint.load(path, *trained())
