"""Real processes for the tests of faults, and the table of promises: `make faults` writes docs/promises.md."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.processes import Job, Left, Nursery, finetuning, left, pretraining

SHM = Path("/dev/shm")
MOUNTS = shutil.which("mount") is not None and os.geteuid() == 0
TITLES = {
    "test_kill_and_resume.py": "Killed runs",
    "test_signals.py": "Signals",
    "test_ranks.py": "Several processes",
    "test_run_folders.py": "Run folders and full disks",
    "test_streams.py": "Terminals and output",
    "test_bad_data.py": "Images and shards",
    "test_remote_shards.py": "Remote shards",
    "test_hostile_input.py": "Hostile input",
}
"""Heading on the page by file of tests, in this order."""
_promised: dict[str, dict[str, Any]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--promises", default=None, metavar="FILE", help="Write the table of what was held, and how often."
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _promise(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    marker = request.node.get_closest_marker("promise")
    assert marker, "each test here must have a promise"
    record_property("promise", marker.args[0])
    record_property("test", f"{Path(request.node.path).name}::{request.node.originalname}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    found = dict(report.user_properties)
    if report.when != "call" or "promise" not in found:
        return
    row = _promised.setdefault(found["promise"], {"tests": set(), "passed": 0, "other": 0, "counts": Counter()})
    row["tests"].add(found["test"])
    row["passed" if report.passed else "other"] += 1
    for name, value in report.user_properties:
        if name not in ("promise", "test"):
            row["counts"][name] += int(str(value))


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--promises", None)
    if path is None or hasattr(session.config, "workerinput"):
        return
    lines = [
        "# What we promise, and how it is tested",
        "",
        "`make faults` writes this page. It runs `tests/faults/`: real processes that are killed, stopped, starved and fed bad",
        "data, over gloo if there are several. Every row names the tests that hold it; `make check` runs most of their cases.",
    ]
    for file, title in TITLES.items():
        held = {promise: row for promise, row in _promised.items() if min(row["tests"]).startswith(file)}
        lines += ["", f"## {title}", "", "<details>", f"<summary>{len(held)} promises and their tests</summary>", ""]
        lines += ["| promise | tried | tests |", "|---|---|---|"]
        for promise, row in held.items():
            counts = [f"{n:,} {what}" for what, n in row["counts"].items()]
            tried = "; ".join([f"{row['passed']} cases" if row["passed"] != 1 else "1 case", *counts])
            failed = f", **{row['other']} did not hold**" if row["other"] else ""
            lines.append(f"| {promise} | {tried}{failed} | {', '.join(f'`{t}`' for t in sorted(row['tests']))} |")
        lines += ["", "</details>"]
    Path(path).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    found = Nursery()
    yield found
    found.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Return a folder of this test, in memory if possible: checkpoints are synced, which is slow on disks."""
    import shutil
    import tempfile

    if not SHM.is_dir():
        yield tmp_path
        return
    found = Path(tempfile.mkdtemp(prefix="mpp-", dir=SHM))
    yield found
    shutil.rmtree(found, ignore_errors=True)


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """Return a file system of 2 MB."""
    if not MOUNTS:
        pytest.skip("mounting a file system of 2 MB takes root")
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


RECIPES = {"pretrain": pretraining, "finetune": finetuning}


@dataclass(frozen=True)
class Bench:
    """A run in its own folder, and what it would leave without faults."""

    nursery: Nursery
    shards: Path
    folder: Path
    reference: Callable[..., Left]
    count: Callable[[str, object], None]
    """Function that counts what was tried, for the table."""

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def recipe(self, job: str, **changes: Any) -> Path:
        return RECIPES[job](self.shards, self.folder / "r.yaml", self.folder / "run", **changes)

    def start(self, job: str, path: Path, *words: str, world: int = 2, **options: Any) -> Job:
        return self.nursery.start(job, path, *words, log=self.log, world=world, **options)

    def goes_on(self, job: str, path: Path, **changes: Any) -> None:
        self.start(job, path, "--resume", "auto").ends_well()
        assert left(self.folder / "run") == self.reference(job, 2, **changes)


@pytest.fixture
def bench(
    nursery: Nursery,
    shards: Path,
    folder: Path,
    reference: Callable[..., Left],
    record_property: Callable[[str, object], None],
) -> Bench:
    return Bench(nursery, shards, folder, reference, record_property)


@pytest.fixture(scope="session")
def reference(nursery: Nursery, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Left]:
    """Return a function that gives what an undisturbed run leaves. Each run is made once."""
    known: dict[str, Left] = {}

    def of(job: str, world: int, **changes: Any) -> Left:
        key = repr((job, world, sorted(changes.items())))
        if key not in known:
            base = tmp_path_factory.mktemp("reference")
            path = RECIPES[job](shards, base / "recipe.yaml", base / "run", **changes)
            nursery.start(job, path, log=base / "log", world=world).ends_well()
            known[key] = left(base / "run")
        return known[key]

    return of
