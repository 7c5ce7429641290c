"""What a process recorded lies on its disk until it is shipped, whatever becomes of the process."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.teacher_gateway.capture.record import DamagedSpool, Record, frame, frames
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
    found: list[Record] = []
    damage: list[DamagedSpool] = []
    whole = [n for n in range(len(written) + 1) if len(b"".join(map(frame, written[:n]))) <= cut]
    try:
        found.extend(frames(stored[:cut]))
    except DamagedSpool as error:
        damage.append(error)
    assert all(error.cut for error in damage)
    assert found == written[: whole[-1]]


@given(st.data())
def test_a_flipped_bit_is_found(data: st.DataObject) -> None:
    stored = bytearray(frame(record(b"a" * 50)) + frame(record(b"b" * 50)))
    place = data.draw(st.integers(0, len(stored) - 1))
    stored[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DamagedSpool):
        list(frames(bytes(stored)))


def test_what_is_damaged_in_the_middle_is_kept_for_an_operator(tmp_path: Path) -> None:
    path = tmp_path / "000001.spool"
    first, second, third = (frame(record(text)) for text in (b"1", b"2", b"3"))
    path.write_bytes(first + second[:-1] + b"!" + third)
    assert read_segment(path) == [record(b"1")]
    assert path.with_suffix(".damaged").read_bytes() == second[:-1] + b"!" + third
    path.write_bytes(first + second[:-1])
    path.with_suffix(".damaged").unlink()
    assert read_segment(path) == [record(b"1")]
    assert not path.with_suffix(".damaged").exists(), "a record that was cut is nobody's"


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
    assert [r.request for path in closed for r in read_segment(path)] == [b"1", b"2", b"3"]


def test_a_spool_has_room_for_so_much_and_more_once_it_is_shipped(made: Any) -> None:
    spool, closed, _ = made(most_bytes=3000)
    texts = [b"x" * 500 for _ in range(5)]
    assert [spool.add(record(text)) for text in texts] == [True, True, True, False, False]
    wait_for(lambda: closed, 20, "a segment is closed")
    assert not spool.add(record(texts[0]))
    spool.shipped(read_segment(closed[0]))
    assert spool.add(record(texts[0]))


def test_what_is_written_at_the_end_is_written(made: Any) -> None:
    spool, closed, _ = made(segment_seconds=3600)
    for number in range(100):
        spool.add(record(str(number).encode()))
    spool.close()
    assert len(read_segment(closed[0])) == 100
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
    assert [r.request for path in closed for r in read_segment(path)] == [b"1", b"3"]
    assert lost == ["spool_disk"]


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
