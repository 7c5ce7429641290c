"""The trainer's process: builds what a trainer needs and runs it until a signal.

It is no Celery worker: no message may wait for a training, and no delivery is held while one runs
(`docs/adr/0005-leases-in-the-object-store.md`).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from services.trainer import announce
from services.trainer.settings import TrainerSettings
from stillhouse.chassis import bus
from stillhouse.chassis import metrics as chassis_metrics
from stillhouse.chassis.errors import RetryableError
from stillhouse.chassis.health import Heartbeat
from stillhouse.chassis.logs import logger
from stillhouse.chassis.storage import ObjectStore, open_store
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.flow import TRAINER

log = logger(__name__)

_SCRATCH = "trainer-"
STALE_AFTER = 300  # seconds without a beat: longer than any load, save or step should take


def run_worker(settings: TrainerSettings) -> None:
    """Run a trainer until SIGTERM or SIGINT; a second one ends it at once, which loses nothing
    that is saved."""
    stopping = threading.Event()

    def heed(number: int, _: FrameType | None) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, heed)
    health = Heartbeat(stale_after=STALE_AFTER)
    chassis_metrics.serve(settings, health=health.healthy)
    from services.trainer.turns import Trainer  # torch takes seconds; /healthz is up before

    store = open_store(settings)
    lease_store = open_store(settings, connect_timeout=2, read_timeout=3, attempts=1)
    publisher = bus.Publisher(TRAINER, settings.broker_url)
    announcer = announce.Announcer(publisher, settings.times.retry)
    with _scratch(settings.work_dir) as scratch:
        trainer = Trainer(
            settings,
            store,
            lease_store,
            announcer,
            pull=lambda: _pull(settings.broker_url),
            hand_on=lambda wake: publisher.republish(wake, TRAINER),
            scratch=scratch,
            beat=health.beat,
            stopping=stopping,
        )
        _self_test(store, stopping, settings.times.retry)
        log.info("trainer ready", environment=trainer.environment.model_dump())
        trainer.run()
        announcer.close(timeout=5)


def _pull(broker_url: str) -> Envelope | None:
    wake = bus.pull(TRAINER, broker_url)
    if wake is not None:
        age = (datetime.now(UTC) - wake.occurred_at).total_seconds()
        chassis_metrics.EVENT_AGE.labels(TRAINER).set(age)
        chassis_metrics.EVENTS.labels(TRAINER, wake.type, "taken").inc()
    return wake


def _self_test(store: ObjectStore, stopping: threading.Event, retry: float) -> None:
    """Refuse a store that ignores conditions; wait for one that is not up yet."""
    while not stopping.is_set():
        try:
            store.self_test()
            return
        except RetryableError as error:
            log.warning("the store does not answer yet", why=str(error))
            stopping.wait(retry)


@contextmanager
def _scratch(work_dir: Path) -> Iterator[Path]:
    """A folder of this process alone; those that killed ones left behind are removed."""
    work_dir.mkdir(parents=True, exist_ok=True)
    for left in work_dir.glob(f"{_SCRATCH}*"):
        try:
            with (left / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        except OSError as error:  # its process lives, or someone else removes it
            log.debug("scratch folder left", folder=str(left), why=str(error))
    folder = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=work_dir))
    try:
        with (folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
