"""Launchers as in docs/many-gpus.md: each of its commands is run, with two processes on a CPU."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.documented import ENVIRONMENT, Workspace, blocks, cut_down, run
from tests.faults.processes import free_port

PAGE = (ROOT / "docs" / "many-gpus.md").read_text()
SECTIONS = {"before": PAGE.split("\n## ")[0]} | dict(
    re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
)
TOGETHER = "Two machines"


def lines_of(section: str) -> list[str]:
    return [
        line
        for language, block in blocks(section)
        for line in block.splitlines()
        if language == "sh" and not line.startswith("#")
    ]


def state(run_folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run_folder / "status.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("title", [t for t, s in SECTIONS.items() if lines_of(s) and t != TOGETHER])
def test_on_one_machine(title: str, workspace: Workspace, tmp_path: Path) -> None:
    folder = workspace.copy(PAGE, tmp_path)
    for line in lines_of(SECTIONS[title]):
        run(cut_down(line), folder)
        out = re.search(r"out=(\S+)", line)
        if "mpp plan" in line:
            continue
        assert out
        assert state(folder / out[1])["state"] == "finished"
        processes = 1 if "one_gpu" in line else 2
        log = (folder / out[1] / "train.log").read_text()
        assert ("(2 processes × " in log) == (processes == 2)
        parts = list((folder / out[1] / "checkpoints").rglob("model-rank*"))
        assert len(parts) == (2 if "fsdp=true" in line else 0)


def here(line: str, port: str) -> str:
    """Return the command of one of the machines, changed to run on this one."""
    return (
        line.replace("node0", "127.0.0.1")
        .replace("29511", port)
        .replace("--machine_rank", "--num_processes 16 --machine_rank")
    )


@pytest.mark.slow
def test_on_two_machines(workspace: Workspace, tmp_path: Path) -> None:
    """Both launchers run on this machine, with one process each."""
    folder = workspace.copy(PAGE, tmp_path)
    lines = lines_of(SECTIONS[TOGETHER])
    assert [re.findall(r"--machine_rank (\d)", line) for line in lines] == [["0"], ["1"]]
    port = str(free_port())
    started = [
        subprocess.Popen(
            ["bash", "-c", cut_down(here(line, port))],
            cwd=folder,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in lines
    ]
    for process in started:
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said
    assert state(folder / "runs" / "two")["state"] == "finished"
    assert "(2 processes × " in (folder / "runs" / "two" / "train.log").read_text()


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_configurations_ask_for_no_engine(file: Path) -> None:
    """Accelerate's own sharding and precision would be refused or ignored."""
    found = yaml.safe_load(file.read_text())
    assert found["distributed_type"] in ("NO", "MULTI_GPU")
    assert not {"fsdp_config", "deepspeed_config", "mixed_precision", "dynamo_config"} & set(found)
    assert file.name in PAGE


SRUN = """#!/bin/bash
# A stand-in: two tasks on this machine. The end of the job's time reaches them alone (USR1), a preemption the script, too.
set -u
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_TASKS_PER_NODE="2(x1)"
lines() { cat runs/photos/metrics.jsonl 2> /dev/null | wc -l; }
before=$(lines)
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!); done
if [[ -e signal ]]; then
    signal=$(cat signal)
    rm signal
    until [[ $(lines) -gt $before ]] || ! kill -0 "${tasks[0]}"; do sleep 0.05; done
    kill "-$signal" "${tasks[@]}"
    [[ $signal == USR1 ]] || kill "-$signal" $PPID
fi
for task in "${tasks[@]}"; do wait "$task" || exit $?; done
"""
SCONTROL = """#!/bin/bash
# A stand-in: names one host; requeues are written down.
case $1 in show) echo 127.0.0.1 ;; requeue) echo "$2" >> requeued ;; esac
"""


@pytest.mark.slow
def test_slurm_queues_again_what_was_preempted(workspace: Workspace, tmp_path: Path) -> None:
    """A run that a signal stopped is queued again and resumes. A finished run or a user's error is not queued again."""
    folder = workspace.copy(PAGE, tmp_path)
    (folder / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(stat.S_IRWXU)
    job = {
        "SLURM_JOB_ID": str(os.getpid()),  # the script derives a port from it
        "SLURM_JOB_NODELIST": "node0",
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "PATH": f"{folder / 'bin'}:{ENVIRONMENT['PATH']}",
    }
    asked = re.search(r"sbatch --nodes 2 (recipes/slurm/pretrain.sbatch .*)", PAGE)
    assert asked
    small = cut_down(f"mpp pretrain {asked[1]}").removeprefix("mpp pretrain ")
    small = small.replace("optim.steps=3", "optim.steps=100")
    for times, signal in enumerate(("USR1", "TERM"), 1):
        (folder / "signal").write_text(signal)
        run(f"bash {small} log_every_steps=1", folder, **job)
        assert state(folder / "runs" / "photos")["state"] == "stopped", signal
        assert (folder / "requeued").read_text().split() == [job["SLURM_JOB_ID"]] * times
    run(f"bash {small} log_every_steps=1", folder, **job)
    assert state(folder / "runs" / "photos")["state"] == "finished"
    assert "resumed at step" in (folder / "runs" / "photos" / "train.log").read_text()
    run(f"bash {small} optim.stesp=3", folder, allowed=(2,), **job)
    assert len((folder / "requeued").read_text().split()) == 2
