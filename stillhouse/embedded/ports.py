"""Choose loopback ports that will still be free when a part binds them.

Ports come from below the range that the kernel hands out for outgoing connections, at random, so
two stacks that start at the same moment seldom meet. SeaweedFS adds 10000 to each of its ports for
gRPC, so a pair is free or not at all.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator

GRPC_OFFSET = 10_000
_FIRST, _COUNT = 10_100, 11_900  # with the offset it ends at 32000, below Linux's 32768


def is_free(port: int) -> bool:
    """Say whether nobody listens on this loopback port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_ports(*, with_grpc: bool = False) -> Iterator[int]:
    """Yield distinct free ports; with `with_grpc` the port 10000 above is free as well."""
    seen: set[int] = set()
    while len(seen) < _COUNT:
        port = _FIRST + secrets.randbelow(_COUNT)
        if port in seen:
            continue
        seen.add(port)
        if is_free(port) and (not with_grpc or is_free(port + GRPC_OFFSET)):
            yield port
    raise OSError("no free port left on 127.0.0.1")
