"""Run the recipes of a JSON file one after another in the same processes: `torchrun -m tests.several_runs FILE`.

    [{"values": {…}, "resume": "never"}, …]

This saves starting processes for each recipe.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mpp
from mpp.recipe.loading import check_recipe
from mpp.recipe.pretrain import PretrainRecipe


def main() -> None:
    for run in json.loads(Path(sys.argv[1]).read_text()):
        mpp.pretrain(check_recipe(run["values"], PretrainRecipe), resume=run["resume"])


if __name__ == "__main__":
    main()
