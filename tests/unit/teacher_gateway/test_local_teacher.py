"""Weights that answer in this process: what they say, together and alone, and how that ends."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from pydantic import SecretStr

from services.teacher_gateway import reasons
from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.teachers.local.client import LocalTeacher, open_local
from services.teacher_gateway.teachers.local.weights import Weights, shelf
from services.teacher_gateway.teachers.outcomes import Answered, Call, Outcome, Reject, Retry
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.chat import Message
from stillhouse.contracts.spec import Signal, Teacher
from tests.support.local_weights import speaking_weights
from tests.support.tiny_tokenizer import END_ID, VOCABULARY, tiny_chat_tokenizer
from tests.support.waiting import wait_for

T = TypeVar("T")

TOPK = Signal(kind="topk", k=6, max_tokens=24)
COUNTS = Signal(kind="counts", draws=30, max_tokens=24)
TEXT = Signal(kind="text", max_tokens=24)
PATIENT = 60.0


class Bench:
    """Weights in a folder, and calls of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = self.told()

    def told(self, **settings: Any) -> TeacherGatewaySettings:
        return TeacherGatewaySettings(
            broker_url="memory://",
            database_url="sqlite:////nowhere",
            key_pepper=SecretStr("0123456789abcdef"),
            profile="embedded",
            file_roots=(self.folder,),
            work_dir=self.folder / "work",
            local_device="cpu",
            **settings,
        )

    def teacher(self, name: str = "speaking", **fields: Any) -> Teacher:
        return Teacher.model_validate(
            {
                "name": "local",
                "weights": f"file:{self.folder / name}",
                "model": "tiny",
                "terms": "own-weights",
                "usd_per_million": {"input": 1, "output": 2},
                **fields,
            }
        )

    def weights(self, name: str = "speaking") -> Weights:
        reference = self.teacher(name).weights
        assert reference is not None
        return shelf.weights(reference, self.settings).result(PATIENT)

    def use(
        self,
        work: Callable[[LocalTeacher], Awaitable[T]],
        signal: Signal = TOPK,
        name: str = "speaking",
        settings: TeacherGatewaySettings | None = None,
        today: date | None = None,
        answers: str | None = None,
    ) -> T:
        async def run() -> T:
            teacher, told = self.teacher(name, answers=answers), settings or self.settings
            async with open_local(teacher, signal, told, today=today) as client:
                return await work(client)

        return asyncio.run(run())

    def ask(
        self, *calls: Call, signal: Signal = TOPK, deadline: float = PATIENT, **how: Any
    ) -> list[Outcome]:
        """Ask for all at once."""

        async def all_of(client: LocalTeacher) -> list[Outcome]:
            asked = (client.ask(call, deadline=deadline) for call in calls)
            return list(await asyncio.gather(*asked))

        return self.use(all_of, signal, **how)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("local"))
    speaking_weights(bench.folder / "speaking")
    return bench


def call(number: int = 0, words: int = 1, **fields: Any) -> Call:
    text = " ".join(["word"] * words)
    return Call([Message(role="user", content=f"[{number}] {text}")], f"item-{number}", **fields)


CALLS = [call(n, words=1 + 5 * n) for n in range(6)]


def answered(outcome: Outcome) -> dict[str, Any]:
    assert isinstance(outcome, Answered), outcome
    found: dict[str, Any] = json.loads(outcome.body)
    assert found["usage"]["prompt_tokens"] == outcome.usage.prompt_tokens
    assert found["usage"]["completion_tokens"] == outcome.usage.completion_tokens
    return found


def choice(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = answered(outcome)["choices"][0]
    return found


def positions(outcome: Outcome) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = choice(outcome)["logprobs"]["content"]
    return found


def ids(outcome: Outcome) -> list[int]:
    return [position["id"] for position in positions(outcome)]


def plain(weights: Weights, asked: Call, answer: list[int]) -> torch.Tensor:
    """Log-probabilities of every token at each position, by one plain forward of one text."""
    prompt = tiny_chat_tokenizer().encode_prompt(asked.messages)
    with torch.inference_mode():
        logits = weights.model(torch.tensor([prompt + answer])).logits[0]
    return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]


