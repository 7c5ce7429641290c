"""What a call costs at the most, what goes upstream, and what is remembered of the database."""

from __future__ import annotations

import asyncio
import json
import math
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.teacher_gateway.capture.asked import Asked, read_body
from services.teacher_gateway.capture.memory import Memory
from services.teacher_gateway.capture.refusal import Refusal, error_body
from services.teacher_gateway.capture.registrations import Registration
from services.teacher_gateway.ledger import Rates
from stillhouse.chassis.errors import RetryableError
from stillhouse.contracts.spec import Price

MESSAGES = [{"role": "user", "content": "Hi"}]


def read(kind: Any = "chat", **body: Any) -> Asked:
    return read_body(json.dumps({"model": "m", **body}).encode(), kind, max_tokens=100)


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({}, 100),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 9}, 9),
        ({"max_completion_tokens": 9, "max_tokens": 20}, 20),
        ({"max_tokens": 7, "n": 3}, 21),
        ({"max_tokens": 7, "n": 2, "best_of": 5}, 35),
        ({"max_tokens": 7, "prompt": "one"}, 7),
        ({"max_tokens": 7, "prompt": ["one", "two"]}, 14),
        ({"max_tokens": 7, "prompt": [1, 2, 3]}, 7),
        ({"max_tokens": 7, "prompt": [[1, 2], [3]]}, 14),
        ({"max_tokens": 7, "prompt": []}, 7),
        ({"max_tokens": 7, "n": None}, 7),
    ],
)
def test_the_most_that_an_answer_can_be(body: dict[str, Any], tokens: int) -> None:
    assert read(**body).most_answer_tokens == tokens


def test_a_prompt_has_no_more_tokens_than_its_body_has_bytes_but_an_image_may() -> None:
    plain = read(messages=MESSAGES)
    image = [{"type": "image_url", "image_url": {"url": "https://x.example/a.png"}}]
    seen = read(messages=[{"role": "user", "content": image}])
    assert plain.most_prompt_tokens > len(json.dumps(MESSAGES))
    assert seen.most_prompt_tokens - plain.most_prompt_tokens > 10_000


def upstream(asked: Asked) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(asked.body_for(msgspec.Raw(b'"theirs"')))
    return found


def test_all_but_what_is_ours_goes_upstream_as_it_came() -> None:
    body = {
        "model": "m",
        "messages": MESSAGES,
        "temperature": 1.0e-5,
        "seed": 12345678901234567890,
        "metadata": {"app": "x"},
        "store": True,
        "vendor": {"deep": [None, {"er": "\u00e9"}]},
    }
    asked = read(**body)
    assert asked.tags == {"app": "x"}
    expected = {k: v for k, v in body.items() if k not in ("metadata", "store")}
    assert upstream(asked) == {**expected, "model": "theirs"}


