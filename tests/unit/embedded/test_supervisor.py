"""The supervisor with processes that do nothing but live, die or refuse to die."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from stillhouse.embedded.process import NotReadyError, StackError, base_environment
from stillhouse.embedded.supervisor import ProcessSpec, StopRequestedError, Supervisor

SLEEP = "import time; time.sleep(60)"


def spec(name, code=SLEEP, **more):
    more.setdefault("probe", lambda: None)
    argv = (sys.executable, "-I", "-S", "-c", code)
    return ProcessSpec(name=name, argv=argv, env=base_environment(), **more)


@pytest.fixture
def said():
    return []


@pytest.fixture
def supervisor(tmp_path, said):
    one = Supervisor(tmp_path / "logs", say=said.append)
    yield one
    one.stop()
    one.close()


def alive(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def file_with(path):
    def probe():
        if not path.exists() or not path.read_text():
            raise NotReadyError(f"{path} is not there")

    return probe


def test_each_order_is_ready_before_the_next_starts(supervisor, tmp_path):
    mark = tmp_path / "mark"
    first = f"import time; time.sleep(.3); open({str(mark)!r}, 'w').write('1'); time.sleep(60)"
    second = f"import os; assert os.path.exists({str(mark)!r}); {SLEEP}"
    supervisor.start(
        [spec("second", second, start_order=1), spec("first", first, probe=file_with(mark))]
    )
    assert list(supervisor.states()) == ["first", "second"]
    assert alive(supervisor.states()["second"].pid)


def test_what_dies_is_started_again_and_its_group_is_gone(supervisor, tmp_path, said):
    note = tmp_path / "note"
    child = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); "
    child += f"open({str(note)!r}, 'w').write(str(p.pid)); p.wait()"
    supervisor.start([spec("worker", child, probe=file_with(note))])
    before, pool = supervisor.states()["worker"].pid, int(note.read_text())

    os.kill(before, signal.SIGKILL)

    def again():
        supervisor.tend()
        return supervisor.states()["worker"].restarts == 1

    until(again)
    assert supervisor.states()["worker"].pid != before
    assert not alive(pool)
    assert any("ended with -9" in line for line in said)


def test_back_off_doubles(supervisor, said):
    supervisor.start([spec("flapping", "import time; time.sleep(.05)")])

    def three():
        supervisor.tend()
        return sum("starts again" in line for line in said) == 3

    until(three)
    delays = [line.rpartition("again in ")[2] for line in said if "starts again" in line]
    assert delays == ["0.5 s", "1 s", "2 s"]


def test_a_process_that_cannot_start_is_named_with_its_last_words(supervisor):
    with pytest.raises(StackError, match=r"(?s)3 times before.*no such setting") as error:
        supervisor.start([spec("sick", "raise SystemExit('no such setting')", probe=_never)])
    assert "sick" in str(error.value)


def test_a_process_that_never_gets_ready_is_named_with_what_was_seen(supervisor):
    with pytest.raises(StackError, match=r"slow was not ready within 0\.2 s: asleep"):
        supervisor.start([spec("slow", probe=_never, ready_seconds=0.2)])


def _never():
    raise NotReadyError("asleep")


def test_stopping_goes_in_order_and_kills_the_stubborn(supervisor, tmp_path):
    log = tmp_path / "order"
    polite = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        f"    open({str(log)!r}, 'a').write(sys.argv[0] + NAME); sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"open({str(log)!r} + NAME, 'w').write('up')\n"
        "time.sleep(60)\n"
    )
    stubborn = f"import signal; signal.signal(15, signal.SIG_IGN); open({str(log)!r} + 's', 'w')"
    stubborn += f".write('up'); {SLEEP}"
    specs = [
        spec(
            name,
            f"NAME = {name!r}\n{polite}",
            stop_order=order,
            probe=file_with(Path(f"{log}{name}")),
        )
        for name, order in (("b", 2), ("a", 0))
    ]
    specs.append(
        spec("s", stubborn, stop_order=1, stop_seconds=0.3, probe=file_with(Path(f"{log}s")))
    )
    supervisor.start(specs)
    pids = [state.pid for state in supervisor.states().values()]
    supervisor.stop()
    assert log.read_text() == "-ca-cb"
    assert not any(alive(pid) for pid in pids)


def test_asked_to_stop_while_starting_it_stops(supervisor):
    threading.Timer(0.2, supervisor.stopping.set).start()
    with pytest.raises(StopRequestedError):
        supervisor.start([spec("slow", probe=_never)])


def test_fresh_folders_are_emptied_before_each_start(supervisor, tmp_path):
    folder = tmp_path / "metrics"
    folder.mkdir()
    (folder / "gauge_1.db").write_text("old")
    supervisor.start([spec("worker", fresh_folders=(folder,))])
    assert list(folder.iterdir()) == []


def test_a_command_runs_to_its_end_and_its_output_comes_back(supervisor):
    argv = (sys.executable, "-c", "print('done')")
    assert supervisor.run_once("job", argv, base_environment()) == "done\n"


def test_a_command_that_fails_is_an_error_with_its_last_words(supervisor):
    argv = (sys.executable, "-c", "raise SystemExit('no disk')")
    with pytest.raises(StackError, match=r"(?s)job failed with 1\..*no disk"):
        supervisor.run_once("job", argv, base_environment())


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's parent-death signal")
def test_a_killed_supervisor_leaves_nothing_behind(tmp_path):
    note = tmp_path / "pids"
    worker = (
        f"import subprocess, sys, os; p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); "
    )
    worker += f"open({str(note)!r}, 'w').write(f'{{os.getpid()}} {{p.pid}}'); p.wait()"
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from stillhouse.embedded.process import base_environment\n"
        "from stillhouse.embedded.supervisor import ProcessSpec, Supervisor\n"
        f"s = Supervisor(Path({str(tmp_path / 'logs')!r}), say=print)\n"
        f"s.forget_folder_at_end(Path({str(tmp_path / 'runtime')!r}))\n"
        f"s.start([ProcessSpec('w', (sys.executable, '-c', {worker!r}), base_environment(),"
        " lambda: None)])\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "runtime").mkdir()
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        until(lambda: note.exists() and len(note.read_text().split()) == 2)
        pids = [int(word) for word in note.read_text().split()]
        assert all(alive(pid) for pid in pids)
        parent.kill()
    until(lambda: not any(alive(pid) for pid in pids))
    until(lambda: not (tmp_path / "runtime").exists())


def test_a_full_disk_ends_no_process(tmp_path, said):
    full = [True]

    def write_down():
        if full[0]:
            raise OSError(28, "No space left on device")

    one = Supervisor(tmp_path / "logs", say=said.append, changed=write_down)
    try:
        one.start([spec("worker")])
        one.tend()
        assert one.states()["worker"].pid
        assert len([line for line in said if "No space left" in line]) == 1
        full[0] = False
        one.tend()
        assert not one._unwritten
    finally:
        one.stop()
        one.close()


def test_a_process_that_lives_and_does_not_work_is_started_again(
    supervisor, tmp_path, said, monkeypatch
):
    monkeypatch.setattr("stillhouse.embedded.supervisor._ASK_SECONDS", 0.05)
    works = [True]

    def probe():
        if not works[0]:
            raise NotReadyError("it refuses every write")

    supervisor.start([spec("store", probe=probe, deaf_seconds=0.3)])
    first = supervisor.states()["store"].pid
    works[0] = False

    def restarted():
        supervisor.tend()
        works[0] = works[0] or not alive(first)
        return supervisor.states()["store"].pid != first

    until(restarted)
    assert any("it refuses every write" in line for line in said)
