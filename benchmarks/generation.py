"""How near does a real pipeline come to asking a teacher without a pause?

Part of `benchmarks.gateway`. The teacher answers after 50 ms whatever it is asked; the spec allows
64 calls at once. Ideal is items x 50 ms / 64; wall is from the first call for a train item to the
answer of the last, as the teacher saw them: claims, leases, ledger, parts in the store and the jobs
between are in it. A pipeline of other prompts goes first, so that no worker's first job is in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load import MARKS
from services.teacher_gateway.prompts.lines import prompt_sha256
from stillhouse.cli.client import Client, new_key
from stillhouse.contracts.chat import Message
from stillhouse.contracts.spec import heldout_split
from stillhouse.embedded.ports import free_ports
from stillhouse.embedded.stack import StackOptions, running_stack

ITEMS, HELDOUT, SEED = 1000, 0.02, 7
DELAY, AT_ONCE = 0.05, 64
BATCH, WORKERS = 200, 6
WARM_UP = 600
SERVICES = (
    "teacher_gateway.api",
    "teacher_gateway.worker",
    "teacher_gateway.clock",
    "dataset_builder.worker",
)


def measure_generation() -> dict[str, float]:
    """Run one pipeline up to its last answer; return what it took and what would be ideal."""
    with tempfile.TemporaryDirectory(prefix="stillhouse-generation-") as made:
        root = Path(made)
        weights = root / "models" / "smollm2-135m-instruct"
        subprocess.run(
            [sys.executable, "-m", "stillhouse.embedded.weights", str(weights)], check=True
        )
        port = next(free_ports())
        command = [sys.executable, "-m", "benchmarks.load", "upstream"]
        command += ["--port", str(port), "--delay-ms", str(1000 * DELAY)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as teacher:
            assert teacher.stdout is not None
            teacher.stdout.readline()
            try:
                return _run(root, weights, f"http://127.0.0.1:{port}")
            finally:
                teacher.kill()


def _run(root: Path, weights: Path, teacher: str) -> dict[str, float]:
    options = StackOptions.from_environment(
        quick_stop=True,
        services=SERVICES,
        file_roots=(root,),
        service_env={"TEACHER_GATEWAY_WORKER_PROCESSES": str(WORKERS)},
    )
    with running_stack(root / "stack", options) as stack:
        assert stack.api_url is not None
        with Client(stack.api_url, stack.api_key) as client:
            for name, count in (("Warm-up", WARM_UP), ("Question", ITEMS)):
                prompts = root / f"{name}.jsonl"
                prompts.write_text("".join(_lines(name, count)))
                _answered(client, spec(weights, prompts, f"{teacher}/v1"))
        served: list[float] = httpx.get(f"{teacher}/times").json()
    train = sorted(served)[-ITEMS:]
    wall = train[-1] + DELAY - train[0]
    ideal = len(train) * DELAY / AT_ONCE
    return {
        "generation_items": float(len(train)),
        "generation_wall_seconds": wall,
        "generation_ideal_of_wall": ideal / wall,
    }


def _lines(name: str, items: int) -> Iterator[str]:
    """Prompts of which so many are not held out."""
    number = 0
    while items:
        text, number = f"{name} {number} [mark {number % MARKS}]", number + 1
        sha256 = prompt_sha256([Message(role="user", content=text)])
        items -= heldout_split(sha256, HELDOUT, SEED) == "train"
        yield json.dumps({"prompt": text}) + "\n"


def _answered(client: Client, posted: dict[str, Any]) -> None:
    """Submit a pipeline and wait for its last answer."""
    pipeline = client.submit(posted, idempotency_key=new_key())["pipeline_id"]
    end = time.monotonic() + 300
    while True:
        found = client.status(pipeline)
        if found["responses_completed_at"]:
            return
        if found["ended_at"]:
            raise SystemExit(f"the pipeline ended as {found['state']}: {found['reason']}")
        if time.monotonic() > end:
            raise SystemExit(f"no last answer after 300 s; last seen: {found}")
        time.sleep(0.5)


def spec(weights: Path, prompts: Path, url: str) -> dict[str, Any]:
    return {
        "version": 1,
        "name": "generation",
        "teachers": [
            {
                "name": "teacher",
                "url": url,
                "model": "upstream",
                "terms": "own-weights",
                "usd_per_million": {"input": 0.1, "output": 0.2},
                "limits": {"concurrency": AT_ONCE},
            }
        ],
        "prompts": {"from": f"file:{prompts}", "heldout": HELDOUT, "batch": BATCH},
        "signal": {"kind": "text", "max_tokens": 256},
        "student": {"from": f"file:{weights}", "terms": "own-weights"},
        "training": {"loss": "sft", "seed": SEED},
        "budget": {"teacher_usd": 100},
    }
