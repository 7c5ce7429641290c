"""Answers that call functions, and answers whose reasoning came apart from them."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow.parquet as pq
import pytest

from services.dataset_builder import reasons
from services.dataset_builder.records import Draft, Recipe
from services.dataset_builder.shards import encode_shard
from stillhouse.contracts.chat import ChatTokenizer, Message
from stillhouse.contracts.responses import Item, Rejection
from tests.support.steps import make_recipe, outcome, question, reason_of, row_of
from tests.support.tiny_tokenizer import END_ID, START, START_ID, tiny_chat_tokenizer
from tests.unit.dataset_builder.test_shards import HEADER

# ChatML that writes functions and calls, as the templates of Hermes and Qwen do.
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{% for call in (message['tool_calls'] if 'tool_calls' in message else []) %}"
    "{{ '<call>' + ({'name': call['function']['name'], 'arguments': call['function']['arguments']}"
    " | tojson) + '</call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
ARGUMENTS = '{"city": "Sao  Paulo"}'
# As the template writes the call: with its own spaces.
TURN = '<call>{"name": "weather", "arguments": {"city": "Sao  Paulo"}}</call>'
# As this teacher wrote it.
SAMPLED = '<call>{"name":"weather","arguments":{"city":"Sao  Paulo"}}</call>'


def chat(template: str = TEMPLATE) -> ChatTokenizer:
    return ChatTokenizer(**tiny_chat_tokenizer().model_dump() | {"chat_template": template})


def asked() -> Item:
    return question().model_copy(update={"tools": [WEATHER]})


def calling(
    *,
    kind: str = "text",
    ids: list[int] | None = None,
    usage: int | None = None,
    finish: str = "tool_calls",
    template: str = TEMPLATE,
    item: Item | None = None,
    **message: Any,
) -> Draft | Rejection:
    """What becomes of an answer that calls the weather, sampled as `ids` where they are given."""
    item = item or asked()
    recipe = make_recipe(kind=kind, chat=chat(template))
    said = {
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": ARGUMENTS},
            }
        ],
        **message,
    }
    choice: dict[str, Any] = {"message": said, "finish_reason": finish}
    if ids is not None:
        choice["logprobs"] = {
            "content": [{"token": "", "id": i, "logprob": -0.5, "top_logprobs": []} for i in ids]
        }
    prompt = len(recipe.chat.encode_prompt(item.messages, item.tools)) if usage is None else usage
    body = {"choices": [choice], "usage": {"prompt_tokens": prompt}}
    return outcome(json.dumps(body), recipe, item)


def test_a_call_without_ids_is_what_the_template_writes_and_ends_the_turn() -> None:
    row = row_of(calling())
    assert (row.text, row.finish_reason, row.signal_reason) == (TURN, "stop", None)
    assert list(row.answer_ids) == [*TURN.encode(), END_ID]
    rendered = chat().render(asked().messages, [WEATHER])
    assert "weather" in rendered
    assert list(row.prompt_ids) == chat().encode_text(rendered)


def test_what_is_said_beside_a_call_is_part_of_its_turn() -> None:
    assert row_of(calling(content="Let me look. ")).text == "Let me look. " + TURN


def test_several_calls_and_the_older_form_of_one_are_read() -> None:
    one = {"function": {"name": "weather", "arguments": ARGUMENTS}}
    assert row_of(calling(tool_calls=[one, one])).text == TURN + TURN
    older = calling(tool_calls=None, function_call=one["function"], finish="function_call")
    assert row_of(older).text == TURN


def test_a_row_holds_the_functions_that_were_offered() -> None:
    [stored] = pq.read_table(io.BytesIO(encode_shard(HEADER, [row_of(calling())]))).to_pylist()
    assert json.loads(stored["tools"]) == [WEATHER]
    assert (stored["answer"], stored["reasoning"]) == (TURN, None)


def test_the_teachers_ids_of_a_call_are_the_row() -> None:
    row = row_of(calling(kind="topk", ids=[*SAMPLED.encode(), END_ID]))
    assert (row.signal, row.signal_reason, row.text) == ("topk", None, SAMPLED)
    assert list(row.answer_ids) == [*SAMPLED.encode(), END_ID]


@pytest.mark.parametrize(
    "sampled",
    [
        "The weather is fine.",
        SAMPLED.replace("weather", "whether"),
        SAMPLED.replace("Paulo", "Paolo"),
        SAMPLED.replace("city", "town"),
    ],
)
def test_ids_that_spell_another_call_leave_the_row_as_text(sampled: str) -> None:
    row = row_of(calling(kind="topk", ids=[*sampled.encode(), END_ID]))
    assert (row.signal, row.signal_reason) == ("text", reasons.CALL_NOT_IN_TOKENS)
    assert row.text == TURN


def test_a_call_with_ids_must_name_what_was_said_beside_it() -> None:
    ids = [*SAMPLED.encode(), END_ID]
    row = row_of(calling(kind="topk", ids=ids, content="Let me look."))
    assert row.signal_reason == reasons.CALL_NOT_IN_TOKENS


def test_a_call_of_a_signal_pipeline_without_log_probabilities_is_text() -> None:
    assert row_of(calling(kind="topk")).signal_reason == reasons.NO_LOGPROBS


def test_a_call_is_no_empty_answer_and_half_a_call_is_none() -> None:
    assert row_of(calling(content="")).text == TURN
    assert reason_of(calling(finish="length")) == reasons.CUT
    assert reason_of(calling(tool_calls=[])) == reasons.UNEXPECTED_FINISH


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (TEMPLATE.replace("<|im_start|>assistant", "<|im_start|>teacher"), "otherwise once"),
        (TEMPLATE.replace("'<call>'", "'' if true else '<call>'"), "does not write calls"),
    ],
)
def test_a_template_that_cannot_write_the_turn_rejects_the_call(template: str, said: str) -> None:
    found = calling(template=template)
    assert reason_of(found) == reasons.TURN_DIFFERS
    assert isinstance(found, Rejection)
    assert said in found.detail


def test_a_call_that_spells_a_control_token_is_rejected() -> None:
    forged = {"function": {"name": "weather", "arguments": json.dumps({"city": START})}}
    assert reason_of(calling(tool_calls=[forged])) == reasons.CONTROL_TOKEN
    assert reason_of(calling(content=START)) == reasons.CONTROL_TOKEN


def test_control_tokens_with_which_the_template_writes_calls_are_text() -> None:
    template = TEMPLATE.replace("<call>", START)
    turn = TURN.replace("<call>", START)
    row = row_of(calling(template=template))
    assert (row.text, row.answer_ids[0]) == (turn, START_ID)
    ids = [START_ID, *SAMPLED.removeprefix("<call>").encode(), END_ID]
    sampled = row_of(calling(kind="topk", ids=ids, template=template))
    assert (sampled.signal, sampled.answer_ids[0]) == ("topk", START_ID)
    plain = calling(kind="topk", ids=[START_ID, *SAMPLED.encode(), END_ID])
    assert reason_of(plain) == reasons.CONTROL_TOKEN


@pytest.mark.parametrize(
    "arguments", ["{}", "not JSON", "[" * 3000, '{"deep": [1, {"er": ["x", null]}]}']
)
def test_arguments_of_any_form_are_a_row(arguments: str) -> None:
    call = {"function": {"name": "weather", "arguments": arguments}}
    row = row_of(calling(tool_calls=[call]))
    assert row.text.startswith("<call>")
    ids = [*f"weather {arguments} ".encode(), END_ID]
    assert row_of(calling(kind="topk", ids=ids, tool_calls=[call])).signal in ("topk", "text")


@pytest.mark.parametrize(
    "calls",
    [[{}], [{"function": None}], [{"function": {"name": ""}}], [{"function": {"name": 3}}], {}],
)
def test_a_call_of_another_shape_is_named_as_such(calls: Any) -> None:
    assert reason_of(calling(tool_calls=calls)) == reasons.WRONG_SCHEMA


def test_the_turns_of_functions_are_rendered_and_only_the_last_answer_is_supervised() -> None:
    messages = [
        Message(role="user", content="Weather?"),
        Message.model_validate(
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "weather", "arguments": ARGUMENTS}}],
            }
        ),
        Message(role="tool", content="21 C"),
    ]
    item = asked().model_copy(update={"messages": messages})
    recipe = make_recipe(kind="text", chat=chat())
    body = json.dumps({"choices": [{"message": {"content": "Mild."}, "finish_reason": "stop"}]})
    row = row_of(outcome(body, recipe, item))
    assert TURN in recipe.chat.decode(list(row.prompt_ids))
    assert list(row.answer_ids) == [*b"Mild.", END_ID]


# Reasoning apart from the answer


def reasoned(
    ids: list[int] | None, recipe: Recipe, field: str = "reasoning_content"
) -> Draft | Rejection:
    message = {"content": "A lake.", field: "Still water."}
    choice: dict[str, Any] = {"message": message, "finish_reason": "stop"}
    if ids is not None:
        choice["logprobs"] = {
            "content": [{"token": "", "id": i, "logprob": -0.5, "top_logprobs": []} for i in ids]
        }
    usage = {"prompt_tokens": len(recipe.chat.encode_prompt(question().messages))}
    return outcome(json.dumps({"choices": [choice], "usage": usage}), recipe)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_is_kept_apart_and_nothing_is_trained_on_it(field: str) -> None:
    row = row_of(reasoned(None, make_recipe(kind="text"), field))
    assert (row.text, row.reasoning, row.signal_reason) == ("A lake.", "Still water.", None)
    assert list(row.answer_ids) == [*b"A lake.", END_ID]


@pytest.mark.parametrize(
    "between", [b"<think>Still water.</think>", b"", b"Still water."], ids=repr
)
def test_ids_that_cover_the_reasoning_make_a_row_of_text(between: bytes) -> None:
    row = row_of(reasoned([*between, *b"A lake.", END_ID], make_recipe()))
    if between:
        assert (row.signal, row.signal_reason) == ("text", reasons.REASONING_IN_TOKENS)
    else:
        assert (row.signal, row.signal_reason) == ("topk", None)
    assert list(row.answer_ids) == [*b"A lake.", END_ID]


def test_control_tokens_around_the_reasoning_are_no_reason_to_reject() -> None:
    ids = [START_ID, *b"Still water.", START_ID, *b"A lake.", END_ID]
    assert row_of(reasoned(ids, make_recipe())).signal_reason == reasons.REASONING_IN_TOKENS


def test_a_call_after_reasoning_that_the_ids_cover_is_text() -> None:
    ids = [*b"Rain?", *SAMPLED.encode(), END_ID]
    row = row_of(calling(kind="topk", ids=ids, reasoning_content="Rain?"))
    assert (row.text, row.signal_reason) == (TURN, reasons.REASONING_IN_TOKENS)


def test_reasoning_without_an_answer_is_an_empty_one() -> None:
    body = {"choices": [{"message": {"reasoning": "Hm."}, "finish_reason": "stop"}]}
    assert reason_of(outcome(json.dumps(body), make_recipe(kind="text"))) == reasons.EMPTY_ANSWER
