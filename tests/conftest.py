"""Small images, shards and recipes that the tests make themselves."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tests.preloaded import run_command

ROOT = Path(__file__).resolve().parent.parent
SHOWN_FILES = 30
torch.set_num_threads(1)  # bit-equal on any machine, and the processes under test get the other cores


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the seconds of the files whose tests take longest, if pytest was asked for durations."""
    seconds: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                file = report.nodeid.partition("::")[0]
                seconds[file] = seconds.get(file, 0.0) + report.duration
    if terminalreporter.config.getoption("durations") and sum(seconds.values()) > 60:
        terminalreporter.section("slowest files")
        for file, duration in sorted(seconds.items(), key=lambda item: -item[1])[:SHOWN_FILES]:
            terminalreporter.write_line(f"{duration:6.0f} s  {file}")
        terminalreporter.write_line(f"{sum(seconds.values()):6.0f} s  in all {len(seconds)} files")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a CUDA device if there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


class Runs:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def drawn_image(number: int, size: int = 24, channels: int = 3) -> Image.Image:
    """Return a gradient with a shape on it, different for each number. Even numbers have discs, odd ones squares."""
    rng = np.random.default_rng(number)
    ramp = np.linspace(0, 1, size)
    low, high = rng.integers(0, 120, 3), rng.integers(130, 255, 3)
    array = (low + (high - low) * (ramp[:, None, None] + ramp[None, :, None]) / 2).astype(np.uint8)
    image = Image.fromarray(array)
    x, y = rng.integers(2, size // 2, 2)
    side = int(rng.integers(size // 4, size // 2))
    draw = ImageDraw.Draw(image)
    colour = tuple(int(v) for v in rng.integers(0, 255, 3))
    (draw.ellipse if number % 2 == 0 else draw.rectangle)([x, y, x + side, y + side], fill=colour)
    return image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session", autouse=True)
def verify_in_forks() -> Iterator[Any]:
    """Verify exports in forks of a process without mpp, except where a test asks for `new_interpreters`."""
    from mpp.exchange import verify
    from tests import clean

    with pytest.MonkeyPatch.context() as patch:
        in_new_interpreter = verify.run_in_new_interpreter
        patch.setattr(verify, "run_in_new_interpreter", clean.run_program)
        yield in_new_interpreter


@pytest.fixture
def new_interpreters(verify_in_forks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify exports as users do: each in a new interpreter."""
    from mpp.exchange import verify

    monkeypatch.setattr(verify, "run_in_new_interpreter", verify_in_forks)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 60 JPEGs and PNGs in two class folders."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(60):
        target = folder / ("disc" if i % 2 == 0 else "square")
        target.mkdir(exist_ok=True)
        jpeg = i % 3 != 0
        (target / f"{i:03d}.{'jpg' if jpeg else 'png'}").write_bytes(encoded(drawn_image(i), "JPEG" if jpeg else "PNG"))
    return folder


@pytest.fixture(scope="session")
def shards(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same images as labeled shards of 25, 25 and 10 images."""
    from mpp.data.shards.pack import pack

    out = tmp_path_factory.mktemp("shards")
    pack(str(image_folder), str(out), images_per_shard=25, workers=1)
    return out


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a `tests.documented.Workspace`: what pages require, made once for all of them."""
    from tests.documented import Workspace

    return Workspace(tmp_path_factory.mktemp("documented") / "workspace")


def pretrain_values(shards: Path | str, out: Path | str, **changes: Any) -> dict[str, Any]:
    """Return a recipe that trains in a second: 16 px, patches of 4 px, width 32, 2 blocks."""
    values: dict[str, Any] = {
        "out": str(out),
        "data": {"shards": str(shards), "image_size": 16, "workers": 0, "held_out": 12},
        "encoder": {
            "name": "vit_tiny_patch16_224",
            "args": {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
        },
        "optim": {"base_lr": 2e-2, "steps": 20, "global_batch_size": 16, "warmup_steps": 2},
        "log_every_steps": 1,
        "checkpoint_every_steps": 5,
        "skill_every_steps": 10,
    }
    from mpp.recipe.overrides import apply_overrides

    apply_overrides(values, {}, changes)
    return values


def pretrain_recipe(shards: Path | str, out: Path | str, **changes: Any) -> Any:
    from mpp.recipe.loading import check_recipe
    from mpp.recipe.pretrain import PretrainRecipe

    return check_recipe(pretrain_values(shards, out, **changes), PretrainRecipe)


@pytest.fixture
def recipe_file(tmp_path: Path, shards: Path) -> Callable[..., Path]:
    """Write a pretraining recipe as YAML and return its path."""

    def write(**changes: Any) -> Path:
        import yaml

        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(pretrain_values(shards, tmp_path / "run", **changes), sort_keys=False))
        return path

    return write


def command(
    *words: str | Path,
    processes: int = 1,
    module: str = "mpp",
    environment: dict[str, str] | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run `mpp …`, or another module, in its own process, or under torchrun on several.

    A command of mpp that gets no environment and no options but `cwd` and `timeout` is a fork of `tests.preloaded`.

    Args:
        *words: Command line after the module.
        processes: Number of processes.
        module: Module to run.
        environment: Additional environment variables.
        **options: Options of `subprocess.run`.
    """
    if (processes, module, environment) == (1, "mpp", None) and options.keys() <= {"cwd", "timeout"}:
        return run_command([str(word) for word in words], **{"cwd": os.getcwd(), **options})
    launcher = [sys.executable, "-m", module]
    if processes > 1:
        launcher = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
            "--master_port", str(29500 + os.getpid() % 1000), "-m", module,
        ]  # fmt: skip
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})}
    return subprocess.run(
        [*launcher, *map(str, words)], capture_output=True, text=True, env=own, check=False, **options
    )


def tool(name: str) -> Any:
    """Import a script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of shapes on textures, 32 px: unlabeled/ 100, train/ 24 and val/ 8 with masks and boxes."""
    out = tmp_path_factory.mktemp("shapes")
    tool("draw_shapes").main([str(out), "--unlabeled", "100", "--train", "24", "--val", "8", "--side-px", "32"])
    return out


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """Return the URL of an S3 server."""
    from tests.faults.processes import free_port

    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(url, timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, "the server has ended"
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield url
    finally:
        server.kill()
        server.wait()
