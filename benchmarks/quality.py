"""Does the teacher's distribution teach more than its text? KD against SFT on a real teacher.

    .venv/bin/python -m benchmarks.quality [--root DIR] [--rates 1e-4 2e-4 4e-4]

The demo's teacher answers the demo's prompts once, through the real gateway and builder. From the
same shards the trainer then makes one student for each loss (forward KL on top-k + tail; SFT on
the teacher's tokens) and learning rate: same initial weights, same order, same supervised tokens.
For each loss the rate with the lowest `kl_full` on the validation rows is chosen, and its student
is measured on the test rows, which chose nothing. Met only if KD's `kl_full` is lower than SFT's.

The interval is a bootstrap over test prompts of the paired difference. One seed: see
`docs/benchmarks.md` for what that can and cannot show. Cost grows with rates x losses x tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from stillhouse.chassis.storage import ObjectStore
from stillhouse.cli import specs
from stillhouse.cli.client import Client, new_key
from stillhouse.contracts import artifacts
from stillhouse.contracts.envelope import Envelope, seal
from stillhouse.contracts.events import PipelineAccepted
from stillhouse.contracts.shards import Heldout
from stillhouse.contracts.spec import ResolvedSpec, Spec, spec_digest
from stillhouse.contracts.trainings import CheckpointManifest, TrainingState
from stillhouse.embedded.stack import StackInfo, StackOptions, running_stack

DEMO = Path(__file__).resolve().parent.parent / "demo"
LOSSES = ("forward_kl", "sft")
RATES = (1e-4, 2e-4, 4e-4)
COLLECTING = (
    "teacher_gateway.api",
    "teacher_gateway.worker",
    "teacher_gateway.clock",
    "dataset_builder.worker",
)
DRAWS = 10_000


@dataclass(frozen=True)
class Arm:
    """A trained student and its sums on the held-out rows."""

    loss: str
    rate: float
    steps: int
    tokens: int
    seconds: float
    initial: str
    validation: list[Any]
    test: list[Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder for stack and weights; kept if given")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    chosen = parser.parse_args()
    with _folder(chosen.root) as root:
        weights = root / "models" / "smollm2-135m-instruct"
        subprocess.run(
            [sys.executable, "-m", "stillhouse.embedded.weights", str(weights)], check=True
        )
        options = StackOptions.from_environment(
            teacher=True, quick_stop=True, services=COLLECTING, file_roots=(weights.parent,)
        )
        with running_stack(root, options) as stack:
            store = _store(stack)
            resolved = collect(stack, store, weights)
            bench = Bench(root, store, _store(stack, short=True), resolved, weights.parent)
            arms = [bench.train(loss, rate) for rate in chosen.rates for loss in LOSSES]
            assert bench.untrained is not None
            return report(arms, bench.untrained, bench.measure(bench.teacher, "test"))


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    made = Path(tempfile.mkdtemp(prefix="stillhouse-quality-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _store(stack: StackInfo, *, short: bool = False) -> ObjectStore:
    times = {"connect_timeout": 2, "read_timeout": 3, "attempts": 1} if short else {}
    return ObjectStore(
        bucket=stack.store.bucket,
        endpoint_url=stack.store.endpoint_url,
        access_key=stack.store.access_key,
        secret_key=stack.store.secret_key,
        **times,  # type: ignore[arg-type]
    )


def collect(stack: StackInfo, store: ObjectStore, weights: Path) -> ResolvedSpec:
    """Have the teacher answer the demo's prompts, and wait for the sealed dataset."""
    filled = Template((DEMO / "pipeline.yaml").read_text()).substitute(
        teacher_url=stack.teacher_url, teacher_weights=weights, prompts=DEMO / "prompts.jsonl"
    )
    path = stack.root / "pipeline.yaml"
    path.write_text(filled.replace("start: after_student", "start: at_once"))
    assert stack.api_url is not None
    assert stack.api_key is not None
    started = time.monotonic()
    with Client(stack.api_url, stack.api_key) as client:
        spec = specs.upload_inputs(client, specs.load(path))
        pipeline = client.submit(spec, idempotency_key=new_key())["pipeline_id"]
        print(f"collecting answers as {pipeline}", flush=True)
        while True:
            status = client.status(pipeline)
            if status["stages"]["build"]["state"] == "done":
                break
            if status["state"] not in ("accepting", "running"):
                raise SystemExit(f"the pipeline is {status['state']}: {status['reason']}")
            if time.monotonic() - started > 1200:
                raise SystemExit(f"no sealed dataset after 20 minutes; last seen: {status}")
            time.sleep(2)
    print(f"dataset sealed after {time.monotonic() - started:.0f} s", flush=True)
    found = store.find_model(artifacts.spec_key("default", pipeline), ResolvedSpec)
    assert found is not None
    return found[0]


