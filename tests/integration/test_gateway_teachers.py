"""Every route to a teacher through a real attempt at a batch: answers, faults, and the books."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from services.dataset_builder.handlers import HANDLERS
from services.dataset_builder.jobs import JOBS, BuilderContext
from services.dataset_builder.shards import read_column, read_header
from services.teacher_gateway.models import Outbox
from services.teacher_gateway.teachers import endpoint
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.canonical import sha256_hex
from stillhouse.contracts.chat import Message
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.responses import Item
from tests.support.answers import make_body
from tests.support.gateway import FAST, World, make_world
from tests.support.teacher import Fault, Teacher, running_teacher

SETTLED = ("answers", "probe")
LISTED = ("unused", "unknown")
KEY = "s3cret-key-0042"
TEXT: dict[str, Any] = {
    "signal": {"kind": "text", "max_tokens": 64},
    "training": {"loss": "sft"},
}
ANTHROPIC = {"api": "anthropic", "api_key": {"env": "LLM_KEY"}}

Speak = Callable[..., Teacher]


@pytest.fixture
def speak(tmp_path: Path) -> Iterator[Speak]:
    """Start a teacher; it ends with the test."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            running_teacher(tmp_path / "invoices.jsonl", **options)
        )


@pytest.fixture
def world_of(
    store: ObjectStore, tmp_path: Path, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., World]:
    monkeypatch.setenv("LLM_KEY", KEY)
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    return lambda *args, **fields: make_world(store, url, tenant, *args, **fields)


def check_money(world: World, teacher: Teacher) -> None:
    """What is settled is the invoice of the stored answers; with what is listed, all of it."""
    assert world.charged("answers") == sum(answer.cost_microusd for answer in world.answers())
    assert world.charged(*SETTLED, *LISTED) >= teacher.invoiced_microusd()
    assert world.pipeline().reserved_microusd == 0
    world.check_books()


def bodies(world: World) -> list[dict[str, Any]]:
    return [json.loads(answer.body) for answer in world.answers()]


def texts(world: World) -> list[str]:
    return [body["choices"][0]["message"]["content"] for body in bodies(world)]


def build(world: World, batch: int = 0) -> tuple[Any, Callable[[str], list[Any]]]:
    """Make the shard of a closed batch as the builder does; return its header and its columns."""

    class Told:
        def publish(self, *envelopes: Envelope) -> None:
            pass

    store, resolved = world.context.store, world.resolved
    context = BuilderContext(store, Told(), 60.0)
    rows = world.rows(select(Outbox))
    (stored,) = (row for row in rows if json.loads(row.envelope)["type"] == "response_batch.stored")
    envelope = Envelope.model_validate_json(stored.envelope)
    for job in HANDLERS[type(envelope.event())](envelope, envelope.event()):
        JOBS[job.name](job, context)
    found = store.read(artifacts.shard_key(resolved.tenant_id, resolved.dataset_id, batch))
    assert found is not None
    return read_header(found.data), lambda name: read_column(found.data, name)


def test_anthropic_answers_are_bought_stored_and_built_as_text(
    speak: Speak, world_of: Callable[..., World]
) -> None:
    teacher = speak(api="anthropic", api_key=KEY)
    teacher.script(Fault("reasoning", match="[0/0]"))
    world = world_of(teacher.url, items=12, batches=3, teacher=ANTHROPIC, **TEXT)
    world.collect()
    assert world.outcomes() == {"answered": 12}
    assert len(teacher.requests) == 12
    assert world.charged("answers") == teacher.invoiced_microusd()
    assert world.charged(*LISTED) == 0
    check_money(world, teacher)
    said = {invoice.answer_sha256 for invoice in teacher.invoices()}
    assert {sha256_hex(text.encode()) for text in texts(world)} == said
    assert {body["object"] for body in bodies(world)} == {"chat.completion"}
    header, column = build(world)
    assert header.rows >= 10  # an answer may repeat another
    assert set(column("signal")) == {"text"}
    assert set(column("answer")) <= set(texts(world))
    # The key went out as a header and stayed there.
    manifest = world.manifest().model_dump_json()
    assert all(KEY not in text for text in (manifest, *(a.body for a in world.answers())))


