"""What the trainer says about itself on /metrics. One process has one training at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge

from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import LedgerEntry

if TYPE_CHECKING:  # whoever reads the names of the metrics need not load torch
    from services.trainer.data import StepRows

TOKENS = Counter("stillhouse_trainer_tokens_total", "Supervised tokens trained on")
ROWS = Counter(
    "stillhouse_trainer_rows_total", "Rows trained on, by the signal they had", ["signal"]
)
STEPS = Counter("stillhouse_trainer_steps_total", "Optimiser steps")
COMPUTE_SECONDS = Counter("stillhouse_trainer_compute_seconds_total", "Seconds of training")
DATA_WAIT_SECONDS = Counter(
    "stillhouse_trainer_data_wait_seconds_total", "Seconds of waiting for rows, or of reading them"
)
RATE = Gauge("stillhouse_trainer_tokens_per_second", "Supervised tokens a second in the last step")
FED = Gauge(
    "stillhouse_trainer_fed_tokens_per_second",
    "Tokens, supervised or not, that went through the student a second in the last step",
)
FLOPS = Gauge(
    "stillhouse_trainer_flops_per_second", "Operations of its matrices a second in the last step"
)
UTILISATION = Gauge(
    "stillhouse_trainer_utilisation_ratio",
    "The same as a share of what one large matrix product reaches on this device",
)
DEVICE_MEMORY = Gauge(
    "stillhouse_trainer_device_memory_bytes", "Most memory of the GPU that tensors held at once"
)
CHECKPOINTS = Counter(
    "stillhouse_trainer_checkpoints_total", "Checkpoints saved, by what for", ["kind"]
)
CHECKPOINT_SECONDS = Gauge(
    "stillhouse_trainer_checkpoint_seconds", "Duration of the last save, upload included"
)
LEASES_LOST = Counter("stillhouse_trainer_leases_lost_total", "Leases lost to another holder")
WAKE_UPS = Counter("stillhouse_trainer_wake_ups_total", "Events taken, by outcome", ["outcome"])
RUNS = Counter("stillhouse_trainer_runs_total", "Leases held and given up, by why", ["outcome"])

# Gauges of the training at hand: removed when it is left.
_LABELS = ["pipeline"]
LOSS = Gauge("stillhouse_trainer_loss_nats", "Mean loss of the last step", _LABELS)
GRADIENT = Gauge("stillhouse_trainer_gradient_norm", "Norm before clipping, last step", _LABELS)
LEARNING_RATE = Gauge("stillhouse_trainer_learning_rate", "Rate of the last step", _LABELS)
STEP = Gauge("stillhouse_trainer_step", "Steps done", _LABELS)
SHARD_LAG = Gauge(
    "stillhouse_trainer_shard_lag", "Train shards of the pipeline not trained on yet", _LABELS
)
EPOCH = Gauge("stillhouse_trainer_lease_epoch", "Fencing epoch of the lease held", _LABELS)
CHECKPOINT_AGE = Gauge(
    "stillhouse_trainer_checkpoint_age_seconds", "Age of the newest checkpoint", _LABELS
)
_OF_A_TRAINING = (LOSS, GRADIENT, LEARNING_RATE, STEP, SHARD_LAG, EPOCH, CHECKPOINT_AGE)


def stepped(
    resolved: ResolvedSpec, step: StepRows, entry: LedgerEntry, gradient: float, seconds: float
) -> None:
    STEPS.inc()
    TOKENS.inc(entry.tokens)
    COMPUTE_SECONDS.inc(seconds)
    RATE.set(entry.tokens / seconds)
    for row in step.rows:
        kind = "text" if row.signal is None else "counts" if row.signal.drawn else "topk"
        ROWS.labels(kind).inc()
    pipeline = resolved.pipeline_id
    STEP.labels(pipeline).set(entry.step)
    LOSS.labels(pipeline).set(entry.loss)
    GRADIENT.labels(pipeline).set(gradient)
    LEARNING_RATE.labels(pipeline).set(entry.learning_rate)
    SHARD_LAG.labels(pipeline).set(resolved.batches.train - len(step.cursor.shards))


def worked(fed: float, flops: float, utilisation: float) -> None:
    FED.set(fed)
    FLOPS.set(flops)
    UTILISATION.set(utilisation)


@contextmanager
def waiting_for_data() -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        DATA_WAIT_SECONDS.inc(time.monotonic() - started)


def leave() -> None:
    """Forget the gauges of a training that this process no longer holds."""
    for gauge in _OF_A_TRAINING:
        gauge.clear()


def saved(pipeline: str, kind: str, seconds: float) -> None:
    at = time.monotonic()
    CHECKPOINTS.labels(kind).inc()
    CHECKPOINT_SECONDS.set(seconds)
    CHECKPOINT_AGE.labels(pipeline).set_function(lambda: time.monotonic() - at)