class Gate:
    """Holds the thread that computes at its next forward, until it is opened; notes how many rows
    each forward had."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.most = 10**6
        self._entered, self._open = threading.Event(), threading.Event()

    def __call__(self, _: Any, arguments: Any, named: dict[str, Any]) -> None:
        self._entered.set()
        assert self._open.wait(PATIENT)
        rows = int((arguments[0] if arguments else named["input_ids"]).shape[0])
        if rows > self.most:
            raise torch.OutOfMemoryError("out of memory")
        self.rows.append(rows)

    async def entered(self) -> None:
        assert await asyncio.to_thread(self._entered.wait, PATIENT)

    def open(self) -> None:
        self._open.set()


@contextmanager
def gated(weights: Weights) -> Iterator[Gate]:
    gate = Gate()
    handle = weights.model.model.register_forward_pre_hook(gate, with_kwargs=True)
    try:
        yield gate
    finally:
        gate.open()
        handle.remove()


def together(bench: Bench, gate: Gate) -> list[Outcome]:
    """Ask for the first of CALLS, and for the others while its prompt is being read."""

    async def work(client: LocalTeacher) -> list[Outcome]:
        first = asyncio.create_task(client.ask(CALLS[0], deadline=PATIENT))
        await gate.entered()
        rest = [asyncio.create_task(client.ask(c, deadline=PATIENT)) for c in CALLS[1:]]
        # The loop is free while the weights compute: this would never end else.
        await asyncio.to_thread(until_waiting, client, len(rest))
        gate.open()
        return list(await asyncio.gather(first, *rest))

    return bench.use(work)


def until_last(client: LocalTeacher, asked: Call) -> None:
    def last() -> str:
        return client._engine._waiting[-1].seed_of

    wait_for(last, PATIENT, "a call at the queue's end", until=lambda seed: seed == asked.seed_of)


def until_waiting(client: LocalTeacher, count: int) -> None:
    wait_for(lambda: len(client._engine._waiting) == count, PATIENT, f"{count} calls that wait")


# What is said


def test_log_probabilities_equal_a_plain_forward(bench: Bench) -> None:
    check_against_plain_forwards(bench, "speaking")


def test_bfloat16_layers_have_a_float32_output_layer(bench: Bench) -> None:
    told = bench.told(local_dtype="bfloat16")
    found = bench.ask(*CALLS, settings=told)
    coarse = shelf.weights(f"file:{bench.folder / 'speaking'}", told).result(PATIENT)
    assert coarse.model.dtype == torch.bfloat16
    logits = coarse.logits(torch.ones((1, 32), dtype=torch.bfloat16))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    weights, off = bench.weights(), []
    assert weights.head is weights.model.lm_head
    for asked, outcome in zip(CALLS, found, strict=True):
        exact = plain(weights, asked, ids(outcome))
        for row, position in zip(exact, positions(outcome), strict=True):
            off.append(abs(position["logprob"] - float(row[position["id"]])))
    assert sum(off) / len(off) < 0.05


def test_attention_over_a_window_is_the_same_beside_others(bench: Bench) -> None:
    """A Mistral that sees 12 tokens back: the padding of shorter rows must not count."""
    config = json.loads((speaking_weights(bench.folder / "window") / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    config["sliding_window"] = 12
    (bench.folder / "window" / "config.json").write_text(json.dumps(config))
    check_against_plain_forwards(bench, "window")
    wide, narrow = bench.ask(CALLS[3]), bench.ask(CALLS[3], name="window")
    assert ids(wide[0]) != ids(narrow[0])


def check_against_plain_forwards(bench: Bench, name: str) -> None:
    for asked, outcome in zip(CALLS, bench.ask(*CALLS, name=name), strict=True):
        expected = plain(bench.weights(name), asked, ids(outcome))
        for exact, position in zip(expected, positions(outcome), strict=True):
            assert position["logprob"] == pytest.approx(float(exact[position["id"]]), abs=1e-4)
            listed = {entry["id"]: entry["logprob"] for entry in position["top_logprobs"]}
            assert len(listed) == TOPK.k
            for i, logprob in listed.items():
                assert logprob == pytest.approx(float(exact[i]), abs=1e-4)
            floor = float(exact.topk(TOPK.k).values[-1])
            assert min(listed.values()) == pytest.approx(floor, abs=1e-4)


def test_an_answer_is_the_same_alone_and_beside_others(bench: Bench) -> None:
    together = bench.ask(*CALLS)
    for asked, beside in zip(CALLS, together, strict=True):
        (alone,) = bench.ask(asked)
        assert ids(alone) == ids(beside)
        for one, other in zip(positions(alone), positions(beside), strict=True):
            assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)


def test_an_answer_does_not_depend_on_the_signal(bench: Bench) -> None:
    texts = [
        [choice(outcome)["message"]["content"] for outcome in bench.ask(*CALLS, signal=signal)]
        for signal in (TEXT, TOPK, COUNTS)
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 3


def test_another_item_gets_another_answer_to_the_same_question(bench: Bench) -> None:
    first, again = call(), Call(call().messages, "another-item")
    one, same, other = bench.ask(first, first, again)
    assert ids(one) == ids(same)
    assert ids(one) != ids(other)


def test_counts_are_drawn_at_each_position_the_same_each_time(bench: Bench) -> None:
    one, other = bench.ask(*CALLS, signal=COUNTS), bench.ask(*CALLS[::-1], signal=COUNTS)
    for outcome, again in zip(one, other[::-1], strict=True):
        for position, same in zip(positions(outcome), positions(again), strict=True):
            assert "top_logprobs" not in position
            assert sum(position["counts"].values()) == COUNTS.draws
            assert position["counts"] == same["counts"]
            assert all(0 <= int(i) < VOCABULARY for i in position["counts"])
        assert len({json.dumps(p["counts"]) for p in positions(outcome)}) == len(positions(outcome))


def test_text_alone_carries_no_log_probabilities(bench: Bench) -> None:
    (outcome,) = bench.ask(call(), signal=TEXT)
    assert "logprobs" not in choice(outcome)


def test_the_prompt_is_rendered_as_the_builder_renders_it(bench: Bench, tmp_path: Path) -> None:
    (outcome,) = bench.ask(CALLS[2])
    chat = tiny_chat_tokenizer()
    assert answered(outcome)["usage"]["prompt_tokens"] == len(chat.encode_prompt(CALLS[2].messages))


def test_templates_see_the_day_of_acceptance(bench: Bench) -> None:
    folder = speaking_weights(bench.folder / "dated")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ strftime_now('%B %Y') }}" + config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = [
        answered(bench.ask(call(), name="dated", today=day)[0])["usage"]["prompt_tokens"]
        for day in (date(2026, 5, 1), date(2026, 9, 1))
    ]
    assert tokens[1] - tokens[0] == len("September") - len("May")


# How it ends


def test_an_answer_ends_at_the_end_of_turn_which_is_no_text(bench: Bench) -> None:
    ended = [o for o in bench.ask(*CALLS) if choice(o)["finish_reason"] == "stop"]
    assert ended
    for outcome in ended:
        assert ids(outcome)[-1] == END_ID
        assert END_ID not in ids(outcome)[:-1]
        text = choice(outcome)["message"]["content"]
        assert text == tiny_chat_tokenizer().decode(ids(outcome)[:-1])


def test_an_answer_that_is_too_long_is_cut(bench: Bench) -> None:
    for outcome in bench.ask(*(call(n, max_tokens=1) for n in range(4))):
        assert len(ids(outcome)) == 1
        ended = ids(outcome) == [END_ID]
        assert choice(outcome)["finish_reason"] == ("stop" if ended else "length")


def test_every_end_token_of_the_model_ends_an_answer(bench: Bench) -> None:
    """Take what one answer says third for an end: it stops there."""
    (free,) = bench.ask(CALLS[1])
    stop = ids(free)[2]
    folder = speaking_weights(bench.folder / "two-ends")
    path = folder / "generation_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "eos_token_id": [END_ID, stop, 10**6]}))
    (found,) = bench.ask(CALLS[1], name="two-ends")
    assert ids(found) == ids(free)[: ids(free).index(stop) + 1]
    assert choice(found)["finish_reason"] == "stop"


def test_a_full_context_cuts_an_answer_and_refuses_a_longer_prompt(bench: Bench) -> None:
    prompt = len(tiny_chat_tokenizer().encode_prompt(call().messages))
    speaking_weights(bench.folder / "short", positions=prompt + 3, end=-8.0)
    fits, over = bench.ask(call(), call(words=3), name="short")
    # The last token needs no place: nothing comes after it.
    assert len(ids(fits)) == 4
    assert choice(fits)["finish_reason"] == "length"
    assert isinstance(over, Reject)
    assert over.reason == reasons.REFUSED_BY_TEACHER
    assert f"the weights see {prompt + 3}" in over.detail


# Together


def test_calls_that_wait_share_a_forward_and_join_those_under_way(bench: Bench) -> None:
    with gated(bench.weights()) as gate:
        found = together(bench, gate)
    assert gate.rows[0] == 1
    # The first answer goes on alone for a token, then the other prompts are read at once.
    assert gate.rows[2] == len(CALLS) - 1
    assert max(gate.rows) >= len(CALLS) - 1
    assert len(gate.rows) <= max(len(ids(outcome)) for outcome in found) + 3
    for outcome, alone in zip(found, CALLS, strict=True):
        assert ids(outcome) == ids(bench.ask(alone)[0])


def test_the_cache_and_one_forward_bound_how_many_go_together(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, calls = bench.weights(), [call(n) for n in range(6)]
    size = len(tiny_chat_tokenizer().encode_prompt(calls[0].messages)) + TOPK.max_tokens
    monkeypatch.setattr(weights, "token_bytes", (1 << 20) // (2 * size))
    with gated(weights) as gate:
        gate.open()
        few = bench.ask(*calls, settings=bench.told(local_cache_mib=1))
    assert max(gate.rows) <= 2
    monkeypatch.undo()
    assert [ids(o) for o in few] == [ids(o) for o in bench.ask(*calls)]


def test_where_memory_runs_out_fewer_go_together(bench: Bench) -> None:
    with gated(bench.weights()) as gate:
        gate.most = 2
        found = together(bench, gate)
    assert max(gate.rows) == 2
    assert [ids(o) for o in found] == [ids(o) for o in bench.ask(*CALLS)]


def test_a_call_ends_at_its_deadline_and_is_not_computed_any_more(bench: Bench) -> None:
    async def work(client: LocalTeacher) -> tuple[Outcome, Outcome]:
        gone = asyncio.create_task(client.ask(CALLS[0], deadline=PATIENT))
        await gate.entered()
        late = await client.ask(CALLS[1], deadline=0.05)  # cannot begin: the gate is shut
        gone.cancel()
        await asyncio.wait([gone])
        asked = asyncio.create_task(client.ask(CALLS[2], deadline=PATIENT))
        await asyncio.to_thread(until_last, client, CALLS[2])  # it stands behind the late one
        gate.open()
        return late, await asked

    with gated(bench.weights()) as gate:
        late, other = bench.use(work)
    assert isinstance(late, Retry)
    assert (late.reason, late.lost, late.away) == (reasons.TEACHER_TIMEOUT, False, True)
    assert len(ids(other)) > 3
    # One forward for what was given up, which no other ever joined.
    assert gate.rows == [1] * (1 + len(ids(other)))


def test_what_fails_is_asked_again_and_the_next_call_is_answered(bench: Bench) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    handle = bench.weights().model.model.register_forward_pre_hook(broken)
    try:
        (failed,) = bench.ask(call())
    finally:
        handle.remove()
    assert isinstance(failed, Retry)
    assert (failed.reason, failed.lost, failed.away) == (reasons.TEACHER_ERROR, False, True)
    assert "the device is gone" in failed.detail
    assert isinstance(bench.ask(call())[0], Answered)


def test_weights_that_give_no_numbers_reject_the_item(bench: Bench) -> None:
    speaking_weights(bench.folder / "damaged")
    weights = bench.weights("damaged")
    with torch.no_grad():
        weights.model.lm_head.weight[3] = float("nan")
    calls = [call(), call(1, given=completion("A lake."))]
    for outcome in bench.ask(*calls, name="damaged", answers="given"):
        assert isinstance(outcome, Reject)
        assert outcome.reason == reasons.TEACHER_INVALID
        assert "token 1" in outcome.detail


# Loading


def test_one_model_is_kept_until_another_is_asked_for(bench: Bench) -> None:
    speaking_weights(bench.folder / "other", seed=5)
    first = bench.weights()
    bench.ask(call())
    assert bench.weights() is first
    assert bench.weights("other") is not first
    assert bench.weights() is not first


@pytest.mark.parametrize("name", ["missing", "broken"])
def test_weights_that_cannot_be_used_say_why_and_are_looked_at_again(
    bench: Bench, name: str
) -> None:
    if name == "broken":
        folder = speaking_weights(bench.folder / "broken")
        (folder / "model.safetensors").write_bytes(b"not tensors")
    for _ in range(2):
        with pytest.raises(PermanentError, match=name):
            bench.ask(call(), name=name)
    (bench.folder / name).rename(bench.folder / f"{name}-away") if name == "broken" else None
    speaking_weights(bench.folder / name)
    assert isinstance(bench.ask(call(), name=name)[0], Answered)


def test_a_call_does_not_wait_for_weights_beyond_its_deadline(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading goes on in the process, so the next job finds the weights there."""
    from services.teacher_gateway.teachers.local import weights as module

    go, load = threading.Event(), module._load

    def slow(*arguments: Any, **named: Any) -> Weights:
        assert go.wait(PATIENT)
        return load(*arguments, **named)

    monkeypatch.setattr(module, "_load", slow)
    speaking_weights(bench.folder / "slow")
    (late,) = bench.ask(call(), name="slow", deadline=0.05)
    assert isinstance(late, Retry)
    assert (late.reason, late.away) == (reasons.TEACHER_TIMEOUT, True)
    assert "still loading" in late.detail
    go.set()
    assert isinstance(bench.ask(call(), name="slow")[0], Answered)


