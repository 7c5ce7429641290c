"""Rows train on the teacher's ids with the teacher's outcomes, or say why they do not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from services.dataset_builder import reasons
from services.dataset_builder.records import Draft
from services.dataset_builder.vocabulary import Vocabulary
from stillhouse.contracts import signals
from stillhouse.contracts.chat import ChatTokenizer
from stillhouse.contracts.signals import TopK
from stillhouse.contracts.spec import Signal
from tests.support.smollm2 import smollm2_chat_tokenizer
from tests.support.steps import K, honest, make_recipe, outcome, question, reason_of, row_of, spoken
from tests.support.tiny_tokenizer import CHATML, END, END_ID, START_ID, tiny_chat_tokenizer

DATA = Path(__file__).parent / "data"
REAL = json.loads((DATA / "real_answers.json").read_text())


def signal_of(row: Draft) -> TopK:
    assert row.stored is not None
    return signals.decode(row.stored)


def entries(body: dict[str, Any]) -> list[dict[str, Any]]:
    return list(body["choices"][0]["logprobs"]["content"])


def without_ids(body: dict[str, Any]) -> None:
    for position in entries(body):
        for found in (position, *position["top_logprobs"]):
            del found["id"]


def parsed(body: str) -> list[dict[str, Any]]:
    return entries(json.loads(body))


# With the teacher's ids


def test_stop_supervises_the_end_of_turn_and_length_does_not() -> None:
    stopped, cut = row_of(outcome(honest(max_tokens=64))), row_of(outcome(honest(max_tokens=5)))
    assert (stopped.finish_reason, stopped.answer_ids[-1]) == ("stop", END_ID)
    assert (cut.finish_reason, len(cut.answer_ids)) == ("length", 5)
    assert END_ID not in cut.answer_ids


def test_there_is_one_position_of_the_signal_for_each_supervised_id() -> None:
    for most in (5, 64):
        row = row_of(outcome(honest(max_tokens=most)))
        assert signal_of(row).positions == len(row.answer_ids)
        assert signal_of(row).slots == K + 1


def test_outcomes_are_the_k_likeliest_and_the_sampled_token() -> None:
    body = honest(k=3, max_tokens=64)
    row, seen_outside = row_of(outcome(body, make_recipe(k=3))), 0
    signal = signal_of(row)
    for t, (entry, sampled) in enumerate(zip(parsed(body), row.answer_ids, strict=True)):
        listed = {each["id"]: each["logprob"] for each in entry["top_logprobs"]}
        expected = {**listed, sampled: entry["logprob"]}
        seen_outside += sampled not in listed
        present = np.isfinite(signal.logp[t])
        assert set(signal.ids[t][present]) == set(expected)
        for i, logp in zip(signal.ids[t][present], signal.logp[t][present], strict=True):
            assert logp == pytest.approx(expected[int(i)], abs=0.05)
        tail = 1 - sum(map(math.exp, expected.values()))
        assert math.exp(signal.tail[t]) == pytest.approx(tail, abs=0.01)
    assert seen_outside, "no sampled token was outside the list: the test saw nothing"


def test_more_alternatives_than_asked_for_go_to_the_tail() -> None:
    few = row_of(outcome(honest(k=20), make_recipe(k=2)))
    assert signal_of(few).slots == 3
    assert (np.isfinite(signal_of(few).logp).sum(axis=1) <= 3).all()


def test_an_end_that_the_teacher_scored_keeps_its_distribution() -> None:
    row = row_of(outcome(honest(max_tokens=64)))
    signal = signal_of(row)
    assert np.isfinite(signal.logp[-1]).sum() > 1
    assert END_ID in signal.ids[-1]


def test_an_end_that_the_teacher_did_not_score_is_certain() -> None:
    body = honest(
        lambda b: entries(b) and b["choices"][0]["logprobs"]["content"].pop(), max_tokens=64
    )
    row = row_of(outcome(body))
    signal = signal_of(row)
    assert row.answer_ids[-1] == signal.ids[-1, 0] == END_ID
    assert math.exp(signal.logp[-1, 0]) == pytest.approx(1, abs=1e-6)
    assert np.isfinite(signal.logp[-1]).sum() == 1


def test_another_end_token_of_the_model_teaches_the_one_of_the_template() -> None:
    def change(body: dict[str, Any]) -> None:
        entries(body)[-1]["id"] = START_ID

    row = row_of(outcome(honest(change, max_tokens=64)))
    assert row.answer_ids[-1] == END_ID
    assert START_ID in signal_of(row).ids[-1]


def test_a_control_token_inside_an_answer_rejects_it() -> None:
    def change(body: dict[str, Any]) -> None:
        hidden = {"id": START_ID, "token": "", "bytes": [], "logprob": -3.0, "top_logprobs": []}
        body["choices"][0]["logprobs"]["content"].insert(2, hidden)

    assert reason_of(outcome(honest(change))) == reasons.CONTROL_TOKEN


def test_ids_that_do_not_decode_to_the_text_reject_the_answer() -> None:
    def other(body: dict[str, Any]) -> None:
        body["choices"][0]["message"]["content"] += "!"

    assert reason_of(outcome(honest(other))) == reasons.IDS_DIFFER_FROM_TEXT


@pytest.mark.parametrize("i", [-1, 258, 2**31, 2**40])
def test_a_sampled_id_outside_the_vocabulary_rejects_the_answer(i: int) -> None:
    found = outcome(honest(lambda body: entries(body)[0].update(id=i)))
    assert reason_of(found) == reasons.IDS_DIFFER_FROM_TEXT


def test_an_alternative_outside_the_vocabulary_goes_to_the_tail() -> None:
    # Models pad their vocabulary beyond the tokenizer's.
    def change(body: dict[str, Any]) -> None:
        for alternative in entries(body)[0]["top_logprobs"]:
            alternative["id"] += 1000

    signal = signal_of(row_of(outcome(honest(change))))
    assert np.isfinite(signal.logp[0]).sum() == 1


def test_repeated_ids_are_one_outcome() -> None:
    def change(body: dict[str, Any]) -> None:
        top = entries(body)[0]["top_logprobs"]
        top[1] = {**top[0], "logprob": top[1]["logprob"]}

    ids = signal_of(row_of(outcome(honest(change)))).ids[0]
    logp = signal_of(row_of(outcome(honest(change)))).logp[0]
    present = list(ids[np.isfinite(logp)])
    assert len(present) == len(set(present))


def test_blanks_that_a_server_strips_do_not_part_text_from_ids() -> None:
    def strip(body: dict[str, Any]) -> None:
        first = entries(body)[0]
        space = {"id": 32, "token": " ", "bytes": [32], "logprob": -1.0, "top_logprobs": []}
        body["choices"][0]["logprobs"]["content"].insert(0, space | {"top_logprobs": [space]})
        assert first

    row = row_of(outcome(honest(strip)))
    assert row.text.startswith(" ")
    assert row.text == tiny_chat_tokenizer().decode(list(row.answer_ids)).removesuffix(END)


def test_a_cut_inside_a_character_keeps_the_ids_of_its_bytes() -> None:
    def cut(body: dict[str, Any]) -> None:
        half = {"id": 0xC3, "token": "\ufffd", "bytes": [0xC3], "logprob": -2.0}
        entries_ = body["choices"][0]["logprobs"]["content"]
        entries_[-1] = half | {"top_logprobs": [half]}
        body["choices"][0]["message"]["content"] = body["choices"][0]["message"]["content"][:-1]

    row = row_of(outcome(honest(cut, max_tokens=5)))
    assert row.answer_ids[-1] == 0xC3
    assert "\ufffd" not in row.text


def merged(body: dict[str, Any]) -> None:
    """As llama.cpp lists a character of several tokens: once, with the last token's id."""
    whole = {"id": 0xA9, "token": "\u00e9", "bytes": [0xC3, 0xA9], "logprob": -2.0}
    body["choices"][0]["logprobs"]["content"].insert(1, whole | {"top_logprobs": [whole]})
    text = body["choices"][0]["message"]["content"]
    body["choices"][0]["message"]["content"] = f"{text[0]}\u00e9{text[1:]}"
    body["usage"]["completion_tokens"] += 2


