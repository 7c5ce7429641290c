"""The demo leaves no process behind, however it ends; what it does is tested end to end."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from stillhouse.embedded.stack import SERVICE_PROCESSES
from tests.support.waiting import wait_for

DEMO = Path(__file__).parents[2] / "demo" / "run.py"
PROCESSES = {"valkey", "seaweedfs", "teacher", *SERVICE_PROCESSES}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "smollm2-135m-instruct"
    command = [sys.executable, "-m", "stillhouse.embedded.weights", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture
def demo(weights: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo that found its weights written, and now starts its stack. They are real ones, so that
    its pipeline goes on however late a test ends it."""
    shutil.copytree(weights, tmp_path / "models" / weights.name, copy_function=os.link)
    process = subprocess.Popen(
        [sys.executable, str(DEMO), "--root", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def pids(root: Path) -> set[int]:
    processes = json.loads((root / "stack.json").read_text())["processes"]
    return {entry["pid"] for entry in processes.values() if set(processes) == PROCESSES}


def alive(root: Path, known: set[int]) -> list[str]:
    """What still runs of a stack: its processes, and whatever names its folder."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        if process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        words = " ".join(process.info["cmdline"] or ())
        if process.pid in known or str(root) in words:
            found.append(f"{process.pid} {words[:80]}")
    return found


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(demo: subprocess.Popen[str], tmp_path: Path) -> None:
    known = wait_for(lambda: pids(tmp_path), 90, "the stack starts all its processes")

    demo.send_signal(signal.SIGINT)
    said, _ = demo.communicate(timeout=60)

    assert demo.returncode == 130, said
    assert said.splitlines()[-1] == "stopped; nothing runs any more"
    assert "Traceback" not in said
    assert alive(tmp_path, known) == []


@pytest.mark.slow
def test_a_killed_demo_leaves_no_process(demo: subprocess.Popen[str], tmp_path: Path) -> None:
    known = wait_for(lambda: pids(tmp_path), 90, "the stack starts all its processes")

    demo.kill()
    demo.wait()

    wait_for(lambda: not alive(tmp_path, known), 20, "the stack is gone with its demo")


def test_a_second_demo_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "stack.json").write_text(json.dumps({"state": "ready"}))
    with (tmp_path / "run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, str(DEMO), "--root", str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    assert done.returncode == 1
    assert "already runs" in done.stderr
    assert (tmp_path / "stack.json").exists()
