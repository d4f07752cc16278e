"""A process that answers each line of JSON on its standard input with one line of JSON."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any


class LineServer:
    """Client of such a process, which starts with the first request and ends with this one.

    Args:
        program: Command line of the process.
        **options: Options of `subprocess.Popen`.
    """

    def __init__(self, program: Sequence[str], **options: Any) -> None:
        self._program, self._options = program, options
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        """Start the process, unless it runs."""
        if self._process is None:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._process = subprocess.Popen(self._program, **pipes, **self._options)
        return self._process

    def read(self) -> Any:
        """Return the next answer."""
        process = self.start()
        assert process.stdout
        line = process.stdout.readline()
        assert line, f"{self._program} has ended"
        return json.loads(line)

    def ask(self, request: Any) -> Any:
        """Send a request and return its answer."""
        process = self.start()
        assert process.stdin
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """Kill the process, if it was started."""
        if self._process is not None:
            with self._process as process:
                process.kill()
