"""What the API's answers look like to a reader: JSON objects in, tables and lines out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from stillhouse.cli.client import Json
from stillhouse.cli.screen import Table
from stillhouse.contracts.events import STAGES

FIGURES = (
    ("kl_top20", "KL top-k"),
    ("kl_full", "KL full"),
    ("ppl", "perplexity"),
    ("top1", "top-1"),
    ("stop_rate", "stop rate"),
)
_SHARES = ("top1", "stop_rate")
NONE = "-"


def pipelines_table(pipelines: Iterable[Json]) -> Table:
    rows = [
        (
            p["pipeline_id"],
            p["name"],
            state_of(p),
            str(p["rows"]),
            usd(p["cost"]["spent_usd"]),
            moment(p["created_at"]),
        )
        for p in pipelines
    ]
    headings = ("pipeline", "name", "state", "rows", "spent", "created")
    return Table("", headings, rows, numbers=(3, 4))


def teachers_table(teachers: Iterable[Json]) -> Table:
    rows = [
        (
            t["name"],
            t["model"],
            t["url"],
            t["terms"],
            usd(t["cost"]["spent_usd"]),
            usd(t["cost"]["budget_usd"]),
        )
        for t in teachers
    ]
    headings = ("teacher", "model", "address", "terms", "spent", "budget")
    return Table("", headings, rows, numbers=(4, 5))


def captured_table(captured: Json) -> Table:
    """What was recorded of each registered teacher."""
    rows = [
        (
            t["teacher"],
            str(t["records"]),
            str(t["failures"]),
            usd(t["cost_microusd"] / 1e6),
            moment(t["first_at"]),
            moment(t["last_at"]),
        )
        for t in captured["teachers"]
    ]
    headings = ("teacher", "records", "failures", "cost", "first", "last")
    return Table("", headings, rows, numbers=(1, 2, 3))


def tags_table(captured: Mapping[str, Json]) -> Table:
    """By teacher: the tags of what was recorded, the most used first."""
    rows = [
        (teacher, name, value, str(count))
        for teacher, found in captured.items()
        for name, values in found["tags"].items()
        for value, count in sorted(values.items(), key=lambda pair: (-pair[1], pair[0]))
    ]
    headings = ("teacher", "tag", "value", "records")
    return Table("" if rows else "no record has a tag", headings, rows, numbers=(3,))


def failures_table(captured: Json) -> Table:
    """The last exchanges without a whole answer, which give no prompt."""
    rows = [
        (moment(f["at"]), f["teacher"], f["reason"], str(f["status"]), f["detail"])
        for f in captured["last_failures"]
    ]
    return Table("", ("at", "teacher", "reason", "status", "detail"), rows, numbers=(3,))


def state_of(pipeline: Json) -> str:
    """The state, and what it will end as where that is settled."""
    ends = f", will be {pipeline['stopping']}" if pipeline["stopping"] else ""
    return f"{pipeline['state']}{ends if pipeline['state'] in ('accepting', 'running') else ''}"


def stages_table(pipeline: Json) -> Table:
    """One row a stage: its state, and what its newest figures say."""
    rows = [
        (stage, pipeline["stages"][stage]["state"], stage_figures(pipeline, stage) or NONE)
        for stage in STAGES
    ]
    return Table("", ("stage", "state", "figures"), rows)


def stage_line(pipeline: Json, stage: str) -> str:
    """One stage in a line, for logs."""
    state = pipeline["stages"][stage]["state"]
    return f"{stage:<8}  {state:<9}  {stage_figures(pipeline, stage)}".rstrip()


def stage_figures(pipeline: Json, stage: str) -> str:
    """Counts that the gateway keeps of a stage, then what the stage itself told last."""
    figures = dict(pipeline["stages"][stage]["figures"])
    figures.pop("at", None)  # when they came
    if stage == "collect" and pipeline["batches"]:
        words = [f"batches {pipeline['batches_closed']}/{pipeline['batches']}"]
    elif stage == "build" and pipeline["items"]:
        rejected = sum(pipeline["rejections"].values())
        words = [f"rows {pipeline['rows']}/{pipeline['items']}", f"rejected {rejected}"]
        figures.pop("rows", None)
        figures.pop("rejected", None)
    else:
        words = []
    return ", ".join([*words, *(f"{name} {number(value)}" for name, value in figures.items())])


def summary_lines(pipeline: Json) -> list[str]:
    """State, counts, money and tokens of a pipeline."""
    cost, tokens = pipeline["cost"], pipeline["tokens"]
    lines = [
        f"{pipeline['pipeline_id']} ({pipeline['name']}): {state_of(pipeline)}"
        + (f": {pipeline['reason']}" if pipeline.get("reason") else ""),
        f"items {pipeline['items']}, rows {pipeline['rows']}, pending {pipeline['pending']}, "
        f"rejected {sum(pipeline['rejections'].values())}"
        + counted(pipeline["rejections"], before=": "),
        f"cost {usd(cost['spent_usd'])} of {usd(cost['budget_usd'])}"
        f" (reserved {usd(cost['reserved_usd'])}); "
        f"tokens: {tokens['prompt']} asked, {tokens['completion']} answered, "
        f"{tokens['trained']} trained on",
    ]
    if pipeline.get("student_id") and pipeline["state"] in ("released", "withheld"):
        lines.append(f"student {pipeline['student_id']}")
    return lines


def counted(reasons: Mapping[str, int], *, before: str = "") -> str:
    """Return `before` and the reasons by count, or nothing."""
    ordered = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
    return before + ", ".join(f"{reason} {count}" for reason, count in ordered) if ordered else ""


def figures_table(report: Json) -> Table:
    """The teacher's own noise floor, the student before training, and after."""
    rows = []
    for label, name in (
        ("teacher (noise floor)", "teacher"),
        ("untrained student", "untrained"),
        ("trained student" if report["step"] else "untrained student", "model"),
    ):
        figures = report.get(name)
        if figures:
            cells = [_figure(key, figures.get(key)) for key, _ in FIGURES]
            rows.append((label, *cells, str(figures["rows"]), str(figures["tokens"])))
    title = f"{report['split']} rows, step {report['step']}"
    headings = ("model", *(heading for _, heading in FIGURES), "rows", "tokens")
    return Table(title, headings, rows, numbers=range(1, len(headings)))