# Given answers


def completion(text: str, finish: str = "stop", **message: Any) -> str:
    said = {"role": "assistant", "content": text, **message}
    return json.dumps({"choices": [{"message": said, "finish_reason": finish}]})


@pytest.mark.parametrize("signal", [TOPK, COUNTS], ids=["topk", "counts"])
def test_a_given_answer_is_scored_as_it_was_written(bench: Bench, signal: Signal) -> None:
    """What the weights wrote themselves gets the same log-probabilities and the same draws."""
    written = bench.ask(*CALLS, signal=signal)
    again = [
        Call(c.messages, c.seed_of, given=o.body)
        for c, o in zip(CALLS, written, strict=True)
        if isinstance(o, Answered)
    ]
    scored = bench.ask(*again, signal=signal, answers="given")
    for one, other in zip(written, scored, strict=True):
        assert ids(one) == ids(other)
        assert answered(one)["usage"] == answered(other)["usage"]
        assert choice(one)["message"] == choice(other)["message"]
        assert choice(one)["finish_reason"] == choice(other)["finish_reason"]
        for a, b in zip(positions(one), positions(other), strict=True):
            assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-4)
            assert a.get("counts") == b.get("counts")
            for x, y in zip(a.get("top_logprobs", []), b.get("top_logprobs", []), strict=True):
                assert x["logprob"] == pytest.approx(y["logprob"], abs=1e-4)


