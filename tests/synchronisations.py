"""Count what asks a device for a value, and so waits for it. The count is made on CPUs, where nothing waits."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mpp.training.exchange import Exchange

ASKING_OPERATIONS = (
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_", "equal.", "is_nonzero", "bincount",
)  # fmt: skip
ASKING_METHODS = ("tolist", "numpy", "cpu", "item", "__bool__", "__float__", "__int__", "__index__", "__array__")


class Asked:
    """A context whose `found` has a line of code for each time that a value was asked for.

    Tensors of int64 are not counted: they are sample numbers, which the dataloader made on the host.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self.paused = False
        self._modes = _Functions(self), _Operations(self)

    def note(self, what: str, tensor: Any) -> None:
        if not self.paused and not (isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int64):
            frames = [f for f in traceback.extract_stack() if "/mpp/" in f.filename]
            self.found.append(f"{what} at {frames[-1].filename}:{frames[-1].lineno}" if frames else what)

    def __enter__(self) -> Asked:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Functions(TorchFunctionMode):
    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ASKING_METHODS:
            self.asked.note(func.__name__, args[0])
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        indices = args[1] if name.startswith(("index.", "index_put")) else ()
        by_bool = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)  # counts what is true
        if name.startswith(ASKING_OPERATIONS) or by_bool:
            self.asked.note(name, args[0])
        return func(*args, **(kwargs or {}))


def check_steady_steps(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    """Check that steady steps of a run ask the device for nothing but results of the step before.

    The run has six steps, of which steps 2 to 5 log and save nothing. The results of a step may be read once the next
    step is on its way. The first step is logged by pretraining, and not by fine-tuning.
    """
    asked, events, sent = Asked(), list[Any](), itertools.count(1)
    made, read = Exchange.__init__, Exchange.read

    def began(self: Any, *args: Any) -> None:
        made(self, *args)
        self.number = next(sent)
        events.append(f"{self.number} sent")

    def was_read(self: Any) -> list[float]:
        events.append(f"{self.number} read")
        asked.paused = True
        values = read(self)
        asked.paused = False
        return values

    def step_begins(name: str, *_: Any) -> None:
        if name == "train.step_begins":
            events.append(len(asked.found))

    monkeypatch.setattr(Exchange, "__init__", began)
    monkeypatch.setattr(Exchange, "read", was_read)
    monkeypatch.setattr("mpp.parallel.faults.point", step_begins)
    with asked:
        run()
    steps = [e for e in events if isinstance(e, int)]
    assert len(steps) == 6
    assert asked.found[steps[1] : steps[5]] == []
    assert len(asked.found) > steps[5], "control: measuring at the end must ask the device"
    told = [e for e in events if isinstance(e, str)]
    first = ["1 sent", "1 read", "2 sent", "3 sent", "2 read"], ["1 sent", "2 sent", "1 read", "3 sent", "2 read"]
    assert told[:5] in first
    assert told[5:] == ["4 sent", "3 read", "5 sent", "4 read", "6 sent", "5 read", "6 read"]