@pytest.mark.parametrize("change", [merged, lambda body: (merged(body), without_ids(body))])
def test_tokens_that_the_server_does_not_list_leave_text(change: Any) -> None:
    true, row = row_of(outcome(honest())), row_of(outcome(honest(change)))
    assert row.signal == "text"
    assert row.signal_reason in (
        reasons.SAMPLED_TOKENS_MISSING,
        reasons.SAMPLED_TOKEN_UNMAPPED,
    )
    assert list(row.answer_ids) == [true.answer_ids[0], 0xC3, 0xA9, *true.answer_ids[1:]]


def test_without_ids_the_count_tells_of_tokens_that_are_not_listed() -> None:
    def change(body: dict[str, Any]) -> None:
        without_ids(body)
        body["usage"]["completion_tokens"] += 1

    row = row_of(outcome(honest(change)))
    assert (row.signal, row.signal_reason) == ("text", reasons.SAMPLED_TOKENS_MISSING)


def test_ids_of_another_vocabulary_are_no_missing_tokens() -> None:
    def change(body: dict[str, Any]) -> None:
        for position in entries(body)[:-1]:
            position["id"] = (position["id"] + 1) % 256

    assert reason_of(outcome(honest(change))) == reasons.IDS_DIFFER_FROM_TEXT