class Bench:
    """Trains and measures arms over one sealed dataset."""

    def __init__(
        self,
        root: Path,
        store: ObjectStore,
        lease_store: ObjectStore,
        resolved: ResolvedSpec,
        weights_root: Path,
    ) -> None:
        from services.evaluator.models import Models, open_folder, prepare_torch
        from services.evaluator.suite import Suite
        from stillhouse.chassis.model_folder import resolve_folder

        prepare_torch(1)
        self.root, self.store, self.lease_store = root, store, lease_store
        self.resolved, self.weights_root = resolved, weights_root
        self.models = Models(
            store, work_dir=root / "work" / "quality", roots=(weights_root,), device="cpu"
        )
        key = artifacts.heldout_key(resolved.tenant_id, resolved.dataset_id)
        found = store.find_model(key, Heldout)
        assert found is not None
        suite = Suite.of(found[0], found[1], 1000)
        self.rows = {
            split: suite.load_rows(store, split)  # type: ignore[arg-type]
            for split in ("validation", "test")
        }
        reference = resolved.reference
        assert reference is not None
        self.teacher = open_folder(resolve_folder(reference, (weights_root,)), "cpu")
        from services.evaluator.fidelity import hidden_states

        self.states = {
            split: hidden_states(self.teacher, rows) for split, rows in self.rows.items()
        }
        self.untrained: list[Any] | None = None

    def measure(self, model: Any, split: str) -> list[Any]:
        from services.evaluator.fidelity import hidden_states, score_rows

        rows = self.rows[split]
        return score_rows(
            model.get_output_embeddings(),
            hidden_states(model, rows),
            rows,
            reference_head=self.teacher.get_output_embeddings(),
            reference_states=self.states[split],
            vocabulary=self.teacher.config.vocab_size,
            chunk=64,
        )

    def train(self, loss: str, rate: float) -> Arm:
        """Train one student with the trainer's own code and measure it."""
        arm = self._variant(loss, rate, f"{loss}-{rate:g}".replace("_", "-").replace(".", "-"))
        started = time.monotonic()
        self._run(arm)
        seconds = time.monotonic() - started
        state = self._state(arm)
        if state.failed or not state.done:
            raise SystemExit(f"the arm {loss} at {rate:g} did not end: {state.failed or state}")
        first, last = state.published[0], state.published[-1]
        initial = self.store.get_model(first.manifest, CheckpointManifest)
        if self.untrained is None:
            self.untrained = self.measure(self.models.checkpoint(first.manifest), "test")
        model = self.models.checkpoint(last.manifest)
        found = Arm(
            loss=loss,
            rate=rate,
            steps=last.step,
            tokens=last.tokens,
            seconds=seconds,
            initial=initial.files["model.safetensors"].sha256,
            validation=self.measure(model, "validation"),
            test=self.measure(model, "test"),
        )
        print(
            f"{loss:>10} at {rate:g}: {found.steps} steps, {found.tokens} tokens, "
            f"{seconds:.0f} s, kl_full on validation {kl_full(found.validation):.4f}",
            flush=True,
        )
        return found

    def _variant(self, loss: str, rate: float, name: str) -> ResolvedSpec:
        """The same dataset under another training: a spec and prompts of its own in the store."""
        spec = self.resolved.spec
        training = spec.training.model_copy(update={"loss": loss, "learning_rate": rate})
        evaluation = spec.evaluation.model_copy(update={"every_steps": 100_000})
        changed = spec.model_copy(update={"training": training, "evaluation": evaluation})
        changed = Spec.model_validate(changed.model_dump(by_alias=True))
        digest = spec_digest(changed)
        pipeline = f"pl-quality-{name}"
        tenant = self.resolved.tenant_id
        training_id = artifacts.training_id(self.resolved.dataset_id, digest, name)
        resolved = self.resolved.model_copy(
            update={"pipeline_id": pipeline, "spec": changed, "training_id": training_id}
        )
        for batch in range(resolved.batches.total):
            source = artifacts.prompts_key(tenant, self.resolved.pipeline_id, batch)
            prompts = self.store.read(source)
            assert prompts is not None
            self.store.put_new(artifacts.prompts_key(tenant, pipeline, batch), prompts.data)
        self.store.put_new_model(artifacts.spec_key(tenant, pipeline), resolved)
        return resolved

    def _run(self, resolved: ResolvedSpec) -> None:
        from services.trainer.announce import Announcer
        from services.trainer.settings import TrainerSettings
        from services.trainer.turns import Trainer

        ref = self.store.find(artifacts.spec_key(resolved.tenant_id, resolved.pipeline_id))
        assert ref is not None
        event = PipelineAccepted(
            spec=ref, dataset_id=resolved.dataset_id, training_id=resolved.training_id
        )
        wake = seal(event, tenant_id=resolved.tenant_id, pipeline_id=resolved.pipeline_id)
        published: list[Envelope] = []
        scratch = self.root / "work" / resolved.pipeline_id
        scratch.mkdir(parents=True)
        settings = TrainerSettings(
            broker_url="memory://",
            profile="embedded",
            device="cpu",
            threads=1,
            file_roots=str(self.weights_root),
        )
        trainer = Trainer(
            settings,
            self.store,
            self.lease_store,
            Announcer(_Collected(published), 0.1),  # type: ignore[arg-type]
            pull=lambda: None,
            hand_on=lambda wake: None,
            scratch=scratch,
        )
        trainer.handle(wake)
        shutil.rmtree(scratch)

    def _state(self, resolved: ResolvedSpec) -> TrainingState:
        key = artifacts.training_state_key(resolved.tenant_id, resolved.training_id)
        found = self.store.find_model(key, TrainingState)
        assert found is not None
        return found[0]


