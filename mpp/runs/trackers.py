"""Log metrics to TensorBoard, Weights & Biases, Trackio and MLflow."""

from __future__ import annotations

import math
import uuid
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from mpp.errors import MppWarning, UserError, one_line
from mpp.recipe.flat import JsonObject

PROJECT = "mpp"
"""Name of the project (MLflow: experiment) to which trackers assign runs."""
MLFLOW_RUN = "mlflow-run"
"""File with the id that MLflow gave the run, so that a resumed run continues it."""


class Trackers:
    """The trackers of a run, through Accelerate's trackers.

    Args:
        names: Names of trackers as in recipes.
        out: The run folder, where trackers write their files.
        settings: Values of the recipe by dotted key.
        resumed_at: Step that the run continues from. TensorBoard discards later steps.
        active: Whether this process writes; true only on the main process.

    Raises:
        UserError: If a tracker cannot be started.
    """

    def __init__(self, names: Sequence[str], out: Path, settings: JsonObject, *, resumed_at: int, active: bool) -> None:
        self._found: list[Any] = []
        if not names or not active:
            return
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        known_to_mlflow = _stored_id(out / MLFLOW_RUN) if "mlflow" in names else None
        options: dict[str, JsonObject] = {
            "tensorboard": {"purge_step": resumed_at + 1},
            "wandb": {
                "dir": str(out),
                "name": f"{out.parent.name}/{out.name}",
                "id": _tracked_as(out),
                "resume": "allow",
            },
            "trackio": {"name": f"{out.name}-{_tracked_as(out)}", "resume": "allow"},
            "mlflow": {"run_name": f"{out.parent.name}/{out.name}", "run_id": known_to_mlflow},
        }
        try:
            for name in names:
                kind = LOGGER_TYPE_TO_CLASS[name]
                where = {"logging_dir": str(out)} if kind.requires_logging_directory else {}
                tracker = kind(PROJECT, **where, **options[name])
                self._found.append(tracker)
                tracker.start()
                if name == "mlflow" and known_to_mlflow is None:
                    (out / MLFLOW_RUN).write_text(f"{tracker.tracker.info.run_id}\n")
                if name != "mlflow" or known_to_mlflow is None:  # MLflow keeps the first settings and refuses others
                    tracker.store_init_configuration(plain)
        except Exception as error:  # an error of the tracker: no login, no network, a folder that cannot be written
            with suppress(Exception):
                self.close()
            advice = f"; delete {out / MLFLOW_RUN} to begin another run" if name == "mlflow" and known_to_mlflow else ""
            raise UserError(f"trackers: {name}: {type(error).__name__}: {one_line(error)}{advice}") from error

    def log(self, record: JsonObject) -> None:
        """Log the numbers of one line of metrics, which contains `step`."""
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and math.isfinite(v) and k != "step"}
        for tracker in list(self._found):
            try:
                tracker.log(numbers, step=record["step"])
            except Exception as error:  # an error of the tracker must not end the run
                self._found.remove(tracker)
                with suppress(Exception):  # MLflow starts no other run before this one has ended
                    tracker.finish()
                warnings.warn(f"trackers: {tracker.name} gets no more: {one_line(error)}", MppWarning, stacklevel=2)

    def close(self) -> None:
        for tracker in self._found:
            tracker.finish()
        self._found = []


def _tracked_as(out: Path) -> str:
    """Return the run's name for trackers. It is stored in the run folder, so that a resumed run has the same name."""
    path = out / "tracked-as"
    name = _stored_id(path)
    if name is None:
        name = uuid.uuid4().hex[:12]
        path.write_text(f"{name}\n")
    return name


def _stored_id(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None
