"""What does a request through the capture endpoint cost, beside other gateways?

    .venv/bin/python -m benchmarks.gateway [--seconds 3] [--rounds 3] [--folder DIR]

Five ways from the same client to the same upstream (1.1 kB answers): straight; ours, which checks
a key, counts money and records durably; TensorZero's embedded gateway with recording off; FastAPI
with aiohttp that appends both bodies to a file; LiteLLM's proxy with a master key. Each gateway has
one core to itself; client, upstream, store and everything else have the other. They are measured in
turn, round after round, while the others have nothing to do, and the median of the rounds is shown.
Every answer is compared with what the upstream says to that question.

CPU is that of the gateway's processes, divided by the requests; ours is read once all its records
are in the store. Then one real pipeline asks a teacher that takes 50 ms for 1,000 train items, 64
at once: ideal time over the time from the first call to the last answer, as the teacher saw them.

Cost grows with rounds x shapes x gateways x seconds (about 5 minutes).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import targets
from benchmarks.generation import measure_generation
from benchmarks.load import MARKS, content, question
from benchmarks.peers import peer_venv, versions
from stillhouse.embedded.ports import free_ports
from stillhouse.embedded.stack import StackInfo, StackOptions, running_stack

PEERS = ("litellm[proxy]", "tensorzero", "openai", "fastapi", "aiohttp", "uvicorn", "uvloop")
# Connections and the upstream's delay in ms.
SHAPES = ((1, 0), (32, 0), (256, 0), (256, 50))
GATEWAY_CORE, OTHER_CORE = 0, 1
OURS, TENSORZERO, FASTAPI, LITELLM, DIRECT = "stillhouse", "tensorzero", "fastapi", "litellm", "-"


@dataclass
class Gateway:
    """One way to the upstreams; `pids` are the processes whose CPU counts."""

    name: str
    urls: dict[int, str]
    model: str
    key: str
    pids: list[int] = field(default_factory=list)

    def tree(self) -> list[psutil.Process]:
        found = [psutil.Process(pid) for pid in self.pids]
        return found + [child for one in found for child in one.children(recursive=True)]

    def cpu(self) -> float:
        """CPU seconds so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self.tree())


@dataclass(frozen=True)
class Sample:
    requests: int
    per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(".stillhouse/benchmarks"))
    parser.add_argument("--only", choices=("capture", "generation"))
    chosen = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        sys.stderr.write("expected two cores: one for the gateway, one for everything else\n")
        return 2
    chosen.folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    if chosen.only != "generation":
        python = peer_venv("gateway", PEERS, chosen.folder)
        figures |= capture(python, chosen.rounds, chosen.seconds)
    if chosen.only != "capture":
        os.sched_setaffinity(0, {GATEWAY_CORE, OTHER_CORE})
        figures |= measure_generation()
    return targets.report(figures, TARGETS)


def capture(python: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure all gateways in turn; return the figures that the targets judge."""
    os.sched_setaffinity(0, {OTHER_CORE})  # children inherit it
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="stillhouse-gateway-") as made:
        folder = Path(made)
        upstreams = {delay: stack.enter_context(upstream(delay)) for delay in (0, 50)}
        gateways = [
            Gateway(
                DIRECT, {d: f"{url}/chat/completions" for d, url in upstreams.items()}, "m", "none"
            )
        ]
        gateways += [
            stack.enter_context(peer(python, name, upstreams, folder))
            for name in (TENSORZERO, FASTAPI, LITELLM)
        ]
        ours, client = stack.enter_context(stillhouse(upstreams, folder / "stack"))
        gateways.append(ours)
        checked = {gateway.name: check_answers(gateway) for gateway in gateways}
        wait_for_records(client, checked[OURS])
        samples = measure(python, gateways, client, rounds, seconds)
    print_table(samples, versions(python, ("tensorzero", "litellm", "fastapi", "aiohttp")))
    return figures_of(samples)


@contextmanager
def upstream(delay_ms: int) -> Iterator[str]:
    port = next(free_ports())
    command = [sys.executable, "-m", "benchmarks.load", "upstream"]
    command += ["--port", str(port), "--delay-ms", str(delay_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


@contextmanager
def peer(python: Path, name: str, upstreams: dict[int, str], folder: Path) -> Iterator[Gateway]:
    """Start a peer once for each upstream, on the gateways' core."""
    with ExitStack() as stack:
        urls: dict[int, str] = {}
        pids: list[int] = []
        told: dict[str, str] = {}
        for delay, url in upstreams.items():
            own = folder / f"{name}-{delay}"
            own.mkdir()
            command = [str(python), "-m", "benchmarks.gateway_peers", name, "--upstream", url]
            command += ["--folder", str(own), "--port", str(next(free_ports()))]
            log = stack.enter_context((own / "log").open("wb"))
            process = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
            )
            stack.callback(_end, process)
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(b'{"url"'):
                    told = json.loads(line)
                    break
            else:
                raise SystemExit(f"{name} did not start: {(own / 'log').read_text()[-2000:]}")
            urls[delay] = told["url"]
            pids.append(process.pid)
            pin(process.pid)
        yield Gateway(name, urls, told["model"], told["key"], pids)


