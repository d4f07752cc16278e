"""Processes with torch and timm but without mpp, in which exports are verified.

Importing torch and timm takes ten times as long as a verification. So a process that has imported only them is kept,
and each program runs in a fork of it. Outside of tests, and in some of them, a new interpreter is started each time.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys

from tests.line_server import LineServer

PROGRAM = """
import contextlib, io, json, os, sys, traceback
import torch, timm, safetensors.torch

def run(program, argument, folder, answer):
    os.chdir(folder)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["-c", argument]
        try:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
        except SystemExit as ended:
            code = int(bool(ended.code))
        except BaseException:
            traceback.print_exc()
            code = 1
    os.write(answer, json.dumps([code, out.getvalue(), err.getvalue()]).encode())

for line in sys.stdin:
    program, argument, folder = json.loads(line)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        run(program, argument, folder, theirs)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as answer:
        said = answer.read()
    _, status = os.waitpid(child, 0)
    print(said or json.dumps([1, "", f"the process ended with {status}"]), flush=True)
"""

SERVER = LineServer([sys.executable, "-I", "-c", PROGRAM])
atexit.register(SERVER.close)


def run_program(program: str, argument: str) -> subprocess.CompletedProcess[str]:
    """Do what `mpp.exchange.verify.run_in_new_interpreter` does, in a fork of the kept process."""
    code, out, err = SERVER.ask([program, argument, os.getcwd()])
    return subprocess.CompletedProcess([program, argument], code, out, err)
