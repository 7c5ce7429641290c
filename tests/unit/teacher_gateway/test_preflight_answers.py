"""What the first token's list tells: whether two of the same question agree, and what moved."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from services.teacher_gateway.preflight.answers import (
    disagreement,
    ended_by_itself,
    first_list,
    ids_match,
    largest_change,
    length_of,
    lists_characters,
)
from tests.support.tiny_tokenizer import END_ID, tiny_chat_tokenizer


def logs(**probabilities: float) -> dict[Any, float]:
    return {name: math.log(p) for name, p in probabilities.items()}


def test_the_same_lists_agree_and_others_part_by_their_divergence() -> None:
    base = logs(a=0.5, b=0.3)
    assert disagreement([base, dict(base), dict(base)]) == 0
    other = logs(a=0.3, b=0.5)
    expected = 0.5 * math.log(0.5 / 0.3) + 0.3 * math.log(0.3 / 0.5)
    assert disagreement([base, base, other]) == pytest.approx(expected)
    assert disagreement([base]) == 0


def test_a_token_that_the_other_list_lacks_is_part_of_the_rest() -> None:
    # Two tokens of about the same probability change places at the end of the list.
    base, other = logs(a=0.9, b=0.01), logs(a=0.9, c=0.0101)
    assert disagreement([base, other]) == pytest.approx(0, abs=1e-6)
    assert largest_change(base, other) < 0.02
    assert disagreement([logs(a=0.9, b=0.05), logs(x=0.9, y=0.05)]) > 1
    assert disagreement([logs(a=0.9), {}]) == math.inf


def test_what_temperature_and_top_p_do_is_a_large_change() -> None:
    base = logs(a=0.6, b=0.3, c=0.08)
    powered = {name: 2 * value for name, value in base.items()}
    norm = math.log(sum(math.exp(value) for value in powered.values()))
    assert largest_change(base, {name: v - norm for name, v in powered.items()}) > 0.5
    # Only the nucleus is listed, perhaps with all of the mass as before.
    assert largest_change(logs(a=0.99, b=0.005), logs(a=1.0)) == math.inf
    assert largest_change(base, {}) == math.inf
    assert largest_change(base, base) == 0


def body(listed: list[dict[str, Any]], text: str = "ab", finish: str = "stop") -> str:
    position = {"logprob": -1.0, "id": 97, "token": "a", "top_logprobs": listed}
    second = {"logprob": -1.0, "id": 98, "token": "b", "top_logprobs": listed}
    end = {"logprob": -1.0, "id": END_ID, "token": "", "top_logprobs": listed}
    content = [position, second, end] if finish == "stop" else [position, second]
    choice = {
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish,
        "logprobs": {"content": content},
    }
    return json.dumps({"choices": [choice]})


def test_a_list_is_cut_to_the_likeliest_and_without_what_has_no_mass() -> None:
    # As vLLM lists them: the sampled token first, beside the k likeliest.
    listed = [
        {"token": "rare", "bytes": [1], "logprob": -7.0},
        {"token": "a", "bytes": [2], "logprob": -0.1},
        {"token": "b", "bytes": [3], "logprob": -3.0},
        {"token": "c", "bytes": [4], "logprob": -9999.0},
    ]
    assert first_list(body(listed), 2) == {(2,): -0.1, (3,): -3.0}
    assert first_list(body(listed), 9) == {(1,): -7.0, (2,): -0.1, (3,): -3.0}
    with pytest.raises(ValueError, match="no alternatives"):
        first_list(body([]), 2)


@pytest.mark.parametrize(
    ("text", "finish", "matches"),
    [
        ("ab", "stop", True),
        ("ab", "length", True),
        (" ab\n", "stop", True),  # servers strip blanks
        ("ab!", "stop", False),
    ],
)
def test_ids_must_decode_to_the_text(text: str, finish: str, matches: bool) -> None:
    answer = body([{"id": 97, "logprob": -0.1}], text, finish)
    assert ids_match(answer, tiny_chat_tokenizer()) is matches
    assert ended_by_itself(answer) is (finish == "stop")


def test_a_character_that_is_listed_once_for_its_tokens_is_told_from_another_text() -> None:
    def spoken(text: str) -> str:
        answer = json.loads(body([], text, "length"))
        answer["choices"][0]["logprobs"]["content"] = [
            {"id": 97, "logprob": -0.1, "bytes": [97]},
            {"id": 169, "logprob": -0.1, "bytes": [195, 169]},
        ]
        return json.dumps(answer)

    once = spoken("a\u00e9")
    assert (ids_match(once, tiny_chat_tokenizer()), lists_characters(once)) == (False, True)
    other = spoken("a\u00e8")
    assert (ids_match(other, tiny_chat_tokenizer()), lists_characters(other)) == (False, False)
    assert length_of(once, tiny_chat_tokenizer()) == 3


def test_an_answer_without_ids_or_beside_reasoning_is_not_judged() -> None:
    answer = json.loads(body([{"id": 97, "logprob": -0.1}]))
    answer["choices"][0]["message"]["reasoning"] = "hm"
    assert ids_match(json.dumps(answer), tiny_chat_tokenizer()) is None
    answer = json.loads(body([{"id": 97, "logprob": -0.1}]))
    for position in answer["choices"][0]["logprobs"]["content"]:
        del position["id"]
    assert ids_match(json.dumps(answer), tiny_chat_tokenizer()) is None
