"""How the processes of a run are launched, find each other and choose a precision."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpp.errors import UserError
from mpp.parallel.devices import multiply_in_tf32
from mpp.parallel.launch import check_launch
from mpp.parallel.team import ranks_here, start_team


@pytest.mark.parametrize(
    ("rank", "world", "local", "expected"),
    [
        (0, 1, None, [0]),
        (3, 4, None, [0, 1, 2, 3]),
        (1, 8, "4", [0, 1, 2, 3]),
        (6, 8, "4", [4, 5, 6, 7]),
        (4, 5, "4", [4]),
    ],
)
def test_the_processes_of_a_machine(
    rank: int, world: int, local: str | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert list(ranks_here(rank, world)) == expected


WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"LOCAL_RANK": "0"},
            "LOCAL_RANK is in the environment, but not RANK, MASTER_ADDR; start the run by torchrun, or",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1"},
            "RANK, WORLD_SIZE are in the environment, but not MASTER_ADDR; .*unset RANK, W",
        ),
        ({**WHOLE, "MASTER_ADDR": ""}, "but not MASTER_ADDR"),
        ({**WHOLE, "RANK": "2"}, "RANK: 2 in the environment; must be at least 0 and at most 1"),
        ({**WHOLE, "RANK": "-1"}, "RANK: -1 in the environment; must be at least 0"),
        ({**WHOLE, "WORLD_SIZE": "0"}, "WORLD_SIZE: 0 in the environment; must be at least 1"),
        ({**WHOLE, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE: 0 in the environment; must be at least 1"),
        ({**WHOLE, "MASTER_PORT": "99999"}, "MASTER_PORT: 99999 in the environment; .* at most 65535"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK: '' in the environment, not a whole number"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE: 'x' in the environment, not a whole number; start by torchrun, or unset it"),
    ],
)
def test_half_of_a_launcher_s_environment(given: dict[str, str], message: str) -> None:
    """A run would wait for processes that never come, or fail with a message of torch's."""
    with pytest.raises(UserError, match=message):
        check_launch(given)


@pytest.mark.parametrize("given", [{}, WHOLE, {"RANK": "0"}, {"WORLD_SIZE": "1"}, {"MASTER_PORT": "80"}])
def test_an_environment_that_holds_together(given: dict[str, str]) -> None:
    check_launch(given)


def test_a_switch_of_accelerate_s_that_is_neither_on_nor_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "maybe")
    with pytest.raises(UserError, match="ACCELERATE_USE_FSDP: 'maybe' in the environment; must be true or false"):
        start_team("fp32")


class Called(TorchDispatchMode):
    """The names of torch's operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs")
def test_attention_is_written_out_for_bf16_on_cpus_alone() -> None:
    q = torch.randn(2, 3, 7, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    for precision, fused in (("fp32", True), ("bf16", False), ("auto", True)):
        team = start_team(precision)
        with Called() as called, team.autocast():
            found = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert any("flash_attention" in name for name in called.names) == fused, precision
        torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device may have it")
def test_tf32_is_for_cuda_devices() -> None:
    with pytest.raises(UserError, match="^precision: tf32 is for CUDA devices from Ampere on; use auto, fp32 or bf16"):
        start_team("tf32")


def test_tf32_is_for_one_run() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        multiply_in_tf32(True)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
        multiply_in_tf32(False)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_sharding_is_for_the_recipe_to_ask_for(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """`accelerate launch --use_fsdp` sets this variable."""
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UserError, match=f"^accelerate's {engine}: launch without --use_{engine.lower()}"):
        start_team("fp32")
