"""Check the environment variables by which a launcher describes the processes of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from accelerate.utils import parse_flag_from_env

from mpp.errors import UserError

COUNTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
"""Variables of launchers that hold whole numbers."""
LAUNCHERS = (*COUNTS, "MASTER_ADDR", "ACCELERATE_", "OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_", "FORK_LAUNCHED")
"""Prefixes of the variables that Accelerate reads."""


def is_launched(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher started this process."""
    sizes = (environment.get(name, "") for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    return bool(environment.get("LOCAL_RANK")) or any(size.isdigit() and int(size) > 1 for size in sizes)


def check_devices(devices: int, environment: Mapping[str, str]) -> None:
    """Check that this is one of several processes if a recipe asks for several devices.

    Raises:
        UserError: If a recipe with several devices runs in Python. Only the command starts processes.
    """
    if devices > 1 and not is_launched(environment):
        raise UserError(
            f"devices: {devices}: Python runs in one process; use the command `mpp`, or start Python by torchrun"
        )


def is_set(variable: str) -> bool:
    """Return whether a boolean variable of a launcher is on.

    Raises:
        UserError: If its value is not a boolean.
    """
    try:
        return bool(parse_flag_from_env(variable))
    except ValueError as error:
        raise UserError(f"{variable}: '{os.environ[variable]}' in the environment; must be true or false") from error


def check_launch(environment: Mapping[str, str]) -> None:
    """Check the variables that give the rank of this process and the number of processes.

    Raises:
        UserError: If a value is invalid, or if a variable is missing: the run would wait for processes that never come.
    """
    numbers: dict[str, int] = {}
    for name in COUNTS:
        value = environment.get(name)
        if value is None:
            continue
        if not re.fullmatch(r"-?[0-9]{1,9}", value):
            raise UserError(f"{name}: '{value}' in the environment, not a whole number; start by torchrun, or unset it")
        numbers[name] = int(value)
    if "LOCAL_RANK" not in numbers and numbers.get("WORLD_SIZE", 1) <= 1:
        return  # a single process; the other variables do not matter
    world, rank = numbers.get("WORLD_SIZE", 1), numbers.get("RANK", 0)
    missing = [name for name in ("RANK", "MASTER_ADDR") if not environment.get(name)]
    missing += ["WORLD_SIZE"] if rank > 0 and "WORLD_SIZE" not in numbers else []
    if missing:
        there = ", ".join(name for name in COUNTS if name in numbers)
        raise UserError(
            f"{there} {'are' if ', ' in there else 'is'} in the environment, but not {', '.join(missing)}; start the "
            f"run by torchrun, or unset {there}"
        )
    least = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    most = {"RANK": world - 1, "MASTER_PORT": 65535}
    for name, number in sorted(numbers.items(), reverse=True):  # WORLD_SIZE first, because it limits RANK
        if not least.get(name, 0) <= number <= most.get(name, number):
            end = f" and at most {most[name]}" if name in most else ""
            raise UserError(f"{name}: {number} in the environment; must be at least {least.get(name, 0)}{end}")