@pytest.mark.parametrize(
    ("body", "hidden", "options"),
    [
        ({}, False, None),
        ({"stream": False}, False, None),
        ({"stream": None}, False, None),
        ({"stream": True}, True, {"include_usage": True}),
        ({"stream": True, "stream_options": None}, True, {"include_usage": True}),
        ({"stream": True, "stream_options": {"x": 1}}, True, {"x": 1, "include_usage": True}),
        (
            {"stream": True, "stream_options": {"include_usage": False}},
            True,
            {"include_usage": True},
        ),
        (
            {"stream": True, "stream_options": {"include_usage": True}},
            False,
            {"include_usage": True},
        ),
    ],
)
def test_a_stream_always_brings_its_usage(
    body: dict[str, Any], hidden: bool, options: dict[str, Any] | None
) -> None:
    asked = read(messages=MESSAGES, **body)
    assert asked.usage_hidden == hidden
    assert upstream(asked).get("stream_options") == options


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 0}, {"max_tokens": -1}, {"n": 0}, {"n": -5}, {"best_of": 0}, {"n": 1.5},
        {"max_tokens": "7"}, {"stream": 1}, {"metadata": {"a": None}}, {"metadata": {"": "x"}},
        {"metadata": {"a": "x" * 513}}, {"stream_options": [1]}, {"model": None},
    ],
)  # fmt: skip
def test_what_decides_must_be_what_it_should_be(body: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as refused:
        read(**body)
    assert refused.value.status == 400
    assert json.loads(refused.value.body)["error"]["type"] == "invalid_request_error"


@given(
    st.decimals(0, 1000, places=6),
    st.decimals(0, 1000, places=6),
    st.integers(0, 10**7),
    st.integers(0, 10**7),
)
def test_rates_in_whole_numbers_cost_what_the_price_says_rounded_up(
    into: Any, out: Any, prompt_tokens: int, answer_tokens: int
) -> None:
    price = Price(input=float(into), output=float(out))
    exact = Fraction(str(price.input)) * prompt_tokens + Fraction(str(price.output)) * answer_tokens
    assert Rates.of(price).cost(prompt_tokens, answer_tokens) == math.ceil(exact)


def test_an_error_is_in_openais_form() -> None:
    found = json.loads(error_body(429, "busy", 'say "when"'))
    assert found == {
        "error": {
            "message": 'say "when"',
            "type": "rate_limit_error",
            "param": None,
            "code": "busy",
        }
    }


def test_a_registration_has_a_budget_of_whole_micro_dollars() -> None:
    found = Registration.model_validate(
        {
            "name": "fast",
            "url": "http://127.0.0.1:9/v1",
            "model": "m",
            "terms": "own-weights",
            "usd_per_million": {"input": 0, "output": 0},
            "budget_usd": 0.1234567,
        }
    )
    assert found.budget_microusd == 123_456
    with pytest.raises(ValueError, match="at most 50 characters"):
        Registration.model_validate({**found.model_dump(), "name": "a" * 51})


# Memory


class Source:
    """What would be the database: a value by key, or an error."""

    def __init__(self) -> None:
        self.value: Any = "first"
        self.reads = 0
        self.clock = 0.0

    def read(self, *_: Any) -> Any:
        self.reads += 1
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def remembering(test: Any) -> None:
    async def run() -> None:
        source = Source()
        with ThreadPoolExecutor(2) as threads:
            memory: Memory[str, Any] = Memory(source.read, threads, clock=lambda: source.clock)
            await asyncio.wait_for(test(source, memory), 20)

    asyncio.run(run())


async def seen(memory: Memory[str, Any], wanted: Any) -> None:
    """Until the background has read anew."""
    while memory.known("k") != wanted:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def test_a_value_is_read_once_and_used_while_it_is_fresh() -> None:
    async def test(source: Source, memory: Memory[str, Any]) -> None:
        assert memory.known("k") is None
        found = await asyncio.gather(*(memory.find("k", source.read) for _ in range(20)))
        assert (set(found), source.reads) == ({"first"}, 1)
        source.clock = 1.9
        assert (memory.known("k"), source.reads) == ("first", 1)

    remembering(test)


def test_a_stale_value_is_used_while_it_is_read_anew_and_a_dead_one_is_not() -> None:
    async def test(source: Source, memory: Memory[str, Any]) -> None:
        await memory.find("k", source.read)
        source.clock, source.value = 3.0, "second"
        assert memory.known("k") == "first"
        await seen(memory, "second")
        assert source.reads == 2
        source.clock = 8.0
        assert memory.known("k") is None, "5 seconds old"

    remembering(test)


def test_what_is_gone_is_forgotten_and_what_cannot_be_read_is_held_for_a_while() -> None:
    async def test(source: Source, memory: Memory[str, Any]) -> None:
        await memory.find("k", source.read)
        source.clock, source.value = 3.0, RetryableError("away")
        assert memory.known("k") == "first"
        while source.reads < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert memory.known("k") == "first"
        source.value = KeyError("revoked")
        await seen(memory, None)

    remembering(test)


def test_a_change_is_not_undone_by_a_read_that_began_before_it() -> None:
    async def test(source: Source, memory: Memory[str, Any]) -> None:
        started = asyncio.Event()
        loop = asyncio.get_running_loop()
        go = asyncio.Event()

        def slow() -> str:
            loop.call_soon_threadsafe(started.set)
            asyncio.run_coroutine_threadsafe(go.wait(), loop).result(10)
            return "before the change"

        first = asyncio.create_task(memory.find("k", slow))
        await started.wait()
        memory.forget("k")
        go.set()
        assert await first == "before the change"
        assert memory.known("k") is None
        assert await memory.find("k", source.read) == "first"

    remembering(test)
