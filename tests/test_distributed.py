"""What the processes of a run are to each other."""

from __future__ import annotations

import pytest

from mpp.distributed import ranks_here


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
