"""Watch the other processes of a run. A process that is gone or hangs is named, and no process waits for ever.

Each process has a thread that writes a beat and its main thread's progress into the store of the process group, every
second. An exchange that breaks is then explained: by what another process left as its last word, by whose beat has
stopped, or by who is behind. A process whose main thread has made no progress for `hang_timeout_s` ends, with the
stacks of its threads in `hang-rankN.txt` of the run folder. So does one that waits for a process of its machine that
has died: NCCL does not say, and gloo not always; it cannot where a child of the dead one holds its connections.
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
"""What each process wrote last, by rank; None of one that wrote nothing."""
BEAT_S = 1.0
SILENT_S = 5.0
"""Without a beat for so long, while another process looks, one is gone or stopped (a guess)."""
STORE_TIMEOUT_S = 2.0
SAVING = "measuring, logging, saving"


class Watch:
    """Of a run's processes; a context. What ends the run leaves it as one line for the user.

    UserError for what broke in the loader or between processes.
    rank, world: of this process, and how many there are. out: the run folder.
    """

    def __init__(self, rank: int, world: int, out: Path, *, hang_timeout_s: float) -> None:
        self.rank, self.world, self.out, self.hang_timeout_s = rank, world, out, hang_timeout_s
        self.status: Callable[..., None] | None = None
        """How to write status.json, once there is one: `runs.log.RunLog.status`."""
        self._marks, self._step, self._doing, self._moved = 0, 0, "setting up", math.inf
        self._beats, self._alone_since = 0, math.inf
        self._known: States = {}
        """Where each process runs, should the store go down with one of them."""
        self._ended = threading.Event()
        self._store: torch.distributed.TCPStore | None = None

    def at(self, step: int, doing: str) -> None:
        """The main thread has come so far: every process, in the same order. From the first call on a hang is one."""
        if not self._known and self._store is not None:
            self._known = self._states()  # by now every process has written once
        self._marks, self._step, self._doing, self._moved = self._marks + 1, step, doing, time.monotonic()

    def __enter__(self) -> Watch:
        if self.world > 1 and "MASTER_ADDR" in os.environ:  # as every launcher sets it
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
        self._moved = math.inf  # it beats on while it asks who else does
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
        """A line for the user where it is about the loader or the other processes; else the error as it is."""
        if not isinstance(error, RuntimeError):  # a UserError is none
            return error
        if of_a_worker(error):
            return worker_died(error)
        if self.world > 1 and (isinstance(error, torch.distributed.DistError) or _of_exchange(error)):
            return UserError(f"step {self._step}: {self._who(error)}. Go on with --resume auto")
        return error

    def _who(self, error: BaseException) -> str:
        """Which process broke an exchange, by its last word, else by its silence, else by how far it came."""
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
        """Who ended before its time, by its last word or because its process is no more."""
        words = {r: s["word"] for r, s in now.items() if s and s["word"]}
        if words:
            rank, word = min(words.items())
            return f"{self._named(rank, now)} ended: {word}"
        gone = [r for r in now if _gone(now[r] or self._known.get(r)) and not (now[r] or {}).get("done")]
        return f"{', '.join(self._named(r, now) for r in gone)} is gone" if gone else None

    def _silent(self, before: States, now: States) -> list[int]:
        """Other processes without a beat since. Where the store is gone, the one that holds it: process 0."""
        if not any(now.values()):
            return [0]
        others = [r for r in range(self.world) if r != self.rank]
        return [r for r in others if not now[r] or (before[r] and before[r]["beats"] == now[r]["beats"])]

    def _states(self) -> States:
        """What each process wrote last; None of one that wrote nothing, or cannot be asked for."""
        states = dict.fromkeys(range(self.world))
        if self._store is None:
            return states
        # beside this thread: of a store whose process is stopped an answer never comes, whatever its timeout
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
        except RuntimeError:  # it went down with the process that held it
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
        except RuntimeError:  # an exchange that breaks says so
            self._store = None

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._write()
            if died := self._unnoticed():
                self._end(f"step {self._step}: {died}. Go on with --resume auto")
            if time.monotonic() - self._moved > self.hang_timeout_s:
                self._give_up()

    def _unnoticed(self) -> str | None:
        """Who died a while ago without this process's main thread having come to know."""
        if self._moved == math.inf or not any(map(_gone, self._known.values())):
            self._alone_since = math.inf
            return None
        self._alone_since = min(self._alone_since, time.monotonic())
        if time.monotonic() - self._alone_since < SILENT_S or self._busy():
            return None
        return self._dead(self._states())

    def _busy(self) -> bool:
        """Whether the main thread does what no other process is needed for, and what would be lost: it may save."""
        if self._doing != SAVING:
            return False
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith("torch.distributed"):
                return False
            frame = frame.f_back
        return True

    def _give_up(self) -> None:
        """End this process, from beside a main thread that hangs."""
        before = self._states()
        time.sleep(SILENT_S)
        now = self._states()
        if self._ended.is_set() or time.monotonic() - self._moved < SILENT_S:
            return  # it has moved meanwhile
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
        """Of this process, at once: its main thread answers nobody."""
        stacks = self.out / f"hang-rank{self.rank}.txt"
        with contextlib.suppress(OSError), open(stacks, "w") as file:
            faulthandler.dump_traceback(file)
        self._write(word=why)
        self._say_status("failed", why)
        print(f"process {self.rank}: {why}; its stacks are in {stacks}", file=sys.stderr, flush=True)
        os._exit(2)


def _of_exchange(error: BaseException) -> bool:
    """gloo raises plain RuntimeErrors."""
    text = str(error)
    return "gloo" in text or "Connection closed by peer" in text or "Connection reset by peer" in text


def _gone(state: JsonObject | None) -> bool:
    """Whether a process of this machine has ended; False where that cannot be told."""
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
    """Of this process: its number is one of `pids`, as containers have each their own."""
    try:
        pids = os.readlink("/proc/self/ns/pid")
    except OSError:
        pids = ""
    return {"host": platform.node(), "pids": pids, "pid": os.getpid()}
