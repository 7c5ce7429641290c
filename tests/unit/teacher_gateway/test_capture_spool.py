"""What a process recorded lies on its disk until it is shipped, whatever becomes of the process."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.teacher_gateway.capture.record import Damage, Record, frame, frames
from services.teacher_gateway.capture.ship import read_segment
from services.teacher_gateway.capture.spool import Spool, abandoned, open_folder, segments
from stillhouse.chassis.errors import PermanentError
from tests.support.waiting import wait_for


def record(request: bytes = b"{}", **changes: Any) -> Record:
    values: dict[str, Any] = {
        "tenant_id": "t",
        "teacher": "fast",
        "verdict_id": "tv-1",
        "terms": "own-weights",
        "kind": "chat",
        "at": 1.0,
        "seconds": 0.5,
        "status": 200,
        "streamed": False,
        "failure": "",
        "detail": "",
        "tags": {"app": "x"},
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "tranche_id": "tr-1",
        "bill": "known",
        "microusd": 5,
        "request": request,
        "answer": b"{}",
    }
    return Record(**{**values, **changes})


@given(st.lists(st.binary(max_size=200), max_size=5), st.data())
def test_records_are_read_as_written_and_a_cut_costs_the_last_one_alone(
    requests: list[bytes], data: st.DataObject
) -> None:
    written = [record(request) for request in requests]
    stored = b"".join(map(frame, written))
    assert list(frames(stored)) == written
    cut = data.draw(st.integers(0, len(stored)))
    whole = [n for n in range(len(written) + 1) if len(b"".join(map(frame, written[:n]))) <= cut]
    found = list(frames(stored[:cut]))
    assert [r for r in found if isinstance(r, Record)] == written[: whole[-1]]
    assert all(r.cut for r in found if isinstance(r, Damage))


@given(st.data())
def test_a_flipped_bit_is_found_and_costs_no_record_before_it(data: st.DataObject) -> None:
    first, second = record(b"a" * 50), record(b"b" * 50)
    stored = bytearray(frame(first) + frame(second))
    place = data.draw(st.integers(0, len(stored) - 1))
    stored[place] ^= 1 << data.draw(st.integers(0, 7))
    found = list(frames(bytes(stored)))
    assert [r.cut for r in found if isinstance(r, Damage)] == [False]
    assert (found[0] == first) == (place >= len(frame(first)))


@given(st.binary(max_size=300))
def test_whatever_lies_in_a_spool_is_read_to_an_end(data: bytes) -> None:
    assert not [r for r in frames(data) if isinstance(r, Record)]
    found = list(frames(frame(record(b"1")) + data))
    assert found[0] == record(b"1")


def raw_frame(payload: bytes) -> bytes:
    """A payload in a frame without a flaw."""
    checksum = zlib.crc32(payload)
    head = struct.pack(">II", len(payload), checksum)
    return head + struct.pack(">I", zlib.crc32(head)) + payload


@pytest.mark.parametrize(
    "changes",
    [
        {"microusd": -1}, {"microusd": 10**13 + 1}, {"prompt_tokens": -5},
        {"completion_tokens": (1 << 40) + 1}, {"at": float("nan")}, {"at": 1e300},
        {"seconds": float("inf")}, {"bill": "free"}, {"kind": 7}, {"tags": {"a": 1}},
        {"answer": "text"},
    ],
)  # fmt: skip
def test_a_record_with_what_cannot_be_is_damage_and_the_next_is_read(
    changes: dict[str, Any],
) -> None:
    bad = raw_frame(msgspec.msgpack.encode(record(b"1", **changes)))
    found = list(frames(bad + raw_frame(b"\xc1") + frame(record(b"2"))))
    assert [type(r) for r in found] == [Damage, Damage, Record]
    assert found[-1] == record(b"2")


def test_a_record_in_a_request_is_never_read_as_one() -> None:
    """Who can choose what lies in a spool could else be another tenant in it."""
    forged = frame(record(b"{}", tenant_id="other"))
    carrier = frame(record(b"x" * 100 + forged + b"x" * 100))
    for place in range(len(carrier)):
        damaged = bytearray(carrier)
        damaged[place] ^= 1
        assert not [r for r in frames(bytes(damaged)) if isinstance(r, Record)]
        assert not [r for r in frames(carrier[:place]) if isinstance(r, Record)]


def test_what_is_damaged_in_the_middle_costs_no_other_record(tmp_path: Path) -> None:
    path = tmp_path / "000001.spool"
    first, second, third = (frame(record(text)) for text in (b"1", b"2", b"3"))
    path.write_bytes(first + second[:-1] + b"!" + third)
    records, damage = read_segment(path)
    assert records == [record(b"1"), record(b"3")]
    assert [found.at for found in damage] == [len(first)]
    path.write_bytes(first + second[:-1])
    assert read_segment(path) == ([record(b"1")], []), "a record that was cut is nobody's"


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., tuple[Spool, list[Path], list[str]]]]:
    spools: list[Spool] = []

    def make(**options: Any) -> tuple[Spool, list[Path], list[str]]:
        closed: list[Path] = []
        lost: list[str] = []
        spool = Spool(
            tmp_path / "captured",
            closed=closed.append,
            lost=lambda records, why: lost.extend([why] * len(records)),
            **{"most_bytes": 1 << 20, "segment_seconds": 0.1, **options},
        )
        spools.append(spool)
        return spool, closed, lost

    yield make
    for spool in spools:
        spool.close()


def test_a_spool_closes_a_segment_when_it_is_old_enough(made: Any) -> None:
    spool, closed, _ = made()
    assert spool.add(record(b"1"))
    assert spool.add(record(b"2"))
    wait_for(lambda: closed, 20, "a segment is closed")
    spool.add(record(b"3"))
    wait_for(lambda: closed, 20, "another one is", until=lambda found: len(found) == 2)
    assert [r.request for path in closed for r in read_segment(path)[0]] == [b"1", b"2", b"3"]


def test_a_spool_has_room_for_so_much_and_more_once_it_is_shipped(made: Any) -> None:
    spool, closed, _ = made(most_bytes=3000)
    texts = [b"x" * 500 for _ in range(5)]
    assert [spool.add(record(text)) for text in texts] == [True, True, True, False, False]
    wait_for(lambda: closed, 20, "a segment is closed")
    assert not spool.add(record(texts[0]))
    spool.shipped(read_segment(closed[0])[0])
    assert spool.add(record(texts[0]))


def test_what_is_written_at_the_end_is_written(made: Any) -> None:
    spool, closed, _ = made(segment_seconds=3600)
    for number in range(100):
        spool.add(record(str(number).encode()))
    spool.close()
    assert len(read_segment(closed[0])[0]) == 100
    assert not spool.add(record()), "nothing is taken after the end"


def test_what_a_full_disk_took_of_a_lost_record_is_not_read_as_one(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, closed, lost = made(segment_seconds=3600)
    spool.add(record(b"1"))
    wait_for(lambda: spool._size, 20, "the first one is written")
    real = os.write

    def write(handle: int, data: bytes) -> int:
        real(handle, data)  # all of it, and the disk fails at the very end
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    spool.add(record(b"2"))
    wait_for(lambda: lost, 20, "the second one is lost")
    monkeypatch.setattr(os, "write", real)
    spool.add(record(b"3"))
    spool.close()
    assert [r.request for path in closed for r in read_segment(path)[0]] == [b"1", b"3"]
    assert lost == ["spool_disk"]


def test_a_record_that_cannot_be_written_costs_none_of_those_beside_it(made: Any) -> None:
    spool, closed, lost = made(segment_seconds=3600)
    for request, detail in ((b"1", ""), (b"2", "\ud800"), (b"3", "")):
        spool.add(record(request, detail=detail))
    spool.close()
    assert [r.request for path in closed for r in read_segment(path)[0]] == [b"1", b"3"]
    assert lost == ["spool_error"]


def test_a_disk_that_hangs_never_holds_up_who_adds(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda handle: (go.wait(30), real(handle)))
    spool, _, _ = made(most_bytes=1 << 40)
    added = 0
    while spool.add(record(b"x" * (1 << 20))):
        added += 1
        assert added < 1000, "what waits in memory has an end"
    go.set()


def test_only_spools_whose_process_is_gone_are_found(made: Any, tmp_path: Path) -> None:
    folder = tmp_path / "captured"
    spool, closed, _ = made()
    spool.add(record())
    wait_for(lambda: closed, 20, "a segment is closed")
    (folder / ".making-x").mkdir()
    assert list(abandoned(folder)) == []
    spool.close()
    os.close(spool._lock)  # as the end of its process would
    (path,) = abandoned(folder)
    assert path.name == spool.spool_id
    assert path.exists(), "what is left in it is not removed"
    for left in segments(path):
        left.unlink()
    assert list(abandoned(folder)) == [path]
    assert not path.exists()
    assert (folder / ".making-x").exists(), "it may be on its way"
    old = time.time() - 86_400
    os.utime(folder / ".making-x", (old, old))
    assert list(abandoned(folder)) == []
    assert not (folder / ".making-x").exists()


def test_two_who_sweep_at_once_do_not_meet(made: Any, tmp_path: Path) -> None:
    spool, closed, _ = made()
    spool.add(record())
    wait_for(lambda: closed, 20, "a segment is closed")
    spool.close()
    os.close(spool._lock)
    first = abandoned(tmp_path / "captured")
    next(first)
    assert list(abandoned(tmp_path / "captured")) == [], "the first one holds it"
    first.close()
    assert len(list(abandoned(tmp_path / "captured"))) == 1


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "captured"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(PermanentError, match="TEACHER_GATEWAY_CAPTURE_DIR"):
        open_folder(shared)
    (tmp_path / "file").write_text("")
    with pytest.raises(PermanentError, match="cannot be used"):
        open_folder(tmp_path / "file" / "captured")
    open_folder(tmp_path / "new" / "captured")
    assert (tmp_path / "new" / "captured").stat().st_mode & 0o777 == 0o700
