"""Which gateway a command talks to, and with which key.

What was named (by option or environment) wins over the embedded stack of the data folder. The
embedded stack's key is sent to that stack alone.
"""

from __future__ import annotations

from pathlib import Path

from stillhouse.cli.client import Client, StillhouseClientError

DEFAULT_ROOT = Path(".stillhouse")


def connect(
    url: str | None,
    key: str | None,
    root: Path,
    *,
    patience_seconds: float = 0.0,
) -> Client:
    """Return a client of the gateway that was named, or of the embedded stack in `root`."""
    if not (url and key):
        from stillhouse.embedded.process import StackError
        from stillhouse.embedded.stack import read_stack

        try:
            stack = read_stack(root)
        except StackError as error:
            if url:
                raise _no_key(url) from None
            raise StillhouseClientError(
                f"{error}, or set STILLHOUSE_URL and STILLHOUSE_API_KEY"
            ) from None
        if url is not None and stack.api_url is not None and _same(url, stack.api_url):
            url = None
        if url is not None:
            raise _no_key(url)
        if stack.api_url is None:
            raise StillhouseClientError(
                f"the stack in {root} runs without its API: set STILLHOUSE_URL to another gateway"
            )
        url = stack.api_url
        key = key or stack.api_key
        if not key:
            raise StillhouseClientError(
                f"{root}/credentials.json has no API key: set STILLHOUSE_API_KEY, or make one with "
                "`python -m services.teacher_gateway keys create`"
            )
    return Client(url, key, patience_seconds=patience_seconds)


def _same(one: str, other: str) -> bool:
    return one.rstrip("/").replace("//localhost:", "//127.0.0.1:") == other.rstrip("/")


def _no_key(url: str) -> StillhouseClientError:
    return StillhouseClientError(f"no API key for {url}: set STILLHOUSE_API_KEY, or give --key")
