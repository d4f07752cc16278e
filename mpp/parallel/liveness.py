"""Watch the other processes of a run. A process that died or hangs is named, and no process waits for ever.

Every second, a thread of each process writes a heartbeat and its main thread's progress into the store of the process
group. If an exchange breaks, these records explain it: by another process's last message, by a heartbeat that stopped,
or by a process that is behind.

The thread ends its own process in two cases. It first writes the stacks of all threads to `hang-rankN.txt` in the run
folder.

* The main thread has made no progress for `hang_timeout_s`.
* The main thread waits for a process of this machine that has died. NCCL does not report the death. gloo does not
  always: it cannot detect a death if a child of the dead process holds its connections.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import torch

from mpp.errors import UserError, one_line
from mpp.parallel.workers import of_a_worker, worker_died
from mpp.recipe.flat import JsonObject

States: TypeAlias = dict[int, Any]
"""Last record of each process, by rank. None if a process has not written any."""
BEAT_S = 1.0
SILENT_S = 5.0
"""Seconds without a heartbeat after which a process counts as gone or stopped (a guess)."""
STORE_TIMEOUT_S = 2.0
SAVING = "measuring, logging, saving"


class Watch:
    """A context that watches the processes of a run.

    An error of the loader, or of an exchange between processes, leaves the context as a UserError of one line.

    Args:
        rank: Rank of this process.
        world: Number of processes.
        out: The run folder.
        hang_timeout_s: Seconds without progress after which a process counts as hung.
    """

    def __init__(self, rank: int, world: int, out: Path, *, hang_timeout_s: float) -> None:
        self.rank, self.world, self.out, self.hang_timeout_s = rank, world, out, hang_timeout_s
        self.status: Callable[..., None] | None = None
        """Function that writes status.json, once the log is open: `runs.log.RunLog.status`."""
        self._marks, self._step, self._doing, self._moved = 0, 0, "setting up", math.inf
        self._beats, self._alone_since = 0, math.inf
        self._known: States = {}
        """Records of all processes with their hosts and pids, kept in case the process that holds the store dies."""
        self._ended = threading.Event()
        self._store: torch.distributed.TCPStore | None = None

    def at(self, step: int, doing: str) -> None:
        """Record the progress of the main thread. The first call starts the detection of hangs.

        Every process makes the same calls in the same order.

        Args:
            step: Step that the main thread has reached.
            doing: What it does now, for messages.
        """
        if not self._known and self._store is not None:
            self._known = self._states()  # by now every process has written once
        self._marks, self._step, self._doing, self._moved = self._marks + 1, step, doing, time.monotonic()

    def __enter__(self) -> Watch:
        if self.world > 1 and "MASTER_ADDR" in os.environ:  # every launcher sets it
            self._store = torch.distributed.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=STORE_TIMEOUT_S),
            )
            self._write()
        if self.world > 1:
            threading.Thread(target=self._beat, name="liveness", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._moved = math.inf  # the heartbeat continues while this process reads those of the others
        if error is None:
            self._ended.set()
            self._write(done=True)
            return
        explained = error
        if isinstance(error, KeyboardInterrupt):
            why, state = "interrupted, without saving", "stopped"
        else:
            state = "failed"
            explained = self._explained(error)
            why = one_line(explained)
        self._ended.set()
        self._write(word=why)
        self._say_status(state, why)
        if explained is not error:
            raise explained from error

    def _say_status(self, state: str, why: str) -> None:
        with contextlib.suppress(OSError):  # a full disk may be what ended the run
            if self.status is not None:
                self.status(state, step=self._step, why=why)

    def _explained(self, error: BaseException) -> BaseException:
        """Return a UserError if the error comes from the loader or an exchange; else the error itself."""
        if not isinstance(error, RuntimeError):  # a UserError is not a RuntimeError
            return error
        if of_a_worker(error):
            return worker_died(error)
        if self.world > 1 and (isinstance(error, torch.distributed.DistError) or _of_exchange(error)):
            return UserError(f"step {self._step}: {self._who(error)}. Continue with --resume auto")
        return error

    def _who(self, error: BaseException) -> str:
        """Return which process broke an exchange: the one that left a message or died, else one without heartbeats."""
        before = self._states()
        deadline = time.monotonic() + SILENT_S
        while time.monotonic() < deadline:
            now = self._states()
            if died := self._dead(now):
                return died
            time.sleep(BEAT_S / 4)
        silent = self._silent(before, now)
        if silent:
            return f"{', '.join(self._named(r, now) for r in silent)} is gone or stopped"
        return f"the exchange between processes broke, though all of them run: {one_line(error)}"

    def _dead(self, now: States) -> str | None:
        """Return which process ended early, because it left a last message or because its pid no longer exists."""
        words = {r: s["word"] for r, s in now.items() if s and s["word"]}
        if words:
            rank, word = min(words.items())
            return f"{self._named(rank, now)} ended: {word}"
        gone = [r for r in now if _gone(now[r] or self._known.get(r)) and not (now[r] or {}).get("done")]
        return f"{', '.join(self._named(r, now) for r in gone)} is gone" if gone else None

    def _silent(self, before: States, now: States) -> list[int]:
        """Return the other processes without a heartbeat between two readings.

        If the store cannot be read, return process 0, which holds the store.
        """
        if not any(now.values()):
            return [0]
        others = [r for r in range(self.world) if r != self.rank]
        return [r for r in others if not now[r] or (before[r] and before[r]["beats"] == now[r]["beats"])]

    def _states(self) -> States:
        """Return the last record of each process. None if a process has not written any, or if the store is gone."""
        states = dict.fromkeys(range(self.world))
        if self._store is None:
            return states
        # In a thread of its own: if the process that holds the store is stopped, the call never returns, in spite of
        # its timeout.
        asking = threading.Thread(target=self._ask, args=(self._store, states), daemon=True)
        asking.start()
        asking.join(STORE_TIMEOUT_S)
        if asking.is_alive():
            self._store = None
        return dict(states)

    def _ask(self, store: torch.distributed.TCPStore, states: States) -> None:
        try:
            for rank in range(self.world):
                key = self._key(rank)
                states[rank] = json.loads(store.get(key)) if store.check([key]) else None
        except RuntimeError:  # the process that held the store has died
            self._store = None

    def _named(self, rank: int, states: States) -> str:
        state = states[rank] or self._known.get(rank)
        if not state:
            return f"process {rank}"
        return f"process {rank} (pid {state['pid']} on {state['host']})"

    def _key(self, rank: int) -> str:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return f"mpp/{self.out}/{attempt}/{rank}"

    def _write(self, word: str | None = None, done: bool = False) -> None:
        self._beats += 1
        state = {"beats": self._beats, "marks": self._marks, "doing": self._doing, "word": word, "done": done}
        try:
            if self._store is not None:
                self._store.set(self._key(self.rank), json.dumps({**state, **_here()}))
        except RuntimeError:  # the store is gone; the next exchange will fail and report it
            self._store = None

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._write()
            if died := self._unnoticed():
                self._end(f"step {self._step}: {died}. Continue with --resume auto")
            if time.monotonic() - self._moved > self.hang_timeout_s:
                self._give_up()

    def _unnoticed(self) -> str | None:
        """Return which process died at least SILENT_S ago without this process's main thread having noticed."""
        if self._moved == math.inf or not any(map(_gone, self._known.values())):
            self._alone_since = math.inf
            return None
        self._alone_since = min(self._alone_since, time.monotonic())
        if time.monotonic() - self._alone_since < SILENT_S or self._busy():
            return None
        return self._dead(self._states())

    def _busy(self) -> bool:
        """Return whether the main thread may be saving, without waiting for another process. It must not be ended."""
        if self._doing != SAVING:
            return False
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith("torch.distributed"):
                return False
            frame = frame.f_back
        return True

    def _give_up(self) -> None:
        """End this process, whose main thread hangs, and name the processes that are behind."""
        before = self._states()
        time.sleep(SILENT_S)
        now = self._states()
        if self._ended.is_set() or time.monotonic() - self._moved < SILENT_S:
            return  # the main thread has made progress in the meantime
        silent = self._silent(before, now)
        least = min((s["marks"] for s in now.values() if s), default=self._marks)
        behind = silent or [r for r, s in now.items() if s and s["marks"] == least]
        if len(behind) < self.world:
            doing = sorted({(now[r] or self._known.get(r) or {}).get("doing", "") for r in behind})
            who = f"{', '.join(self._named(r, now) for r in behind)}, {' and '.join(doing)},"
        else:
            who = f"every process, {self._doing},"
        self._end(f"step {self._step}: no progress for hang_timeout_s, {self.hang_timeout_s:g} s: {who} hangs")

    def _end(self, why: str) -> None:
        """End this process at once, without its main thread, and write the stacks of its threads."""
        stacks = self.out / f"hang-rank{self.rank}.txt"
        with contextlib.suppress(OSError), open(stacks, "w") as file:
            faulthandler.dump_traceback(file)
        self._write(word=why)
        self._say_status("failed", why)
        print(f"process {self.rank}: {why}; its stacks are in {stacks}", file=sys.stderr, flush=True)
        os._exit(2)


def _of_exchange(error: BaseException) -> bool:
    """Return whether an error comes from an exchange by gloo, which raises plain RuntimeErrors."""
    text = str(error)
    return "gloo" in text or "Connection closed by peer" in text or "Connection reset by peer" in text


def _gone(state: JsonObject | None) -> bool:
    """Return whether a process of this machine has ended; False if that cannot be determined."""
    if not state or (state["host"], state["pids"]) != (_here()["host"], _here()["pids"]):
        return False
    try:
        with open(f"/proc/{state['pid']}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return sys.platform == "linux"
    except OSError:
        return False


def _here() -> JsonObject:
    """Return host, PID namespace and pid of this process. Each container has its own PID namespace."""
    try:
        pids = os.readlink("/proc/self/ns/pid")
    except OSError:
        pids = ""
    return {"host": platform.node(), "pids": pids, "pid": os.getpid()}
