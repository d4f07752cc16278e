"""Record the versions, devices and command of a run."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from mpp.errors import DISTRIBUTION, without_secrets
from mpp.recipe.flat import JsonObject

PACKAGES = (
    "mpp",
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "webdataset",
    "numpy",
    "safetensors",
    "simplejpeg",
    "pillow",
)


def environment() -> JsonObject:
    """Return the versions, devices and command of this process as JSON data."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(DISTRIBUTION if name == "mpp" else name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "command": [without_secrets(word) for word in sys.argv],
    }
