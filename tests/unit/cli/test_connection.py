from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillhouse.cli.client import Client, StillhouseClientError
from stillhouse.cli.connection import connect

STACK_URL = "http://127.0.0.1:18080"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A data folder as a running stack leaves it: lock held, addresses and keys written."""
    (tmp_path / "run").mkdir()
    store = {"endpoint_url": "http://127.0.0.1:1", "bucket": "b"}
    values = {
        "state": "ready",
        "api_url": STACK_URL,
        "teacher_url": None,
        "broker_url": "redis+socket:///x",
        "store": store,
        "supervisor_pid": 1,
        "processes": {},
    }
    (tmp_path / "stack.json").write_text(json.dumps(values))
    keys = {"api_key": "sth_stack", "store": {"access_key": "a", "secret_key": "s"}}
    (tmp_path / "credentials.json").write_text(json.dumps(keys))
    with (tmp_path / "run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path


def of(client: Client) -> tuple[str, str]:
    with client:
        return client.base_url, client._http.headers["Authorization"].removeprefix("Bearer ")


def test_the_stack_of_the_folder_is_found_with_its_key(root: Path) -> None:
    assert of(connect(None, None, root)) == (STACK_URL, "sth_stack")


def test_what_is_named_wins_over_the_stack(root: Path) -> None:
    assert of(connect("http://h:1/", "sth_mine", root)) == ("http://h:1", "sth_mine")
    assert of(connect(None, "sth_mine", root)) == (STACK_URL, "sth_mine")


def test_the_stacks_key_goes_to_no_other_gateway(root: Path) -> None:
    with pytest.raises(StillhouseClientError, match="no API key for http://elsewhere:18080"):
        connect("http://elsewhere:18080", None, root)


def test_the_stack_named_by_its_own_address_gets_its_key(root: Path) -> None:
    assert of(connect("http://localhost:18080", None, root)) == (STACK_URL, "sth_stack")


def test_without_a_stack_the_error_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(StillhouseClientError, match="start one with `stillhouse up`"):
        connect(None, None, tmp_path)


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://h", "http://"])
def test_what_is_no_address_is_said_to_be_none(url: str, tmp_path: Path) -> None:
    with pytest.raises(StillhouseClientError, match="expected an address such as"):
        connect(url, "sth_key", tmp_path)


@pytest.mark.parametrize("key", ["sth_\u00e9", "sth_a\nb"])
def test_a_key_that_no_header_can_carry_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(StillhouseClientError, match="copy it again"):
        connect("http://h", key, tmp_path)
