"""The embedded stack: which processes there are, what each is told, where it all lies.

    python -m stillhouse.embedded.stack            # what `stillhouse up` does

Everything is below one folder (default `.stillhouse`): data, logs, ports and keys. Whoever wants to
talk to a running stack reads `stack.json` there. Broker, store and database can each be replaced by
a URL; the services cannot tell the difference.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import http.client
import json
import os
import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stillhouse.embedded import seaweedfs as weed
from stillhouse.embedded import teacher, valkey
from stillhouse.embedded.ports import free_ports, is_free
from stillhouse.embedded.process import NotReadyError, StackError, base_environment
from stillhouse.embedded.seaweedfs import Store
from stillhouse.embedded.supervisor import ProcessSpec, StopRequestedError, Supervisor

SERVICES: Mapping[str, tuple[str, ...]] = {
    "dataset_builder": ("worker",),
    "trainer": ("worker",),
    "evaluator": ("worker",),
    "teacher_gateway": ("worker", "clock", "api"),
}
_CELERY_WORKERS = ("teacher_gateway.worker", "dataset_builder.worker", "evaluator.worker")
_READS_FILES = ("teacher_gateway", "trainer", "evaluator")
# Which hub `hf:` references lead to; a token is passed by name only.
_HUB_VARIABLES = ("HF_ENDPOINT", "HF_HUB_OFFLINE")
SERVICE_PROCESSES = tuple(f"{name}.{kind}" for name, kinds in SERVICES.items() for kind in kinds)
TENANT = "default"

# Consumers declare their queues before anything publishes: a message without a queue is dropped.
_START = {"part": 0, "consumer": 1, "publisher": 2}
# Services first, so that their last writes find the store; the broker last of all.
_STOP = {"service": 0, "store": 1, "broker": 2}


@dataclass(frozen=True)
class StackOptions:
    """What a stack may be told; whatever is None is started here."""

    api_host: str = "127.0.0.1"
    api_port: int | None = None
    broker_url: str | None = field(default=None, repr=False)
    store: Store | None = None
    database_url: str | None = field(default=None, repr=False)
    file_roots: tuple[Path, ...] = ()
    pass_env: tuple[str, ...] = ()  # NAME, or NAME@host for a key of that host alone
    service_env: Mapping[str, str] = field(default_factory=dict, repr=False)
    services: tuple[str, ...] = SERVICE_PROCESSES
    teacher: bool = False
    # Stopped politely, SeaweedFS waits 15 s for its own subscribers. Killed after its last writer
    # is gone it loses nothing that it acknowledged, but a power cut may then cost more.
    quick_stop: bool = False

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ, **chosen: Any) -> StackOptions:
        """Read the URLs that replace parts; an option that is set wins over the environment."""
        store = None
        if endpoint := env.get("STILLHOUSE_STORE_ENDPOINT_URL"):
            keys = ("STILLHOUSE_STORE_ACCESS_KEY", "STILLHOUSE_STORE_SECRET_KEY")
            if missing := [key for key in keys if not env.get(key)]:
                raise StackError(
                    f"STILLHOUSE_STORE_ENDPOINT_URL is set, so {' and '.join(missing)} must be too"
                )
            bucket = env.get("STILLHOUSE_STORE_BUCKET", weed.BUCKET)
            store = Store(endpoint, bucket, env[keys[0]], env[keys[1]])
        found = {
            "broker_url": env.get("STILLHOUSE_BROKER_URL") or None,
            "store": store,
            "database_url": env.get("STILLHOUSE_DATABASE_URL") or None,
        }
        return cls(**(found | {k: v for k, v in chosen.items() if v is not None}))


@dataclass(frozen=True)
class StackInfo:
    """A running stack as its clients see it."""

    root: Path
    state: str
    api_url: str | None
    api_key: str | None = field(repr=False)
    teacher_url: str | None
    broker_url: str = field(repr=False)
    store: Store
    supervisor_pid: int
    processes: Mapping[str, Mapping[str, Any]]

    def pid(self, name: str) -> int:
        """Return the process id (and group) of one process, such as `trainer.worker`."""
        return int(self.processes[name]["pid"])


def is_running(root: Path) -> bool:
    """Say whether a stack runs in `root`, ready or not."""
    return _is_locked(root / "run" / "lock")


def read_stack(root: Path) -> StackInfo:
    """Return the stack that runs in `root`, or say how to start one."""
    root = root.resolve()
    if not is_running(root):
        raise StackError(f"no stack runs in {root}: start one with `stillhouse up`")
    try:
        values = json.loads((root / "stack.json").read_text())
        keys = json.loads((root / "credentials.json").read_text())
    except (OSError, ValueError) as error:
        raise StackError(f"the stack in {root} is still starting: try again") from error
    store = Store(**values["store"], **keys["store"])
    return StackInfo(
        root=root,
        state=values["state"],
        api_url=values["api_url"],
        api_key=keys.get("api_key"),
        teacher_url=values["teacher_url"],
        broker_url=values["broker_url"],
        store=store,
        supervisor_pid=values["supervisor_pid"],
        processes=values["processes"],
    )


class Stack:
    """One stack in one folder; `run` does everything on the thread that calls it."""

    def __init__(
        self,
        root: Path,
        options: StackOptions | None = None,
        *,
        say: Callable[[str], None] = lambda _: None,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.root = root.resolve()
        self.options = options or StackOptions()
        self.stopping = threading.Event()
        self.hurry = threading.Event()
        self._say = say
        self._ready = ready
        self._state = "starting"
        self._ports: dict[str, int] = {}

    def run(self) -> None:
        """Start all, restart what dies, and stop all when `stopping` is set."""
        self._make_folders()
        with _locked(self.root):
            self._ports = self._choose_ports()
            runtime = valkey.make_runtime_dir()
            self._supervisor = Supervisor(
                self.root / "logs",
                say=self._say,
                changed=self._write_state,
                stopping=self.stopping,
                hurry=self.hurry,
            )
            try:
                self._supervisor.forget_folder_at_end(runtime)
                self._broker_url = self.options.broker_url or valkey.broker_url(runtime)
                self._store = self.options.store or self._own_store()
                self._save_credentials({})
                self._start(runtime)
                self._state = "ready"
                self._write_state()
                self._ready()
                self._supervisor.watch()
            except StopRequestedError:
                pass
            finally:
                self._state = "stopping"
                slow = self.options.store is None and not self.options.quick_stop
                self._say(
                    "stopping" + ("; the store takes about 15 s, a second Ctrl-C none" * slow)
                )
                self._supervisor.stop()
                self._state = "stopped"
                with contextlib.suppress(OSError):  # a full disk: all is stopped all the same
                    self._write_state()
                self._supervisor.close()
                with contextlib.suppress(OSError):
                    for leftover in runtime.iterdir():
                        leftover.unlink()
                    runtime.rmdir()

    def table(self, runtime: Path) -> list[ProcessSpec]:
        """Return every process of this stack, in no particular order."""
        parts = []
        if self.options.broker_url is None:
            parts.append(self._valkey_spec(runtime))
        if self.options.store is None:
            parts.append(self._seaweedfs_spec(runtime))
        if self.options.teacher:
            parts.append(self._teacher_spec())
        return parts + [self._service_spec(name) for name in self.options.services]

    def _start(self, runtime: Path) -> None:
        table = self.table(runtime)
        self._supervisor.start(spec for spec in table if spec.start_order == _START["part"])
        if any(name.startswith("teacher_gateway.") for name in self.options.services):
            self._migrate()
        self._supervisor.start(spec for spec in table if spec.start_order != _START["part"])

    def _migrate(self) -> None:
        """Bring the database to this version, and have a key for the command line."""
        command = (sys.executable, "-m", "services.teacher_gateway")
        env = self._service_env("teacher_gateway.migrate")
        cwd = self._work_folder("teacher_gateway")
        fresh = self.options.database_url is None and not self._database_file().exists()
        self._supervisor.run_once("migrate", (*command, "migrate"), env, cwd=cwd)
        known = self._credentials().get("api_key_of") == self._database_digest()
        if fresh or not known:
            words = ("keys", "create", "--tenant", TENANT, "--json")
            printed = self._supervisor.run_once("keys", (*command, *words), env, cwd=cwd)
            try:
                key = str(json.loads(printed)["key"])
            except (ValueError, LookupError, TypeError) as error:
                raise StackError("the gateway printed no API key; see logs/keys.log") from error
            self._save_credentials(
                {"api_key": key, "api_key_of": self._database_digest(), "tenant": TENANT}
            )

    def _valkey_spec(self, runtime: Path) -> ProcessSpec:
        data = self.root / "valkey"
        return ProcessSpec(
            name="valkey",
            argv=tuple(valkey.command(data, runtime)),
            env=base_environment(),
            probe=valkey.probe(runtime),
            address=valkey.broker_url(runtime),
            cwd=data,
            start_order=_START["part"],
            stop_order=_STOP["broker"],
        )

    def _seaweedfs_spec(self, runtime: Path) -> ProcessSpec:
        data = self.root / "seaweedfs"
        ports = {name: self._ports[f"seaweedfs.{name}"] for name in weed.PORT_NAMES}
        return ProcessSpec(
            name="seaweedfs",
            argv=tuple(weed.command(data, self._s3_config(), runtime, ports)),
            env=weed.environment(data),
            probe=weed.probe(self._store),
            # Once its disk was full, its filer refuses every write until it is started again.
            deaf_seconds=60,
            address=self._store.endpoint_url,
            cwd=data,
            start_order=_START["part"],
            stop_order=_STOP["store"],
            stop_seconds=0.2 if self.options.quick_stop else weed.STOP_GRACE_SECONDS,
            after_exit=lambda: weed.sweep_sockets(ports),
        )

    def _teacher_spec(self) -> ProcessSpec:
        port = self._ports["teacher"]
        return ProcessSpec(
            name="teacher",
            argv=(sys.executable, "-m", "stillhouse.embedded.teacher", "--port", str(port)),
            env=base_environment({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}),
            probe=http_probe("127.0.0.1", port, "/health"),
            address=self._teacher_url() or "",
            start_order=_START["part"],
            stop_order=_STOP["service"],
        )

    def _service_spec(self, name: str) -> ProcessSpec:
        service, kind = name.split(".")
        if name == "teacher_gateway.api":
            port, path = self._ports["teacher_gateway.api"], "/readyz"
            host, address = self.options.api_host, self._api_url() or ""
        else:
            port, path = self._ports[f"{name}.metrics"], "/healthz"
            host, address = "127.0.0.1", f"http://127.0.0.1:{port}/metrics"
        publishes_unasked = kind in ("clock", "api")
        fresh = (self._metrics_folder(name),) if name in _CELERY_WORKERS else ()
        return ProcessSpec(
            name=name,
            argv=(sys.executable, "-m", f"services.{service}", kind),
            env=self._service_env(name),
            probe=http_probe(_reachable(host), port, path),
            address=address,
            cwd=self._work_folder(service),
            start_order=_START["publisher" if publishes_unasked else "consumer"],
            stop_order=_STOP["service"],
            fresh_folders=fresh,
        )

    def _service_env(self, name: str) -> dict[str, str]:
        """Return all that one process of a service is told."""
        service, kind = name.split(".")
        prefix = service.upper()
        told = {
            "BROKER_URL": self._broker_url,
            "STORE_ENDPOINT_URL": self._store.endpoint_url,
            "STORE_BUCKET": self._store.bucket,
            "STORE_ACCESS_KEY": self._store.access_key,
            "STORE_SECRET_KEY": self._store.secret_key,
            "WORK_DIR": str(self._work_folder(service)),
            "PROFILE": "embedded",
        }
        if f"{name}.metrics" in self._ports:
            told["METRICS_PORT"] = str(self._ports[f"{name}.metrics"])
        if service in _READS_FILES:
            roots = (self.root / "models", *self.options.file_roots)
            told["FILE_ROOTS"] = os.pathsep.join(str(path.resolve()) for path in roots)
        if service == "teacher_gateway":
            told |= {
                "DATABASE_URL": self._database_url(),
                "API_HOST": self.options.api_host,
                "API_PORT": str(self._ports["teacher_gateway.api"]),
                "KEY_PEPPER": self._key_pepper(),
            }
        env = base_environment(
            {
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "PASSIVE",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONUNBUFFERED": "1",
            }
        )
        # What an operator set for this very service (a device, a deadline) is meant for it.
        env |= {k: v for k, v in os.environ.items() if k.startswith(f"{prefix}_")}
        env |= {k: v for k, v in self.options.service_env.items() if k.startswith(f"{prefix}_")}
        env |= {k: os.environ[k] for k in _HUB_VARIABLES if k in os.environ}
        env |= self._passed_env()
        env |= {f"{prefix}_{key}": value for key, value in told.items()}
        if service == "teacher_gateway" and self.options.pass_env:
            # What is passed may be sent to a teacher: to one host, or wherever a spec says.
            passed = [name if "@" in name else f"{name}@*" for name in self.options.pass_env]
            env.setdefault("TEACHER_GATEWAY_SECRET_HOSTS", ",".join(passed))
        if service in _READS_FILES:
            # Shared, so that weights are fetched once.
            env.setdefault(f"{prefix}_CACHE_DIR", str(self.root / "cache"))
        if f"{service}.{kind}" in _CELERY_WORKERS:
            env["PROMETHEUS_MULTIPROC_DIR"] = str(self._metrics_folder(name))
        return env

    def _passed_env(self) -> dict[str, str]:
        names = [given.partition("@")[0] for given in self.options.pass_env]
        if missing := [name for name in names if name not in os.environ]:
            raise StackError(f"--pass-env names {', '.join(missing)}, which is not set")
        return {name: os.environ[name] for name in names}

    def _make_folders(self) -> None:
        for name in ("valkey", "seaweedfs", "logs", "run", "models", "work"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        (self.root / "secrets").mkdir(mode=0o700, exist_ok=True)
        (self.root / ".gitignore").write_text("*\n")

    def _choose_ports(self) -> dict[str, int]:
        """Keep the ports of the last run where they are free, so that addresses stay."""
        try:
            before = json.loads((self.root / "stack.json").read_text())["ports"]
        except (OSError, ValueError, LookupError):
            before = {}
        ports: dict[str, int] = {}
        if self.options.store is None:
            last = {name: before.get(f"seaweedfs.{name}", 0) for name in weed.PORT_NAMES}
            kept = {name: port for name, port in last.items() if port}
            chosen = weed.choose_ports(kept)
            ports |= {f"seaweedfs.{name}": port for name, port in chosen.items()}
        names = [f"{name}.metrics" for name in self.options.services]
        names += ["teacher_gateway.api", "teacher"]
        if self.options.api_port is not None:
            before["teacher_gateway.api"] = self.options.api_port
            if not is_free(self.options.api_port):
                raise StackError(
                    f"port {self.options.api_port} is taken: choose another with --api-port"
                )
        fresh = free_ports()
        for name in names:
            port = before.get(name)
            while port is None or port in ports.values() or not is_free(port):
                port = next(fresh)
            ports[name] = port
        return ports

    def _own_store(self) -> Store:
        access_key, secret_key = weed.write_config(self._s3_config())
        endpoint = f"http://127.0.0.1:{self._ports['seaweedfs.s3']}"
        return Store(endpoint, weed.BUCKET, access_key, secret_key)

    def _s3_config(self) -> Path:
        return self.root / "secrets" / "s3.json"

    def _database_file(self) -> Path:
        return self.root / "gateway.sqlite3"

    def _database_url(self) -> str:
        return self.options.database_url or f"sqlite:///{self._database_file()}"

    def _database_digest(self) -> str:
        """Name the database without its password, to know which one our key belongs to."""
        import hashlib

        pepper = self._key_pepper()
        return hashlib.sha256(f"{pepper}{self._database_url()}".encode()).hexdigest()[:16]

    def _key_pepper(self) -> str:
        path = self.root / "secrets" / "key_pepper"
        if not path.exists():
            _write_private(path, secrets.token_urlsafe(32))
        return path.read_text()

    def _work_folder(self, service: str) -> Path:
        folder = self.root / "work" / service
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _metrics_folder(self, name: str) -> Path:
        return self.root / "run" / "metrics" / name

    def _api_url(self) -> str | None:
        if "teacher_gateway.api" not in self.options.services:
            return None
        host = _reachable(self.options.api_host)
        return f"http://{host}:{self._ports['teacher_gateway.api']}"

    def _teacher_url(self) -> str | None:
        return f"http://127.0.0.1:{self._ports['teacher']}/v1" if self.options.teacher else None

    def _credentials(self) -> dict[str, Any]:
        try:
            values = json.loads((self.root / "credentials.json").read_text())
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    def _save_credentials(self, more: Mapping[str, Any]) -> None:
        pair = {"access_key": self._store.access_key, "secret_key": self._store.secret_key}
        values = self._credentials() | {"store": pair} | dict(more)
        _write_private(self.root / "credentials.json", json.dumps(values, indent=2) + "\n")

    def _write_state(self) -> None:
        states = self._supervisor.states()
        values = {
            "version": 1,
            "state": self._state,
            "supervisor_pid": os.getpid(),
            "api_url": self._api_url(),
            "teacher_url": self._teacher_url(),
            "broker_url": self._broker_url,
            "store": {"endpoint_url": self._store.endpoint_url, "bucket": self._store.bucket},
            "ports": self._ports,
            "processes": {name: vars(state) for name, state in states.items()},
        }
        _write_private(self.root / "stack.json", json.dumps(values, indent=2) + "\n")


def run_stack(
    root: Path,
    options: StackOptions | None = None,
    *,
    say: Callable[[str], None] = print,
) -> int:
    """Run a stack in the foreground until Ctrl-C or SIGTERM; a second one stops at once."""
    stack: Stack

    def ready() -> None:
        say(f"ready; data and logs are in {stack.root}. Ctrl-C stops everything.")

    def heed(_number: int, _frame: object) -> None:
        (stack.hurry if stack.stopping.is_set() else stack.stopping).set()

    stack = Stack(root, options, say=say, ready=ready)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, heed) for number in numbers}
    try:
        stack.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


@contextlib.contextmanager
def running_stack(
    root: Path,
    options: StackOptions | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[StackInfo]:
    """Run a stack beside the caller and yield it when it is ready, for tests and demos."""
    up = threading.Event()
    failed: list[BaseException] = []
    stack = Stack(root, options, say=say, ready=up.set)

    def run() -> None:
        try:
            stack.run()
        except BaseException as error:
            failed.append(error)
        finally:
            up.set()

    thread = threading.Thread(target=run, name="stillhouse-stack")
    thread.start()
    try:
        up.wait()
        if failed:
            raise failed[0]
        yield read_stack(root)
    finally:
        stack.stopping.set()
        try:
            thread.join()
        except KeyboardInterrupt:
            stack.hurry.set()
            thread.join()
            raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stack from a command line; `stillhouse up` is the same with more comfort."""
    parser = argparse.ArgumentParser(prog="python -m stillhouse.embedded.stack")
    parser.add_argument("--root", type=Path, default=Path(".stillhouse"))
    parser.add_argument("--api-port", type=int)
    parser.add_argument("--pass-env", action="append", default=[], metavar="NAME[@HOST]")
    parser.add_argument("--file-root", action="append", default=[], type=Path)
    parser.add_argument("--teacher", action="store_true", help=f"serve {teacher.MODEL_NAME} too")
    parser.add_argument("--quick-stop", action="store_true", help="do not wait for the store")
    parser.add_argument("--service", action="append", choices=(*SERVICE_PROCESSES, "none"))
    chosen = parser.parse_args(argv)
    try:
        options = StackOptions.from_environment(
            api_port=chosen.api_port,
            pass_env=tuple(chosen.pass_env),
            file_roots=tuple(chosen.file_root),
            teacher=chosen.teacher,
            quick_stop=chosen.quick_stop,
        )
        if chosen.service:
            names = tuple(name for name in chosen.service if name != "none")
            options = replace(options, services=names)
        return run_stack(chosen.root, options, say=_print)
    except StackError as error:
        print(f"stillhouse up: {error}", file=sys.stderr)  # noqa: T201
        return 1


def _print(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def http_probe(host: str, port: int, path: str) -> Callable[[], None]:
    """Return a probe that passes on 200; never through a proxy that the user may have set."""

    def ask() -> None:
        connection = http.client.HTTPConnection(host, port, timeout=3)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read(300).decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise NotReadyError(f"{path}: {error}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise NotReadyError(f"{path} answers {answer.status}: {body}")

    return ask


def _reachable(host: str) -> str:
    """Return where to reach a server that listens on `host`."""
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host  # noqa: S104


def _write_private(path: Path, text: str) -> None:
    """Replace a file that only its owner may read; a reader sees the old or the new one whole."""
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mode 0600
    with os.fdopen(handle, "w") as file:
        file.write(text)
    Path(partial).replace(path)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the folder for one supervisor; the lock goes with the process, however it ends."""
    with (root / "run" / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(
                f"a stack already runs in {root}: stop it with Ctrl-C where it runs, "
                "or choose another folder with --root"
            ) from None
        yield


def _is_locked(path: Path) -> bool:
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


if __name__ == "__main__":
    sys.exit(main())
