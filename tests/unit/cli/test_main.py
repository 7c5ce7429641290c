"""The command line as a user meets it: what is printed where, and with which exit code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stillhouse.cli import client
from stillhouse.cli import main as command_line
from tests.unit.cli.gateway import REPORT, STUDENT, FakeGateway, serving

SPEC = "version: 1\nname: demo\nprompts: {from: 'file:prompts.jsonl'}\n"


@dataclass
class Said:
    code: int
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
def run(
    gateway: FakeGateway,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Run]:
    """Run the command line in an empty folder, with the fake gateway in its environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(client, "_PAUSE", 0.01)
    (tmp_path / "spec.yaml").write_text(SPEC)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi?"}\n')

    def run(*words: str) -> Said:
        monkeypatch.setattr("sys.argv", ["stillhouse", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return Said(code if isinstance(code, int) else 0 if code is None else -1, out, err)

    with serving(gateway) as url:
        monkeypatch.setenv("STILLHOUSE_URL", url)
        monkeypatch.setenv("STILLHOUSE_API_KEY", "sth_test")
        yield run


def test_submit_uploads_the_prompts_and_prints_the_id_alone(run: Run, gateway: FakeGateway) -> None:
    said = run("submit", "spec.yaml")

    assert (said.code, said.out) == (0, "pl-1\n")
    assert "stillhouse status pl-1" in said.err
    assert [entry[0] for entry in gateway.asked] == ["PUT", "POST", "GET"]
    assert gateway.asked[1][3]["prompts"]["from"].startswith("upload:")


def test_submitting_a_spec_that_ended_says_how_to_run_it_again(
    run: Run, gateway: FakeGateway
) -> None:
    gateway.states = ["failed"]

    said = "ran before as pl-1 and is failed; `--new` runs it again"
    assert said in run("submit", "spec.yaml").err
    assert said in run("submit", "spec.yaml", "--watch").err


def test_an_error_with_json_is_json_on_standard_output(run: Run, gateway: FakeGateway) -> None:
    gateway.states = ["failed"]
    said = run("check", "no-such-file.yaml", "--json")
    assert "no-such-file.yaml" in json.loads(said.out)["error"]
    assert said.err == ""


def test_a_watched_pipeline_ends_with_its_outcome(run: Run, gateway: FakeGateway) -> None:
    gateway.states = ["running", "released"]
    said = run("submit", "spec.yaml", "--watch")

    assert said.code == 0
    assert said.err.splitlines()[0] == "submitted as pl-1"
    assert "collect   running    batches 3/4" in said.err
    assert "pl-1 is released: `stillhouse report pl-1`" in said.out


def test_a_watched_pipeline_that_fails_is_exit_code_one(run: Run, gateway: FakeGateway) -> None:
    gateway.states = ["running", "failed"]
    said = run("status", "pl-1", "--watch")

    assert said.code == 1
    assert said.err.splitlines()[-1] == "stillhouse: pl-1 is failed: teacher said no"


def test_status_shows_stages_rows_money_and_rejections(run: Run) -> None:
    said = run("status", "pl-1")

    assert said.code == 0
    assert said.err == ""
    assert "pl-1 (demo): running" in said.out
    assert "items 10, rows 7, pending 1, rejected 2: too_short 2" in said.out
    assert "cost $0.25 of $1.00" in said.out
    assert "build     running  rows 7/10, rejected 2, loss 0.5" in said.out


def test_status_without_an_id_lists_pipelines(run: Run) -> None:
    said = run("status")

    assert said.out.splitlines()[1].split() == [
        *("pl-1", "demo", "running", "7", "$0.25", "2026-01-02", "03:04:05")
    ]


def test_report_shows_three_models_and_their_answers(run: Run) -> None:
    lines = run("report", "pl-1").out.splitlines()

    assert lines[0] == "test rows, step 12"
    assert lines[1].split() == [
        *("model", "KL", "top-k", "KL", "full", "perplexity", "top-1", "stop", "rate"),
        *("rows", "tokens"),
    ]
    assert lines[3].split()[:2] == ["untrained", "student"]
    assert lines[4].split()[2:] == [
        "1.0000",
        "1.5000",
        "9.5000",
        "50.0",
        "%",
        "75.0",
        "%",
        "8",
        "80",
    ]
    assert lines[6:] == [
        "prompt             Hi?",
        "teacher            Yes?[2J",
        "untrained student  (ended at once)",
        "student            Ye",
    ]


def test_events_rejections_and_samples_are_lines(run: Run) -> None:
    assert run("events", "pl-1").out.split() == [
        *("1", "2026-01-02", "03:04:05", "shard.written", "batch=3")
    ]
    assert "too_short  0 chars" in run("rejections", "pl-1").out
    assert run("samples", "pl-1").out.splitlines() == [
        *("split   train", "prompt  Hi?", "answer  Yes.", "end     stop")
    ]


def test_following_events_ends_with_the_pipeline(run: Run, gateway: FakeGateway) -> None:
    gateway.states = ["running", "released"]

    assert len(run("events", "pl-1", "--follow").out.splitlines()) == 1


def test_following_events_ends_at_the_limit_though_the_pipeline_goes_on(run: Run) -> None:
    said = run("events", "pl-1", "--follow", "--limit", "1")

    assert (said.code, len(said.out.splitlines())) == (0, 1)


def test_captured_shows_teachers_tags_and_failures(run: Run, gateway: FakeGateway) -> None:
    at = "2026-01-02 03:04:05"
    assert run("captured").out.splitlines() == [
        f"teacher  records  failures   cost  first{' ' * 16}last",
        f"live           5         2  $0.30  {at}  {at}",
        f"spare          1         0  $0.00  {at}  {at}",
        "",
        "teacher  tag   value    records",
        "live     app   support        3",
        "live     app   shop           1",
        "live     team  a              2",
        "",
        "failures: no_done 2; the last ones:",
        "at                   teacher  reason   status  detail",
        f"{at}  live     no_done     200  it broke off",
    ]
    gateway.asked.clear()
    assert "spare" not in run("captured", "--teacher", "live").out
    assert [query for _, _, query, _ in gateway.asked] == [{"teacher": "live"}]
    assert run("captured", "--teacher", "none").out == "nothing was recorded of none\n"


def test_pull_makes_the_folder_and_prints_where(run: Run, tmp_path: Path) -> None:
    said = run("pull", "pl-1", "--to", "mine")

    assert said.out == f"{tmp_path / 'mine'}\n"
    assert {p.name: p.read_bytes() for p in (tmp_path / "mine").iterdir()} == STUDENT


def test_cancel_says_what_became_of_it(run: Run) -> None:
    assert run("cancel", "pl-1").out == "pl-1 is cancelled\n"


@pytest.mark.parametrize(
    "words",
    [
        ("submit", "spec.yaml"),
        ("status",),
        ("status", "pl-1"),
        ("events", "pl-1"),
        ("samples", "pl-1"),
        ("rejections", "pl-1"),
        ("report", "pl-1"),
        ("pull", "pl-1"),
        ("cancel", "pl-1"),
        ("captured",),
        ("init", "new.yaml"),
    ],
    ids=" ".join,
)
def test_with_json_the_output_is_json_and_nothing_else(run: Run, words: tuple[str, ...]) -> None:
    said = run(*words, "--json")

    assert said.code == 0
    json.loads(said.out)
    assert said.err == ""


def test_the_report_as_json_is_the_gateways(run: Run) -> None:
    assert json.loads(run("report", "pl-1", "--json").out) == REPORT


def test_a_problem_is_one_sentence_and_exit_code_one(run: Run, gateway: FakeGateway) -> None:
    gateway.problem = (404, {"title": "Not Found", "detail": "there is no such pipeline"})

    said = run("report", "pl-2")
    assert (said.code, said.out) == (1, "")
    assert said.err == "stillhouse: there is no such pipeline\n"


def test_without_a_gateway_the_error_says_how_to_start_one(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STILLHOUSE_URL")
    monkeypatch.delenv("STILLHOUSE_API_KEY")

    said = run("status")
    assert (said.code, said.out) == (1, "")
    assert "start one with `stillhouse up`" in said.err
    assert len(said.err.splitlines()) == 1


def test_a_traceback_shows_only_when_asked_for(run: Run) -> None:
    assert "Traceback" not in run("check", "none.yaml").err
    assert "Traceback" in run("check", "none.yaml", "--debug").err


@pytest.mark.parametrize(
    "words",
    [
        ("frobnicate",),
        ("status", "--limit", "0"),
        ("submit",),
        ("status", "--watch"),
        ("pull", "-x"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_two(run: Run, words: tuple[str, ...]) -> None:
    assert run(*words).code == 2


def test_init_never_overwrites(run: Run, tmp_path: Path) -> None:
    assert run("init").code == 0
    (tmp_path / "pipeline.yaml").write_text("mine")

    said = run("init")
    assert said.code == 1
    assert "exists already" in said.err
    assert (tmp_path / "pipeline.yaml").read_text() == "mine"


def test_an_answer_in_another_shape_is_called_a_difference_of_versions(
    run: Run, gateway: FakeGateway
) -> None:
    gateway.problem = (200, {"pipeline_id": "pl-1"})

    said = run("status", "pl-1")
    assert said.code == 1
    assert "version" in said.err