# Signals that cannot be used leave text, with the reason


def test_an_answer_without_log_probabilities_is_text() -> None:
    for logprobs in (None, {}, {"content": None}, {"content": []}):
        body = honest(lambda b, given=logprobs: b["choices"][0].update(logprobs=given))
        row = row_of(outcome(body))
        assert (row.signal, row.signal_reason) == ("text", reasons.NO_LOGPROBS)
        assert row.stored is None
        assert tiny_chat_tokenizer().decode(list(row.answer_ids)).removesuffix(END) == row.text


@pytest.mark.parametrize(
    "logprobs",
    [
        [],
        "none",
        {"content": "none"},
        {"content": [{"token": "a"}]},
        {"content": [{"token": "a", "logprob": "-1"}]},
        {"content": [{"token": "a", "logprob": None}]},
        {"content": [{"token": "a", "logprob": -1, "id": "97"}]},
        {"content": [{"token": "a", "logprob": -1, "bytes": [256]}]},
        {"content": [{"token": "a", "logprob": -1, "id": 97, "top_logprobs": {"a": -1}}]},
        {"content": {"tokens": ["a"], "token_logprobs": [-1]}},
    ],
)
def test_log_probabilities_of_another_shape_leave_text(logprobs: object) -> None:
    row = row_of(outcome(honest(lambda body: body["choices"][0].update(logprobs=logprobs))))
    assert (row.signal, row.signal_reason) == ("text", reasons.LOGPROBS_MALFORMED)


def inflate(body: dict[str, Any]) -> None:
    for position in entries(body):
        for found in (position, *position["top_logprobs"]):
            found["logprob"] = min(0.0, found["logprob"] + 1)


def positive(body: dict[str, Any]) -> None:
    entries(body)[0]["top_logprobs"][0]["logprob"] = 0.5


def linear(body: dict[str, Any]) -> None:
    for position in entries(body):
        for found in (position, *position["top_logprobs"]):
            found["logprob"] = math.exp(found["logprob"])


def contradicting(body: dict[str, Any]) -> None:
    for position in entries(body):
        position["logprob"] /= 2


def sentinels(body: dict[str, Any]) -> None:
    position = entries(body)[0]
    for found in (position, *position["top_logprobs"]):
        found["logprob"] = -9999.0


@pytest.mark.parametrize("lie", [inflate, positive, linear, contradicting, sentinels])
def test_what_is_no_raw_distribution_leaves_text_with_the_teachers_ids(lie: Any) -> None:
    row, true = row_of(outcome(honest(lie))), row_of(outcome(honest()))
    assert (row.signal, row.signal_reason) == ("text", reasons.LOGPROBS_NOT_RAW)
    assert row.answer_ids == true.answer_ids


# Without ids


