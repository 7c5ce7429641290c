"""The command line: `stillhouse init check submit status events samples rejections report pull
cancel teachers captured up`.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage. With --json standard output carries JSON and
nothing else, on an error an object with `error` and what the gateway answered. Else an error is one
sentence on standard error that says what to do; add --debug to any command for its traceback.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from stillhouse.cli import specs, views, watch
from stillhouse.cli.client import (
    ENDED,
    Client,
    Json,
    StillhouseApiError,
    StillhouseClientError,
    new_key,
)
from stillhouse.cli.connection import DEFAULT_ROOT, connect
from stillhouse.cli.screen import Screen

app = typer.Typer(
    name="stillhouse",
    help="Distil a large language model into a small one.",
    epilog="Add --debug to any command to see tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Url = Annotated[
    str | None,
    typer.Option("--url", envvar="STILLHOUSE_URL", help="The gateway's address."),
]
Key = Annotated[
    str | None,
    typer.Option("--key", envvar="STILLHOUSE_API_KEY", help="An API key."),
]
Root = Annotated[
    Path,
    typer.Option("--root", envvar="STILLHOUSE_ROOT", help="Data folder of the embedded stack."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
PipelineId = Annotated[str, typer.Argument(metavar="ID", help="The pipeline's id.")]
SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="The spec: YAML or JSON.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many.")]

# How long a command that watches bears a gateway that is away (it restarts in seconds).
WATCH_PATIENCE_SECONDS = 60.0
# Whose tags `captured` asks for, one request each.
_TAGGED_TEACHERS = 20


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("pipeline.yaml"),
    as_json: AsJson = False,
) -> None:
    """Write a commented spec to fill in; what exists is never overwritten."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(specs.template())
    except FileExistsError:
        raise Refused(f"{path} exists already: name another file, or remove it first") from None
    screen = Screen(as_json=as_json)
    if as_json:
        screen.data({"path": str(path)})
    else:
        screen.line(f"wrote {path}: fill in what is marked, then `stillhouse check {path}`")


@app.command()
def check(
    spec: SpecFile,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Ask each teacher a handful of questions, which it bills."),
    ] = False,
    url: Url = None,
    key: Key = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Have a spec checked: fields, terms, tokenizers; with --probe the teachers too, and what the
    pipeline would cost. Nothing is created."""
    document = specs.load(spec)
    screen = Screen(as_json=as_json)
    with connect(url, key, root) as client:
        found = client.check(specs.upload_inputs(client, document), probe=probe)
    if as_json:
        screen.data(found)
        return
    for line in views.check_lines(found):
        screen.line(line)
    if found.get("preflight") is not None:
        screen.line()
        screen.table(views.findings_table(found["preflight"]))
        for line in views.advice_lines(found["preflight"]):
            screen.line(line)


@app.command()
def submit(
    spec: SpecFile,
    watching: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    new: Annotated[
        bool, typer.Option("--new", help="Another pipeline, though the same spec ran before.")
    ] = False,
    url: Url = None,
    key: Key = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Create a pipeline. Submitting the same spec again names the same pipeline."""
    document = specs.load(spec)
    screen = Screen(as_json=as_json)
    patience = WATCH_PATIENCE_SECONDS if watching else 0.0
    with connect(url, key, root, patience_seconds=patience) as client:
        document = specs.upload_inputs(client, document)
        created = client.submit(document, idempotency_key=new_key() if new else None)
        pipeline_id = created["pipeline_id"]
        if as_json and not watching:
            screen.data(created)
            return
        if not watching:
            screen.line(pipeline_id)
        state = client.status(pipeline_id)["state"]
        if state in ENDED:
            screen.progress(
                f"this spec ran before as {pipeline_id} and is {state}; `--new` runs it again"
            )
        elif not watching:
            screen.progress(f"follow it with `stillhouse status {pipeline_id} --watch`")
        if watching:
            screen.progress(f"submitted as {pipeline_id}")
            _follow(client, screen, pipeline_id)


