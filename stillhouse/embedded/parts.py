"""Run one real part alone, for tests and benchmarks that need a broker or a store.

with valkey(tmp_path) as url, seaweedfs(tmp_path) as store:
    ...
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from stillhouse.embedded import seaweedfs as weed
from stillhouse.embedded import valkey as vk
from stillhouse.embedded.process import base_environment, kill_group, spawn, wait_until_ready
from stillhouse.embedded.seaweedfs import Store

__all__ = ["Store", "seaweedfs", "valkey"]


@contextlib.contextmanager
def valkey(folder: Path) -> Iterator[str]:
    """Run Valkey with its data below `folder`; yield its broker URL."""
    data, log, runtime = folder / "valkey", folder / "logs" / "valkey.log", vk.make_runtime_dir()
    data.mkdir(parents=True, exist_ok=True)
    process = spawn(vk.command(data, runtime), env=base_environment(), log=log, cwd=data)
    try:
        wait_until_ready(process, vk.probe(runtime), name="valkey", log=log, deadline_seconds=15)
        yield vk.broker_url(runtime)
    finally:
        kill_group(process)
        shutil.rmtree(runtime, ignore_errors=True)


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[Store]:
    """Run SeaweedFS with its data below `folder`; yield the store with its bucket made.

    It is killed at the end: that loses nothing it acknowledged, and a clean stop takes 15 s.
    """
    data, log = folder / "seaweedfs", folder / "logs" / "seaweedfs.log"
    runtime = vk.make_runtime_dir()
    data.mkdir(parents=True, exist_ok=True)
    config = folder / "s3.json"
    access_key, secret_key = weed.write_config(config)
    ports = weed.choose_ports()
    store = Store(f"http://127.0.0.1:{ports['s3']}", weed.BUCKET, access_key, secret_key)
    argv = weed.command(data, config, runtime, ports)
    process = spawn(argv, env=weed.environment(data), log=log, cwd=data)
    try:
        wait_until_ready(process, weed.probe(store), name="seaweedfs", log=log, deadline_seconds=60)
        yield store
    finally:
        kill_group(process)
        weed.sweep_sockets(ports)
        shutil.rmtree(runtime, ignore_errors=True)