def _end(process: subprocess.Popen[bytes]) -> None:
    for one in (*psutil.Process(process.pid).children(recursive=True), process):
        one.kill()


@contextmanager
def stillhouse(upstreams: dict[int, str], root: Path) -> Iterator[tuple[Gateway, httpx.Client]]:
    """The embedded stack with one teacher for each upstream; its API has the gateways' core."""
    options = StackOptions(services=("teacher_gateway.api",), quick_stop=True)
    with running_stack(root, options) as stack, client_of(stack) as client:
        for delay, url in upstreams.items():
            answer = client.put(f"/v1/teachers/upstream-{delay}", json=registered(url))
            answer.raise_for_status()
        pid = stack.pid("teacher_gateway.api")
        pin(pid)
        assert stack.api_key is not None
        url = f"{stack.api_url}/v1/chat/completions"
        gateway = Gateway(
            OURS, dict.fromkeys(upstreams, url), "upstream-{delay}", stack.api_key, [pid]
        )
        yield gateway, client


def registered(url: str) -> dict[str, Any]:
    return {
        "url": url,
        "model": "upstream",
        "terms": "own-weights",
        "usd_per_million": {"input": 0.1, "output": 0.2},
        "limits": {"concurrency": 1024},
        "budget_usd": 1_000_000,
    }


def client_of(stack: StackInfo) -> httpx.Client:
    assert stack.api_url is not None
    headers = {"Authorization": f"Bearer {stack.api_key}"}
    return httpx.Client(base_url=stack.api_url, headers=headers, timeout=30)


def pin(pid: int) -> None:
    """Give a process with all its threads the gateways' core."""
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        for thread in process.threads():
            with suppress(ProcessLookupError):  # it has just ended
                os.sched_setaffinity(thread.id, {GATEWAY_CORE})


def check_answers(gateway: Gateway) -> int:
    """Some answers compared as a whole, before anything is timed; return how many."""
    asked = 0
    for delay, url in gateway.urls.items():
        for mark in range(0, MARKS, 9):
            body = question(gateway.model.format(delay=delay), mark)
            headers = {
                "Authorization": f"Bearer {gateway.key}",
                "Content-Type": "application/json",
            }
            answer = httpx.post(url, content=body, headers=headers, timeout=60)
            answer.raise_for_status()
            found = answer.json()["choices"][0]["message"]["content"]
            if found != content(mark):
                raise SystemExit(f"{gateway.name} gave another answer: {found[:200]!r}")
            asked += 1
    return asked


