from __future__ import annotations

import io
import json

import pytest

from stillhouse.cli.screen import Screen, Table, clean, plain_lines


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert clean("a\x1b[2Jb\rc\u202ed\x9be\n\tf") == "a?[2Jb?c?d?e\n\tf"
    assert clean("caf\u00e9 \u4f60\u597d") == "caf\u00e9 \u4f60\u597d"


def test_a_table_is_columns_of_spaces_off_a_terminal() -> None:
    table = Table("", ("stage", "rows"), [("collect", "7"), ("x", "1234")], numbers=(1,))

    assert plain_lines(table) == ["stage    rows", "collect     7", "x        1234"]


def test_one_row_is_one_line_whatever_the_text() -> None:
    (_, line) = plain_lines(Table("", ("answer",), [("one\ntwo  " + "x" * 200,)]))

    assert line.startswith("one two xxx")
    assert line.endswith("...")
    assert len(line) == 100


def test_markup_in_text_is_text() -> None:
    out = io.StringIO()
    Screen(out=out).line("[red]not red[/red]")

    assert out.getvalue() == "[red]not red[/red]\n"


def test_json_is_the_only_thing_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    screen = Screen(as_json=True, out=out)
    screen.progress("on the way")
    screen.data({"a": "\u00e9"})

    assert json.loads(out.getvalue()) == {"a": "\u00e9"}
    assert capsys.readouterr() == ("", "")
