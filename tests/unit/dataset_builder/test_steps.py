"""Each step over answers that are honest, odd, or made to break it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from services.dataset_builder import reasons
from services.dataset_builder.records import HeldoutIndex
from services.dataset_builder.steps.clean import answer_sha256
from stillhouse.contracts.chat import ChatTokenizer
from stillhouse.contracts.responses import Rejection
from tests.support.steps import honest, make_recipe, outcome, question, reason_of, row_of, spoken
from tests.support.tiny_tokenizer import END_ID, tiny_chat_tokenizer

EIGHT_WORDS = "One two three four five six seven eight."
SEVEN_WORDS = "One two three four five six seven."


def broken(change: Callable[[dict[str, Any]], object]) -> str:
    return reason_of(outcome(honest(change)))


# Parse


def test_an_honest_answer_becomes_a_row_with_its_signal() -> None:
    row = row_of(outcome(honest()))
    assert (row.signal, row.signal_reason) == ("topk", None)
    assert row.stored is not None
    assert list(row.prompt_ids) == tiny_chat_tokenizer().encode_prompt(question().messages)
    assert row.text == tiny_chat_tokenizer().decode([i for i in row.answer_ids if i != END_ID])


@pytest.mark.parametrize(
    "body",
    [
        "",
        " ",
        "<html>upstream went away</html>",
        honest()[:200],
        honest() + "}",
        '{"choices": [{"message": {"content": ' + "[" * 100_000,
        '{"choices": [NaN]}',
        '{"choices": [{"message": {"content": "\\ud800"}, "finish_reason": "stop"}]}',
        "\x00",
    ],
    ids=lambda body: f"{body[:20]!r}...{len(body)}",
)
def test_a_body_that_is_no_json_is_malformed(body: str) -> None:
    assert reason_of(outcome(body)) == reasons.MALFORMED_JSON


@pytest.mark.parametrize(
    "body",
    [
        "null",
        "[]",
        "[" * 100_000,
        '"choices"',
        "{}",
        '{"output": "hello"}',
        '{"choices": null}',
        '{"choices": {}}',
        '{"choices": ["hello"]}',
        '{"choices": [{"text": "a legacy completion"}]}',
        '{"choices": [{"message": null}]}',
        '{"choices": [{"message": {"content": ["parts"]}}]}',
        '{"choices": [{"message": {"content": 1}}]}',
        '{"choices": [{"message": {"content": "a"}, "finish_reason": 0}]}',
        '{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": "9"}}',
        '{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": 9.5}}',
    ],
    ids=lambda body: f"{body[:60]}...{len(body)}",
)
def test_json_of_another_shape_is_named_as_such(body: str) -> None:
    assert reason_of(outcome(body)) == reasons.WRONG_SCHEMA


def test_an_error_with_status_200_is_named_as_such() -> None:
    body = json.dumps({"error": {"message": "overloaded", "code": 503}})
    assert reason_of(outcome(body)) == reasons.ERROR_BODY


def test_no_choices_is_a_reason_of_its_own() -> None:
    assert broken(lambda body: body.update(choices=[])) == reasons.NO_CHOICES


def test_fields_that_nobody_knows_are_ignored() -> None:
    def add(body: dict[str, Any]) -> None:
        body["timings"] = {"deep": [{"er": None}]}
        body["choices"][0]["message"]["tool_calls"] = None
        body["choices"].append({"message": {"content": "a second choice"}})

    assert row_of(outcome(honest(add))).text == row_of(outcome(honest())).text


def test_minus_infinity_of_a_careless_server_is_the_tails() -> None:
    def change(body: dict[str, Any]) -> None:
        body["choices"][0]["logprobs"]["content"][0]["top_logprobs"][-1]["logprob"] = -9e9

    careless = honest(change).replace("-9000000000.0", "-Infinity")
    assert "-Infinity" in careless
    assert row_of(outcome(careless)).stored == row_of(outcome(honest(change))).stored


# Clean and filter


@pytest.mark.parametrize("damage", ["\x00", "\x1b[31m", "\x7f", "\x85", "a\ufffdb", "end\ufffd"])
def test_damaged_text_is_rejected_not_repaired(damage: str) -> None:
    found = outcome(spoken(f"Hello {damage}"), make_recipe(kind="text"))
    assert reason_of(found) == reasons.BROKEN_TEXT
    assert "Hello" not in found.detail


def test_line_feeds_and_tabs_are_text() -> None:
    row = row_of(outcome(spoken("a\n\tb\r\n"), make_recipe(kind="text")))
    assert row.text == "a\n\tb\r\n"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (spoken("Hello.", "content_filter"), reasons.CONTENT_FILTER),
        (spoken("Hello.", "tool_calls"), reasons.UNEXPECTED_FINISH),
        (spoken("Hello.", ""), reasons.UNEXPECTED_FINISH),
        (spoken("Hello.", "\x1b[2J"), reasons.UNEXPECTED_FINISH),
        (spoken("", refusal="I cannot help with that."), reasons.REFUSED),
        (spoken(""), reasons.EMPTY_ANSWER),
        (spoken(" \n\t "), reasons.EMPTY_ANSWER),
        (spoken("Hi."), reasons.TOO_SHORT),
        (spoken("Hello, I was cu", "length"), reasons.CUT),
    ],
)
def test_answers_that_should_not_be_learnt_from_are_counted(body: str, reason: str) -> None:
    recipe = make_recipe(kind="text", min_characters=4, drop_cut=True)
    assert reason_of(outcome(body, recipe)) == reason


def test_null_content_is_an_empty_answer() -> None:
    assert broken(lambda b: b["choices"][0]["message"].update(content=None)) == reasons.EMPTY_ANSWER


def test_cut_answers_are_kept_unless_the_spec_drops_them() -> None:
    body = honest(max_tokens=5)
    assert row_of(outcome(body)).finish_reason == "length"
    assert reason_of(outcome(body, make_recipe(drop_cut=True))) == reasons.CUT


# Held-out


def heldout(prompt: str = "", answer: str = "") -> HeldoutIndex:
    prompts = {question(prompt).prompt_sha256} if prompt else set()
    return HeldoutIndex(frozenset(prompts), frozenset({answer_sha256(answer)} if answer else ()))


def test_a_train_prompt_that_is_held_out_is_dropped_however_it_is_written() -> None:
    recipe = make_recipe(heldout=heldout(prompt="  say SOMETHING\nshort. "))
    assert reason_of(outcome(honest(), recipe)) == reasons.HELDOUT_PROMPT


def test_a_long_answer_that_is_held_out_is_dropped_however_it_is_written() -> None:
    recipe = make_recipe(kind="text", heldout=heldout(answer=EIGHT_WORDS.upper() + "\n"))
    assert reason_of(outcome(spoken(EIGHT_WORDS), recipe)) == reasons.HELDOUT_ANSWER


def test_a_short_answer_may_be_shared_with_a_held_out_one() -> None:
    recipe = make_recipe(kind="text", heldout=heldout(answer=SEVEN_WORDS))
    assert row_of(outcome(spoken(SEVEN_WORDS), recipe)).text == SEVEN_WORDS


def test_held_out_batches_are_not_compared_with_themselves() -> None:
    assert row_of(outcome(spoken(EIGHT_WORDS), make_recipe(kind="text"))).text == EIGHT_WORDS


# Render and length


def test_a_prompt_that_the_teacher_counted_otherwise_is_rejected() -> None:
    found = outcome(honest(lambda body: body["usage"].update(prompt_tokens=3)))
    assert reason_of(found) == reasons.PROMPT_TOKENS_DIFFER
    assert "3" in found.detail


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None}])
def test_a_signal_without_a_counted_prompt_is_rejected(usage: object) -> None:
    assert broken(lambda body: body.update(usage=usage)) == reasons.USAGE_MISSING


def test_text_may_come_from_a_teacher_with_another_tokenizer() -> None:
    row = row_of(outcome(spoken("Hello.", usage=3), make_recipe(kind="text")))
    assert (row.signal, row.signal_reason) == ("text", None)


def test_a_template_that_refuses_a_conversation_rejects_its_item() -> None:
    template = "{{ raise_exception('no roles') }}"
    chat = ChatTokenizer(**tiny_chat_tokenizer().model_dump() | {"chat_template": template})
    found = outcome(honest(), make_recipe(chat=chat))
    assert reason_of(found) == reasons.TEMPLATE_REFUSED


def test_rows_that_are_too_long_are_rejected_not_cut() -> None:
    tokens = len(row_of(outcome(honest())).input_ids)
    assert row_of(outcome(honest(), make_recipe(max_tokens=tokens)))
    found = outcome(honest(), make_recipe(max_tokens=tokens - 1))
    assert reason_of(found) == reasons.TOO_LONG


def test_details_quote_neither_prompt_nor_answer() -> None:
    secret = "hunter2"
    bodies = [spoken(secret, "tool_calls"), spoken(secret + "\x00"), spoken(secret, usage=1)]
    for body in [*bodies, json.dumps({"choices": [{"message": secret}]}), '{"a": "' + secret]:
        found = outcome(body)
        assert isinstance(found, Rejection)
        assert secret not in found.detail
