"""Write fine-tuning runs into recipes/RESULTS.csv, a row for each trial. Rows of runs of the same name are replaced.

    python tools/results.py cifar10-labels=runs/cifar10-labels segment-shapes=runs/segment-shapes

recipes/LOG.md records how each run was made and what it took.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import yaml

from mpp.runs.verdict import APPROACHES

RESULTS = Path(__file__).resolve().parent.parent / "recipes" / "RESULTS.csv"
COLUMNS = ["run", "task", "labels_per_class", "approach", "seed", "metric", "value"]
TRIAL = re.compile(rf"(?:labels(?P<labels>\d+)-)?(?P<approach>{'|'.join(APPROACHES)})-seed(?P<seed>\d+)")


def rows_of(name: str, run: Path) -> list[dict[str, str]]:
    """Return the rows of a run's trials.

    Raises:
        ValueError: If a trial is not finished.
    """
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    counts = recipe["data"]["labels_per_class"]
    metric = json.loads((run / "result.json").read_text())["metric"]
    rows = []
    for trial in sorted(run.iterdir()):
        found = TRIAL.fullmatch(trial.name)
        if found is None:
            continue
        if not (trial / "result.json").exists():
            raise ValueError(f"{trial}: not finished")
        value = json.loads((trial / "result.json").read_text())["metrics"][metric]
        labels = found["labels"] or (str(counts[0]) if counts else "all")
        row = [name, recipe["task"]["name"], labels, found["approach"], found["seed"], metric, f"{value:.4f}"]
        rows.append(dict(zip(COLUMNS, row, strict=True)))
    return sorted(rows, key=lambda r: (int(r["labels_per_class"].replace("all", "0")), r["approach"], int(r["seed"])))


def replace(names: Collection[str], new: list[dict[str, str]], results: Path = RESULTS) -> None:
    """Replace the rows of the runs of these names."""
    kept: list[dict[str, str]] = []
    if results.exists():
        with open(results, newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["run"] not in names]
    with open(results, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + new)


def write(runs: Sequence[tuple[str, Path]], results: Path = RESULTS) -> int:
    """Write the rows of runs, and return their number."""
    new = [row for name, run in runs for row in rows_of(name, run)]
    replace(dict(runs), new, results)
    return len(new)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fine-tuning runs as rows of recipes/RESULTS.csv.")
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    given = [word.partition("=") for word in parser.parse_args(words).runs]
    print(f"{write([(name, Path(run)) for name, _, run in given])} rows in {RESULTS}")


if __name__ == "__main__":
    main()