def test_without_ids_bytes_say_the_same() -> None:
    for most in (5, 64):
        with_ids = row_of(outcome(honest(max_tokens=most)))
        by_bytes = row_of(outcome(honest(without_ids, max_tokens=most)))
        assert by_bytes.answer_ids == with_ids.answer_ids
        assert by_bytes.signal == "topk"
        # Alternatives that are control tokens have no bytes: those are the tail's.
        theirs, ours = signal_of(with_ids), signal_of(by_bytes)
        for t in range(ours.positions):
            found = {int(i) for i in ours.ids[t][np.isfinite(ours.logp[t])]}
            expected = {int(i) for i in theirs.ids[t][np.isfinite(theirs.logp[t])]}
            assert found | {END_ID} == expected | {END_ID}


def test_names_of_control_tokens_are_understood() -> None:
    def change(body: dict[str, Any]) -> None:
        without_ids(body)
        for position in entries(body):
            for found in (position, *position["top_logprobs"]):
                if not found["bytes"]:
                    found.update(token=END, bytes=list(END.encode()))

    ours = row_of(outcome(honest(change, max_tokens=64)))
    assert ours.stored == row_of(outcome(honest(max_tokens=64))).stored


def test_an_alternative_without_an_id_goes_to_the_tail() -> None:
    def change(body: dict[str, Any]) -> None:
        without_ids(body)
        position = entries(body)[0]
        for found in position["top_logprobs"]:
            if found["token"] != position["token"]:
                found.update(token="no such token", bytes=list(b"no such token"))

    row = row_of(outcome(honest(change)))
    assert row.signal == "topk"
    assert np.isfinite(signal_of(row).logp[0]).sum() == 1


def test_a_sampled_token_without_an_id_leaves_text_with_the_reason() -> None:
    def change(body: dict[str, Any]) -> None:
        without_ids(body)
        entries(body)[1].update(token="two", bytes=list(b"two"))

    row = row_of(outcome(honest(change)))
    assert (row.signal, row.signal_reason) == ("text", reasons.SAMPLED_TOKEN_UNMAPPED)


def test_sentence_pieces_without_ids_leave_text_with_the_reason() -> None:
    vocabulary = {"<unk>": 0, END: 1, **{chr(i): i for i in range(32, 127)}, "\u2581": 200}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens([END])
    chat = ChatTokenizer(tokenizer_json=tokenizer.to_str(), chat_template=CHATML, eos_token=END)
    assert Vocabulary(chat).by_bytes is None

    def change(body: dict[str, Any]) -> None:
        without_ids(body)
        body["usage"]["prompt_tokens"] = len(chat.encode_prompt(question().messages))

    row = row_of(outcome(honest(change), make_recipe(chat=chat)))
    assert (row.signal, row.signal_reason) == ("text", reasons.TOKENIZER_WITHOUT_BYTES)


def test_text_that_spells_a_control_token_is_rejected() -> None:
    found = outcome(spoken(f"Write {END} to end."), make_recipe(kind="text"))
    assert reason_of(found) == reasons.CONTROL_TOKEN


# The demo's teacher


@pytest.mark.parametrize(
    "given", REAL, ids=lambda given: given["body"]["choices"][0]["finish_reason"]
)
@pytest.mark.parametrize("ids", [True, False], ids=["ids", "bytes"])
def test_a_real_answer_becomes_a_row_of_the_teachers_own_tokens(given: Any, ids: bool) -> None:
    chat, body = smollm2_chat_tokenizer(), json.loads(json.dumps(given["body"]))
    choice = body["choices"][0]
    sampled = [entry["id"] for entry in choice["logprobs"]["content"]]
    if not ids:
        without_ids(body)
    row = row_of(outcome(json.dumps(body), make_recipe(chat=chat, k=20), question(given["prompt"])))
    assert row.signal == "topk"
    assert len(row.prompt_ids) == body["usage"]["prompt_tokens"]
    assert list(row.answer_ids) == sampled
    assert row.text == choice["message"]["content"]
    assert (row.answer_ids[-1] == chat.eos_id) == (choice["finish_reason"] == "stop")
    signal = signal_of(row)
    for t, entry in enumerate(given["body"]["choices"][0]["logprobs"]["content"]):
        at = list(signal.ids[t]).index(entry["id"])
        assert signal.logp[t, at] == pytest.approx(entry["logprob"], abs=0.05)


