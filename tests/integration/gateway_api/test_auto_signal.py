"""`signal: auto`: what each teacher gives is found out at acceptance, and paid by the pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from services.teacher_gateway.accept import accept_pipeline
from services.teacher_gateway.database import reading
from services.teacher_gateway.models import Charge
from stillhouse.contracts import artifacts
from stillhouse.contracts.spec import ResolvedSpec, Signal
from stillhouse.embedded.parts import Store
from tests.support.gateway_api import Api, accept_in_process, pipeline, posted_spec, submit
from tests.support.teacher import Fault, Teacher, running_teacher

SFT = {"loss": "sft"}


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[Teacher]:
    with running_teacher(tmp_path / "invoices.jsonl") as running:
        yield running


def auto(api: Api, teacher: Teacher, k: int = 5, **parts: Any) -> dict[str, Any]:
    signal = {"kind": "auto", "k": k, "max_tokens": 16}
    posted = posted_spec(api.files, signal=signal, **parts)
    posted["teachers"][0] |= {"url": teacher.url, "model": teacher.model}
    return posted


def signals(api: Api, pipeline_id: str) -> dict[str, Signal]:
    found = api.gateway.store.find_model(artifacts.spec_key(api.tenant, pipeline_id), ResolvedSpec)
    assert found is not None, pipeline(api, pipeline_id).reason
    return found[0].signals


def charges(api: Api, pipeline_id: str) -> list[Charge]:
    with reading(api.engine) as session:
        return list(session.scalars(select(Charge).where(Charge.pipeline_id == pipeline_id)))


@pytest.mark.parametrize(
    ("most", "fault", "k", "found"),
    [
        (64, None, 5, ("topk", 5)),
        (64, None, 30, ("topk", 30)),
        (20, None, 30, ("topk", 20)),
        (5, None, 30, ("topk", 5)),
        (64, Fault("few_logprobs"), 5, ("topk", 3)),
    ],
    ids=["as asked", "deep", "twenty", "five", "clamped"],
)
def test_an_endpoint_gives_as_many_log_probabilities_as_it_will(
    most: int, fault: Fault | None, k: int, found: tuple[str, int], small: Api, tmp_path: Path
) -> None:
    with running_teacher(tmp_path / "few.jsonl", most_logprobs=most) as teacher:
        teacher.script(*([fault] if fault else []))
        pipeline_id = submit(small, auto(small, teacher, k))
        accept_pipeline(small.context(), pipeline_id)
        signal = signals(small, pipeline_id)["local"]
        assert (signal.kind, signal.k, signal.max_tokens) == (*found, 16)
        accepted = pipeline(small, pipeline_id)
        assert (accepted.state, accepted.attempts) == ("running", 0)
        booked = charges(small, pipeline_id)
        assert {charge.kind for charge in booked} == {"probe"}
        assert sum(charge.microusd for charge in booked) == teacher.invoiced_microusd()
        assert accepted.spent_microusd == teacher.invoiced_microusd()


@pytest.mark.parametrize("kind", ["missing_logprobs", "inflated", "wrong_prompt_tokens"])
def test_what_gives_no_usable_ones_gives_text(kind: Any, small: Api, teacher: Teacher) -> None:
    teacher.script(Fault(kind))
    pipeline_id = submit(small, auto(small, teacher, training=SFT))
    accept_pipeline(small.context(), pipeline_id)
    assert signals(small, pipeline_id)["local"].kind == "text"


def test_text_alone_does_not_do_for_a_loss_that_needs_more(small: Api, teacher: Teacher) -> None:
    teacher.script(Fault("missing_logprobs"))
    pipeline_id = submit(small, auto(small, teacher))
    accept_pipeline(small.context(), pipeline_id)
    failed = pipeline(small, pipeline_id)
    assert failed.state == "failed"
    assert failed.reason.startswith("missing_logprobs: `training.loss: forward_kl` needs")
    assert "use `training.loss: sft`" in failed.reason
    assert failed.spent_microusd >= teacher.invoiced_microusd()


def test_each_teacher_gets_its_own_and_only_endpoints_are_asked(
    small: Api, teacher: Teacher
) -> None:
    posted = auto(small, teacher)
    first = posted["teachers"][0] | {"weight": 1}
    here = {name: value for name, value in first.items() if name not in ("url", "reference")}
    weights = here | {"name": "here", "weights": first["reference"]}
    claude = first | {"name": "claude", "api": "anthropic", "url": "http://127.0.0.1:1/v1"}
    posted["teachers"] = [first, weights, claude]
    pipeline_id = submit(small, posted)
    accept_pipeline(small.context(), pipeline_id)
    kinds = {name: signal.kind for name, signal in signals(small, pipeline_id).items()}
    assert kinds == {"local": "topk", "here": "counts", "claude": "text"}
    assert len(teacher.requests) == 1


def test_a_teacher_that_does_not_answer_is_asked_again_and_then_fails(
    small: Api, teacher: Teacher
) -> None:
    teacher.script(Fault("status", status=503, attempts=(1,)))
    context = dataclasses.replace(
        small.context(), times=dataclasses.replace(small.context().times, probe_attempts=2)
    )
    pipeline_id = submit(small, auto(small, teacher))
    accept_pipeline(context, pipeline_id)
    waiting = pipeline(small, pipeline_id)
    assert (waiting.state, waiting.attempts) == ("accepting", 1)
    assert waiting.next_attempt_at is not None
    assert waiting.next_attempt_at > waiting.created_at
    accept_pipeline(context, pipeline_id)
    assert pipeline(small, pipeline_id).state == "running"

    away = submit(small, auto(small, dataclasses.replace(teacher, url="http://127.0.0.1:1/v1")))
    accept_pipeline(context, away)
    assert pipeline(small, away).state == "accepting"
    accept_pipeline(context, away)
    failed = pipeline(small, away)
    assert failed.state == "failed"
    assert failed.reason.startswith("teacher_unreachable: teacher 'local' did not answer")
    assert "in 2 attempts" in failed.reason
    assert failed.spent_microusd == 0


def test_a_budget_below_the_questions_fails_before_they_are_asked(
    small: Api, teacher: Teacher
) -> None:
    pipeline_id = submit(small, auto(small, teacher, budget={"teacher_usd": 0.00001}))
    accept_pipeline(small.context(), pipeline_id)
    assert pipeline(small, pipeline_id).reason.startswith("budget_exhausted")
    assert teacher.requests == []


@pytest.mark.parametrize("crash_at", ["auto_booked", "question_answered", "acceptance_prompts"])
def test_a_kill_leaves_its_questions_listed_and_the_next_acceptance_asks_anew(
    crash_at: str, small: Api, teacher: Teacher, tmp_path: Path, store_part: Store
) -> None:
    pipeline_id = submit(small, auto(small, teacher))
    assert accept_in_process(tmp_path, store_part, pipeline_id, crash_at=crash_at) == 137
    asked = len(teacher.requests)
    assert asked == (0 if crash_at == "auto_booked" else 1)
    left = charges(small, pipeline_id)
    known = crash_at == "acceptance_prompts"
    assert {charge.kind for charge in left} == {"probe" if known else "unknown"}
    assert sum(charge.microusd for charge in left) >= teacher.invoiced_microusd()
    assert pipeline(small, pipeline_id).spent_microusd == sum(c.microusd for c in left)

    accept_pipeline(small.context(), pipeline_id)
    assert signals(small, pipeline_id)["local"].k == 5
    assert len(teacher.requests) == asked + 1
    booked = charges(small, pipeline_id)
    assert pipeline(small, pipeline_id).spent_microusd == sum(c.microusd for c in booked)
    assert sum(c.microusd for c in booked) >= teacher.invoiced_microusd()
    accept_pipeline(small.context(), pipeline_id)  # a redelivery
    assert len(teacher.requests) == asked + 1
