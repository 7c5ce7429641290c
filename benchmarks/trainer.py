"""How many tokens does the trainer learn from in a second of CPU, beside other trainers?

    .venv/bin/python -m benchmarks.trainer [--steps 4] [--rounds 2] [--folder DIR]

One thread, the same random model, rows and optimiser for all, float32 (and bfloat16 for ours, where
a probe finds it faster). Two shapes: a student whose head is three quarters of it, and one whose
head is a tenth. Learnt are tokens (TRL's SFTTrainer), stored top-k with its tail (a Hugging Face
Trainer with whole logits), and a teacher's whole distribution (TRL's GKDTrainer, off-policy, the
teacher's forward left out of both and stated). Each run is a process of its own; runs are
interleaved, and the median of the rounds is shown. The losses of all steps must agree.

Cost grows with rounds x shapes x steps (about 15 minutes).
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import targets
from benchmarks.peers import peer_venv, versions
from benchmarks.trainer_data import LENGTH, PROMPT, ROWS, SHAPES, write

PEERS = ("trl", "transformers", "accelerate", "datasets")
TORCH = "torch==2.13.0"
# What is compared: rows in a batch, the peer, and ours (loss, distribution).
KINDS = {"sft": ROWS, "topk": ROWS, "gkd": 2}
# Steps of different trainers may differ by the order of sums alone.
AGREE = 2e-3


@dataclass(frozen=True)
class Run:
    """One process: who, over which shape, what it learns from."""

    who: str
    shape: str
    kind: str
    dtype: str = "float32"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(".stillhouse/benchmarks"))
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=tuple(KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.ours is not None:
        print(json.dumps(ours(told.ours, told.kind, told.steps, told.dtype)))
        return 0
    told.folder.mkdir(parents=True, exist_ok=True)
    python = peer_venv("trainer", (TORCH, *PEERS), told.folder)
    with tempfile.TemporaryDirectory(prefix="stillhouse-trainer-") as made:
        folders = {}
        for shape in SHAPES:
            folders[shape] = Path(made) / shape
            folders[shape].mkdir()
            write(folders[shape], shape, told.steps)
        found = measure(python, folders, told.rounds, told.steps)
    print_table(found, versions(python, ("trl", "transformers", "torch")))
    return targets.report(figures_of(found), TARGETS)


def measure(
    python: Path, folders: dict[str, Path], rounds: int, steps: int
) -> dict[Run, list[dict[str, Any]]]:
    runs = [
        Run(who, shape, kind)
        for shape in SHAPES
        for kind in KINDS
        for who in ("peer", "stillhouse")
    ]
    runs += [Run("stillhouse", shape, "topk", "bfloat16") for shape in SHAPES]
    found: dict[Run, list[dict[str, Any]]] = {run: [] for run in runs}
    for number in range(rounds):
        for run in runs:
            found[run].append(start(python, run, folders[run.shape], steps))
            speed = per_cpu_second(found[run][-1])
            sys.stderr.write(f"round {number + 1}: {run}: {speed:.0f} tokens a CPU second\n")
    for run in runs:
        check_losses(run, found)
    return found


def start(python: Path, run: Run, folder: Path, steps: int) -> dict[str, Any]:
    if run.who == "peer":
        command = [str(python), "-m", "benchmarks.trainer_peers", run.kind]
        command += ["--folder", str(folder), "--batch", str(KINDS[run.kind])]
    else:
        command = [sys.executable, "-m", "benchmarks.trainer", "--ours", str(folder)]
        command += ["--kind", run.kind, "--dtype", run.dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [*command, "--steps", str(steps)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{run} failed: {done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check_losses(run: Run, found: dict[Run, list[dict[str, Any]]]) -> None:
    """Every run must have learnt the same as the peer: else its speed says nothing."""
    wanted = found[Run("peer", run.shape, run.kind)][0]["losses"]
    allowed = AGREE if run.dtype == "float32" else 10 * AGREE
    for each in found[run]:
        for step, (one, other) in enumerate(zip(wanted, each["losses"], strict=True), 1):
            if abs(one - other) > allowed * max(1.0, abs(one)):
                raise SystemExit(f"{run}: loss {other} in step {step}, expected {one}")


def ours(folder: Path, kind: str, steps: int, dtype: str) -> dict[str, Any]:
    """The trainer's own steps over the same rows: collate, forward, loss, backward, AdamW."""
    import numpy as np
    import torch

    from benchmarks.trainer_memory import MemoryPeak
    from services.trainer import plan, probe
    from services.trainer.data import Row
    from services.trainer.gradients import Passes
    from services.trainer.losses import WholeTargets
    from services.trainer.optim import Optimizer
    from services.trainer.settings import TrainerSettings
    from services.trainer.student import decoder_layers, open_folder
    from stillhouse.contracts import signals
    from stillhouse.contracts.spec import Training
    from stillhouse.contracts.trainings import Plan

    settings = TrainerSettings(broker_url="memory://", device="cpu", dtype=dtype)
    plan.set_up_torch(settings)
    said: dict[str, Any] = {"learning_rate": 1e-4, "warmup_steps": 0}
    if kind == "sft":
        said["loss"] = "sft"
    if kind == "gkd":
        said |= {"loss": "forward_kl", "distribution": "weights"}
    training = Training(**said)
    model = open_folder(folder / "model")
    teacher = open_folder(folder / "teacher").requires_grad_(False) if kind == "gkd" else None
    stored = np.load(folder / "rows.npz")
    batch = KINDS[kind]
    rows = []
    for n in range(steps * batch):
        topk = signals.TopK(stored["kept"][n], stored["logp"][n], stored["tail"][n])
        signal = signals.encode(topk) if kind == "topk" else None
        rows.append(Row(f"r{n}", 0, stored["ids"][n], PROMPT, signal))
    optimizer = Optimizer(model, training)
    teacher_seconds: list[float] = []
    if teacher is not None:
        teacher.model.forward = _timed(teacher.model.forward, teacher_seconds)
        WholeTargets.spread = _timed(WholeTargets.spread, teacher_seconds)  # type: ignore[method-assign]
    here = plan.environment(torch.device("cpu"), settings)
    found = probe.suited(model, len(decoder_layers(model)), torch.device("cpu"), settings, here)
    settled = Plan(
        training_id="benchmark",
        micro_batch_tokens=found.micro_batch_tokens,
        activation_bytes=found.activation_bytes,
        environment=here.model_copy(update={"dtype": found.dtype}),
        started_at="",
    )
    passes = Passes(training, torch.device("cpu"), settled, teacher=teacher)
    losses, marks = [], []
    with MemoryPeak() as memory:
        for step in range(steps):
            losses.append(passes.gradient(model, rows[step * batch : (step + 1) * batch]))
            optimizer.clip()
            optimizer.step(plan.learning_rate(training, step + 1, None))
            marks.append(time.process_time())
    return {
        "tokens": (steps - 1) * batch * (LENGTH - PROMPT),
        "cpu_seconds": marks[-1] - marks[0],
        "teacher_seconds": sum(teacher_seconds[len(teacher_seconds) // steps :]),
        "memory_mb": memory.over_start / 2**20,
        "losses": losses,
    }


def _timed(inner: Any, seconds: list[float]) -> Any:
    def forward(*given: Any, **named: Any) -> Any:
        started = time.process_time()
        try:
            return inner(*given, **named)
        finally:
            seconds.append(time.process_time() - started)

    return forward


def per_cpu_second(result: dict[str, Any]) -> float:
    return float(result["tokens"] / (result["cpu_seconds"] - result["teacher_seconds"]))


def print_table(found: dict[Run, list[dict[str, Any]]], installed: dict[str, str]) -> None:
    names = {"sft": "SFT: TRL", "topk": "top-k: Hugging Face Trainer", "gkd": "whole: TRL GKD"}
    print("  ".join(f"{name} {version}" for name, version in installed.items()))
    print(f"{'':<44}{'tokens/CPU s':>13}{'range':>14}{'memory MB':>11}{'teacher s':>11}")
    for run, results in found.items():
        name = names[run.kind].split(": ")
        who = name[1] if run.who == "peer" else f"stillhouse {run.dtype}"
        speeds = [per_cpu_second(result) for result in results]
        memory = statistics.median(result["memory_mb"] for result in results)
        teacher = statistics.median(result["teacher_seconds"] for result in results)
        print(
            f"{run.shape:<12}{name[0]:<7}{who:<25}{statistics.median(speeds):>13.0f}"
            f"{f'{min(speeds):.0f}-{max(speeds):.0f}':>14}{memory:>11.0f}{teacher:>11.2f}"
        )


def figures_of(found: dict[Run, list[dict[str, Any]]]) -> dict[str, float]:
    def speed(run: Run) -> float:
        return statistics.median(per_cpu_second(result) for result in found[run])

    def memory(run: Run) -> float:
        return statistics.median(float(result["memory_mb"]) for result in found[run])

    figures: dict[str, float] = {}
    for shape in SHAPES:
        label = shape.replace("-", "_")
        for kind in KINDS:
            peer, mine = Run("peer", shape, kind), Run("stillhouse", shape, kind)
            figures[f"{kind}_of_peer_{label}"] = speed(mine) / speed(peer)
            figures[f"{kind}_memory_of_peer_{label}"] = memory(mine) / memory(peer)
        narrow = Run("stillhouse", shape, "topk", "bfloat16")
        figures[f"topk_bfloat16_of_peer_{label}"] = speed(narrow) / speed(
            Run("peer", shape, "topk")
        )
    return figures


TARGETS = {
    "sft_of_peer_head_heavy": ("at least", 2.5),
    "sft_of_peer_head_light": ("at least", 1.2),
    "topk_of_peer_head_heavy": ("at least", 1.3),
    "topk_bfloat16_of_peer_head_heavy": ("at least", 1.7),
    "gkd_of_peer_head_heavy": ("at least", 4.0),
    "sft_memory_of_peer_head_heavy": ("at most", 0.35),
    "topk_memory_of_peer_head_heavy": ("at most", 0.5),
}


if __name__ == "__main__":
    sys.exit(main())
