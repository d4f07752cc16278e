"""Write the records of a run folder (metrics.jsonl, train.log, status.json), and show progress on the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections import deque
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from mpp.errors import MppWarning, UserError, printable, without_secrets
from mpp.parallel import faults
from mpp.recipe.flat import JsonObject
from mpp.runs.records import write_status

MOST_WAITING_BYTES = 64 << 20
"""Most bytes of lines that are held while the disk is full; beyond that the oldest bytes are dropped."""
RECENT_LINES = 5
"""Number of latest lines of metrics from which the pace is computed, since the first line includes the start-up."""


class MetricsSink(Protocol):
    """Another destination for metrics, such as `runs.trackers.Trackers`."""

    def log(self, record: JsonObject) -> None: ...
    def close(self) -> None: ...


class Lines:
    """A file to which lines are appended. If a write fails, it warns, and keeps the lines for the next write.

    Args:
        path: File to append to. If its last line has no line break, one is added before the next line.

    Raises:
        OSError: If the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._waiting, self._told = path, b"", False
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close())
        size = self._file.tell()
        if size:
            with open(path, "rb") as before:
                before.seek(size - 1)
                self._waiting = b"" if before.read(1) == b"\n" else b"\n"

    def write(self, line: str) -> None:
        self._waiting += line.encode("utf-8", "backslashreplace") + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._told = False
        except OSError as error:
            self._waiting = self._waiting[-MOST_WAITING_BYTES:]
            if not self._told:
                self._told = True
                warnings.warn(f"{self.path}: {error.strerror}; its lines wait", MppWarning, stacklevel=3)

    def close(self) -> None:
        self._file.close()


def format_duration(seconds: float) -> str:
    """Format a duration as 1:02:03, 12:34 or 56 s."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class RunLog:
    """Writer of a run's records.

    Args:
        out: The run folder.
        steps: Number of steps of the whole run.
        resumed_at: Step that the run continues from. Lines of later steps are removed from metrics.jsonl, since they
            will be written again.
        active: Whether anything is written; true only on the main process.
        label: Text before each line on the terminal.
        trackers: Trackers that also get every line of metrics. They are closed together with this log.

    Raises:
        UserError: If the files cannot be written.
    """

    def __init__(
        self,
        out: Path,
        *,
        steps: int,
        resumed_at: int,
        active: bool,
        label: str = "",
        trackers: MetricsSink | None = None,
    ) -> None:
        self.out, self.steps, self.active, self.label, self.trackers = out, steps, active, label, trackers
        self.bar: tqdm[Any] | None = None
        self._shown: dict[str, str] = {}
        self._lines: deque[tuple[int, float]] = deque(maxlen=RECENT_LINES + 1)
        if not active:
            return
        try:
            self._rewind(resumed_at)
            self._metrics, self._log = Lines(out / "metrics.jsonl"), Lines(out / "train.log")
        except OSError as error:
            raise UserError(f"{out}: {error.strerror}") from error
        if sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=resumed_at, desc=label or None, unit="step", dynamic_ncols=True)

    def _rewind(self, step: int) -> None:
        path = self.out / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # the run was killed while it wrote this line
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        faults.point("load.metrics_kept", temporary)
        os.replace(temporary, path)
        faults.point("load.metrics_rewound")

    def metrics(self, record: JsonObject) -> None:
        """Write a line of metrics.jsonl, and show it in the progress bar, or as a plain line if there is no bar.

        Args:
            record: Metrics by name, with `step` among them.
        """
        if not self.active:
            return
        # JSON has no NaN or infinity; readers in other languages reject Python's notation
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in record.items()}
        self._metrics.write(json.dumps(clean))
        if self.trackers is not None:
            self.trackers.log(record)
        tuned = [k for k in record if k.startswith("tune_")]
        keys = ("loss", "skill", "probe_accuracy", *tuned, "lr", "images_per_s")
        new = {k: f"{k} {record[k]:.4g}" for k in keys if k in record and math.isfinite(record[k])}
        self._shown = {k: v for k, v in self._shown.items() if k not in record} | new
        if self.bar is not None:
            self.bar.set_postfix_str("  ".join(self._shown[k] for k in keys if k in self._shown))
        else:
            text = "  ".join(new.values())
            print(f"{self.label}step {record['step']}/{self.steps}  {text}{self._eta(record['step'])}", flush=True)

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def _eta(self, step: int) -> str:
        """Return the time left at the pace of the last lines, such as `  eta 1:02:03`; "" after the first line."""
        now = time.monotonic()
        self._lines.append((step, now))
        before, then = self._lines[0]
        return f"  eta {format_duration((now - then) / (step - before) * (self.steps - step))}" if step > before else ""

    def note(self, text: str) -> None:
        """Write a line to train.log only."""
        if self.active:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(without_secrets(text))}")

    def say(self, text: str) -> None:
        """Write a line to train.log and to the terminal."""
        if not self.active:
            return
        self.note(text)
        text = printable(without_secrets(text))
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(self.label + text, flush=True)

    def status(self, state: str, **more: object) -> None:
        """Write status.json.

        Args:
            state: running, finished, stopped or failed.
            **more: Other values for status.json, such as the step.
        """
        if self.active:
            try:
                write_status(self.out, state, steps=self.steps, **more)
            except OSError as error:
                warnings.warn(f"{self.out}/status.json: {error.strerror}", MppWarning, stacklevel=2)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.active:
            self._metrics.close()
            self._log.close()
        if self.trackers is not None:
            self.trackers.close()
