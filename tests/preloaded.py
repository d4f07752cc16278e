"""Run commands of mpp, each in its own process that begins with torch imported.

Small commands spend most of their time on imports. `python -m tests.preloaded` reads a line of JSON, {"words": […],
"cwd": …, "env": {…}, "timeout": …}, and answers with one, {"code": …, "out": …, "err": …}.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.line_server import LineServer

ROOT = Path(__file__).resolve().parent.parent
SERVER = LineServer([sys.executable, "-m", "tests.preloaded"], cwd=ROOT)
atexit.register(SERVER.close)


def run_command(
    words: Sequence[str], cwd: str | os.PathLike[str], timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run `mpp WORDS` in a fork of the preloaded process, with the environment of this process and one thread.

    Args:
        words: Command line after `mpp`.
        cwd: Working directory.
        timeout: Seconds after which the process is killed by SIGALRM.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = SERVER.ask({"words": list(words), "cwd": str(cwd), "env": env, "timeout": timeout})
    return subprocess.CompletedProcess(["mpp", *words], answer["code"], answer["out"], answer["err"])


def _run(words: list[str], cwd: str, env: dict[str, str], timeout: float) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.setitimer(signal.ITIMER_REAL, timeout)
                os.environ.clear()
                os.environ.update(env)
                os.chdir(cwd)
                nothing = os.open(os.devnull, os.O_RDONLY)
                for source, target in ((nothing, 0), (out.fileno(), 1), (err.fileno(), 2)):
                    os.dup2(source, target)
                from mpp.cli.app import main

                sys.argv = ["mpp", *words]
                main(words, "mpp")
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return {"code": os.waitstatus_to_exitcode(status), "out": out.read(), "err": err.read()}


def _serve() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it
    import mpp
    from mpp.exchange import verify
    from tests import clean

    clean.SERVER.start()  # here, so that the processes of all commands share it
    verify.run_in_new_interpreter = clean.run_program
    for name in ("torch", "timm", "torchvision", "accelerate", "matplotlib.pyplot"):
        importlib.import_module(name)
    for found in pkgutil.walk_packages(mpp.__path__, "mpp."):
        if found.name != "mpp.__main__":
            importlib.import_module(found.name)
    for line in sys.stdin:
        print(json.dumps(_run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    os.chdir(ROOT)
    _serve()
