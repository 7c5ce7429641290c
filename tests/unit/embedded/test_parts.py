"""What the embedded parts are told, without starting them."""

import json
import os
import socket
import stat

import pytest

from stillhouse.embedded import seaweedfs, valkey
from stillhouse.embedded.ports import GRPC_OFFSET, free_ports, is_free
from stillhouse.embedded.process import StackError, base_environment


def test_a_taken_port_is_not_offered():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert not is_free(taken.getsockname()[1])


def test_ports_leave_room_for_their_grpc_partner():
    ports = free_ports(with_grpc=True)
    chosen = [next(ports) for _ in range(20)]
    assert len(set(chosen)) == 20
    assert all(port + GRPC_OFFSET < 32_768 for port in chosen)


def test_store_ports_of_the_last_run_are_kept_when_they_are_free():
    before = seaweedfs.choose_ports()
    assert seaweedfs.choose_ports(before) == before


def test_store_keys_are_made_once_and_only_their_owner_reads_them(tmp_path):
    path = tmp_path / "s3.json"
    first = seaweedfs.write_config(path)
    assert seaweedfs.write_config(path) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["identities"][0]["actions"][0] == "Admin"


def test_a_broken_key_file_says_what_to_do(tmp_path):
    (tmp_path / "s3.json").write_text("{}")
    with pytest.raises(StackError, match="remove it"):
        seaweedfs.write_config(tmp_path / "s3.json")


def test_two_installations_have_different_keys(tmp_path):
    assert seaweedfs.write_config(tmp_path / "a") != seaweedfs.write_config(tmp_path / "b")


def test_a_store_does_not_show_its_secret():
    assert "hush" not in repr(seaweedfs.Store("http://x", "b", "key", "hush"))


def test_broker_socket_is_short_and_private(tmp_path):
    runtime = valkey.make_runtime_dir()
    try:
        assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
        assert len(os.fsencode(valkey.socket_path(runtime))) < 108
        words = valkey.command(tmp_path, runtime)
        assert words[words.index("--appendonly") + 1] == "yes"
        assert words[words.index("--port") + 1] == "0"
    finally:
        runtime.rmdir()


def test_a_socket_path_that_the_kernel_would_cut_is_refused(tmp_path):
    with pytest.raises(StackError, match="too long"):
        valkey.socket_path(tmp_path / ("x" * 120))


def test_a_named_binary_must_be_executable(monkeypatch, tmp_path):
    monkeypatch.setenv("VALKEY_BIN", str(tmp_path / "nothing"))
    monkeypatch.setenv("WEED_BIN", str(tmp_path / "nothing"))
    with pytest.raises(StackError, match="VALKEY_BIN"):
        valkey.find_binary()
    with pytest.raises(StackError, match="WEED_BIN"):
        seaweedfs.find_binary()


def test_children_do_not_see_the_users_secrets(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("OPENAI_API_KEY", "hush")
    assert "hush" not in base_environment().values()