def test_scores_equal_a_plain_forward_with_the_end_of_turn(bench: Bench) -> None:
    texts = ["A lake.", "A lake is water, standing.", "Ein See."]
    calls = [call(n, words=n + 1, given=completion(text)) for n, text in enumerate(texts)]
    calls.append(call(9, given=completion("A lake is wa", "length")))
    chat = tiny_chat_tokenizer()
    long = TOPK.model_copy(update={"max_tokens": 64})
    found = bench.ask(*calls, signal=long, answers="given")
    for asked, text, outcome in zip(calls, [*texts, "A lake is wa"], found, strict=True):
        finish = "length" if text.endswith("wa") else "stop"
        expected = chat.encode_text(text) + ([END_ID] if finish == "stop" else [])
        assert ids(outcome) == expected
        assert choice(outcome)["finish_reason"] == finish
        assert choice(outcome)["message"]["content"] == text
        exact = plain(bench.weights(), asked, expected)
        for row, position in zip(exact, positions(outcome), strict=True):
            assert position["logprob"] == pytest.approx(float(row[position["id"]]), abs=1e-4)


def test_two_scorings_of_the_same_text_agree_to_the_bit(bench: Bench) -> None:
    asked = call(3, given=completion("The same text."))
    (one,), (other,) = (bench.ask(asked, answers="given") for _ in range(2))
    assert one == other


