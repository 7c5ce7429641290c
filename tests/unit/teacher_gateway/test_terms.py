"""The terms gate: what may train what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.teacher_gateway.terms.gate import Catalogue, load_catalogue
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.spec import Spec, Verdict


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return load_catalogue()


def spec(
    terms: str, *, url: str = "http://10.0.0.1/v1", student: str = "own-weights", **purpose: Any
) -> Spec:
    return Spec.model_validate(
        {
            "version": 1,
            "name": "t",
            "purpose": purpose,
            "teachers": [
                {
                    "name": "teach",
                    "url": url,
                    "model": "m",
                    "terms": terms,
                    "usd_per_million": {"input": 0, "output": 0},
                }
            ],
            "prompts": {"from": "file:/p"},
            "student": {"from": "file:/w", "terms": student},
            "budget": {"teacher_usd": 1},
        }
    )


def teacher_verdict(catalogue: Catalogue, asked: Spec) -> Verdict:
    return catalogue.judge(asked)[0]


@pytest.mark.parametrize(
    ("terms", "purpose", "outcome"),
    [
        ("smollm2@self-hosted", {}, "allow"),
        ("own-weights", {}, "allow"),
        ("apache-2.0", {"use": "commercial", "distributed": True}, "allow"),
        ("mit", {}, "allow"),
        ("llama-3@self-hosted", {}, "deny"),
        ("llama-3.1@self-hosted", {}, "allow_with_duties"),
        ("llama-3.3@self-hosted", {"distributed": True}, "allow_with_duties"),
        ("openai@api", {}, "deny"),
        ("openai@api", {"kind": "classifier"}, "allow_with_duties"),
        ("openai@api", {"kind": "classifier", "distributed": True}, "deny"),
        ("anthropic@api", {"kind": "classifier"}, "deny"),
        ("xai@api", {}, "deny"),
        ("own-data", {}, "deny"),
        ("gpt-9@somewhere", {}, "deny"),
    ],
)
def test_the_verdict_on_a_teacher_depends_on_terms_and_purpose(
    catalogue: Catalogue, terms: str, purpose: dict[str, Any], outcome: str
) -> None:
    verdict = teacher_verdict(catalogue, spec(terms, **purpose))
    assert verdict.outcome == outcome
    assert verdict.subject == "teacher:teach"
    assert bool(verdict.duties) == (outcome == "allow_with_duties")
    assert verdict.reason
    assert verdict.source


def test_llama_puts_its_name_and_notice_on_the_student(catalogue: Catalogue) -> None:
    duties = " ".join(teacher_verdict(catalogue, spec("llama-3.1@self-hosted")).duties)
    for part in ('begins with "Llama"', "Built with Llama", "licence agreement", "700 million"):
        assert part in duties


def test_unknown_terms_are_denied_with_what_to_do(catalogue: Catalogue) -> None:
    verdict = teacher_verdict(catalogue, spec("nobody@nowhere"))
    assert "unknown terms are denied" in verdict.reason
    assert "smollm2@self-hosted" in verdict.reason
    assert "TEACHER_GATEWAY_TERMS_FILE" in verdict.reason


@pytest.mark.parametrize("host", ["api.openai.com", "API.OpenAI.com.", "eu.api.openai.com:443"])
def test_the_route_decides_whatever_the_spec_says(catalogue: Catalogue, host: str) -> None:
    verdict = teacher_verdict(catalogue, spec("smollm2@self-hosted", url=f"https://{host}/v1"))
    assert verdict.outcome == "deny"
    assert "set `terms: openai@api`" in verdict.reason


def test_apache_weights_lay_a_duty_on_a_student_made_of_them(catalogue: Catalogue) -> None:
    found = catalogue.judge(spec("own-weights", student="smollm2@self-hosted"))
    assert [v.subject for v in found] == ["teacher:teach", "prompts", "student"]
    assert found[2].outcome == "allow_with_duties"
    assert "Apache-2.0" in found[2].duties[0]


def test_a_verdict_has_its_id_from_entry_purpose_and_subject(catalogue: Catalogue) -> None:
    one = teacher_verdict(catalogue, spec("mit"))
    assert one.id == teacher_verdict(load_catalogue(), spec("mit")).id
    other = [spec("mit", use="research"), spec("apache-2.0"), spec("unknown")]
    ids = {teacher_verdict(catalogue, asked).id for asked in other}
    assert len(ids | {one.id}) == 4
    assert one.id != catalogue.judge(spec("mit", student="mit"))[2].id


def test_an_operators_entry_comes_before_the_shipped_one(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    own = tmp_path / "terms.yaml"
    own.write_text(
        "version: 1\nentries:\n- id: anthropic@api\n  for: [teacher]\n"
        "  hosts: [api.anthropic.com]\n  source: our letter\n  as_of: May 2026\n"
        "  evidence: primary\n  rules: [{outcome: allow, reason: written permission}]\n"
    )
    merged = load_catalogue(own)
    asked = spec("anthropic@api", url="https://api.anthropic.com/v1")
    assert teacher_verdict(merged, asked).outcome == "allow"
    assert teacher_verdict(merged, asked).source.startswith("our letter (as of May 2026")
    assert teacher_verdict(catalogue, asked).outcome == "deny"
    assert merged.sha256 != catalogue.sha256


def test_a_broken_catalogue_is_refused_at_once(tmp_path: Path) -> None:
    own = tmp_path / "terms.yaml"
    own.write_text("version: 1\nentries: [{id: x}]\n")
    with pytest.raises(PermanentError, match=r"terms\.yaml cannot be used"):
        load_catalogue(own)


def test_every_entry_ends_with_a_rule_for_every_purpose(catalogue: Catalogue) -> None:
    names = [name for entry in catalogue.entries for name in (entry.id, *entry.also)]
    assert len(names) == len(set(names))
    for entry in catalogue.entries:
        assert not any(entry.rules[-1].when.model_dump().values()), entry.id
        for rule in entry.rules:
            assert bool(rule.duties) == (rule.outcome == "allow_with_duties"), entry.id
