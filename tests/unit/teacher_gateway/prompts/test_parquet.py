"""Parquet prompts: read by a process of its own, row N as line N, within a fixed memory."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.teacher_gateway.prompts import parquet
from services.teacher_gateway.prompts.file import PromptsRefused
from services.teacher_gateway.prompts.lines import LineRefused, answer_of, parse_line, tags_of
from services.teacher_gateway.prompts.parquet import is_parquet, lines_of_parquet
from services.teacher_gateway.prompts.parquet_rows import convert

MESSAGES = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "content": "21 C", "tool_call_id": "1"},
]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "tides", "strict": True}},
]


def written(path: Path, columns: dict[str, Any], **options: Any) -> BinaryIO:
    pq.write_table(pa.table(columns), path, **options)
    return path.open("rb")


def converted(columns: dict[str, Any]) -> list[bytes]:
    """The lines of a table, converted in this process."""
    source, sink = io.BytesIO(), io.BytesIO()
    pq.write_table(pa.table(columns), source)
    source.seek(0)
    convert(source, sink, 1 << 30, 1000)
    return sink.getvalue().splitlines()


def lines_of(file: BinaryIO, folder: Path, alive: Callable[[], None] = lambda: None) -> BinaryIO:
    return lines_of_parquet(file, folder, max_bytes=1 << 30, max_rows=100_000, alive=alive)


def refusal(file: BinaryIO, folder: Path) -> PromptsRefused:
    with file, pytest.raises(PromptsRefused) as caught:
        lines_of(file, folder)
    return caught.value


def test_a_file_is_told_by_its_content_and_read_by_another_process(tmp_path: Path) -> None:
    prompts = [f"What is the number {n}?" for n in range(100)]
    with written(tmp_path / "prompts.jsonl", {"prompt": prompts, "other": prompts}) as file:
        assert is_parquet(file)
        with lines_of(file, tmp_path) as lines:
            assert [json.loads(line) for line in lines] == [{"prompt": p} for p in prompts]
    assert not is_parquet(io.BytesIO(b'{"prompt": "PAR1"}'))
    assert not is_parquet(io.BytesIO(b""))


@pytest.mark.parametrize("as_text", [True, False], ids=["JSON text", "structs"])
def test_both_forms_of_a_conversation_are_the_same_prompt(as_text: bool) -> None:
    tags, answer = {"team": "a"}, {"object": "chat.completion", "choices": [{"message": {}}]}
    columns: dict[str, Any] = {"messages": [MESSAGES], "tools": [TOOLS], "tags": [tags]}
    if as_text:
        columns = {name: [json.dumps(value) for value in found] for name, found in columns.items()}
    [line] = converted({**columns, "response": [json.dumps(answer)]})
    found = parse_line(line)
    assert found.messages == parse_line(json.dumps({"messages": MESSAGES}).encode()).messages
    assert (found.tools, tags_of(found)) == (TOOLS, tags)
    assert json.loads(answer_of(found)) == answer


def test_a_map_of_tags_and_coded_texts_are_read() -> None:
    tags = pa.array([[("team", "a"), ("lang", "de")], None], pa.map_(pa.string(), pa.string()))
    lines = converted({"prompt": pa.array(["x", "y"]).dictionary_encode(), "tags": tags})
    assert [tags_of(parse_line(line)) for line in lines] == [{"team": "a", "lang": "de"}, {}]


def test_rows_that_are_no_prompt_are_lines_with_a_reason() -> None:
    broken = pa.array([b"ok", b"\xff\xfe", None, b"a\0b", b""], pa.binary()).view(pa.binary())
    lines = converted({"prompt": pa.Array.from_buffers(pa.string(), 5, broken.buffers())})
    assert parse_line(lines[0]).messages[0].content == "ok"
    said = []
    for line in lines[1:]:
        with pytest.raises(LineRefused) as caught:
            parse_line(line)
        said.append(str(caught.value))
    assert said == [
        "it is not UTF-8",
        'expected an object with either "messages" or "prompt", found neither',
        "it holds the character NUL",
        "a message has no content",
    ]


def test_json_text_that_is_none_or_too_deep_is_refused_by_its_line() -> None:
    for text in ("no JSON", "[" * 100_000, '[{"role": "user", "content": "\\ud800"}]', "3"):
        [line] = converted({"messages": [text]})
        with pytest.raises(LineRefused):
            parse_line(line)


def test_files_that_are_none_are_refused_with_what_is_wrong(tmp_path: Path) -> None:
    named = written(tmp_path / "a", {"question": ["x"], "id": [1]})
    assert "a column `prompt` or `messages`, found question, id" in str(refusal(named, tmp_path))
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "b").write_bytes(data[: len(data) // 2])
    cut = refusal((tmp_path / "b").open("rb"), tmp_path)
    assert "is not whole Parquet" in str(cut)
    assert cut.reason == "prompts_damaged"


def test_a_small_file_that_holds_a_huge_value_is_refused_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "MEMORY_BYTES", 448 << 20)
    values = {"prompt": ["x" * (96 << 20)]}
    file = written(tmp_path / "value", values, compression="zstd", use_dictionary=False)
    assert (tmp_path / "value").stat().st_size < 1 << 17
    assert "takes over 448 MiB: write it with smaller row groups" in str(refusal(file, tmp_path))


def test_rows_that_repeat_one_long_text_are_refused_before_they_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "ALLOWANCE_BYTES", 1 << 20)
    text = pa.array(["y" * (1 << 18)])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), text)
    file = written(tmp_path / "rows", {"prompt": column}, compression="zstd")
    assert (tmp_path / "rows").stat().st_size < 10_000
    assert "split it over several pipelines" in str(refusal(file, tmp_path))


def test_no_more_rows_are_read_than_tell_that_there_are_too_many() -> None:
    source, sink = io.BytesIO(), io.BytesIO()
    pq.write_table(pa.table({"prompt": [str(n) for n in range(50)]}), source)
    source.seek(0)
    convert(source, sink, 1 << 30, 3)
    assert len(sink.getvalue().splitlines()) == 4


def test_whoever_waits_for_a_long_file_is_kept_alive_and_may_stop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "LOOK_SECONDS", 0.001)

    def stop() -> None:
        raise RuntimeError("cancelled")

    with (
        written(tmp_path / "a", {"prompt": ["x"]}) as file,
        pytest.raises(RuntimeError, match="cancelled"),
    ):
        lines_of(file, tmp_path, stop)


def test_the_reader_is_told_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_API_KEY", "sk-secret")
    told: dict[str, str] = {}
    real = parquet.subprocess.Popen

    def popen(*args: Any, env: dict[str, str], **options: Any) -> Any:
        told.update(env)
        return real(*args, env=env, **options)

    monkeypatch.setattr(parquet.subprocess, "Popen", popen)
    with written(tmp_path / "a", {"prompt": ["x"]}) as file:
        lines_of(file, tmp_path).close()
    assert "PATH" in told
    assert "QWEN_API_KEY" not in told
