"""Structured logs: one JSON object a line, with the ids of pipeline and event bound to it.

No prompt or answer text is logged at INFO or above.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


def setup(service: str, process: str, level: str = "INFO") -> None:
    """Send structlog and the standard library's loggers to standard error as JSON lines."""

    def say_who(_logger: Any, _name: str, line: dict[str, Any]) -> dict[str, Any]:
        # Not a context variable: other threads would not have it.
        return {**line, "service": service, "process": process}

    shared: list[Any] = [
        say_who,
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("botocore", "boto3", "urllib3", "amqp", "httpx", "httpcore", "asyncio"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def logger(name: str) -> Any:
    return structlog.stdlib.get_logger(name)
