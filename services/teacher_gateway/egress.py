"""Where the gateway may connect to: a teacher's URL is a user's text, so it is checked.

The addresses that a name has are checked where they are used, by the resolver of the connection
itself: a name that resolves otherwise the second time gains nothing. Redirects are never
followed. Link-local addresses, among them clouds' metadata services, are refused always;
loopback and private ones unless the operator allows them.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from stillhouse.chassis.errors import PermanentError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_METADATA_V6 = ipaddress.ip_network("fd00:ec2::/32")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")


class EgressRefused(PermanentError):
    """A teacher's address is one that the gateway does not connect to."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, reason="teacher_address_refused")


def check_url(url: str, *, private: bool) -> None:
    """Refuse a URL that may not be a teacher's. Names are resolved at the connection."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise EgressRefused(f"expected an http or https URL, found {parts.scheme!r}")
    if parts.username is not None or parts.password is not None:
        raise EgressRefused("expected a URL without a user: give the key as `api_key: {env: ...}`")
    if not parts.hostname:
        raise EgressRefused(f"expected a host in the URL, found {url!r}")
    try:
        literal = ipaddress.ip_address(parts.hostname)
    except ValueError:
        return
    check_address(str(literal), private=private)


def check_address(address: str, *, private: bool) -> None:
    """Refuse an address that may not be a teacher's; `private` allows loopback and private."""
    given = ipaddress.ip_address(address.split("%", 1)[0])
    for found in _embedded(given) or [given]:
        if (
            found.is_link_local
            or found.is_multicast
            or found.is_unspecified
            or (found.is_reserved and not found.is_loopback)
            or found in _METADATA_V6
        ):
            raise EgressRefused(f"{address} is never a teacher's address")
        if not found.is_global and not private:
            raise EgressRefused(
                f"{address} is not a public address: an operator allows private teachers with "
                "TEACHER_GATEWAY_ALLOW_PRIVATE_TEACHERS=true"
            )


def _embedded(address: Address) -> list[Address]:
    """IPv4 addresses that an IPv6 one stands for: where the packets really go."""
    if not isinstance(address, ipaddress.IPv6Address):
        return []
    found: list[Address] = []
    if address.ipv4_mapped:
        found.append(address.ipv4_mapped)
    if address.sixtofour:
        found.append(address.sixtofour)
    if address.teredo:
        found.extend(address.teredo)
    if address in _NAT64 or (address in _COMPATIBLE and int(address) > 0xFFFF):
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
    return found


class CheckedResolver(AbstractResolver):
    """Resolves names for a connection and refuses what may not be connected to."""

    def __init__(self, *, private: bool, inner: AbstractResolver | None = None) -> None:
        self._private = private
        self._inner = inner or ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        """Resolve; every address must be allowed, so that no choice among them matters."""
        found = await self._inner.resolve(host, port, family)  # type: ignore[arg-type]
        for entry in found:
            check_address(entry["host"], private=self._private)
        return found

    async def close(self) -> None:
        await self._inner.close()


def connector(*, private: bool, limit: int) -> aiohttp.TCPConnector:
    """Make the connector of a teacher's client; `limit` connections at once."""
    return aiohttp.TCPConnector(
        resolver=CheckedResolver(private=private), use_dns_cache=False, limit=limit
    )
