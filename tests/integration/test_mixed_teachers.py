"""Three teachers of three signals in one pipeline: built, trained on, measured, and named."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from services.evaluator.settings import EvaluatorSettings
from services.trainer.data import TrainData
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.events import (
    DatasetSealed,
    HeldoutSealed,
    ShardWritten,
    StudentEvaluated,
    TrainingCompleted,
)
from stillhouse.contracts.signals import decode
from stillhouse.contracts.spec import ResolvedSpec, Signal
from stillhouse.contracts.trainings import Cursor
from stillhouse.embedded.parts import Store
from tests.integration.test_builder_shards import Scene as Building
from tests.support.answers import close_responses, make_body, make_items
from tests.support.evaluated import Scene as Evaluating
from tests.support.shards import make_resolved_spec, tiny_student
from tests.support.trainers import Bench, cursor_of, head_of

DRAWS = 20
# One of the held-out batches of each teacher, then train batches in turns.
TURNS = ["chat", "local", "claude", "chat", "local", "chat", "claude", "local"]
HEADER = {"chat": "topk", "local": "counts", "claude": "text"}


def mixed_spec(tenant: str, student: Path) -> ResolvedSpec:
    plain = {"model": "m", "terms": "own-weights", "usd_per_million": {"input": 1, "output": 2}}
    resolved = make_resolved_spec(
        tenant=tenant,
        student=f"file:{student}",
        validation=2,
        test=1,
        train=5,
        training={"passes": 2, "tokens_per_step": 150},
        teachers=[
            {**plain, "name": "chat", "url": "http://h/v1", "weight": 2},
            {**plain, "name": "local", "weights": "file:/teacher", "weight": 1},
            {**plain, "name": "claude", "url": "http://h/v1", "api": "anthropic", "weight": 1},
        ],
        signal={"kind": "auto", "k": 8, "draws": DRAWS, "max_tokens": 64},
    )
    signals = {
        name: Signal(kind=kind, k=8, draws=DRAWS, max_tokens=64)  # type: ignore[arg-type]
        for name, kind in HEADER.items()
    }
    return resolved.model_copy(
        update={
            "signals": signals,
            "batch_teachers": TURNS,
            "verdicts": [
                resolved.verdicts[0].model_copy(
                    update={"id": f"ve-{name}", "subject": f"teacher:{name}"}
                )
                for name in HEADER
            ],
        }
    )


def body_of(teacher: str, messages: Any) -> str:
    def change(body: dict[str, Any]) -> None:
        [choice] = body["choices"]
        if teacher == "claude":
            del choice["logprobs"], body["usage"]
            choice["message"]["reasoning_content"] = "Hm."
        elif teacher == "local":
            for position in choice["logprobs"]["content"]:
                likely = position.pop("top_logprobs")[0]["id"]
                position["counts"] = dict(
                    Counter({str(position["id"]): 2}) + Counter({str(likely): DRAWS - 2})
                )

    return make_body(messages, change=change)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixed")


def test_three_teachers_teach_one_student(
    store: ObjectStore, store_part: Store, tenant: str, folder: Path
) -> None:
    student = tiny_student(folder / "tiny", layers=2)
    resolved = mixed_spec(tenant, student)
    building = Building(store, resolved)

    # The builder: each batch by the signal of its teacher.
    for batch, teacher in enumerate(TURNS):
        items = make_items(resolved, batch)
        bodies = {item.item_id: body_of(teacher, item.messages) for item in items}
        building.take(building.close(batch, items, bodies=bodies))
        header = building.header(batch)
        assert (header.teacher, header.signal) == (teacher, HEADER[teacher])
        rows = pq.read_table(io.BytesIO(building.data(batch))).to_pylist()
        assert {(row["teacher"], row["signal"], row["signal_reason"]) for row in rows} == {
            (teacher, HEADER[teacher], None)
        }
        assert {row["reasoning"] for row in rows} == {"Hm." if teacher == "claude" else None}
        assert len(rows) == 4
    building.take(close_responses(store, resolved))
    told = building.told.envelopes
    [heldout] = [e for e in told if e.type == HeldoutSealed.TYPE]
    written = [e for e in told if e.type == ShardWritten.TYPE]
    [sealed] = [e for e in told if e.type == DatasetSealed.TYPE]

    # The trainer: all rows, in the order of the batches.
    data = TrainData(store, resolved)
    kinds = []
    for batch in range(resolved.batches.train):
        for row in data.order(0, batch, Cursor(step=0, phase="stream")):
            kinds.append("text" if row.signal is None else "counts" if row.signal.drawn else "topk")
            if row.signal is not None:
                assert decode(row.signal).positions == row.supervised
    assert kinds == [HEADER[teacher] for teacher in TURNS[3:] for _ in range(4)]
    bench = Bench(store, store_part, folder, folder)
    bench.run(*written, sealed)
    head = head_of(store, resolved)
    assert head.final
    assert head.loss is not None
    assert head.rows > 2 * 20, "two passes and the decay"
    completed = next(e for e in bench.wire.published if e.type == TrainingCompleted.TYPE)

    # The evaluator: what can be measured of three teachers at once, and what cannot.
    settings = EvaluatorSettings(
        broker_url="redis://nowhere",
        file_roots=str(folder),
        work_dir=folder,
        generate_tokens=4,
        stop_rate_prompts=2,
    )
    evaluating = Evaluating(store, resolved, settings, [], heldout)
    events = evaluating.take(heldout, completed)
    assert StudentEvaluated.TYPE in {event.type for event in events}
    before, after = evaluating.report(0), evaluating.report(head.step)
    for report in (before, after):
        assert report.model.kl_full is None
        assert set(report.unmeasured) == {"kl_full"}
        assert "not all the same weights" in report.unmeasured["kl_full"]
        assert report.model.kl_top20 is not None, "of the rows with log-probabilities"
        assert report.model.rows == 8
    assert after.model.ppl is not None
    assert before.model.ppl is not None
    assert after.model.ppl < before.model.ppl
    papers = json.loads(evaluating.student_file("provenance.json"))
    assert [(t["name"], t["signal"]["kind"]) for t in papers["teachers"]] == list(HEADER.items())
    taught = [shard["teacher"] for shard in papers["trained_on"]["shards"]]
    assert taught == TURNS[3:]
    assert papers["trained_on"]["rows"] == cursor_of(store, head).rows
    card = evaluating.student_file("README.md").decode()
    assert "- `kl_top20`: the teacher gave text alone." in card, "the test rows are claude's"
    for name in HEADER:
        assert f"teacher:{name}" in card