@app.command()
def status(
    pipeline_id: Annotated[str | None, typer.Argument(metavar="ID")] = None,
    watching: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    limit: Limit = None,
    url: Url = None,
    key: Key = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Show one pipeline (stages, rows, money), or all of them."""
    screen = Screen(as_json=as_json)
    if pipeline_id is None and watching:
        raise typer.BadParameter("--watch needs a pipeline's id")
    patience = WATCH_PATIENCE_SECONDS if watching else 0.0
    with connect(url, key, root, patience_seconds=patience) as client:
        if pipeline_id is None:
            found = list(client.pipelines(limit=limit))
            if as_json:
                screen.data(found)
            elif found:
                screen.table(views.pipelines_table(found))
            else:
                screen.line("no pipelines yet: `stillhouse submit SPEC` makes one")
        elif watching:
            _follow(client, screen, pipeline_id)
        else:
            _show(screen, client.status(pipeline_id))


@app.command()
def events(
    pipeline_id: PipelineId,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Go on until it ends, or until --limit are shown."),
    ] = False,
    after: Annotated[int, typer.Option("--after", min=0, help="Only later ones.")] = 0,
    limit: Limit = None,
    url: Url = None,
    key: Key = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Show what happened, in order. With --json one event a line."""
    screen = Screen(as_json=as_json)
    patience = WATCH_PATIENCE_SECONDS if follow else 0.0
    with connect(url, key, root, patience_seconds=patience) as client:
        found = (
            client.follow(pipeline_id, after=after)
            if follow
            else client.events(pipeline_id, after=after, limit=limit)
        )
        for event in itertools.islice(found, limit):
            if as_json:
                screen.record(event)
            else:
                screen.line(views.event_line(event))


@app.command()
def samples(
    pipeline_id: PipelineId,
    split: Annotated[str | None, typer.Option(help="train, validation or test.")] = None,
    limit: Limit = 10,
    url: Url = None,
    key: Key = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Show rows of the dataset."""
    screen = Screen(as_json=as_json)
    with connect(url, key, root) as client:
        found = client.samples(pipeline_id, split=split, limit=limit)
    if as_json:
        screen.data(found)
    elif found["items"]:
        screen.table(views.rows_table(found["items"]))
    else:
        screen.line("no rows yet")


@app.command()
def rejections(
    pipeline_id: PipelineId,
    reason: Annotated[str | None, typer.Option(help="Only those with this reason.")] = None,
    limit: Limit = None,
    url: Url = None,
    key: Key = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Show which items became no row, and why."""
    screen = Screen(as_json=as_json)
    with connect(url, key, root) as client:
        found = list(client.rejections(pipeline_id, reason=reason, limit=limit))
    if as_json:
        screen.data(found)
    elif found:
        screen.table(views.rejections_table(found))
    else:
        screen.line(f"nothing was rejected as {reason}" if reason else "nothing was rejected")


@app.command()
def report(
    pipeline_id: PipelineId,
    url: Url = None,
    key: Key = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Show the figures of the student, and answers side by side."""
    screen = Screen(as_json=as_json)
    with connect(url, key, root) as client:
        found = client.report(pipeline_id)
    if as_json:
        screen.data(found)
        return
    show_report(screen, found)


@app.command()
def pull(
    pipeline_id: PipelineId,
    to: Annotated[
        Path | None, typer.Option("--to", help="Folder to make.", show_default=False)
    ] = None,
    url: Url = None,
    key: Key = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Fetch the student's folder, verified; a broken fetch goes on where it ended."""
    screen = Screen(as_json=as_json)
    with connect(url, key, root) as client:
        student = client.student(pipeline_id)
        folder = to or Path(student["student_id"])
        client.pull(pipeline_id, folder, progress=watch.fetching(screen))
    if as_json:
        screen.data({"student_id": student["student_id"], "path": str(folder.resolve())})
    else:
        screen.line(str(folder.resolve()))


@app.command()
def cancel(
    pipeline_id: PipelineId,
    url: Url = None,
    key: Key = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Stop a pipeline; what was asked already is still paid and listed."""
    screen = Screen(as_json=as_json)
    with connect(url, key, root) as client:
        found = client.cancel(pipeline_id)
    if as_json:
        screen.data(found)
    else:
        ends = found["state"] in ENDED
        screen.line(
            f"{pipeline_id} is {found['state']}"
            if ends
            else f"{pipeline_id} will be cancelled once what it reserved is settled"
        )


teachers = typer.Typer(
    name="teachers",
    help="Teachers for live traffic: `model` of OpenAI's API is the name of one.",
    no_args_is_help=True,
)
app.add_typer(teachers)


@teachers.command("add")
def add_teacher(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The teacher: YAML or JSON.")],
    url: Url = None,
    key: Key = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Register a teacher, or replace the one of the same name."""
    document = specs.load(file)
    name = document.get("name")
    if not isinstance(name, str):
        raise Refused(f"{file} has no `name`: callers give it as `model`")
    screen = Screen(as_json=as_json)
    with connect(url, key, root) as client:
        found = client.put_teacher(name, document)
        base_url = client.base_url
    if as_json:
        screen.data(found)
        return
    screen.line(f"{name} is registered under {found['verdict']['terms']}")
    for duty in found["verdict"]["duties"]:
        screen.line(f"  duty: {duty}")
    screen.progress(f"call it with base_url={base_url}/v1, a Stillhouse key and model={name}")


@teachers.command("list")
def list_teachers(
    url: Url = None, key: Key = None, root: Root = DEFAULT_ROOT, as_json: AsJson = False
) -> None:
    """Show the registered teachers with their money."""
    screen = Screen(as_json=as_json)
    with connect(url, key, root) as client:
        found = client.teachers()
    if as_json:
        screen.data(found)
    elif found:
        screen.table(views.teachers_table(found))
    else:
        screen.line("no teachers yet: `stillhouse teachers add FILE` registers one")


@teachers.command("remove")
def remove_teacher(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The teacher's name.")],
    url: Url = None,
    key: Key = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Take no more calls for a teacher; what was recorded and paid stays."""
    screen = Screen(as_json=as_json)
    with connect(url, key, root) as client:
        client.remove_teacher(name)
    if as_json:
        screen.data({"removed": name})
    else:
        screen.line(f"{name} is removed; what it answered stays: `stillhouse captured` shows it")


@app.command()
def captured(
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="NAME", help="Only of this teacher.")
    ] = None,
    url: Url = None,
    key: Key = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Show what was recorded of live traffic: by teacher and tag, and what failed; no texts."""
    screen = Screen(as_json=as_json)
    with connect(url, key, root) as client:
        found = client.captured(teacher=teacher)
        if as_json:
            screen.data(found)
            return
        names = [entry["teacher"] for entry in found["teachers"]]
        shown = names[:_TAGGED_TEACHERS]
        each = {name: client.captured(teacher=name) if len(names) > 1 else found for name in shown}
    if not names:
        screen.line(
            f"nothing was recorded of {teacher}"
            if teacher
            else "nothing was recorded yet: `stillhouse teachers add FILE` registers a teacher for "
            "live traffic"
        )
        return
    screen.table(views.captured_table(found))
    screen.line()
    screen.table(views.tags_table(each))
    if len(names) > len(shown) or found.get("next"):
        screen.line("there are more teachers: `--teacher NAME` shows one")
    if found["last_failures"]:
        screen.line()
        screen.line(f"failures{views.counted(found['reasons'], before=': ')}; the last ones:")
        screen.table(views.failures_table(found))


@app.command()
def up(
    root: Root = DEFAULT_ROOT,
    api_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the API.", show_default=False)
    ] = None,
    pass_env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[@HOST]",
            help="A variable for the services, such as a teacher's key; with @HOST it is sent to "
            "that host alone.",
        ),
    ] = None,
    file_root: Annotated[
        list[Path] | None,
        typer.Option(help="Folder below which specs may name files, beside ROOT/models."),
    ] = None,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Serve the demo's teacher too.")
    ] = False,
    quick_stop: Annotated[
        bool, typer.Option("--quick-stop", help="Do not wait for the store at the end.")
    ] = False,
) -> None:
    """Run the embedded stack in one folder until Ctrl-C."""
    from stillhouse.embedded.stack import StackOptions, run_stack

    options = StackOptions.from_environment(
        api_port=api_port,
        pass_env=tuple(pass_env or ()),
        file_roots=tuple(file_root or ()),
        teacher=teacher,
        quick_stop=quick_stop,
    )
    raise typer.Exit(run_stack(root, options, say=lambda line: print(line, flush=True)))


class Refused(Exception):
    """A command cannot do what it was asked; the text says what to do."""


def show_report(screen: Screen, found: Json) -> None:
    """The table of figures, then answers side by side."""
    screen.table(views.figures_table(found))
    for name, why in sorted((found.get("unmeasured") or {}).items()):
        screen.line(f"{name} was not measured: {why}")
    if found.get("samples"):
        screen.line()
        screen.table(views.answers_table(found))


def _show(screen: Screen, pipeline: Json) -> None:
    if screen.as_json:
        screen.data(pipeline)
        return
    for line in views.summary_lines(pipeline):
        screen.line(line)
    screen.table(views.stages_table(pipeline))


def _follow(client: Client, screen: Screen, pipeline_id: str) -> None:
    """Watch a pipeline to its end; a failed or withheld one is exit code 1."""
    try:
        ended = watch.pipeline(client, screen, pipeline_id)
    except KeyboardInterrupt:
        screen.progress(
            f"{pipeline_id} goes on: `stillhouse status {pipeline_id}` shows it, "
            f"`stillhouse cancel {pipeline_id}` stops it"
        )
        raise typer.Exit(130) from None
    if screen.as_json:
        screen.data(ended)
    elif ended["state"] == "released":
        screen.line(
            f"{pipeline_id} is released: `stillhouse report {pipeline_id}` shows its figures, "
            f"`stillhouse pull {pipeline_id} DIR` fetches the student"
        )
    if ended["state"] in ENDED and ended["state"] != "released":
        if not screen.as_json:
            raise Refused(
                f"{pipeline_id} is {ended['state']}: {ended.get('reason') or 'see events'}"
            )
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; every error of ours is one sentence."""
    words = sys.argv[1:]
    debug = "--debug" in words
    try:
        app([word for word in words if word != "--debug"])
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` had enough
        sys.exit(0)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if "--json" in words:
            problem = error.problem if isinstance(error, StillhouseApiError) else {}
            print(json.dumps({"error": _sentence(error), **problem}))
        else:
            print(f"stillhouse: {_sentence(error)}", file=sys.stderr)
        sys.exit(1)


def _sentence(error: Exception) -> str:
    from stillhouse.embedded.process import StackError

    if isinstance(error, Refused | StillhouseClientError | specs.SpecFileError | StackError):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, KeyError):
        return (
            f"the gateway's answer has no {error}: its version and this one differ; "
            "--debug shows where"
        )
    return f"{type(error).__name__}: {error} (a defect: --debug shows where)"


if __name__ == "__main__":
    main()
