"""The run folder's records: metrics.jsonl, train.log, status.json, env.json, and progress on the terminal."""

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
"""Of lines that a full disk does not take; the oldest are dropped beyond."""
RECENT_LINES = 5
"""Of the metrics, from which the pace is taken; the first one has the start of everything in it."""


class MetricsSink(Protocol):
    """Other places for metrics; `runs.trackers.Trackers` is one."""

    def log(self, record: JsonObject) -> None: ...
    def close(self) -> None: ...


class Lines:
    """A file that gets lines. Where it cannot be written, they wait for the next one that can, and a warning says so.

    Args:
        path: Appended to; a last line that was never finished is finished.

    Raises:
        OSError: It cannot be opened.
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
    """1:02:03, 12:34 or 56 s."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class RunLog:
    """Writes a run's records. On all but the main process (`active=False`) it writes nothing.

    out: the run folder. steps: of the whole run. resumed_at: lines of later steps are taken off metrics.jsonl,
    since they will be written again. trackers: get every line, too, and are closed with this.
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
                continue  # the line that was being written when the run died
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        faults.point("load.metrics_kept", temporary)
        os.replace(temporary, path)
        faults.point("load.metrics_rewound")

    def metrics(self, record: JsonObject) -> None:
        """One line of metrics.jsonl; `step` is in it. On a terminal the bar shows it, elsewhere a plain line."""
        if not self.active:
            return
        # JSON has no NaN or infinity: readers in other languages stumble over Python's
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
        """Time left at the pace of the last lines, such as `  eta 1:02:03`; "" before there are two."""
        now = time.monotonic()
        self._lines.append((step, now))
        before, then = self._lines[0]
        return f"  eta {format_duration((now - then) / (step - before) * (self.steps - step))}" if step > before else ""

    def note(self, text: str) -> None:
        """A line of train.log alone."""
        if self.active:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(without_secrets(text))}")

    def say(self, text: str) -> None:
        """A line for people: train.log and the terminal."""
        if not self.active:
            return
        self.note(text)
        text = printable(without_secrets(text))
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(self.label + text, flush=True)

    def status(self, state: str, **more: object) -> None:
        """status.json: running, finished, stopped or failed, and where."""
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