ANTHROPIC_FAULTS = [
    (Fault("rate_limited", retry_after=0.01), "teacher_rate_limited", False),
    (Fault("status", status=529), "teacher_error", False),
    (Fault("status", status=500), "teacher_error", False),
    (Fault("status", status=504, billed=True), "teacher_error", True),
    (Fault("status", status=400), "refused_by_teacher", False),
    (Fault("redirect"), "teacher_invalid", False),
    (Fault("truncated_json"), "teacher_invalid", True),
    (Fault("cut_reply"), "teacher_error", True),
    (Fault("wrong_schema"), "teacher_invalid", True),
    (Fault("huge_body", size=8 << 20), "teacher_invalid", True),
    (Fault("gzip_bomb", size=1 << 20), "teacher_invalid", True),
    (Fault("refusal"), "refused_by_teacher", True),
    (Fault("strange_finish"), "teacher_invalid", True),
    (Fault("still_reasoning"), "still_reasoning", True),
    (Fault("missing_usage"), "teacher_invalid", True),
    (Fault("wrong_usage"), "teacher_invalid", True),
]


@pytest.mark.parametrize(
    ("fault", "reason", "costs"), ANTHROPIC_FAULTS, ids=lambda value: getattr(value, "kind", None)
)
def test_every_misbehaviour_of_a_message_ends_as_a_counted_rejection(
    fault: Fault, reason: str, costs: bool, speak: Speak, world_of: Callable[..., World]
) -> None:
    teacher = speak(api="anthropic")
    teacher.script(Fault(**{**vars(fault), "match": "[0/1]"}))
    world = world_of(teacher.url, items=3, teacher=ANTHROPIC, **TEXT)
    world.collect_until_closed()
    assert world.outcomes() == {"answered": 2, reason: 1}
    (rejection,) = world.manifest().rejections
    assert (rejection.reason, bool(rejection.detail)) == (reason, True)
    assert (world.charged(*LISTED) > 0) is costs
    check_money(world, teacher)


def test_an_anthropic_model_that_takes_no_temperature_is_asked_without(
    speak: Speak, world_of: Callable[..., World]
) -> None:
    teacher = speak(api="anthropic", refuses=("temperature", "top_p"))
    world = world_of(teacher.url, items=2, teacher=ANTHROPIC, **TEXT)
    world.collect()
    assert world.outcomes() == {"answered": 2}
    assert teacher.bad_requests == 0


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", status=529, retry_after=0.01),
        Fault("status", status=400, message="You have reached your specified API usage limits."),
    ],
    ids=["overloaded", "spending limit"],
)
def test_a_pause_of_the_whole_endpoint_costs_no_item(
    fault: Fault, speak: Speak, world_of: Callable[..., World]
) -> None:
    teacher = speak(api="anthropic")
    teacher.script(fault)
    world = world_of(teacher.url, items=3, teacher=ANTHROPIC, **TEXT)
    for _ in range(3 * FAST.attempts):
        world.expire()
        world.collect()
    assert world.outcomes() == {"pending": 3}
    teacher.forgive()
    world.collect_until_closed()
    assert world.outcomes() == {"answered": 3}
    assert world.charged(*LISTED) == 0
    check_money(world, teacher)


def test_vllm_answers_become_rows_with_their_signal(
    speak: Speak, world_of: Callable[..., World]
) -> None:
    teacher = speak(api="vllm", most_logprobs=20)
    teacher.script(Fault("reasoning", match="[0/0]"))
    world = world_of(teacher.url, items=12, batches=3)
    world.collect()
    assert world.outcomes() == {"answered": 12}
    check_money(world, teacher)
    logprobs = bodies(world)[0]["choices"][0]["logprobs"]["content"]
    assert all("id" not in position for position in logprobs)
    header, column = build(world)
    assert header.rows >= 10
    assert set(column("signal")) == {"topk"}
    said = dict(zip(column("answer"), column("input_ids"), strict=True))
    for body in bodies(world):
        message = body["choices"][0]["message"]
        ids = said.get(message["content"])
        if ids is not None:  # the byte tokenizer's ids are the bytes
            tail = bytes(i for i in ids[-len(message["content"]) - 1 :] if i < 256).decode()
            assert tail.endswith(message["content"])


OPENAI_ANSWERS = [
    ("tool_call", {}),
    ("reasoning", {}),
    ("kept_alive", {"seconds": 0.01}),
]


