"""Lines of a file of prompts: accepted, or refused by name."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path

import pytest

from services.teacher_gateway.prompts.file import (
    Prompt,
    PromptsRefused,
    RefusedLine,
    judge_all,
    read_again,
    read_prompts,
)
from services.teacher_gateway.prompts.lines import (
    ACCEPT_REASONS,
    MAX_LINE_BYTES,
    PromptLine,
    prompt_sha256,
)
from services.teacher_gateway.prompts.sources import upload_digest
from stillhouse.contracts.chat import Message, TemplateRefused


def judge(
    *lines: object, max_lines: int = 1000, max_tokens: int = 50
) -> tuple[io.BytesIO, list[Prompt | RefusedLine]]:
    """Each line as it is (bytes), or as JSON. A message's tokens are its characters."""
    data = b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    file = io.BytesIO(data)

    def tokens_of(line: PromptLine) -> int:
        if line.messages[0].content == "refuse me":
            raise TemplateRefused("the chat template refused the conversation: no")
        return sum(len(message.text) for message in line.messages)

    found = read_prompts(
        file,
        max_lines=max_lines,
        max_line_bytes=MAX_LINE_BYTES,
        max_tokens=max_tokens,
        teacher_of=lambda line, sha256: "t",
        tokens_of=tokens_of,
    )
    return file, list(found)


def only_reason(line: object) -> tuple[str, str]:
    _, [found] = judge(line)
    assert isinstance(found, RefusedLine), found
    assert found.reason in ACCEPT_REASONS
    assert found.detail.startswith("line 1: ")
    return found.reason, found.detail


@pytest.mark.parametrize(
    ("line", "reason", "said"),
    [
        (b"   ", "blank_prompt", "it is blank"),
        ({"prompt": "  \n"}, "blank_prompt", "its last message is blank"),
        ({"prompt": ""}, "blank_prompt", "no content"),
        (b"hello", "invalid_prompt", "not JSON"),
        (b"[" * 100_000, "invalid_prompt", "not JSON"),
        (b'"hello"', "invalid_prompt", "found str"),
        (b"\xff\xfe{", "invalid_prompt", "not UTF-8"),
        ({"question": "x"}, "invalid_prompt", "found question"),
        ({"prompt": "x", "messages": []}, "invalid_prompt", 'either "messages" or "prompt"'),
        ({"prompt": 3}, "invalid_prompt", "not a text"),
        ({"messages": []}, "invalid_prompt", "not a list with a message"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "invalid_prompt", "role"),
        ({"messages": [{"role": "user", "content": [1]}]}, "invalid_prompt", "content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "invalid_prompt", "last message"),
        ({"prompt": "a\0b"}, "invalid_prompt", "NUL"),
        (b'{"prompt": "\\ud800"}', "invalid_prompt", "U+D800, half of a surrogate pair"),
        (b'{"\\ud800": 1}', "invalid_prompt", "found ?"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "invalid_prompt", "not JSON"),
        (b'{"prompt": NaN}', "invalid_prompt", "NaN is no JSON"),
        ({"prompt": "x" * 50}, "prompt_too_long", "it has 50 tokens"),
        ({"messages": [{"role": "user", "content": "x"}] * 257}, "prompt_too_long", "256"),
        ({"prompt": "refuse me"}, "template_refused", "refused the conversation"),
        (b'{"prompt": "' + b"x" * MAX_LINE_BYTES + b'"}', "prompt_too_long", "bytes"),
    ],
)
def test_a_line_that_is_no_prompt_has_a_reason(line: object, reason: str, said: str) -> None:
    found, detail = only_reason(line)
    assert found == reason
    assert said in detail


def test_both_forms_are_read_and_other_keys_are_ignored() -> None:
    file, found = judge(
        {"prompt": "one", "id": 7, "tags": ["x"]},
        {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "two"}]},
    )
    assert [p.tokens for p in found if isinstance(p, Prompt)] == [3, 5]
    second = found[1]
    assert isinstance(second, Prompt)
    assert [m.content for m in read_again(file, second).messages] == ["be", "two"]
    first = found[0]
    assert isinstance(first, Prompt)
    assert read_again(file, first).messages == [Message(role="user", content="one")]


def test_prompts_that_differ_in_form_alone_are_duplicates() -> None:
    _, found = judge(
        {"prompt": "What  is a lake?"},
        {"prompt": "x"},
        {"messages": [{"role": "user", "content": " what is a LAKE? "}]},
    )
    assert isinstance(found[2], RefusedLine)
    assert (found[2].reason, found[2].detail) == (
        "duplicate_prompt",
        "line 3: the same as line 1",
    )
    assert isinstance(found[0], Prompt)
    assert found[0].sha256 == prompt_sha256([Message(role="user", content="what is a lake?")])


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm() -> None:
    _, found = judge(b'\xef\xbb\xbf{"prompt": "a"}\r', b'{"prompt": "b"}\r')
    assert all(isinstance(line, Prompt) for line in found)


def test_a_line_of_ten_megabytes_is_refused_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    with path.open("wb") as out:
        out.write(b'{"prompt": "before"}\n{"prompt": "')
        for _ in range(160):
            out.write(b"x" * 65536)
        out.write(b'"}\n{"prompt": "after"}\n')
    with path.open("rb") as file:
        tracemalloc.start()
        found = list(
            read_prompts(
                file,
                max_lines=9,
                max_line_bytes=MAX_LINE_BYTES,
                max_tokens=9,
                teacher_of=lambda line, sha256: "t",
                tokens_of=None,
            )
        )
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert isinstance(found[2], Prompt)
        assert read_again(file, found[2]).messages[0].content == "after"
    assert isinstance(found[1], RefusedLine)
    assert (found[1].line, found[1].reason) == (2, "prompt_too_long")
    assert peak < 5 * MAX_LINE_BYTES


def test_too_many_lines_refuse_the_file() -> None:
    with pytest.raises(PromptsRefused, match="over 1 lines") as caught:
        judge({"prompt": "a"}, {"prompt": "b"}, max_lines=1)
    assert caught.value.reason == "too_many_prompts"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "the file of prompts is empty"),
        ([b"[", b"{}"], "has 2 lines, none a prompt; line 1: it is not JSON"),
    ],
)
def test_a_file_without_a_prompt_is_refused_with_its_first_line(
    lines: list[bytes], said: str
) -> None:
    with pytest.raises(PromptsRefused) as caught:
        judge_all(judge(*lines)[1])
    assert said in str(caught.value)
    assert caught.value.reason == "no_prompts"


@pytest.mark.parametrize(
    "reference", ["upload:", "upload:" + "a" * 63, "upload:" + "a" * 64 + "\n"]
)
def test_a_reference_to_an_upload_is_exactly_a_digest(reference: str) -> None:
    assert upload_digest("upload:" + "a" * 64) == "a" * 64
    with pytest.raises(PromptsRefused, match="64 hex digits"):
        upload_digest(reference)
