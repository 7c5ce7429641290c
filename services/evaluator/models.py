"""Opens models and keeps the last ones in memory between jobs.

Weights come from checkpoints (fetched from the store, digest checked) and from reference folders
that a spec names (checked by `chassis.model_folder`). Only safetensors are read, no code of a
model is run, and a tensor that is missing or left over is an error: a head that stayed random
would give figures that look like a bad student.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from services.evaluator.reasons import CHECKPOINT_INCOMPLETE
from services.evaluator.suite import Row
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.model_folder import check_model_folder, stage
from stillhouse.chassis.model_opening import open_model
from stillhouse.chassis.references import Sources, opened
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.trainings import CheckpointManifest

FILES = ("config.json", "model.safetensors")
FOLDERS_KEPT = 3  # step 0, the best and the newest are what is asked for again


def prepare_torch(threads: int) -> None:
    """Fix what the bits of a figure depend on. Call once in a process, before any model."""
    # cuBLAS reads it when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")


def open_folder(folder: Path, device: str) -> Any:
    """Load a causal language model in float32. Raises PermanentError where the weights do not
    fit their config exactly. The folder is this service's own, or a staged one."""
    check_model_folder(folder)
    model = open_model(folder)
    return model.eval().requires_grad_(False).to(device)


class Models:
    """The reference and the checkpoint that were asked for last, and scratch copies on disk."""

    def __init__(
        self, store: ObjectStore, *, work_dir: Path, sources: Sources, device: str
    ) -> None:
        self._store = store
        self._work_dir = work_dir
        self._folder = work_dir / "checkpoints"
        self._sources = sources
        self._device = device
        self._checkpoint: tuple[str, Any] | None = None
        self._reference: tuple[tuple[str, str | None], Any] | None = None

    def reference(
        self, reference: str, pin: str | None, watching: Callable[[int, int], None]
    ) -> Any:
        """Open the teacher's weights that a spec names; `watching` is told how far they are
        fetched."""
        key = (reference, pin)
        if self._reference is None or self._reference[0] != key:
            self._reference = None  # free the old one first
            self._work_dir.mkdir(parents=True, exist_ok=True)
            with (
                opened(reference, self._sources, pin=pin, watching=watching) as folder,
                tempfile.TemporaryDirectory(dir=self._work_dir) as scratch,
            ):
                staged = Path(scratch) / "reference"
                stage(folder, staged)
                self._reference = (key, open_folder(staged, self._device))
        return self._reference[1]

    def checkpoint(self, manifest: ObjectRef) -> Any:
        """Open a checkpoint by its manifest."""
        if self._checkpoint is None or self._checkpoint[0] != manifest.sha256:
            self._checkpoint = None
            folder = self.fetch(manifest)
            self._checkpoint = (manifest.sha256, open_folder(folder, self._device))
        return self._checkpoint[1]

    def fetch(self, manifest: ObjectRef) -> Path:
        """Copy a checkpoint's model to disk, unless an intact copy is there."""
        said = self._store.get_model(manifest, CheckpointManifest)
        folder = self._folder / manifest.sha256[:32]
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            ref = _file(said, name)
            if not _intact(folder / name, ref):
                self._store.get_file(ref, folder / name)
        os.utime(folder)
        self._sweep()
        return folder

    def _sweep(self) -> None:
        folders = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime)
        for folder in folders[:-FOLDERS_KEPT]:
            shutil.rmtree(folder, ignore_errors=True)


def weights_of(manifest: CheckpointManifest) -> ObjectRef:
    return _file(manifest, "model.safetensors")


def _file(manifest: CheckpointManifest, name: str) -> ObjectRef:
    if name not in manifest.files:
        raise PermanentError(
            f"the checkpoint of step {manifest.step} names no {name}",
            reason=CHECKPOINT_INCOMPLETE,
        )
    return manifest.files[name]


def _intact(path: Path, ref: ObjectRef) -> bool:
    if not path.exists() or path.stat().st_size != ref.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == ref.sha256


class StateCache:
    """Hidden states of the reference, which every checkpoint is measured against.

    They cost a forward of the largest model; the least recently used go when `most_bytes` is
    exceeded.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._held: OrderedDict[tuple[str, str, int], list[Any]] = OrderedDict()

    def get(self, key: tuple[str, str, int]) -> list[Any] | None:
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: tuple[str, str, int], states: list[Any]) -> None:
        self._held[key] = states
        while self._held and sum(map(_bytes, self._held.values())) > self._most:
            self._held.popitem(last=False)


def _bytes(states: list[Any]) -> int:
    return sum(int(state.nbytes) for state in states)


class RowCache:
    """The decoded rows of the last few splits, so that a part does not read its shards again."""

    def __init__(self, most: int = 4) -> None:
        self._most = most
        self._held: OrderedDict[tuple[str, str], list[Row]] = OrderedDict()

    def get(self, key: tuple[str, str]) -> list[Row] | None:
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: tuple[str, str], rows: list[Row]) -> None:
        self._held[key] = rows
        while len(self._held) > self._most:
            self._held.popitem(last=False)
