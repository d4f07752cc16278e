"""Time contestants in turns. The machine's speed drifts, but the ratio within a round does not."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
QUIET_S = 0.25
"""Pause before a turn, in s. Threads of the previous contestant still spin for 0.2 s (OpenMP's block time)."""


class Failed(Exception):
    """A contestant could not be built or run. The message is its last words."""


class Turn(NamedTuple):
    """What a contestant did in its turn."""

    wall_s: float
    cpu_s: float
    images: int
    peak_mib: float
    device_peak_mib: float = 0.0


@dataclass
class Contestant:
    """A process that waits for its turn.

    Raises:
        Failed: If the process does not start.
    """

    name: str
    python: str
    module: str
    bench: str
    settings: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    units: int = 1

    def __post_init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  it lives as long as the process
        words = [self.python, str(HERE / "worker.py"), self.module, self.bench, self.name, json.dumps(self.settings)]
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
            )
        except OSError as error:
            raise Failed(f"{self.name}: {error}") from error
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise Failed(f"{self.name}: {(self._errors.read().strip().splitlines() or ['no word'])[-1]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def turn(self, units: int) -> Turn:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{units}\n")
        self._process.stdin.flush()
        return Turn(**self._answer())

    def end(self) -> None:
        self._process.communicate()
        self._errors.close()


def interleave(contestants: Iterable[Contestant], *, rounds: int, turn_s: float, warm_up: int = 2) -> None:
    """Run rounds in which each contestant has a turn of about `turn_s` seconds. The first turns do not count."""
    contestants = list(contestants)
    for c in contestants:
        c.turn(warm_up)
        one = c.turn(1).wall_s
        c.units = max(round(turn_s / max(one, 1e-9)), 1)
    for number in range(rounds):
        for c in contestants if number % 2 else contestants[::-1]:  # no contestant always runs after the same other
            time.sleep(QUIET_S)
            c.turns.append(c.turn(c.units))
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def rates(contestant: Contestant) -> Spread:
    """Return the images per second of wall time."""
    return Spread.of([turn.images / turn.wall_s for turn in contestant.turns])


def core_rates(contestant: Contestant) -> Spread:
    """Return the images per second of one core, that is of the CPU time that the process spent on them."""
    return Spread.of([turn.images / turn.cpu_s for turn in contestant.turns])


def ratio(ours: Contestant, theirs: Contestant, *, per_core: bool = False) -> Spread:
    """Return how many times as fast ours is, over the rounds."""

    def rate(turn: Turn) -> float:
        return turn.images / (turn.cpu_s if per_core else turn.wall_s)

    return Spread.of([rate(a) / rate(b) for a, b in zip(ours.turns, theirs.turns, strict=True)])
