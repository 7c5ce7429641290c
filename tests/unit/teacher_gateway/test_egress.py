"""Where a teacher may be: every spelling of an address that must not be reached."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver

from services.teacher_gateway.egress import (
    CheckedResolver,
    EgressRefused,
    check_address,
    check_url,
)

NEVER = [
    "169.254.169.254",
    "169.254.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
    "::",
    "fe80::1",
    "fe80::1%eth0",
    "ff02::1",
    "fd00:ec2::254",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
    "::169.254.169.254",
]
PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "::1",
    "fd12:3456::1",
    "::ffff:127.0.0.1",
    "64:ff9b::7f00:1",
]
PUBLIC = ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"]


@pytest.mark.parametrize("address", NEVER)
@pytest.mark.parametrize("private", [False, True])
def test_metadata_and_special_addresses_are_refused_always(address: str, private: bool) -> None:
    with pytest.raises(EgressRefused):
        check_address(address, private=private)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_need_the_operators_word(address: str) -> None:
    check_address(address, private=True)
    with pytest.raises(EgressRefused, match="ALLOW_PRIVATE_TEACHERS"):
        check_address(address, private=False)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    check_address(address, private=False)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/v1",
        "file:///etc/passwd",
        "https://user:secret@example.com/v1",
        "https:///v1",
        "http://169.254.169.254/v1",
        "http://[::ffff:169.254.169.254]/v1",
        "http://127.0.0.1:8080/v1",
    ],
)
def test_urls_that_are_no_teachers_are_refused(url: str) -> None:
    with pytest.raises(EgressRefused):
        check_url(url, private=False)


def test_a_name_is_left_to_the_resolver() -> None:
    check_url("https://llm.example.com/v1", private=False)


class Answers(AbstractResolver):
    """A name server that says what a test wants."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> Any:
        return [
            {"hostname": host, "host": a, "port": port, "family": 2, "proto": 0, "flags": 0}
            for a in self.addresses
        ]

    async def close(self) -> None:
        return None


@pytest.mark.parametrize("addresses", [("169.254.169.254",), ("8.8.8.8", "127.0.0.1")])
def test_a_name_that_resolves_to_a_forbidden_address_is_not_connected_to(
    addresses: tuple[str, ...],
) -> None:
    async def connect() -> None:
        resolver = CheckedResolver(private=False, inner=Answers(*addresses))
        connector = aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False)
        async with aiohttp.ClientSession(connector=connector) as session:
            await session.get("http://llm.example.com/v1")

    with pytest.raises(EgressRefused):
        asyncio.run(connect())


@pytest.mark.parametrize("name", ["2130706433", "0x7f.1", "127.1"])
def test_odd_spellings_of_loopback_are_refused_at_the_connection(name: str) -> None:
    from services.teacher_gateway.egress import connector

    async def connect() -> None:
        made = connector(private=False, limit=1)
        async with aiohttp.ClientSession(connector=made) as session:
            await session.get(f"http://{name}:9/v1")

    with pytest.raises((EgressRefused, aiohttp.ClientConnectorError, ValueError)) as caught:
        asyncio.run(connect())
    if not isinstance(caught.value, EgressRefused):
        # Not resolvable here at all: nothing was connected to either.
        assert "Connect call failed" not in str(caught.value)