def test_an_answer_that_came_along_is_not_looked_at_unless_it_is_asked_for(bench: Bench) -> None:
    (own,) = bench.ask(call())
    (ignoring,) = bench.ask(call(given=completion("Another answer.")))
    assert own == ignoring


CALLING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.get('tool_calls') or [] %}<call>{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_given_call_of_a_function_is_scored_as_the_template_writes_it(bench: Bench) -> None:
    folder = speaking_weights(bench.folder / "calling")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = CALLING
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    made = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": '{"at":1}'}}
    given = completion("", "tool_calls", tool_calls=[made])
    long = TOPK.model_copy(update={"max_tokens": 64})
    (outcome,) = bench.ask(call(given=given), name="calling", signal=long, answers="given")
    assert tiny_chat_tokenizer().decode(ids(outcome)) == '<call>tide{"at": 1}</call><|im_end|>'
    assert choice(outcome)["finish_reason"] == "tool_calls"
    assert choice(outcome)["message"]["tool_calls"] == [made]
    # The plain template writes no calls.
    (refused,) = bench.ask(call(given=given), signal=long, answers="given")
    assert isinstance(refused, Reject)
    assert "does not write calls" in refused.detail


@pytest.mark.parametrize(
    ("given", "reason", "says"),
    [
        ("{}", reasons.TEACHER_INVALID, "expected a chat completion"),
        (completion("x" * 24), reasons.TEACHER_INVALID, "25 tokens"),
        (completion(""), reasons.TEACHER_INVALID, "empty"),
        (completion("cut", "content_filter"), reasons.REFUSED_BY_TEACHER, "filter"),
        (completion("odd", "because"), reasons.TEACHER_INVALID, "because"),
    ],
)
def test_a_given_answer_that_cannot_be_scored_is_rejected(
    bench: Bench, given: str, reason: str, says: str
) -> None:
    (outcome,) = bench.ask(call(given=given), answers="given")
    assert isinstance(outcome, Reject)
    assert outcome.reason == reason
    assert says in outcome.detail
    assert outcome.usage is None
    assert not outcome.lost
