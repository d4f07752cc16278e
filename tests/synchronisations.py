"""What asks a device for a value, and so waits for it: counted on CPUs, where nothing waits."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ASKING_OPERATIONS = (
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_", "equal.", "is_nonzero", "bincount",
)  # fmt: skip
ASKING_METHODS = ("tolist", "numpy", "cpu", "item", "__bool__", "__float__", "__int__", "__index__", "__array__")


class Asked:
    """A context; `found` has a line of code for each time that a value was asked for.

    Sample numbers, int64 that the loader made, are the host's own and are not counted.
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
        by_bool = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)  # counts what is True
        if name.startswith(ASKING_OPERATIONS) or by_bool:
            self.asked.note(name, args[0])
        return func(*args, **(kwargs or {}))
