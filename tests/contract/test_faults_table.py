"""`tests/faults.md` names every fault, and tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests" / "faults.md"
FAULTS = {*(f"G{number}" for number in range(1, 18)), "H"}


def rows() -> list[list[str]]:
    lines = [line for line in TABLE.read_text().splitlines() if re.match(r"\| [GH]\d* ", line)]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


@cache
def named_in(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_fault_has_a_row() -> None:
    assert {cells[0].split()[0] for cells in rows()} == FAULTS


def test_every_row_names_a_test_that_exists_and_what_it_fails_without() -> None:
    for cells in rows():
        assert len(cells) == 4, f"expected four cells, found {cells}"
        named = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", cells[2])
        assert named, f"{cells[0]}: expected one test as `tests/file.py::test_name`"
        file, test = named.groups()
        assert (ROOT / file).is_file(), f"{cells[0]}: there is no {file}"
        assert test in named_in(file), f"{cells[0]}: {file} has no {test}"
        assert all(cells), f"{cells[0]}: a cell is empty"
