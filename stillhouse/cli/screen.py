"""How a command speaks: tables and colour on a terminal, plain lines elsewhere, or JSON alone.

Text of teachers, prompts and users is shown without its control characters, so that an answer
cannot move the reader's cursor.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

_PLAIN_CELL = 100
# Control characters but tab and newline, what turns the direction of writing, lone surrogates.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Table:
    """Rows of text under headings; `numbers` names the columns that are set to the right. `prose`
    marks cells of whole sentences: wrapped on a terminal, one a line elsewhere."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()
    prose: bool = False


class Screen:
    """Standard output as one command uses it."""

    def __init__(self, *, as_json: bool = False, out: IO[str] | None = None) -> None:
        self.as_json = as_json
        self._out = out or sys.stdout
        self._rich = Console(file=self._out) if self._out.isatty() and not as_json else None

    @property
    def live(self) -> bool:
        """Whether a person watches a terminal."""
        return self._rich is not None

    def data(self, value: Any) -> None:
        """Write one JSON document, or one line of a stream of them."""
        self._write(json.dumps(value, ensure_ascii=False, indent=2))

    def record(self, value: Any) -> None:
        """Write one JSON object on one line."""
        self._write(json.dumps(value, ensure_ascii=False))

    def line(self, text: str = "") -> None:
        if self._rich is not None:
            self._rich.print(Text(clean(text)))
        else:
            self._write(clean(text))

    def table(self, table: Table) -> None:
        if self._rich is not None:
            self._rich.print(_rich_table(table))
            return
        if table.title:
            self._write(table.title)
        for line in plain_lines(table):
            self._write(line)

    def progress(self, text: str) -> None:
        """Tell a person of something under way; silent where the output is data."""
        if not self.as_json:
            print(clean(text), file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def showing(self) -> Iterator[Any]:
        """Yield a function that shows tables in place of the ones before; on a terminal only."""
        assert self._rich is not None
        with Live(console=self._rich, auto_refresh=False, transient=False) as live:

            def show(*tables: Table | str) -> None:
                parts: list[RenderableType] = [
                    _rich_table(t) if isinstance(t, Table) else Text(clean(t)) for t in tables
                ]
                live.update(Group(*parts), refresh=True)

            yield show

    def _write(self, text: str) -> None:
        print(text, file=self._out, flush=True)


def clean(text: str) -> str:
    """Replace control characters, which a terminal would obey."""
    return _UNSAFE.sub("?", text)


def plain_lines(table: Table) -> list[str]:
    """Set a table in columns of spaces, one line a row; prose as one line a cell."""
    if table.prose:
        return _paragraphs(table)
    cells = [[_one_line(c) for c in row] for row in (table.headings, *table.rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(table.headings))]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(widths[n]) if n in table.numbers else cell.ljust(widths[n])
            for n, cell in enumerate(row)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _paragraphs(table: Table) -> list[str]:
    width = max(len(heading) for heading in table.headings)
    lines = []
    for row in table.rows:
        lines += [
            f"{heading.ljust(width)}  {' '.join(clean(cell).split())}".rstrip()
            for heading, cell in zip(table.headings, row, strict=True)
        ]
        lines.append("")
    return lines[:-1]


def _one_line(text: str) -> str:
    text = " ".join(clean(text).split())
    return text if len(text) <= _PLAIN_CELL else text[: _PLAIN_CELL - 3] + "..."


def _rich_table(table: Table) -> RichTable:
    drawn = RichTable(title=table.title or None, title_justify="left", show_lines=table.prose)
    for number, heading in enumerate(table.headings):
        drawn.add_column(
            heading,
            justify="right" if number in table.numbers else "left",
            overflow="fold",
            no_wrap=number in table.numbers,
        )
    for row in table.rows:
        drawn.add_row(*(Text(clean(cell)) for cell in row))
    return drawn
