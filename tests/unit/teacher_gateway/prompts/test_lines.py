"""What a line may hold beside a question: turns, functions, tags, an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.teacher_gateway.prompts.lines import (
    ACCEPT_REASONS,
    MAX_TOOL_DEPTH,
    MAX_TOOLS,
    LineRefused,
    PromptLine,
    answer_of,
    parse_line,
    prompt_sha256,
    tags_of,
)
from stillhouse.contracts.chat import Message

USER = {"role": "user", "content": "Weather?"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CALLED = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
TURNS = [*CALLED, {"role": "tool", "content": "21 C", "tool_call_id": "call_1"}]


def line(**value: Any) -> PromptLine:
    return parse_line(json.dumps(value).encode())


def refused(**value: Any) -> str:
    """Why a line is refused: its reason and what is said."""

    def read() -> None:
        found = line(**value)
        tags_of(found)
        answer_of(found)

    with pytest.raises(LineRefused) as caught:
        read()
    assert caught.value.reason in ACCEPT_REASONS
    return f"{caught.value.reason}: {caught.value}"


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"x": value}
    return value


# Turns and functions


def test_turns_with_calls_and_their_results_are_read() -> None:
    found = line(messages=TURNS, tools=[TOOL])
    assert [message.role for message in found.messages] == ["user", "assistant", "tool"]
    assert found.messages[1].as_sent() == {"role": "assistant", "tool_calls": [CALL]}
    assert found.tools == [TOOL]
    assert line(messages=TURNS, tools=[]).tools is line(messages=TURNS).tools is None


def test_the_empty_fields_and_forms_that_clients_write_are_plain_messages() -> None:
    said = {
        "role": "assistant",
        "content": "",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Bern"}}}],
    }
    parts = [{"type": "text", "text": "21"}, {"type": "text", "text": " C"}]
    found = line(messages=[USER, said, {"role": "tool", "content": parts}])
    call = found.messages[1].tool_calls
    assert call is not None
    assert call[0].function.arguments == '{"city":"Bern"}'
    assert found.messages[2].content == "21 C"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (CALLED, "its last message is of the assistant"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "only the assistant's"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "content"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": 1}]}, USER], "tool_calls"),
        ([USER, {"role": "assistant", "tool_calls": [nested(3)]}, USER], "tool_calls"),
        ([USER, {"role": "assistant", "tool_calls": []}, USER], "expected `content`"),
        ([{**USER, "cache_control": {"type": "ephemeral"}}], "cache_control"),
    ],
)
def test_messages_that_are_none_are_refused_by_name(messages: list[Any], said: str) -> None:
    assert refused(messages=messages).startswith("invalid_prompt: ")
    assert said in refused(messages=messages)


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ({}, "not a list"),
        ([TOOL] * (MAX_TOOLS + 1), "at most 128"),
        (["weather"], '"tools"[0] is not'),
        ([TOOL, {"type": "web_search"}], '"tools"[1] is not'),
        ([{"type": "function"}], '"tools"[0] is not'),
        ([{"type": "function", "function": {"name": ""}}], '"tools"[0] is not'),
        ([{"type": "function", "function": {"name": "x" * 201}}], '"tools"[0] is not'),
        ([{"type": "function", "function": {"name": "x", "parameters": []}}], '"tools"[0] is not'),
        ([TOOL | {"deep": nested(MAX_TOOL_DEPTH)}], "nests over 32 levels"),
    ],
)
def test_functions_that_are_none_are_refused_by_name(tools: Any, said: str) -> None:
    assert said in refused(messages=[USER], tools=tools)


def test_arguments_that_nest_too_deep_and_numbers_beyond_all_are_refused() -> None:
    call = {"function": {"name": "weather", "arguments": nested(MAX_TOOL_DEPTH)}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}, USER]
    assert "nests over 32 levels" in refused(messages=messages)
    raw = json.dumps({"messages": [USER], "tools": [TOOL | {"n": 0}]}).replace(
        '"n": 0', '"n": 1e999'
    )
    with pytest.raises(LineRefused, match="cannot be written again"):
        parse_line(raw.encode())


@pytest.mark.parametrize("escape", ["\\u0000", "\\ud83d", "\\uDE00", "\\ud800 \\udc00"])
@pytest.mark.parametrize(
    "place",
    [
        '{"prompt": "x", "answer": "?"}',
        '{"prompt": "x", "tags": {"?": "y"}}',
        '{"messages": [{"role": "user", "content": "x"}], "tools": [{"?": 1}]}',
        '{"messages": [{"role": "user", "content": "x", "name": "?"}]}',
    ],
)
def test_characters_that_nothing_can_hold_are_refused_wherever_they_stand(
    place: str, escape: str
) -> None:
    with pytest.raises(LineRefused, match="it holds the character"):
        parse_line(place.replace("?", escape).encode())


def test_a_pair_of_surrogates_is_a_character_and_what_nobody_reads_is_ignored() -> None:
    found = parse_line(
        b'{"prompt": "\\ud83d\\ude00", "id": "\\ud800", "\\udfff": [NULL]}'.replace(
            b"NULL", b"null"
        )
    )
    assert found.messages == [Message(role="user", content="\U0001f600")]


# Digests


def test_prompts_with_other_functions_or_calls_are_other_prompts() -> None:
    plain = [Message(role="user", content="Weather?")]
    other = {"type": "function", "function": {"name": "tides"}}
    digests = [
        prompt_sha256(plain),
        prompt_sha256(plain, [TOOL]),
        prompt_sha256(plain, [other]),
        prompt_sha256(line(messages=TURNS).messages),
        prompt_sha256(line(messages=[*TURNS[:2], {"role": "tool", "content": "9 C"}]).messages),
        prompt_sha256([Message(role="user", content="Weather?", name="Ann")]),
    ]
    assert len(set(digests)) == len(digests)


def test_ids_of_calls_are_form() -> None:
    again = json.loads(json.dumps(TURNS).replace("call_1", "call_2"))
    assert prompt_sha256(line(messages=TURNS).messages) == prompt_sha256(
        line(messages=again).messages
    )


def test_the_digest_of_a_plain_question_has_not_changed() -> None:
    """Held-out prompts stay where they are, in every file of prompts that was ever split."""
    found = prompt_sha256([Message(role="user", content="What is a lake?")])
    assert found == "f2911567e26e52a6aa4d5833903192c96f41b4502faed654fe2d07160fbc22df"


# Tags


def test_tags_are_short_texts_by_name() -> None:
    assert tags_of(line(prompt="x", tags={"team": "a", "lang": ""})) == {"team": "a", "lang": ""}
    assert tags_of(line(prompt="x")) == tags_of(line(prompt="x", tags=None)) == {}


@pytest.mark.parametrize(
    "tags",
    [
        ["a"],
        "a",
        {"n": 1},
        {"": "x"},
        {"x" * 65: "y"},
        {"x": "y" * 513},
        {str(n): "x" for n in range(17)},
    ],
)
def test_tags_of_another_form_are_refused_where_somebody_asks_for_them(tags: Any) -> None:
    assert line(prompt="x", tags=tags, answer="y").messages
    assert refused(prompt="x", tags=tags, answer="y").startswith('invalid_prompt: "tags"')


# Answers


def test_a_text_becomes_a_chat_completion_that_stopped() -> None:
    [choice] = json.loads(answer_of(line(prompt="x", answer="A lake.")))["choices"]
    assert choice["message"] == {"role": "assistant", "content": "A lake."}
    assert choice["finish_reason"] == "stop"
    assert answer_of(line(prompt="x", response="A lake.")) == answer_of(
        line(prompt="x", answer="A lake.")
    )


def test_a_completion_is_taken_as_it_is_also_where_it_is_written_as_text() -> None:
    body = {
        "object": "chat.completion",
        "choices": [
            {
                "message": {"role": "assistant", "content": "Gr\u00fc\u00dfe"},
                "finish_reason": "length",
                "logprobs": {"content": [{"token": "G", "logprob": -0.1, "top_logprobs": []}]},
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    }
    assert json.loads(answer_of(line(prompt="x", answer=body))) == body
    assert json.loads(answer_of(line(prompt="x", answer=json.dumps(body)))) == body
    text = json.dumps({"choices": []})
    [choice] = json.loads(answer_of(line(prompt="x", answer=text)))["choices"]
    assert choice["message"]["content"] == text


@pytest.mark.parametrize("value", [{}, {"answer": None}, {"answer": ""}, {"answer": " \n"}])
def test_a_missing_answer_has_a_reason_of_its_own(value: dict[str, Any]) -> None:
    assert refused(prompt="x", **value).startswith("answer_missing: ")


@pytest.mark.parametrize(
    "answer",
    [
        3,
        ["a"],
        {},
        {"choices": []},
        {"choices": ["x"]},
        {"choices": [{"text": "legacy"}]},
        {"choices": [{"message": {}}], "usage": {"prompt_tokens": -1, "completion_tokens": 1}},
        {"choices": [{"message": {}}], "usage": {"prompt_tokens": 1, "completion_tokens": 2**63}},
        {"choices": [{"message": {"content": 1e308 * 10}}]},
    ],
)
def test_an_answer_of_another_form_is_refused(answer: Any) -> None:
    raw = json.dumps({"prompt": "x", "answer": answer}).replace("Infinity", "1e999")
    with pytest.raises(LineRefused) as caught:
        answer_of(parse_line(raw.encode()))
    assert caught.value.reason == "answer_invalid"
