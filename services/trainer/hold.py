"""A training whose lease this process holds: what all that works on it shares."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from services.trainer.settings import TrainerSettings
from services.trainer.timeouts import TrainerTimes
from stillhouse.chassis.errors import StoreUnavailable
from stillhouse.chassis.leases import Lease
from stillhouse.chassis.logs import logger
from stillhouse.chassis.references import Sources
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import Environment, TrainingState

log = logger(__name__)

T = TypeVar("T")


class TrainingStopped(Exception):
    """Nobody wants the training any more: it is left as it is."""


class Announcer(Protocol):
    """Publishes on a thread of its own, so that a slow broker does not slow the training."""

    def say(self, *envelopes: Envelope) -> None:
        """Publish in order, again and again until the broker took them."""

    def mention(self, envelope: Envelope) -> None:
        """Publish once, or drop it."""


@dataclass(frozen=True)
class Tools:
    """What a training needs of its process."""

    settings: TrainerSettings
    store: ObjectStore
    announcer: Announcer
    # Takes the next wake-up that is work of another pipeline than this (tenant, pipeline).
    rival: Callable[[tuple[str, str]], Envelope | None]
    beat: Callable[[], None]
    stopping: threading.Event
    device: torch.device
    here: Environment
    scratch: Path
    # Where weights that a spec names may come from.
    sources: Sources

    @property
    def times(self) -> TrainerTimes:
        return self.settings.times


@dataclass(frozen=True)
class Hold:
    """One holding of one training."""

    tools: Tools
    resolved: ResolvedSpec
    lease: Lease[TrainingState]
    wake: Envelope

    @property
    def tenant(self) -> str:
        return self.resolved.tenant_id

    @property
    def pipeline(self) -> str:
        return self.resolved.pipeline_id

    @property
    def training(self) -> str:
        return self.resolved.training_id

    def stopped(self) -> bool:
        """Whether the pipeline was cancelled, or failed elsewhere."""
        key = artifacts.stopped_key(self.tenant, self.pipeline)
        return self.persist(lambda: self.tools.store.exists(key))

    def persist(self, call: Callable[[], T]) -> T:
        """Call again while the store does not answer, as long as the lease is held.

        Raises LeaseLost when it no longer is, and StoreUnavailable when the process is to end.
        """
        while True:
            try:
                return call()
            except StoreUnavailable as error:
                log.warning("the store does not answer", why=str(error))
                if self.tools.stopping.wait(self.tools.times.retry):
                    raise
                self.lease.check()
