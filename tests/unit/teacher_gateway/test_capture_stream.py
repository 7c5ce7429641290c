"""Streams on their way, and put together: nothing is lost, nothing half is taken for whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.teacher_gateway.capture import failures
from services.teacher_gateway.capture.completion import Unusable, whole_answer
from services.teacher_gateway.capture.sse import Passing, data_of
from tests.support.streamed import chunks_of

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
LOGPROBS = {
    "content": [
        {"token": t, "logprob": -0.5, "bytes": [1], "id": n, "top_logprobs": []}
        for n, t in enumerate("abcde")
    ]
}


def completion(**message: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_790_000_000,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": None, **message},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": USAGE,
    }


def sse(chunks: list[dict[str, Any]], *, end: str = "\n\n", done: bool = True) -> bytes:
    events = [f"data: {json.dumps(chunk)}{end}" for chunk in chunks]
    return "".join(events + ([f"data: [DONE]{end}"] if done else [])).encode()


def streamed(answer: dict[str, Any], **how: Any) -> bytes:
    return sse(list(chunks_of(answer, usage=True)), **how)


def put_together(stream: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(whole_answer(stream, streamed=True))
    return found


CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}},
    {"id": "call_2", "type": "function", "function": {"name": "go", "arguments": '{"to": "x"}'}},
]


@pytest.mark.parametrize(
    "message",
    [
        {"content": "Twelve characters and then some more of them."},
        {"content": "Short", "reasoning_content": "A thought that takes several chunks to tell."},
        {"tool_calls": CALLS},
        {"content": "Both a text", "tool_calls": CALLS[:1]},
    ],
    ids=["text", "reasoning", "tools", "text and tool"],
)
def test_a_stream_gives_the_completion_that_it_was_made_from(message: dict[str, Any]) -> None:
    answer = completion(**message)
    assert json.loads(whole_answer(streamed(answer), streamed=True)) == answer


def test_log_probabilities_of_all_chunks_are_kept_in_order() -> None:
    answer = completion(content="Twelve characters and more of them, in several chunks.")
    answer["choices"][0]["logprobs"] = LOGPROBS
    found = json.loads(whole_answer(streamed(answer), streamed=True))
    assert found == answer


def test_choices_and_calls_that_come_in_turns_are_told_apart() -> None:
    def part(index: int, **delta: Any) -> dict[str, Any]:
        return {"choices": [{"index": index, "delta": delta}]}

    def call(index: int, **function: str) -> list[dict[str, Any]]:
        return [{"index": index, "function": function}]

    found = put_together(
        sse(
            [
                part(1, content="b"),
                part(0, content="a", tool_calls=call(1, name="second", arguments="{")),
                part(1, content="B"),
                part(0, content="A", tool_calls=call(0, name="first", arguments="{}")),
                part(0, tool_calls=call(1, arguments="}")),
                {"choices": [{"index": 1, "delta": {}, "finish_reason": "length"}]},
                {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
            ]
        )
    )
    first, second = found["choices"]
    assert (first["message"]["content"], second["message"]["content"]) == ("aA", "bB")
    assert [c["function"]["name"] for c in first["message"]["tool_calls"]] == ["first", "second"]
    assert [c["function"]["arguments"] for c in first["message"]["tool_calls"]] == ["{}", "{}"]
    assert [c["finish_reason"] for c in found["choices"]] == ["tool_calls", "length"]


def test_a_call_in_a_great_many_pieces_is_put_together() -> None:
    def part(piece: str) -> dict[str, Any]:
        call = {"index": 0, "function": {"arguments": piece}}
        return {"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}

    ending = {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}
    found = put_together(sse([*(part(f"{n},") for n in range(20_000)), ending]))
    (call,) = found["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] == "".join(f"{n}," for n in range(20_000))


def test_a_legacy_stream_gives_a_text_completion() -> None:
    chunks = [
        {"id": "c", "choices": [{"index": 0, "text": "one ", "finish_reason": None}]},
        {"id": "c", "choices": [{"index": 0, "text": "two", "finish_reason": "stop"}]},
    ]
    found = put_together(sse(chunks))
    assert found["object"] == "text_completion"
    assert found["choices"][0]["text"] == "one two"


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (streamed(completion(content="cut"), done=False), failures.TRUNCATED),
        (streamed(completion(content="cut"))[:200], failures.TEACHER_INVALID),
        (sse([{"choices": [{"index": 0, "delta": {"content": "x"}}]}]), failures.TRUNCATED),
        (sse([{"choices": []}]), failures.TEACHER_INVALID),
        (sse([]), failures.TEACHER_INVALID),
        (b"", failures.TRUNCATED),
        (b"data: {not json\n\ndata: [DONE]\n\n", failures.TEACHER_INVALID),
        (b'data: {"choices": 7}\n\ndata: [DONE]\n\n', failures.TEACHER_INVALID),
        (b'data: {"choices": [{"delta": {"content": "\xff"}}]}\n\n', failures.TEACHER_INVALID),
        (b"data: " + b"[" * 100_000 + b"\n\n", failures.TEACHER_INVALID),
        (b"<html>gone</html>", failures.TRUNCATED),
        (sse([{"error": {"message": "overloaded"}}]), failures.TEACHER_ERROR),
        (sse([{"choices": [{"delta": {}, "logprobs": 7}]}]), failures.TEACHER_INVALID),
        (sse([{"choices": [{"delta": {}, "logprobs": {"content": 7}}]}]), failures.TEACHER_INVALID),
        (
            b'data: {"choices": [{"delta": {}, "logprobs": {"content": ["\xff"]}}]}\n\n',
            failures.TEACHER_INVALID,
        ),
    ],
)
def test_what_is_not_whole_is_no_answer(stream: bytes, reason: str) -> None:
    with pytest.raises(Unusable) as found:
        whole_answer(stream, streamed=True)
    assert found.value.reason == reason


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{}]}', b'{"choices": [{"message": 1}]}',
     b'{"choices": [{"message": {"content": "\xff"}}]}', b'{"choices": ' + b"[" * 100_000],
)  # fmt: skip
def test_a_body_that_is_no_completion_is_no_answer(body: bytes) -> None:
    with pytest.raises(Unusable):
        whole_answer(body, streamed=False)


@pytest.mark.parametrize("count", [-1, (1 << 40) + 1, 10**30, 1e400, "7", [1]])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_count_of_tokens_that_cannot_be_makes_an_answer_unusable(
    count: Any, stream: bool
) -> None:
    answer = completion(content="text")
    answer["usage"] = {"prompt_tokens": 1, "completion_tokens": count}
    body = streamed(answer) if stream else json.dumps(answer).encode()
    with pytest.raises(Unusable, match=r"no count of tokens|no chat completion"):
        whole_answer(body, streamed=stream)
    passing = Passing(usage_hidden=False)
    passing.feed(streamed(answer))
    assert passing.usage is None, "it is not billed by either"


def test_a_count_of_tokens_may_be_left_out_or_as_large_as_any_can_be() -> None:
    answer = completion(content="text")
    for usage in (None, {}, {"total_tokens": 1 << 40}, {"prompt_tokens": None, "more": {}}):
        answer["usage"] = usage
        assert json.loads(whole_answer(json.dumps(answer).encode(), streamed=False)) == answer


def test_a_whole_body_is_kept_as_it_came_on_one_line() -> None:
    body = b'{\n "choices": [ {"message": {"content": "a\\nb", "x": 1.0e5}} ]\n}'
    kept = whole_answer(body, streamed=False)
    assert b"\n" not in kept
    assert b"1.0e5" in kept
    assert json.loads(kept) == json.loads(body)


# On the way


@st.composite
def cuts(draw: st.DrawFn) -> tuple[bytes, list[int]]:
    end = draw(st.sampled_from(["\n\n", "\r\n\r\n"]))
    stream = streamed(completion(content="Some text, cut anywhere."), end=end)
    return stream, sorted(draw(st.lists(st.integers(0, len(stream)), max_size=8)))


@given(cuts())
def test_wherever_a_stream_is_cut_the_client_gets_it_whole_but_for_the_usage(
    cut: tuple[bytes, list[int]],
) -> None:
    stream, places = cut
    passing = Passing(usage_hidden=True)
    passed = b""
    for start, stop in zip([0, *places], [*places, len(stream)], strict=True):
        passed += passing.feed(stream[start:stop])
    passed += passing.end()
    assert passing.done
    assert passing.usage is not None
    assert (passing.usage.prompt_tokens, passing.usage.completion_tokens) == (7, 5)
    expected = [data for data in data_of(stream) if b'"prompt_tokens"' not in data]
    assert list(data_of(passed)) == expected


def test_an_event_without_an_end_is_searched_once() -> None:
    """Each byte is looked at a few times, however small the pieces are that it comes in."""
    seen = 0

    class Counted(bytes):
        """What is made of it by adding or joining is counted."""

        def __add__(self, other: bytes) -> bytes:
            nonlocal seen
            seen += len(self) + len(other)
            return bytes(self) + other

        def __radd__(self, other: bytes) -> bytes:
            nonlocal seen
            seen += len(self) + len(other)
            return other + bytes(self)

    passing = Passing(usage_hidden=True)
    piece = Counted(b"x" * 100)
    for _ in range(2000):
        assert passing.feed(piece) == b""
    assert seen < 10 * 2000 * len(piece)
    assert passing.unfinished >= 2000 * len(piece)
    assert passing.feed(b"\n\n") == bytes(piece) * 2000 + b"\n\n"
    assert passing.unfinished == 0


def test_a_client_that_asked_for_the_usage_gets_it() -> None:
    stream = streamed(completion(content="text"))
    passing = Passing(usage_hidden=False)
    assert passing.feed(stream) + passing.end() == stream
    assert passing.usage is not None


def test_a_text_that_looks_like_usage_or_the_end_is_passed_on() -> None:
    text = 'they sent "usage": {"prompt_tokens": 1} and data: [DONE]'
    stream = sse([{"choices": [{"index": 0, "delta": {"content": text}}]}], done=False)
    passing = Passing(usage_hidden=True)
    assert passing.feed(stream) + passing.end() == stream
    assert passing.usage is None
    assert not passing.done


def test_usage_beside_a_choice_is_noted_and_passed_on() -> None:
    chunk = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": USAGE}
    stream = sse([chunk])
    passing = Passing(usage_hidden=True)
    assert passing.feed(stream) == stream
    assert passing.usage is not None


def test_an_end_without_an_empty_line_counts() -> None:
    passing = Passing(usage_hidden=False)
    assert passing.feed(b"data: {}\n\ndata: [DONE]") == b"data: {}\n\n"
    assert passing.end() == b"data: [DONE]"
    assert passing.done
