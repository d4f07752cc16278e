"""The files of a run folder. Reading them must not wait for other imports."""

from __future__ import annotations

import subprocess
import sys


def test_looking_at_a_run_imports_no_torch() -> None:
    """`mpp watch` may share the cores with a run, which would otherwise lose seconds to it."""
    code = "import sys, mpp.runs.watch; print(*{'torch', 'torchvision', 'timm', 'pydantic'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
