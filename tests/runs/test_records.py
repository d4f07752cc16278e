"""A run folder's files, and that who reads them waits for nothing else."""

from __future__ import annotations

import subprocess
import sys


def test_looking_at_a_run_imports_no_torch() -> None:
    """`mpp watch` beside a run on the same cores: seconds of theirs otherwise."""
    code = "import sys, mpp.runs.watch; print(*{'torch', 'torchvision', 'timm', 'pydantic'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
