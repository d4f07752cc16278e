"""docs/promises.md has a row for every promise of tests/faults, and no row that is not tested."""

from __future__ import annotations

import ast
import re

from tests.conftest import ROOT

TABLE = ROOT / "docs" / "promises.md"
HEAD = "| promise | tried | tests |"


def promises() -> dict[str, set[str]]:
    """Return the tests of each promise, by its text."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests" / "faults").glob("test_*.py")):
        tree = ast.parse(path.read_text())
        constants = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            texts = [
                d.args[0].value if isinstance(d.args[0], ast.Constant) else constants[d.args[0].id]  # type: ignore[attr-defined]
                for d in node.decorator_list
                if isinstance(d, ast.Call) and ast.unparse(d.func) == "pytest.mark.promise"
            ]
            assert len(texts) == 1, f"{path.name}::{node.name} must have one promise"
            found.setdefault(str(texts[0]), set()).add(f"{path.name}::{node.name}")
    return found


def test_the_table_is_of_these_tests() -> None:
    """`make faults` writes the table."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ") and line != HEAD]
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in lines]
    table = {row[0]: set(re.findall(r"`([^`]+)`", row[2])) for row in rows}
    assert table == promises()
    assert "did not hold" not in TABLE.read_text()
