"""How near does a real pipeline come to asking a teacher without a pause?

Part of `benchmarks.gateway`. The teacher answers after 50 ms whatever it is asked; the spec allows
64 calls at once. Ideal is items x 50 ms / 64; wall is from the first call for a train item to the
answer of the last, as the teacher saw them: claims, leases, ledger, parts in the store and the jobs
between are in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load import MARKS
from stillhouse.cli.client import Client, new_key
from stillhouse.embedded.ports import free_ports
from stillhouse.embedded.stack import StackOptions, running_stack

ITEMS, DELAY, AT_ONCE = 1000, 0.05, 64
BATCH = 128
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
        prompts = root / "prompts.jsonl"
        lines = [{"prompt": f"Question {n} [mark {n % MARKS}]"} for n in range(ITEMS + 50)]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        port = next(free_ports())
        command = [sys.executable, "-m", "benchmarks.load", "upstream"]
        command += ["--port", str(port), "--delay-ms", str(1000 * DELAY)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as teacher:
            assert teacher.stdout is not None
            teacher.stdout.readline()
            try:
                return _run(root, weights, prompts, f"http://127.0.0.1:{port}")
            finally:
                teacher.kill()


def _run(root: Path, weights: Path, prompts: Path, teacher: str) -> dict[str, float]:
    options = StackOptions.from_environment(
        quick_stop=True,
        services=SERVICES,
        file_roots=(root,),
        service_env={"TEACHER_GATEWAY_WORKER_PROCESSES": "5"},
    )
    with running_stack(root / "stack", options) as stack:
        assert stack.api_url is not None
        with Client(stack.api_url, stack.api_key) as client:
            posted = spec(weights, prompts, f"{teacher}/v1")
            pipeline = client.submit(posted, idempotency_key=new_key())["pipeline_id"]
            end = time.monotonic() + 300
            while True:
                found = client.status(pipeline)
                if found["responses_completed_at"] or found["ended_at"]:
                    break
                if time.monotonic() > end:
                    raise SystemExit(f"no last answer after 300 s; last seen: {found}")
                time.sleep(0.5)
        served: list[float] = httpx.get(f"{teacher}/times").json()
    if not found["responses_completed_at"]:
        raise SystemExit(f"the pipeline ended as {found['state']}: {found['reason']}")
    heldout = len(served) - ITEMS
    train = sorted(served)[heldout:]
    wall = train[-1] + DELAY - train[0]
    ideal = len(train) * DELAY / AT_ONCE
    return {
        "generation_items": float(len(train)),
        "generation_wall_seconds": wall,
        "generation_ideal_of_wall": ideal / wall,
    }


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
        "prompts": {"from": f"file:{prompts}", "heldout": 0.02, "batch": BATCH},
        "signal": {"kind": "text", "max_tokens": 256},
        "student": {"from": f"file:{weights}", "terms": "own-weights"},
        "training": {"loss": "sft"},
        "budget": {"teacher_usd": 100},
    }
