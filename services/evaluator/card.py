"""The model card of a student: what it is, who taught it, under which terms, how good it is.

A pure function of stored facts and without a clock, so that two workers write the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import CheckpointManifest, Cursor, Figures, Report

# Duties of the terms that the card itself can fulfil are found by their words.
_NAME_DUTY = re.compile(r'name that begins with "([^"]+)"')
_SHOWN_DUTY = re.compile(r'"((?:Built with|Improved using) [^"]+)"')

_FIGURES = (
    ("kl_full", "KL to the teacher, full vocabulary (nats)"),
    ("kl_top20", "KL to the teacher, stored outcomes and tail (nats)"),
    ("ppl", "Perplexity on the teacher's answers"),
    ("top1", "Top-1 agreement with the teacher"),
    ("stop_rate", "Answers that end by themselves"),
)


def display_name(spec: ResolvedSpec) -> str:
    """The student's name, with the beginning that terms may ask for."""
    name = spec.spec.name
    for duty in spec.duties:
        found = _NAME_DUTY.search(duty)
        if found and not name.lower().startswith(found[1].lower()):
            return f"{found[1]}-{name}"
    return name


def render_card(
    spec: ResolvedSpec,
    report: Report,
    manifest: CheckpointManifest,
    cursor: Cursor,
    *,
    rejections: dict[str, int],
    validation: Sequence[Report],
) -> str:
    """Write the README.md of a student folder."""
    said, teachers = spec.spec, spec.spec.teachers
    answers = "teacher's answers" if len(teachers) == 1 else "answers of these teachers"
    shown = sorted({found for duty in spec.duties for found in _SHOWN_DUTY.findall(duty)})
    source = f"`{said.student.weights}`"
    if said.student.layers is not None:
        source = f"{said.student.layers} layers of {source}, chosen by block influence"
    blocks = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [distillation, stillhouse]",
        "---",
        "",
        f"# {display_name(spec)}",
        "",
        *(f"{line}.\n" for line in shown[:1]),
        f"A student of {', '.join(_code(t.model) for t in teachers)}, distilled by Stillhouse "
        f"from the {answers} "
        f"to {spec.items} prompts. It starts from {source} and was trained with "
        f"{_code(said.training.loss)} on {cursor.tokens} supervised tokens.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "path/to/this/folder"',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        'messages = [{"role": "user", "content": "Hello"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        "answer = model.generate(**inputs, max_new_tokens=64)[0, inputs.input_ids.shape[1] :]",
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
        "```",
        "",
        "## Figures",
        "",
        *_figures(report),
        "",
        "## Teachers and terms",
        "",
        f"Judged for the purpose: {said.purpose.use}, {said.purpose.kind}, "
        f"{'distributed' if said.purpose.distributed else 'not distributed'} to third parties. "
        "This is not legal advice.",
        "",
        "| subject | terms | verdict | id | source |",
        "|---|---|---|---|---|",
        *(
            _cells(v.subject, v.terms, f"{v.outcome}: {v.reason}", v.id, v.source)
            for v in spec.verdicts
        ),
        "",
        *_duties(spec.duties),
        "## Data",
        "",
        f"{cursor.rows} rows were trained on (rows seen again in later passes are counted again) "
        f"from {len(cursor.shards)} shards of dataset `{spec.dataset_id}`; the figures above come "
        f"from {report.model.rows} rows that were set aside before training. "
        "`provenance.json` names every shard with its digest, and the rows of every step.",
        "",
        *_rejections(rejections),
        "## How it was trained",
        "",
        *_training(spec, manifest, cursor, validation),
        "",
        "## Limits",
        "",
        "- It learnt from prompts like those of its dataset, and knows no others; measure it on "
        "your own before you rely on it.",
        "- It repeats its teacher's errors and biases, and makes more of its own.",
        "- Its safety was not measured. What kept the teacher from harmful answers may be weaker "
        "here.",
        *_bound(report),
    ]
    return "\n".join(blocks) + "\n"


def _figures(report: Report) -> list[str]:
    """A table of teacher, untrained student and student over the test rows."""
    columns = [("teacher (noise floor)", report.teacher)]
    if report.untrained is not None:
        columns.append(("before training", report.untrained))
    columns.append(("this student", report.model))
    lines = [
        f"Over {report.model.rows} test rows ({report.model.tokens} tokens) that chose nothing; "
        "95 % intervals by drawing prompts.",
        "",
        _cells("", *(name for name, _ in columns)),
        _cells(*["---"] * (len(columns) + 1)),
    ]
    for name, words in _FIGURES:
        if any(getattr(figures, name) is not None for _, figures in columns):
            lines.append(_cells(f"{words}, `{name}`", *(_shown(f, name) for _, f in columns)))
    missing = [f"- `{name}`: {why}." for name, why in sorted(report.unmeasured.items())]
    return [*lines, "", "Not measured:", "", *missing] if missing else lines


def _bound(report: Report) -> list[str]:
    if report.model.kl_top20 is None:
        return []
    return ["- `kl_top20` is what it was trained on and a lower bound of the true distance."]


def _shown(figures: Figures, name: str) -> str:
    value = getattr(figures, name)
    if value is None:
        return "not measured"
    bounds = figures.intervals.get(name)
    if bounds is None:
        return f"{value:.4g}"
    return f"{value:.4g} ({bounds[0]:.4g} to {bounds[1]:.4g})"


def _duties(duties: Sequence[str]) -> list[str]:
    if not duties:
        return ["No duties follow from these terms.", ""]
    listed = [f"- {duty}" for duty in duties]
    return ["Whoever uses or passes on this model has these duties:", "", *listed, ""]


def _rejections(rejections: dict[str, int]) -> list[str]:
    if not rejections:
        return []
    counted = ", ".join(f"{count} {reason}" for reason, count in sorted(rejections.items()))
    return [f"Items without a row, by reason: {counted}.", ""]


def _training(
    spec: ResolvedSpec,
    manifest: CheckpointManifest,
    cursor: Cursor,
    validation: Sequence[Report],
) -> list[str]:
    training = spec.spec.training
    settings: dict[str, Any] = training.model_dump(exclude_none=True)
    steps = ", ".join(str(report.step) for report in validation)
    environment = manifest.environment
    return [
        f"Step {manifest.step} of {max(report.step for report in validation)} was chosen by its "
        f"validation figures among steps {steps}. "
        f"Loss of the last step: {'unknown' if manifest.loss is None else f'{manifest.loss:.4g}'}.",
        "",
        "Settings: " + ", ".join(f"`{name}: {value}`" for name, value in settings.items()) + ".",
        "",
        f"Environment: torch {environment.torch}, {environment.device}, {environment.dtype}, "
        f"stillhouse {environment.code}. The same inputs give the same bits there: "
        f"{'yes' if manifest.bitwise else 'no'}.",
    ]


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"


def _cells(*values: str) -> str:
    # A verdict's words come from a catalogue that an operator may edit.
    clean = (" ".join(value.split()).replace("|", "\\|") for value in values)
    return "| " + " | ".join(clean) + " |"