def measure(
    python: Path, gateways: list[Gateway], client: httpx.Client, rounds: int, seconds: float
) -> dict[tuple[str, int, int], list[Sample]]:
    samples: dict[tuple[str, int, int], list[Sample]] = {}
    recorded = recorded_now(client)
    for number in range(rounds):
        for connections, delay in SHAPES:
            for gateway in gateways:
                before = gateway.cpu()
                found = ask(python, gateway, connections, delay, seconds)
                if gateway.name == OURS:
                    recorded += found["requests"]
                    wait_for_records(client, recorded)
                used = gateway.cpu() - before
                count = found["requests"]
                sample = Sample(
                    count,
                    count / found["seconds"],
                    found["p50_ms"],
                    found["p99_ms"],
                    1e6 * used / count,
                )
                samples.setdefault((gateway.name, connections, delay), []).append(sample)
                sys.stderr.write(
                    f"round {number + 1}: {gateway.name:<11} {connections:>4} connections "
                    f"{delay:>3} ms: {sample.per_second:9.0f}/s {sample.cpu_us:8.0f} us\n"
                )
    return samples


def ask(
    python: Path, gateway: Gateway, connections: int, delay: int, seconds: float
) -> dict[str, Any]:
    command = [str(python), "-m", "benchmarks.load", "ask", "--url", gateway.urls[delay]]
    command += ["--model", gateway.model.format(delay=delay), "--key", gateway.key]
    command += ["--connections", str(connections), "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 120)
    if done.returncode:
        raise SystemExit(f"{gateway.name}: {done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def recorded_now(client: httpx.Client) -> int:
    return int(client.get("/v1/captured").raise_for_status().json()["records"])


def wait_for_records(client: httpx.Client, expected: int) -> None:
    """Until every exchange is in the store and its index: recording is part of the work."""
    end = time.monotonic() + 60
    while (found := recorded_now(client)) != expected:
        if time.monotonic() > end or found > expected:
            raise SystemExit(f"expected {expected} records in the store, found {found}")
        time.sleep(0.1)


def median(samples: dict[tuple[str, int, int], list[Sample]], key: Any, what: str) -> float:
    return statistics.median(getattr(sample, what) for sample in samples[key])


def print_table(samples: dict[tuple[str, int, int], list[Sample]], found: dict[str, str]) -> None:
    print("  ".join(f"{name} {version}" for name, version in found.items()))
    print(
        f"{'gateway':<12}{'c':>5}{'ms':>4}{'req/s':>10}{'p50 ms':>9}{'p99 ms':>9}"
        f"{'CPU us':>9}  range"
    )
    for (name, connections, delay), all_of_it in samples.items():
        key = (name, connections, delay)
        cpu = [sample.cpu_us for sample in all_of_it]
        print(
            f"{name:<12}{connections:>5}{delay:>4}{median(samples, key, 'per_second'):>10.0f}"
            f"{median(samples, key, 'p50_ms'):>9.2f}{median(samples, key, 'p99_ms'):>9.2f}"
            f"{median(samples, key, 'cpu_us'):>9.0f}  {min(cpu):.0f}-{max(cpu):.0f}"
        )


def figures_of(samples: dict[tuple[str, int, int], list[Sample]]) -> dict[str, float]:
    def cpu(name: str, connections: int = 32) -> float:
        return median(samples, (name, connections, 0), "cpu_us")

    def p99(name: str) -> float:
        return median(samples, (name, 32, 0), "p99_ms")

    return {
        "cpu_us_a_request": cpu(OURS),
        "cpu_us_a_request_tensorzero": cpu(TENSORZERO),
        "cpu_of_tensorzero": cpu(OURS) / cpu(TENSORZERO),
        "requests_a_cpu_second_of_litellm": cpu(LITELLM) / cpu(OURS),
        "p99_ms_at_32": p99(OURS),
        "p99_ms_at_32_fastapi": p99(FASTAPI),
        "p99_of_fastapi": p99(OURS) / p99(FASTAPI),
        "cost_at_256_of_1": cpu(OURS, 256) / cpu(OURS, 1),
    }


# What each figure must be: at most, or at least.
TARGETS: dict[str, tuple[str, float]] = {
    "cpu_us_a_request": ("at most", 250),
    "cpu_of_tensorzero": ("at most", 1.0),
    "requests_a_cpu_second_of_litellm": ("at least", 50),
    "p99_of_fastapi": ("at most", 1.0),
    "cost_at_256_of_1": ("at most", 1.3),
    "generation_ideal_of_wall": ("at least", 0.8),
}


if __name__ == "__main__":
    sys.exit(main())
