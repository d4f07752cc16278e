"""Build one contestant in its own process, and run it on request.

    python tools/bench/worker.py MODULE BENCH NAME SETTINGS

MODULE is `ours` or `peers`. Its dictionary BENCH has the function that builds contestant NAME from SETTINGS, JSON. Each
line of input is a number of units of work, and is answered with a line of JSON. The process ends with its input.
Standard output has only the answers: what libraries print there goes to standard error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time

from memory import device_peak_mib, peak_mib


def main() -> None:
    began = time.perf_counter()
    module, bench, name, settings = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: object) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    with contextlib.redirect_stdout(sys.stderr):
        contestant = getattr(importlib.import_module(module), bench)[name](**json.loads(settings))
        answer(built_s=time.perf_counter() - began, built_mib=peak_mib(), **contestant.facts)
        for line in sys.stdin:
            wall, cpu = time.perf_counter(), time.process_time()
            images = contestant.run(int(line))
            answer(
                wall_s=time.perf_counter() - wall,
                cpu_s=time.process_time() - cpu,
                images=images,
                peak_mib=peak_mib(),
                device_peak_mib=device_peak_mib(),
            )


if __name__ == "__main__":
    main()
