"""The embedded stack with the real broker and store, and stand-ins for the four services."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from stillhouse.embedded.parts import seaweedfs, valkey
from stillhouse.embedded.ports import GRPC_OFFSET, is_free
from stillhouse.embedded.process import StackError, base_environment
from stillhouse.embedded.seaweedfs import client
from stillhouse.embedded.stack import SERVICE_PROCESSES, StackOptions, read_stack, running_stack

# Serves 200 on the port that it was told, and counts how often keys were asked for.
STAND_IN = """
import http.server, json, os, pathlib, sys
service, words = __spec__.parent.rpartition(".")[2].upper(), sys.argv[1:]
if words == ["migrate"]:
    url = os.environ["TEACHER_GATEWAY_DATABASE_URL"]
    pathlib.Path(url.removeprefix("sqlite:///")).touch()
elif words[:2] == ["keys", "create"]:
    print(json.dumps({"key": "key-" + words[words.index("--tenant") + 1]}))
else:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers(); self.wfile.write(b"ok")
    name = "API_PORT" if words == ["api"] else "METRICS_PORT"
    port = int(os.environ[f"{service}_{name}"])
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    for service in ("teacher_gateway", "dataset_builder", "trainer", "evaluator"):
        folder = tmp_path / "code" / "services" / service
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "__main__.py").write_text(STAND_IN)
    (tmp_path / "code" / "services" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))


def alive(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def until(condition, seconds, what):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def test_the_store_answers_conditions_and_refuses_unknown_buckets_and_keys(tmp_path):
    with seaweedfs(tmp_path) as store:
        s3 = client(store)
        s3.put_object(Bucket=store.bucket, Key="a/b", Body=b"1", IfNoneMatch="*")
        with pytest.raises(s3.exceptions.ClientError, match="PreconditionFailed"):
            s3.put_object(Bucket=store.bucket, Key="a/b", Body=b"2", IfNoneMatch="*")
        with pytest.raises(s3.exceptions.ClientError, match="NoSuchBucket"):
            s3.put_object(Bucket="mistyped", Key="a", Body=b"1")
        stranger = client(type(store)(store.endpoint_url, store.bucket, store.access_key, "wrong"))
        with pytest.raises(s3.exceptions.ClientError, match="SignatureDoesNotMatch"):
            stranger.get_object(Bucket=store.bucket, Key="a/b")


def test_the_broker_keeps_messages_over_a_kill(tmp_path):
    with valkey(tmp_path) as url:
        path = url.removeprefix("redis+socket://")
        redis.Redis(unix_socket_path=path).rpush("queue", "message")
    with valkey(tmp_path) as url:  # the first one was killed, not stopped
        path = url.removeprefix("redis+socket://")
        assert redis.Redis(unix_socket_path=path).lpop("queue") == b"message"


@pytest.mark.slow
def test_a_stack_starts_heals_and_stops(tmp_path, stand_ins):
    root = tmp_path / "s"
    with running_stack(root) as stack:
        assert list(stack.processes)[:2] == ["valkey", "seaweedfs"]
        assert set(SERVICE_PROCESSES) < set(stack.processes)
        assert stack.api_key == "key-default"
        assert stack.state == "ready"

        # A second one says so instead of sharing the folder.
        with pytest.raises(StackError, match="already runs"), running_stack(root):
            pass

        s3 = client(stack.store)
        s3.put_object(Bucket=stack.store.bucket, Key="kept", Body=b"1")
        for name in stack.processes:
            os.killpg(stack.pid(name), signal.SIGKILL)

        def healed():
            now = read_stack(root)
            return all(now.pid(n) != stack.pid(n) and alive(now.pid(n)) for n in stack.processes)

        until(healed, 20, "not all processes came back")

        def readable():
            with contextlib.suppress(Exception):
                return s3.get_object(Bucket=stack.store.bucket, Key="kept")["Body"].read() == b"1"
            return False

        until(readable, 30, "the store did not come back with its object")
        pids = [read_stack(root).pid(name) for name in stack.processes]

    assert not any(alive(pid) for pid in pids)
    with pytest.raises(StackError, match="no stack runs"):
        read_stack(root)


@pytest.mark.slow
def test_killing_the_supervisor_leaves_no_process_and_the_next_start_works(tmp_path):
    root = tmp_path / "s"
    command = [sys.executable, "-m", "stillhouse.embedded.stack", "--root", root]
    command += ["--service", "none"]
    with subprocess.Popen(command, env=base_environment(), stdout=subprocess.PIPE) as up:
        while not up.stdout.readline().startswith(b"ready"):
            assert up.poll() is None, "it ended before it was ready"
        stack = read_stack(root)
        up.kill()
    until(
        lambda: not any(alive(stack.pid(name)) for name in stack.processes), 5, "a child lives on"
    )
    # A killed process with many threads is a zombie a moment before its sockets are closed.
    ports = json.loads((root / "stack.json").read_text())["ports"].values()
    until(
        lambda: all(is_free(port) and is_free(port + GRPC_OFFSET) for port in ports), 10, "a socket"
    )
    with running_stack(root, StackOptions(services=(), quick_stop=True)) as again:
        assert again.store == stack.store
