"""The terms gate: a verdict for the teacher, the prompts and the student's weights of a spec.

The catalogue is data (`catalogue.yaml`, and an operator's own file before it). Whatever it does
not know is denied. A verdict's id is derived from the catalogue's entry, the purpose and the
subject, and goes with every answer, shard, checkpoint and into the student's card.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.canonical import derived_id, digest_of
from stillhouse.contracts.spec import Purpose, Spec, Teacher, Verdict

Subject = Literal["teacher", "prompts", "student"]
Outcome = Literal["allow", "allow_with_duties", "deny"]
_OWN_CATALOGUE = Path(__file__).with_name("catalogue.yaml")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class When(_Part):
    """What a rule asks of subject and purpose; what is unset fits everything."""

    subject: Subject | None = None
    use: Literal["internal", "commercial", "research"] | None = None
    kind: Literal["generative", "classifier"] | None = None
    distributed: bool | None = None

    def fits(self, subject: Subject, purpose: Purpose) -> bool:
        found = {"subject": subject, **purpose.model_dump()}
        return all(
            found[name] == value for name, value in self.model_dump().items() if value is not None
        )


class Rule(_Part):
    outcome: Outcome
    reason: str
    when: When = When()
    duties: list[str] = []


class Entry(_Part):
    """The terms of one (model, route), or of a licence."""

    id: str
    also: list[str] = []
    applies_to: list[Subject] = Field(alias="for")
    hosts: list[str] = Field([], description="where this route is served")
    source: str
    as_of: str
    evidence: Literal["primary", "secondary", "weak"]
    rules: list[Rule] = Field(min_length=1)


class _File(_Part):
    version: Literal[1]
    entries: list[Entry]


class Catalogue(_Part):
    """All entries, an operator's own ones first."""

    entries: list[Entry]

    @cached_property
    def sha256(self) -> str:
        return digest_of(self.model_dump(mode="json", by_alias=True))

    def judge(self, spec: Spec) -> list[Verdict]:
        """Judge every teacher, the prompts and the student's weights."""
        verdicts = [self.judge_teacher(teacher, spec.purpose) for teacher in spec.teachers]
        verdicts.append(self._judge("prompts", "prompts", spec.prompts.terms, spec.purpose))
        verdicts.append(self._judge("student", "student", spec.student.terms, spec.purpose))
        return verdicts

    def judge_teacher(self, teacher: Teacher, purpose: Purpose) -> Verdict:
        """Judge one teacher: its route decides which terms hold."""
        subject = f"teacher:{teacher.name}"
        host = (urlsplit(teacher.url or "").hostname or "").lower().rstrip(".")
        for entry in self.entries:
            served = any(host == name or host.endswith(f".{name}") for name in entry.hosts)
            if served and teacher.terms not in (entry.id, *entry.also):
                reason = (
                    f"{host} serves under the terms `{entry.id}`, found `{teacher.terms}`: the "
                    f"route decides the terms; set `terms: {entry.id}`"
                )
                return self._verdict(subject, teacher.terms, purpose, entry, reason=reason)
        return self._judge("teacher", subject, teacher.terms, purpose)

    def _judge(self, kind: Subject, subject: str, terms: str, purpose: Purpose) -> Verdict:
        entry = next((e for e in self.entries if terms in (e.id, *e.also)), None)
        if entry is None:
            known = ", ".join(sorted(e.id for e in self.entries if kind in e.applies_to))
            reason = (
                f"the terms `{terms}` are not in the catalogue, and unknown terms are denied: "
                f"expected one of {known}; or the operator reads the terms and adds an entry to "
                "the file that TEACHER_GATEWAY_TERMS_FILE names"
            )
            return self._verdict(subject, terms, purpose, None, reason=reason)
        if kind not in entry.applies_to:
            fits = " or ".join(entry.applies_to)
            reason = f"the terms `{terms}` are those of {fits}, not of {kind}"
            return self._verdict(subject, terms, purpose, entry, reason=reason)
        for rule in entry.rules:
            if rule.when.fits(kind, purpose):
                return self._verdict(
                    subject, terms, purpose, entry, rule.outcome, rule.reason, rule.duties
                )
        reason = f"no rule of `{terms}` covers this purpose ({purpose.use}, {purpose.kind})"
        return self._verdict(subject, terms, purpose, entry, reason=reason)

    def _verdict(
        self,
        subject: str,
        terms: str,
        purpose: Purpose,
        entry: Entry | None,
        outcome: Outcome = "deny",
        reason: str = "",
        duties: list[str] | None = None,
    ) -> Verdict:
        digest = digest_of(entry.model_dump(mode="json", by_alias=True) if entry else terms)
        source = "no entry of the catalogue"
        if entry:
            source = f"{entry.source} (as of {entry.as_of}; evidence: {entry.evidence})"
        return Verdict(
            id=derived_id("tv", digest, digest_of(purpose.model_dump(mode="json")), subject),
            subject=subject,
            terms=terms,
            outcome=outcome,
            duties=duties or [],
            reason=reason,
            source=source,
            catalogue_sha256=self.sha256,
        )


def load_catalogue(own: Path | None = None) -> Catalogue:
    """Read the catalogue; entries of an operator's own file come first and so win."""
    entries = _read(own) if own else []
    taken = {name for entry in entries for name in (entry.id, *entry.also)}
    shipped = [entry for entry in _read(_OWN_CATALOGUE) if entry.id not in taken]
    return Catalogue(entries=[*entries, *shipped])


def _read(path: Path) -> list[Entry]:
    try:
        return _File.model_validate(yaml.safe_load(path.read_text())).entries
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise PermanentError(
            f"the catalogue of terms {path} cannot be used: {error}", reason="settings"
        ) from error
