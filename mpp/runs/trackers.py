"""TensorBoard, Weights & Biases and Trackio."""

from __future__ import annotations

import math
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from mpp.errors import MppWarning, UserError, one_line
from mpp.recipe.flat import JsonObject

PROJECT = "mpp"
"""Of runs, in trackers."""


class Trackers:
    """TensorBoard, Weights & Biases or Trackio, through Accelerate's trackers.

    Args:
        names: Trackers, as recipes name them.
        out: The run folder, which their files go to.
        settings: The recipe's values by dotted key.
        resumed_at: TensorBoard forgets later steps.
        active: Whether this process writes; only the main process does.

    Raises:
        UserError: A tracker cannot begin.
    """

    def __init__(self, names: Sequence[str], out: Path, settings: JsonObject, *, resumed_at: int, active: bool) -> None:
        self._found: list[Any] = []
        if not names or not active:
            return
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        options: dict[str, JsonObject] = {
            "tensorboard": {"purge_step": resumed_at + 1},
            "wandb": {
                "dir": str(out),
                "name": f"{out.parent.name}/{out.name}",
                "id": _tracked_as(out),
                "resume": "allow",
            },
            "trackio": {"name": f"{out.name}-{_tracked_as(out)}", "resume": "allow"},
        }
        try:
            for name in names:
                kind = LOGGER_TYPE_TO_CLASS[name]
                where = {"logging_dir": str(out)} if kind.requires_logging_directory else {}
                tracker = kind(PROJECT, **where, **options[name])
                tracker.start()
                tracker.store_init_configuration(plain)
                self._found.append(tracker)
        except Exception as error:  # theirs: no login, no network, a folder that cannot be written
            raise UserError(f"trackers: {name}: {type(error).__name__}: {one_line(error)}") from error

    def log(self, record: JsonObject) -> None:
        """Numbers of one line of the metrics; `step` is in it."""
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and math.isfinite(v) and k != "step"}
        for tracker in list(self._found):
            try:
                tracker.log(numbers, step=record["step"])
            except Exception as error:  # theirs; a run does not end for it
                self._found.remove(tracker)
                warnings.warn(f"trackers: {tracker.name} gets no more: {one_line(error)}", MppWarning, stacklevel=2)

    def close(self) -> None:
        for tracker in self._found:
            tracker.finish()
        self._found = []


def _tracked_as(out: Path) -> str:
    """The run's name for trackers, the same when it is resumed."""
    path = out / "tracked-as"
    try:
        return path.read_text().strip()
    except OSError:
        name = uuid.uuid4().hex[:12]
        path.write_text(f"{name}\n")
        return name
