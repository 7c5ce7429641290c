"""The card fulfils the duties that a card can fulfil, and shows every figure."""

from __future__ import annotations

import pytest

from services.evaluator.card import display_name, render_card
from services.evaluator.student_folder import tokenizer_files
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import CheckpointManifest, Cursor, Figures, Report
from tests.support.reports import ENVIRONMENT, SAVED_AT
from tests.support.shards import make_resolved_spec
from tests.support.tiny_tokenizer import tiny_chat_tokenizer

LLAMA = [
    'Llama: a distributed model that was trained with it has a name that begins with "Llama"',
    'Llama: show "Built with Llama" on a related website, interface or document',
]
REF = ObjectRef(key="k", size=1, sha256="a" * 64)


def _spec(duties: list[str]) -> ResolvedSpec:
    spec = make_resolved_spec()
    verdict = spec.verdicts[0].model_copy(
        update={"duties": duties, "reason": "yes | no\nreally", "outcome": "allow_with_duties"}
    )
    return spec.model_copy(update={"verdicts": [verdict]})


def _card(spec: ResolvedSpec, model: Figures, **report_fields: dict[str, str]) -> str:
    manifest = CheckpointManifest(
        tenant_id="t",
        pipeline_id="p",
        training_id=spec.training_id,
        step=8,
        epoch=1,
        files={},
        parent=None,
        tokenizer_sha256="a" * 64,
        template_sha256="a" * 64,
        tokens=480,
        rows=32,
        loss=None,
        final=True,
        bitwise=True,
        environment=ENVIRONMENT,
        saved_at=SAVED_AT,
    )
    report = Report(
        training_id=spec.training_id,
        step=8,
        split="test",
        checkpoint=REF,
        heldout_sha256="a" * 64,
        teacher=Figures(kl_full=0.0),
        model=model,
        **report_fields,
    )
    cursor = Cursor(step=8, phase="done", rows=32, tokens=480)
    return render_card(
        spec, report, manifest, cursor, rejections={"too_long": 3}, validation=[report]
    )


def test_terms_that_ask_for_a_name_get_it() -> None:
    assert display_name(_spec([])) == "tiny"
    assert display_name(_spec(LLAMA)) == "Llama-tiny"


def test_duties_stand_in_the_card() -> None:
    card = _card(_spec(LLAMA), Figures(kl_full=0.25))
    assert "# Llama-tiny\n\nBuilt with Llama.\n" in card
    for duty in LLAMA:
        assert f"- {duty}\n" in card
    assert "No duties" not in card
    assert "No duties" in _card(_spec([]), Figures())


def test_figures_show_their_intervals_and_what_was_not_measured() -> None:
    model = Figures(kl_full=0.25, rows=16, tokens=400, intervals={"kl_full": (0.2, 0.3)})
    card = _card(_spec([]), model)
    assert "| 0 | 0.25 (0.2 to 0.3) |" in card
    assert "16 test rows (400 tokens)" in card
    assert "top1" not in card
    assert "3 too_long" in card


def test_a_figure_that_cannot_be_had_stands_there_with_the_reason() -> None:
    card = _card(_spec([]), Figures(ppl=3.0), unmeasured={"kl_full": "nobody knows the weights"})
    assert "Not measured:\n\n- `kl_full`: nobody knows the weights.\n" in card
    assert "lower bound of the true distance" not in card
    assert "Not measured" not in _card(_spec([]), Figures(kl_top20=0.1))


def test_all_teachers_are_named() -> None:
    teacher = make_resolved_spec().spec.teachers[0].model_dump(by_alias=True)
    two = [
        {**teacher, "name": name, "model": f"org/{name}", "weight": 1} for name in ("one", "two")
    ]
    card = _card(make_resolved_spec(teachers=two), Figures())
    assert "A student of `org/one`, `org/two`" in card
    assert "answers of these teachers" in card


def test_words_of_a_catalogue_cannot_break_the_table() -> None:
    card = _card(_spec([]), Figures())
    assert "yes \\| no really" in card


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_every_special_token_is_named(name: str) -> None:
    files = tokenizer_files(tiny_chat_tokenizer(), {"max_position_embeddings": 512})
    for token in (b'"eos_token": "<|im_end|>"', b'"bos_token"', b'"pad_token"'):
        assert token in files[name]