class _Collected:
    """A publisher for a training without a broker."""

    def __init__(self, into: list[Envelope]) -> None:
        self._into = into

    def publish(self, *envelopes: Envelope) -> None:
        self._into.extend(envelopes)


def kl_full(rows: list[Any]) -> float:
    return math.fsum(row.kl_full for row in rows) / sum(row.tokens for row in rows)


def _figures(rows: list[Any]) -> dict[str, float]:
    from services.evaluator.statistics import figures

    found = figures(rows)
    names = ("kl_full", "kl_top20", "ppl", "top1")
    return {name: round(float(getattr(found, name)), 4) for name in names}


def paired_interval(first: list[Any], second: list[Any]) -> tuple[float, float]:
    """95 % interval of kl_full(first) - kl_full(second), prompts drawn with replacement."""
    tokens = np.array([row.tokens for row in first], float)
    gap = np.array([a.kl_full - b.kl_full for a, b in zip(first, second, strict=True)])
    draws = np.random.default_rng(0).integers(0, len(gap), (DRAWS, len(gap)))
    means = gap[draws].sum(1) / tokens[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def report(arms: list[Arm], untrained: list[Any], floor: list[Any]) -> int:
    best = {
        loss: min((a for a in arms if a.loss == loss), key=lambda a: kl_full(a.validation))
        for loss in LOSSES
    }
    same = len({(a.initial, a.steps, a.tokens) for a in arms}) == 1
    print(
        "\narm                rate    validation kl_full   test kl_full  kl_top20     ppl    top1"
    )
    for name, rows in (("teacher", floor), ("untrained", untrained)):
        f = _figures(rows)
        print(
            f"{name:<34}{'':>11}{f['kl_full']:>12.4f}{f['kl_top20']:>10.4f}"
            f"{f['ppl']:>9.2f}{f['top1']:>8.4f}"
        )
    for arm in sorted(arms, key=lambda a: (a.loss, a.rate)):
        f, mark = _figures(arm.test), "*" if arm is best[arm.loss] else " "
        print(
            f"{arm.loss:<14}{mark}{arm.rate:>9g}{kl_full(arm.validation):>21.4f}"
            f"{f['kl_full']:>12.4f}{f['kl_top20']:>10.4f}{f['ppl']:>9.2f}{f['top1']:>8.4f}"
        )
    kd, sft = best["forward_kl"], best["sft"]
    low, high = paired_interval(kd.test, sft.test)
    gap = kl_full(kd.test) - kl_full(sft.test)
    print(
        f"\nKD - SFT, kl_full on test: {gap:.4f} (95 % over prompts {low:.4f} .. {high:.4f}); "
        f"same start, steps and tokens: {same}"
    )
    met = same and gap < 0
    figures = {
        "untrained": _figures(untrained),
        "teacher": _figures(floor),
        "kd": {"rate": kd.rate, **_figures(kd.test)},
        "sft": {"rate": sft.rate, **_figures(sft.test)},
        "kd_minus_sft": round(gap, 4),
        "interval": [round(low, 4), round(high, 4)],
        "steps": kd.steps,
        "tokens": kd.tokens,
        "test_rows": len(kd.test),
    }
    targets = {"kd_minus_sft": "< 0, same initial weights, steps and tokens"}
    print(json.dumps({"figures": figures, "targets": targets, "met": met}))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
