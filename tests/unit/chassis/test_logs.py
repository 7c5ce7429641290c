"""Logs: one JSON object a line, whatever is in the message."""

from __future__ import annotations

import json
import subprocess
import sys


def test_every_line_is_json_with_the_service_and_no_second_line() -> None:
    code = """
import logging, threading
from structlog.contextvars import bound_contextvars
from stillhouse.chassis import logs
logs.setup("baker", "worker", "INFO")
log = logs.logger("x")
with bound_contextvars(pipeline="pl-1"):
    log.info("first\\nline: forged", answer=42)
logging.getLogger("other.library").warning("second %s", "line")
log.debug("not shown")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("third")
thread = threading.Thread(target=lambda: log.info("fourth"))
thread.start()
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == [
        "first\nline: forged",
        "second line",
        "third",
        "fourth",
    ]
    assert {(line["service"], line["process"]) for line in lines} == {("baker", "worker")}
    assert lines[0]["pipeline"] == "pl-1"
    assert lines[0]["level"] == "info"
    assert "pipeline" not in lines[1]
    assert "ZeroDivisionError" in lines[2]["exception"]
    assert done.stdout == ""
