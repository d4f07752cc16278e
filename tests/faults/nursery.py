"""Fork real processes that run `mpp …` from one that has imported everything once. A start takes milliseconds.

Requests are lines of JSON on standard input, answers are lines on standard output:
    {"words": [...], "env": {...}, "log": PATH, "bound_by_modes": bool, "record": PATH or null, "file_bytes": N or null}
        ->  {"pid": N}
    {"pid": N}  ->  {"code": exit status, negative for a signal, or null while it runs}
"""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import accelerate.utils  # noqa: F401
import timm  # noqa: F401
import torch
import torchvision.transforms.v2  # noqa: F401

import mpp.evaluation.run
import mpp.finetuning.run
import mpp.inspection.replay
import mpp.pretraining.loop
import mpp.pretraining.setup

torch.set_num_threads(1)


def obey_modes() -> None:
    """Make root obey the modes of files like other users, by dropping two capabilities."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for i in (0, 1):
        sets[i] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def recording(batches: Callable[..., Iterator[Any]], path: str) -> Callable[..., Iterator[Any]]:
    """Return `batches` with a line written for each sample: position, shard, row, and checksums of crop, mask and
    noise.
    """

    def digest(t: torch.Tensor) -> str:
        return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16]

    def recorded(*args: Any, **options: Any) -> Iterator[Any]:
        for batch in batches(*args, **options):
            with open(path, "a") as lines:
                for i, position in enumerate(batch.positions.tolist()):
                    made = (digest(t[i]) for t in (batch.images, batch.units.hidden, batch.units.noise))
                    print(position, *batch.samples[i].tolist(), *made, file=lines)
            yield batch

    return recorded


def child(request: dict[str, Any]) -> None:
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    os.environ.update(request["env"])
    if request.get("file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], resource.RLIM_INFINITY))
    if request.get("bound_by_modes"):
        obey_modes()
    faulthandler.register(signal.SIGUSR2)  # prints what a hanging job was doing
    if request.get("record"):
        mpp.pretraining.setup.load_ahead = recording(mpp.pretraining.setup.load_ahead, request["record"])  # type: ignore[attr-defined]
    sys.argv = ["mpp", *request["words"]]
    from mpp.cli.app import main

    code = 1
    try:
        main(request["words"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    ended: dict[int, int] = {}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "words" in request:
            pid = os.fork()
            if pid == 0:
                child(request)
            print(json.dumps({"pid": pid}), flush=True)
            continue
        pid = request["pid"]
        if pid not in ended:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                ended[pid] = os.waitstatus_to_exitcode(status)
        print(json.dumps({"code": ended.get(pid)}), flush=True)


if __name__ == "__main__":
    main()
