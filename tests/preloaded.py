"""`python -m tests.preloaded`: run commands of mpp, each in its own process that begins with torch imported.

It reads a line of JSON, {"words": […], "cwd": …}, and answers with one, {"code": …, "said": …}. Small commands spend
most of their time on imports.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import mpp


def run(words: list[str], cwd: str) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.chdir(cwd)
                nothing = os.open(os.devnull, os.O_RDONLY)
                for source, target in ((nothing, 0), (said.fileno(), 1), (said.fileno(), 2)):
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
        said.seek(0)
        return {"code": os.waitstatus_to_exitcode(status), "said": said.read()}


def serve() -> None:
    for name in ("torch", "timm", "torchvision", "accelerate", "matplotlib.pyplot"):
        importlib.import_module(name)
    for found in pkgutil.walk_packages(mpp.__path__, "mpp."):
        if found.name != "mpp.__main__":
            importlib.import_module(found.name)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(run(asked["words"], asked["cwd"])), flush=True)


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent)
    serve()