def test_a_real_answer_with_an_emoji_is_text_since_its_first_tokens_are_not_listed() -> None:
    given = json.loads((DATA / "real_merged.json").read_text())
    chat, choice = smollm2_chat_tokenizer(), given["body"]["choices"][0]
    recipe = make_recipe(chat=chat, k=20)
    row = row_of(outcome(json.dumps(given["body"]), recipe, question(given["prompt"])))
    assert (row.signal, row.signal_reason) == ("text", reasons.SAMPLED_TOKENS_MISSING)
    assert row.text == choice["message"]["content"]
    assert len(row.answer_ids) == given["body"]["usage"]["completion_tokens"]
    assert row.answer_ids[-1] == chat.eos_id


# Ids drawn from the whole distribution


def counted(
    change: Callable[[dict[str, Any]], object] = lambda body: None, draws: int = 50, **how: Any
) -> Draft:
    """A row of an answer of local weights: the sampled token came in most of the draws."""

    def count(body: dict[str, Any]) -> None:
        for n, position in enumerate(entries(body)):
            del position["top_logprobs"]
            position["counts"] = {str(position["id"]): draws - 3, "65": 1, str(66 + n % 5): 2}
            if len(position["counts"]) < 3:
                position["counts"] = {str(position["id"]): draws}
        change(body)

    return row_of(outcome(honest(count, **how), make_recipe(kind="counts")))


def test_counts_of_local_weights_are_kept_as_they_were_drawn() -> None:
    row = counted(max_tokens=64)
    assert (row.signal, row.signal_reason, row.answer_ids[-1]) == ("counts", None, END_ID)
    assert row.stored is not None
    assert row.stored.drawn
    signal = signal_of(row)
    assert signal.positions == len(row.answer_ids)
    for t, sampled in enumerate(row.answer_ids):
        present = np.isfinite(signal.logp[t])
        assert signal.ids[t, 0] == sampled
        assert np.exp(signal.logp[t][present]).sum() == pytest.approx(1)


def test_an_end_that_was_not_drawn_is_certain() -> None:
    row = counted(lambda body: entries(body) and body["choices"][0]["logprobs"]["content"].pop())
    assert row.answer_ids[-1] == END_ID
    assert (row.signal, signal_of(row).logp[-1, 0]) == ("counts", 0.0)


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        (None, "no_counts"),
        ({}, "no_counts"),
        ({"65": 49}, "counts_malformed"),
        ({"65": 51}, "counts_malformed"),
        ({"65": 51, "66": -1}, "counts_malformed"),
        ({"65": 50, "66": 0}, "counts_malformed"),
        ({"999999": 50}, "counts_malformed"),
        ({"-1": 50}, "counts_malformed"),
        ({"x": 50}, "logprobs_malformed"),
        ({"65": 1.5}, "logprobs_malformed"),
    ],
)
def test_counts_that_are_not_what_was_asked_for_make_a_row_of_text(
    counts: object, reason: str
) -> None:
    row = counted(lambda body: entries(body)[0].update(counts=counts))
    assert (row.signal, row.signal_reason) == ("text", reason)
    assert reason in reasons.TEXT_ROWS


def test_most_draws_fit() -> None:
    recipe = replace(make_recipe(), signal=Signal(kind="counts", draws=255))

    def count(body: dict[str, Any]) -> None:
        for position in entries(body):
            position["counts"] = {str(position["id"]): 255}

    assert row_of(outcome(honest(count), recipe)).signal == "counts"


# Text given along, without what a teacher would say beside it


def test_text_alone_needs_no_usage_and_says_what_it_lacks() -> None:
    body = json.dumps({"choices": [{"message": {"content": "Hello."}, "finish_reason": "stop"}]})
    row = row_of(outcome(body))
    assert (row.signal, row.signal_reason) == ("text", reasons.NO_LOGPROBS)
    assert list(row.answer_ids) == [*b"Hello.", END_ID]
