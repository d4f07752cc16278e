"""Run the contract on every family. Write mpp/encoders/support.json and the table of docs/encoders.md.

    python tools/support_table.py

It takes about 4 minutes on one core.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

from mpp.encoders.support import FAMILIES, TABLE, markdown
from mpp.objective import contract

PAGE = Path(__file__).resolve().parent.parent / "docs" / "encoders.md"
BETWEEN = re.compile(r"(<!-- support table: .* -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for family in FAMILIES:
        rows.append(contract.row(family))
        faults = [f"{way}: {fault}" for way, found in rows[-1]["ways"].items() for fault in found]
        print(f"{family.title}: {'; '.join(faults) or 'all checks hold'}", flush=True)
    TABLE.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(BETWEEN.sub(lambda m: m[1] + markdown(rows) + m[2], PAGE.read_text()))
    sys.exit(any(found for r in rows for found in r["ways"].values()))


if __name__ == "__main__":
    main()