def answers_table(report: Json) -> Table:
    """The models' answers to the same prompts, side by side."""
    rows = [
        (
            sample["prompt"],
            *(_answer(sample.get(model)) for model in ("teacher", "untrained", "student")),
        )
        for sample in report.get("samples") or []
    ]
    return Table("", ("prompt", "teacher", "untrained student", "student"), rows, prose=True)


def rows_table(samples: Iterable[Json]) -> Table:
    rows = [
        (s["split"], prompt_text(s["messages"]), s["answer"], s["finish_reason"]) for s in samples
    ]
    return Table("", ("split", "prompt", "answer", "end"), rows, prose=True)


def rejections_table(rejections: Iterable[Json]) -> Table:
    rows = [(r["item_id"], r["stage"], r["reason"], r["detail"]) for r in rejections]
    return Table("", ("item", "stage", "reason", "detail"), rows)


def event_line(event: Json) -> str:
    payload = event.get("payload") or {}
    flat = {**payload, **(payload.get("figures") or {})}
    told = "  ".join(
        f"{key}={_value(value)}" for key, value in flat.items() if not isinstance(value, dict)
    )
    return f"{event['sequence']:>5}  {moment(event['occurred_at'])}  {event['type']:<22}  {told}"


def prompt_text(messages: Any) -> str:
    """The last thing that the user said."""
    if isinstance(messages, str):
        messages = json.loads(messages)
    return str(messages[-1]["content"]) if messages else ""


def usd(amount: float) -> str:
    """Dollars to the cent, or as small as they are."""
    return f"${amount:.2f}" if amount == 0 or amount >= 0.1 else f"${amount:.6f}"


def number(value: float) -> str:
    if float(value).is_integer() and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.4g}"


def moment(value: Any) -> str:
    """A time of the API (ISO 8601, or seconds since the epoch) as UTC to the second."""
    if value is None:
        return NONE
    if isinstance(value, int | float):
        when = datetime.fromtimestamp(value, UTC)
    else:
        when = datetime.fromisoformat(str(value)).astimezone(UTC)
    return f"{when:%Y-%m-%d %H:%M:%S}"


def _answer(text: str | None) -> str:
    """A model that ends at once has said something too."""
    return NONE if text is None else text or "(ended at once)"


def _figure(key: str, value: float | None) -> str:
    if value is None:
        return NONE
    return (
        f"{100 * value:.1f} %"
        if key in _SHARES
        else f"{value:.4f}"
        if value < 100
        else f"{value:.1f}"
    )


def _value(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def check_lines(found: Json) -> list[str]:
    """What a check found out."""
    prompts, batches = found["prompts"], found["prompts"]["batches"]
    lines = [f"{found['name']}: this spec can be submitted"]
    for verdict in found["verdicts"]:
        duties = f" (duties: {', '.join(verdict['duties'])})" if verdict["duties"] else ""
        lines.append(f"terms of {verdict['subject']}: {verdict['outcome']}{duties}")
    refused = counted(prompts["rejections"], before="; refused: ")
    lines += [
        f"prompts: {prompts['prompts']}, {prompts['items']} items in {batches['train']} train, "
        f"{batches['validation']} validation and {batches['test']} test batches{refused}",
        f"tokenizer: {found['tokenizer']['vocabulary']} tokens, of {found['tokenizer']['source']}",
        f"at most {usd(found['worst_case_usd'])} for the teacher (budget "
        f"{usd(found['budget_usd'])}), about {found['prompt_tokens']} prompt tokens",
    ]
    if found["probe_usd"] is not None:
        lines.append(f"asking the teachers cost {usd(found['probe_usd'])}")
    else:
        lines.append("the teachers were not asked: `--probe` asks each a handful of questions")
    if found["worst_case_usd"] > found["budget_usd"]:
        lines.append("the budget may end before the prompts do: what is left is then rejected")
    return lines


def findings_table(preflight: Json) -> Table:
    """What a preflight found out, a line a thing."""
    rows = [
        (f["teacher"] or NONE, f["topic"].replace("_", " "), f["value"], f["verdict"])
        for f in preflight["findings"]
    ]
    title = "what a handful of answers tells (intervals of 95 %, from n answers)"
    return Table(title, ("teacher", "finding", "value", "verdict"), rows)


def advice_lines(preflight: Json) -> list[str]:
    """What to change, or to know, where a finding is not simply good."""
    lines = []
    for finding in preflight["findings"]:
        if finding["message"]:
            place = f"`{finding['field']}`: " if finding["field"] else ""
            lines.append(f"{finding['verdict']}: {place}{finding['message']}")
    return lines
