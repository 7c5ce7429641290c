"""Live traffic to a student: OpenAI's own SDK against a running stack, then pipelines from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from tests.support import invariants
from tests.support.pipelines import TENANT, Plant, running_plant
from tests.support.teacher import MODEL, Invoice
from tests.support.waiting import wait_for

SECONDS = 180
CALLS = 40
K = 8


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    with running_plant(tmp_path_factory.mktemp("plant")) as running:
        yield running


@dataclass(frozen=True)
class Traffic:
    """What an application was told: the text of each answer by its question."""

    answers: dict[str, str]
    invoices: list[Invoice]


@pytest.fixture(scope="module")
def traffic(plant: Plant) -> Traffic:
    """The calls of two applications, which know an address and a key."""
    registration = {
        "url": plant.teacher.url,
        "model": MODEL,
        "terms": "smollm2@self-hosted",
        "usd_per_million": {"input": 1, "output": 2},
        "budget_usd": 1,
    }
    plant.client.put_teacher("live", registration)
    answers = {}
    with openai.OpenAI(
        base_url=f"{plant.stack.api_url}/v1", api_key=plant.stack.api_key, max_retries=0
    ) as sdk:
        assert [model.id for model in sdk.models.list()] == ["live"]
        for number in range(CALLS):
            question = f"[captured {number}] Say something."
            answers[question] = ask(sdk, question, "support", stream=bool(number % 2))
        ask(sdk, "[other 0] Say something.", "shop", stream=False)
        with pytest.raises(openai.NotFoundError, match="nobody"):
            sdk.chat.completions.create(
                model="nobody", messages=[{"role": "user", "content": "Hello?"}]
            )
    found = wait_for(
        plant.client.captured, 60, "all is recorded", until=lambda seen: seen["records"] > CALLS
    )
    assert (found["records"], found["failures"]) == (CALLS + 1, 0)
    assert found["tags"] == {"app": {"support": CALLS, "shop": 1}}
    return Traffic(answers, plant.teacher.invoices())


def ask(sdk: openai.OpenAI, question: str, app: str, *, stream: bool) -> str:
    more: dict[str, Any] = {"metadata": {"app": app}, "logprobs": True, "top_logprobs": K}
    answer: Any = sdk.chat.completions.create(
        model="live",
        messages=[{"role": "user", "content": question}],
        max_tokens=24,
        stream=stream,
        **more,
    )
    if not stream:
        assert len(answer.choices[0].logprobs.content[0].top_logprobs) == K
        return str(answer.choices[0].message.content)
    choices = [chunk.choices[0] for chunk in answer if chunk.choices]
    assert choices[-1].finish_reason
    assert sum(len(c.logprobs.content) for c in choices if c.logprobs) > 1
    return "".join(choice.delta.content or "" for choice in choices)


def student_of(plant: Plant, pipeline: str) -> invariants.Left:
    """Wait for the student; return all that its pipeline left."""
    plant.wait(pipeline, "release", lambda status: status["state"] == "released", SECONDS)
    left = invariants.read_all(plant.store, TENANT, pipeline, plant.events(pipeline))
    invariants.check_items(left)
    invariants.check_training(plant.store, left)
    assert len(left.items) == CALLS
    report = plant.client.report(pipeline)
    assert report["model"]["kl_top20"] < report["untrained"]["kl_top20"]
    return left


def rows_of(left: invariants.Left) -> dict[str, str]:
    """The answer of each row by its question."""
    return {json.loads(row["messages"])[-1]["content"]: row["answer"] for row in left.rows}


def test_the_traffic_of_an_application_is_paid_by_its_teachers_account(
    plant: Plant, traffic: Traffic
) -> None:
    [teacher] = plant.client.teachers()
    paid = plant.client._json("GET", f"/v1/accounts/{teacher['account']}/charges")
    assert paid["totals_microusd"]["answers"] == sum(i.microusd for i in traffic.invoices)
    assert paid["cost"]["spent_microusd"] + paid["cost"]["reserved_microusd"] <= 1_000_000


def test_a_pipeline_asks_its_teacher_what_an_application_asked(
    plant: Plant, traffic: Traffic
) -> None:
    before = len(plant.teacher.invoices())
    prompts = {"captured": {"tag": {"app": "support"}}, "heldout": 0.2, "batch": 8}
    pipeline = plant.submit(name="asked", prompts=prompts)
    left = student_of(plant, pipeline)
    assert rows_of(left).keys() == traffic.answers.keys()
    asked = plant.teacher.invoices()[before:]
    assert len([invoice for invoice in asked if invoice.marker.startswith("captured ")]) == CALLS
    invariants.check_content(left, asked)
    invariants.check_money(left, plant.charges(pipeline), asked)


def test_a_pipeline_learns_from_the_recorded_answers_and_asks_nobody(
    plant: Plant, traffic: Traffic
) -> None:
    before = len(plant.teacher.requests)
    given = {
        "name": "live",
        "answers": "given",
        "model": MODEL,
        "terms": "smollm2@self-hosted",
        "usd_per_million": {"input": 0, "output": 0},
        "reference": f"file:{plant.student}",
    }
    captured = {"tag": {"app": "support"}, "teacher": "live", "answers": True}
    prompts = {"captured": captured, "heldout": 0.2, "batch": 8}
    pipeline = plant.submit(name="given", prompts=prompts, teachers=[given])
    left = student_of(plant, pipeline)
    assert len(plant.teacher.requests) == before
    assert rows_of(left) == traffic.answers
    assert {row["signal"] for row in left.rows} == {"topk"}
    invariants.check_content(left, traffic.invoices)
    assert plant.charges(pipeline)["cost"]["spent_microusd"] == 0