@pytest.mark.parametrize(("kind", "more"), OPENAI_ANSWERS)
def test_what_is_odd_and_true_is_an_answer(
    kind: Any, more: dict[str, Any], speak: Speak, world_of: Callable[..., World]
) -> None:
    teacher = speak()
    teacher.script(Fault(kind, match="[0/1]", **more))
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]

    def with_tools(item: Item) -> Item:
        return item.model_copy(update={"tools": tools})

    world = world_of(teacher.url, items=3, change=with_tools)
    world.collect()
    assert world.outcomes() == {"answered": 3}
    assert {seen["tools"] for seen in teacher.requests} == {1}
    assert world.charged("answers") == teacher.invoiced_microusd()
    check_money(world, teacher)
    if kind == "tool_call":
        (message,) = (
            body["choices"][0]["message"]
            for body in bodies(world)
            if body["choices"][0]["finish_reason"] == "tool_calls"
        )
        assert message["tool_calls"][0]["function"]["name"] == "add"


def test_a_provider_that_knows_other_parameters_is_asked_with_them(
    speak: Speak, world_of: Callable[..., World]
) -> None:
    teacher = speak(refuses=("max_tokens", "top_p", "seed"))
    world = world_of(teacher.url, items=6, concurrency=2)
    world.collect()
    assert world.outcomes() == {"answered": 6}
    # Each caller that was under way may have met each refusal once, and nobody again.
    assert 3 <= teacher.bad_requests <= 6
    assert world.charged("answers") == teacher.invoiced_microusd()
    check_money(world, teacher)


def test_a_conversation_of_many_turns_is_answered_as_it_is(
    speak: Speak, world_of: Callable[..., World]
) -> None:
    turns = [
        Message(role="system", content="Be short."),
        Message(role="user", content="1 + 1?"),
        Message(role="assistant", content="2"),
        Message(role="user", content="Sure? [0/x]"),
    ]

    def longer(item: Item) -> Item:
        return item.model_copy(update={"messages": turns})

    teacher = speak(api="anthropic")
    world = world_of(teacher.url, items=1, teacher=ANTHROPIC, change=longer, **TEXT)
    world.collect()
    said = teacher.language.answer(turns, max_tokens=64)
    assert texts(world) == [said.text]


OPENAI_FAULTS = [
    (Fault("slow_drip", seconds=0.02), "teacher_timeout", True),
    (Fault("stalls"), "teacher_timeout", True),
    (Fault("strange_finish"), "teacher_invalid", True),
    (Fault("still_reasoning"), "still_reasoning", True),
    (Fault("refusal"), "refused_by_teacher", True),
    (Fault("status", status=529), "teacher_error", False),
    (Fault("echoes_key"), "refused_by_teacher", False),
]


@pytest.mark.parametrize(
    ("fault", "reason", "costs"), OPENAI_FAULTS, ids=lambda value: getattr(value, "kind", None)
)
def test_every_misbehaviour_of_a_completion_ends_as_a_counted_rejection(
    fault: Fault,
    reason: str,
    costs: bool,
    speak: Speak,
    world_of: Callable[..., World],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The deadline of a call is longer: what is cut is cut by the least rate.
    monkeypatch.setattr(endpoint, "LEAST_SECONDS", 0.2)
    teacher = speak(api_key=KEY)
    teacher.script(Fault(**{**vars(fault), "match": "[0/1]"}))
    world = world_of(teacher.url, items=3, teacher={"api_key": {"env": "LLM_KEY"}})
    world.collect_until_closed()
    assert world.outcomes() == {"answered": 2, reason: 1}
    (rejection,) = world.manifest().rejections
    assert KEY not in rejection.detail
    if reason == "teacher_timeout":
        assert "brought under" in rejection.detail
    assert (world.charged(*LISTED) > 0) is costs
    check_money(world, teacher)


def test_answers_given_along_cost_nothing_and_ask_nobody(
    speak: Speak, world_of: Callable[..., World]
) -> None:
    teacher = speak()

    def answered(item: Item) -> Item:
        if item.messages[0].text.startswith("[0/2]"):
            return item
        return item.model_copy(update={"answer": make_body(item.messages)})

    given = {"url": None, "answers": "given", "usd_per_million": {"input": 0, "output": 0}}
    fields = {"teacher": given, "change": answered, "budget_usd": 0, **TEXT}
    world = world_of(teacher.url, items=6, batches=3, **fields)
    world.collect()
    assert world.outcomes() == {"answered": 5, "no_given_answer": 1}
    assert teacher.requests == []
    assert world.pipeline().spent_microusd == 0
    assert world.pipeline().prompt_tokens > 0
    world.check_books()
    header, column = build(world)
    assert header.rows == 5
    assert set(column("answer")) <= set(texts(world))
