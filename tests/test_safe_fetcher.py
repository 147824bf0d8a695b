"""Downloads that a chat names: nothing turns them inward, nothing they bring hurts.

Every server here listens on loopback. Where a connection is wanted, its name is an exception of the
fetcher's; where none is wanted, a server that counts its visitors stands behind the refused address.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import ipaddress
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openrouter_responses_pipe.openrouter_responses_pipe import (
    AdmissionError,
    Download,
    InputError,
    PayloadTooLargeError,
    SafeFetcher,
    UnsafeURLError,
    _is_safe_url,
    _validate_base64_size,
)
from tests.support import PATIENCE_S, SOON_S, Handler, all_ended, free_port, hostile, read_request

HERE: Final = "pictures.test"  # a name that the fetchers of these tests may take from loopback
LOOPBACK: Final = "127.0.0.1"
PNG: Final = b"\x89PNG\r\n\x1a\n" + bytes(40)
OK: Final = b"HTTP/1.1 200 OK\r\n"
LIMIT: Final = 1000
# what no sentence for a person may hold
INTERNALS: Final = re.compile(r"\d+\.\d+\.\d+\.\d+|\[[0-9a-f:]*\]|Errno|Cannot connect|Traceback|0x")


@dataclass
class Names:
    """A name service: names and their addresses, and who was asked for."""

    table: dict[str, list[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    async def __call__(self, host: str, port: int) -> list[str]:
        """The addresses of `host`; loopback where the table says nothing."""
        self.asked.append(host)
        return self.table.get(host, [LOOPBACK])


@dataclass
class Visits:
    """A server's visitors, and the requests that they made."""

    count: int = 0
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)


async def fetch(
    url: str,
    *,
    names: Callable[[str, int], Any] | None = None,
    allowed: Iterable[str] = (HERE,),
    max_bytes: int = LIMIT,
    timeout_s: float = PATIENCE_S,
) -> Download:
    """One download by a fetcher of its own, which leaves no task behind."""
    before = asyncio.all_tasks()
    fetcher = SafeFetcher(frozenset(allowed), names or Names())
    try:
        return await fetcher.fetch(url, max_bytes, timeout_s)
    finally:
        await fetcher.aclose()
        await all_ended(before)


async def failure(url: str, **how: Any) -> InputError:
    """The error that a download ends in, whose words give nothing away."""
    with pytest.raises(InputError) as caught:
        await fetch(url, **how)
    assert "could not be sent" in caught.value.user_message
    assert not INTERNALS.search(caught.value.user_message)
    return caught.value


async def unsafe(url: str, **how: Any) -> str:
    """The words with which an address is refused."""
    error = await failure(url, **how)
    assert isinstance(error, UnsafeURLError)
    return error.detail


def answer(*lines: str, status: str = "200 OK", body: bytes = b"", visits: Visits | None = None) -> Handler:
    """A handler that answers with these header lines; without a length among them it hangs up at the end."""
    head = "\r\n".join([f"HTTP/1.1 {status}", "Connection: close", *lines, "", ""])

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = visits or Visits()
        seen.count += 1
        line, headers, _ = await read_request(reader)
        seen.requests.append((line, {name: text for name, text in headers.items() if name}))
        writer.write(head.encode() + body)
        await writer.drain()

    return handle


def picture(visits: Visits | None = None) -> Handler:
    """A handler that answers with a small PNG."""
    return answer(f"Content-Length: {len(PNG)}", "Content-Type: image/png", body=PNG, visits=visits)


@contextlib.asynccontextmanager
async def serving(handler: Handler, host: str = HERE) -> AsyncIterator[str]:
    """A server on loopback under a name: its address up to and with the port."""
    async with hostile(handler) as url:
        yield url.replace(LOOPBACK, host).removesuffix("/api/v1")


@contextlib.asynccontextmanager
async def inside() -> AsyncIterator[tuple[int, Visits]]:
    """A server that nobody may reach: its port, and who came."""
    visits = Visits()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visits.count += 1

    async with hostile(handle) as url:
        yield int(url.rsplit(":", 1)[1].split("/")[0]), visits


async def test_a_picture() -> None:
    visits = Visits()
    async with serving(picture(visits)) as base:
        assert await fetch(f"{base}/a.png?b=c#d") == Download(PNG, "image/png", f"{base}/a.png?b=c#d")
    [(line, headers)] = visits.requests
    assert line == "GET /a.png?b=c HTTP/1.1"
    assert headers.pop("host") == base.removeprefix("http://")
    assert headers == {
        "user-agent": "openrouter-responses-pipe",
        "accept": "*/*",
        "accept-encoding": "identity",
    }


# Addresses


INWARD: Final = [
    *("127.0.0.1", "127.1.2.3", "127.255.255.255", "0.0.0.0", "0.1.2.3"),
    *("169.254.169.254", "169.254.0.1", "169.254.170.2", "168.63.129.16", "100.100.100.200", "192.0.0.192"),
    *("10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "192.168.255.255"),
    *(
        "100.64.0.1",
        "100.127.255.255",
        "192.0.0.1",
        "192.0.0.9",
        "192.88.99.1",
        "198.18.0.1",
        "198.19.255.255",
    ),
    *("192.0.2.1", "198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.255", "240.0.0.1"),
    *("255.255.255.255", "::1", "::", "fe80::1", "febf::1", "fc00::1", "fd00:ec2::254", "fd12:3456::1"),
    *("fec0::1", "ff02::1", "ff0e::1", "2001:db8::1", "3fff::1", "100::1", "5f00::1", "4000::1"),
    *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "::ffff:8.8.8.8", "::ffff:0:7f00:1"),
    *("::127.0.0.1", "::10.0.0.1", "::8.8.8.8", "2002:7f00:1::", "2002:a9fe:a9fe::", "2002:808:808::1"),
    *("2001::1", "2001:0:7f00:1::80ff:fffe", "2001:2::1", "2001:10::1", "2001:20::1"),
    *("64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b::a9fe:a9fe"),
    *("64:ff9b:1::1", "64:ff9b:1::8.8.8.8", "64:ff9b:0:0:0:1:808:808"),
]
OPEN: Final = [
    *("8.8.8.8", "1.1.1.1", "93.184.215.14", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1"),
    *("11.0.0.1", "128.0.0.1", "169.253.0.1", "192.0.3.1", "192.167.1.1", "198.17.0.1", "198.20.0.1"),
    *("223.255.255.255", "168.63.129.17", "2606:4700:4700::1111", "2a00:1450:4001:80b::200e"),
    *("2001:4860:4860::8888", "2003::1", "64:ff9b::8.8.8.8", "64:ff9b::101:101"),
]


def host_of(address: str) -> str:
    return f"[{address}]" if ":" in address else address


@pytest.mark.parametrize("address", INWARD)
async def test_an_inward_address(address: str) -> None:
    """Written in the address, found behind a name, and found among others that are fine."""
    names = Names(
        {"turned.test": [address], "mixed.test": ["8.8.8.8", address], "last.test": [address, "1.1.1.1"]}
    )
    async with inside() as (port, visits):
        for host in (host_of(address), "turned.test", "mixed.test", "last.test"):
            assert "not on the open internet" in await unsafe(f"https://{host}:{port}/a.png", names=names)
            assert "not on the open internet" in await unsafe(f"https://{host}/a.png", names=names)
    assert visits.count == 0
    assert set(names.asked) == {"turned.test", "mixed.test", "last.test"}


@pytest.mark.parametrize("address", OPEN)
def test_an_address_of_the_open_internet(address: str) -> None:
    assert _is_safe_url("https://pictures.test/a.png", [address]) == ""
    assert _is_safe_url(f"https://{host_of(address)}:8443/a.png", []) == ""


def embedded(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Iterator[ipaddress.IPv4Address]:
    """Every IPv4 address that may be read out of an IPv6 address, by the standard library and by RFC 6052."""
    if isinstance(address, ipaddress.IPv4Address):
        return
    yield from (four for four in (address.ipv4_mapped, address.sixtofour, *(address.teredo or ())) if four)
    if address in ipaddress.ip_network("64:ff9b::/96") or address in ipaddress.ip_network("::/96"):
        yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)


@settings(max_examples=2000, deadline=None)
@given(
    address=st.ip_addresses()
    | st.integers(0, 2**32 - 1).map(lambda low: ipaddress.IPv6Address((0x64FF9B << 96) | low))
)
@example(address=ipaddress.ip_address("8.8.8.8"))
@example(address=ipaddress.ip_address("2606:4700::1"))
def test_only_global_addresses_pass(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    written = host_of(str(address))
    reasons = [
        _is_safe_url("https://pictures.test/", [str(address)]),
        _is_safe_url("https://pictures.test/", ["8.8.8.8", str(address)]),
        _is_safe_url(f"https://{written}/", []),
        _is_safe_url(f"https://{written}/", ["8.8.8.8"]),
    ]
    assert len(set(reasons)) == 1
    if not reasons[0]:
        assert address.is_global
        assert not address.is_multicast
        assert all(four.is_global and not four.is_multicast for four in embedded(address))


@pytest.mark.parametrize(
    "address", ["", "pictures.test", "127.1", "0x7f.1", "8.8.8.8 ", "2606:4700::1%eth0", "8.8.8.8/32"]
)
def test_what_is_no_address(address: str) -> None:
    assert _is_safe_url("https://pictures.test/", [address])


def test_a_name_without_addresses() -> None:
    assert _is_safe_url("https://pictures.test/", []) == "its server has no address"


# How an address is written

PLAIN: Final = "plain form"
CHARACTERS: Final = "no address may hold"
USER: Final = "a user name"
SCHEME: Final = "only https"
LONG: Final = "too long"

FORMS: Final[list[tuple[str, str]]] = [
    # other ways to write an IPv4 address
    (PLAIN, "https://2130706433/"),
    (PLAIN, "https://017700000001/"),
    (PLAIN, "https://0x7f000001/"),
    (PLAIN, "https://0X7F000001/"),
    (PLAIN, "https://0177.0.0.1/"),
    (PLAIN, "https://0x7f.0.0.1/"),
    (PLAIN, "https://127.0.0.0x1/"),
    (PLAIN, "https://127.0.0.01/"),
    (PLAIN, "https://127.1/"),
    (PLAIN, "https://127.0.1/"),
    (PLAIN, "https://127.0.0.1.1/"),
    (PLAIN, "https://0/"),
    (PLAIN, "https://0x/"),
    (PLAIN, "https://127.0.0.256/"),
    (PLAIN, "https://pictures.test.1/"),
    (PLAIN, "https://127%2e0%2e0%2e1/"),
    (PLAIN, "https://%31%32%37.0.0.1/"),
    # brackets and zones
    (PLAIN, "https://[127.0.0.1]/"),
    (PLAIN, "https://[::1/"),
    (PLAIN, "https://::1/"),
    (PLAIN, "https://[]/"),
    (PLAIN, "https://[::1]x/"),
    (PLAIN, "https://[v1.a]/"),
    (PLAIN, "https://[:::]/"),
    (PLAIN, "https://[fe80::1%25eth0]/"),
    (PLAIN, "https://[fe80::1%eth0]/"),
    (PLAIN, "https://[2606:4700::1%251]/"),
    # dots
    (PLAIN, "https://pictures.test./"),
    (PLAIN, "https://127.0.0.1./"),
    (PLAIN, "https://localhost./"),
    (PLAIN, "https://pictures..test/"),
    (PLAIN, "https://.pictures.test/"),
    (PLAIN, "https://[::1]./"),
    (PLAIN, "https://./"),
    # other scripts that become ASCII on the way
    (PLAIN, "https://１２７.０.０.１/"),
    (PLAIN, "https://127。0。0。1/"),
    (PLAIN, "https://127．0．0．1/"),
    (PLAIN, "https://①②⑦.⓪.⓪.①/"),
    (PLAIN, "https://١٢٧.٠.٠.١/"),
    (PLAIN, "https://ⓛocalhost/"),
    (PLAIN, "https://pictureſ.test/"),
    (PLAIN, "https://\N{KELVIN SIGN}.test/"),
    (PLAIN, "https://pictures\u200b.test/"),
    (PLAIN, "https://pictures\u00ad.test/"),
    (PLAIN, "https://pictures.test／@127.0.0.1/".replace("@", "")),
    (PLAIN, "https://pictures.test℀.a/"),
    # ports
    (PLAIN, "https://pictures.test:0/"),
    (PLAIN, "https://pictures.test:65536/"),
    (PLAIN, "https://pictures.test:99999/"),
    (PLAIN, "https://pictures.test:-1/"),
    (PLAIN, "https://pictures.test:８０/"),
    (PLAIN, "https://pictures.test:80:80/"),
    (PLAIN, "https://pictures.test:a/"),
    (PLAIN, "https://pictures.test:/"),
    (PLAIN, "https://pictures.test:443#@127.0.0.1".replace("#@", "%23")),
    # no host
    (PLAIN, "https:///a.png"),
    (PLAIN, "https://"),
    (PLAIN, "https:"),
    (PLAIN, "https://:443/"),
    (PLAIN, "https:pictures.test/a.png"),
    (PLAIN, "https:/pictures.test/a.png"),
    (PLAIN, "https:////pictures.test/a.png"),
    (PLAIN, "https://?pictures.test"),
    (PLAIN, f"https://{'a' * 64}.test/"),
    (PLAIN, f"https://{'a.' * 130}test/"),
    # users
    (USER, "https://user@pictures.test/"),
    (USER, "https://user:password@pictures.test/"),
    (USER, "https://@pictures.test/"),
    (USER, "https://pictures.test@127.0.0.1/"),
    (USER, "https://pictures.test:443@127.0.0.1/"),
    (USER, "https://pictures.test%00@127.0.0.1/"),
    (USER, "https://127.0.0.1@pictures.test@127.0.0.1/"),
    (USER, "https:user@pictures.test/"),
    # characters
    (CHARACTERS, "https://pictures.test\\@127.0.0.1/"),
    (CHARACTERS, "https://127.0.0.1\\@pictures.test/"),
    (CHARACTERS, "https:\\\\pictures.test\\a.png"),
    (CHARACTERS, "https:/\\pictures.test/a.png"),
    (CHARACTERS, "https://pictures.test/a\\b"),
    (CHARACTERS, "https://pictures.test/\r\nHost: 127.0.0.1"),
    (CHARACTERS, "https://pic\ntures.test/"),
    (CHARACTERS, "https://pic\ttures.test/"),
    (CHARACTERS, "ht\ttps://pictures.test/"),
    (CHARACTERS, "https://pictures.test/a\x00b"),
    (CHARACTERS, "https://pictures.test/\x7f"),
    (CHARACTERS, "https://pictures.test/\x85"),
    (CHARACTERS, "https://pictures.test/\u2028"),
    (CHARACTERS, "https://pictures.test/\ud800"),
    (CHARACTERS, "https://pictures.test/a b"),
    (CHARACTERS, "https://pictures.test/\u00a0"),
    (CHARACTERS, "https://pictures.test\u3000/"),
    (CHARACTERS, " https://pictures.test/"),
    (CHARACTERS, "https://pictures.test/ "),
    (CHARACTERS, "https://pictures.test/\n"),
    # schemes
    (SCHEME, "file:///etc/passwd"),
    (SCHEME, "file://pictures.test/etc/passwd"),
    (SCHEME, "gopher://pictures.test:6379/_INFO"),
    (SCHEME, "data:image/png;base64,iVBORw0KGgo="),
    (SCHEME, "ftp://pictures.test/a.png"),
    (SCHEME, "dict://pictures.test:11211/stats"),
    (SCHEME, "ldap://pictures.test/"),
    (SCHEME, "ws://pictures.test/"),
    (SCHEME, "wss://pictures.test/"),
    (SCHEME, "jar:https://pictures.test/a!/b"),
    (SCHEME, "javascript:alert(1)"),
    (SCHEME, "view-source:https://pictures.test/"),
    (SCHEME, "https+unix://pictures.test/"),
    (SCHEME, "httpſ://pictures.test/"),
    (SCHEME, "//pictures.test/a.png"),
    (SCHEME, "/etc/passwd"),
    (SCHEME, "pictures.test/a.png"),
    (SCHEME, "://pictures.test/"),
    (SCHEME, ""),
    (SCHEME, "http://elsewhere.test/a.png"),
    (SCHEME, "HTTP://elsewhere.test/a.png"),
    (SCHEME, "http://pictures.test.evil.test/"),
    (SCHEME, "http://evilpictures.test/"),
    (SCHEME, "http://8.8.8.8/"),
    (LONG, f"https://pictures.test/{'a' * 9000}"),
    (LONG, f"data:image/png;base64,{'A' * 9000}"),
]


@pytest.mark.parametrize(("says", "url"), FORMS, ids=lambda text: ascii(text)[:60])
async def test_an_address_that_could_be_read_to_lead_elsewhere(says: str, url: str) -> None:
    """Refused for its form alone: before its name is looked up, for a host that is an exception too."""
    names = Names()
    assert says in _is_safe_url(url, ["8.8.8.8"], frozenset({HERE}))
    assert says in await unsafe(url, names=names)
    assert names.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "https://pictures.test",
        "https://PICTURES.Test/a.png",
        "HTTPS://pictures.test:8443/a.png",
        "https://pictures.test:00443/",
        "https://pictures.test?a=https://127.0.0.1/",
        "https://pictures.test#@127.0.0.1",
        "https://pictures.test/@user/a.png",
        "https://pictures.test/a?to=b@example.org",
        "https://a-b.c_d.xn--mnchen-3ya.test/%20ä漢.png",
        "https://0x7f.1.test/",
        "https://10.test/",
        f"https://{'a' * 63}.test/",
    ],
)
def test_a_plain_address(url: str) -> None:
    assert _is_safe_url(url, ["8.8.8.8"]) == ""
    assert _is_safe_url(url, ["127.0.0.1"]) == "its server is not on the open internet"


# Exceptions


@pytest.mark.parametrize(
    ("url", "allowed", "passes"),
    [
        ("http://nas.local/a.png", "nas.local", True),
        ("http://NAS.local:8080/a.png", "nas.LOCAL", True),
        ("https://nas.local/a.png", "nas.local", True),
        ("http://nas.local:8080/a.png", "nas.local:8080", True),
        ("http://nas.local/a.png", "nas.local:80", True),
        ("https://nas.local/a.png", "nas.local:443", True),
        ("http://192.168.0.5/a.png", "192.168.0.5", True),
        ("http://[fd00::5]:81/a.png", "[fd00::5]:81", True),
        ("http://nas.local:8081/a.png", "nas.local:8080", False),
        ("https://nas.local/a.png", "nas.local:80", False),
        ("http://a.nas.local/a.png", "nas.local", False),
        ("http://nas.local.test/a.png", "nas.local", False),
        ("http://a.local/a.png", "*.local", False),
        ("http://nas.local/a.png", "*", False),
        ("http://nas.local/a.png", "", False),
        ("http://nas.local/a.png", ".local", False),
        ("http://192.168.0.6/a.png", "192.168.0.5", False),
        ("http://192.168.0.5/a.png", "192.168.0.0/24", False),
        ("http://nas.local@10.0.0.1/a.png", "nas.local", False),
    ],
)
def test_exceptions_are_exact(url: str, allowed: str, passes: bool) -> None:
    assert (_is_safe_url(url, ["10.0.0.1"], frozenset({allowed})) == "") is passes


async def test_an_exception_of_one_port_is_none_for_another() -> None:
    visits = Visits()
    async with serving(picture(visits)) as base, inside() as (port, inner):
        allowed = {base.removeprefix("http://")}
        assert (await fetch(f"{base}/a", allowed=allowed)).content == PNG
        assert "only https" in await unsafe(f"http://{HERE}:{port}/a", allowed=allowed)
        assert "not on the open" in await unsafe(f"https://{HERE}:{port}/a", allowed=allowed)
    assert (visits.count, inner.count) == (1, 0)


async def test_an_exception_written_as_an_address() -> None:
    async with serving(picture(), LOOPBACK) as base:
        names = Names()
        assert (await fetch(f"{base}/a", allowed=[LOOPBACK], names=names)).mime == "image/png"
        assert names.asked == []


# One look-up, and the connection goes where it said


async def test_the_connection_goes_to_the_judged_address_and_each_request_is_judged_anew() -> None:
    """The same name and port lead to one server first and to another one later."""
    first, second = Visits(), Visits()
    answers = [["127.0.0.1"], ["127.0.0.2"]]

    async def changing(host: str, port: int) -> list[str]:
        return answers.pop(0)

    async with serving(picture(first)) as base:
        other = await asyncio.start_server(
            _closing(picture(second)), "127.0.0.2", int(base.rsplit(":", 1)[1])
        )
        async with other:
            fetcher = SafeFetcher(frozenset({HERE}), changing)
            await fetcher.fetch(f"{base}/1", LIMIT)
            assert (first.count, second.count, len(answers)) == (1, 0, 1)
            await fetcher.fetch(f"{base}/2", LIMIT)
            assert (first.count, second.count, len(answers)) == (1, 1, 0)
            await fetcher.aclose()


def _closing(handler: Handler) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await handler(reader, writer)
        writer.close()

    return handle


async def test_a_name_that_turns_inward_between_two_requests() -> None:
    """Looked up again for the redirect, to another port of the same name, and refused there."""
    visits = Visits()
    async with inside() as (port, inner):
        move = answer(
            f"Location: https://{HERE}:{port}/", "Content-Length: 0", status="302 Found", visits=visits
        )
        async with serving(move) as base:
            names = Names({HERE: [LOOPBACK]})
            allowed = {base.removeprefix("http://")}
            assert "not on the open internet" in await unsafe(f"{base}/a", names=names, allowed=allowed)
    assert (names.asked, visits.count, inner.count) == ([HERE, HERE], 1, 0)


async def test_downloads_side_by_side_go_to_their_own_addresses() -> None:
    seen = [Visits(), Visits()]
    async with serving(picture(seen[0])) as base:
        other = await asyncio.start_server(
            _closing(picture(seen[1])), "127.0.0.2", int(base.rsplit(":", 1)[1])
        )
        async with other:
            names = Names({"one.test": ["127.0.0.1"], "two.test": ["127.0.0.2"]})
            fetcher = SafeFetcher(frozenset(names.table), names)
            urls = [base.replace(HERE, name) for name in (*["one.test"] * 5, *["two.test"] * 3)]
            await asyncio.gather(*(fetcher.fetch(url, LIMIT) for url in urls))
            await fetcher.aclose()
    assert [visits.count for visits in seen] == [5, 3]


async def test_a_second_address_serves_where_the_first_is_silent() -> None:
    async with serving(picture()) as base:
        names = Names({HERE: ["127.0.0.3", LOOPBACK]})
        assert (await fetch(f"{base}/a", names=names)).content == PNG


async def test_the_systems_own_names() -> None:
    """Without a name service of its own the fetcher asks the system."""
    async with inside() as (port, visits):
        fetcher = SafeFetcher()
        with pytest.raises(UnsafeURLError, match="open internet"):
            await fetcher.fetch(f"https://localhost:{port}/", LIMIT)
        await fetcher.aclose()
    assert visits.count == 0
    async with serving(picture(), "localhost") as base:
        fetcher = SafeFetcher(frozenset({"localhost"}))
        assert (await fetcher.fetch(base, LIMIT)).content == PNG
        await fetcher.aclose()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (socket.gaierror(-2, "Name or service not known: pictures.test"), "name is not known"),
        (UnicodeError("label too long"), "not valid"),
    ],
)
async def test_a_name_that_nobody_knows(error: BaseException, says: str) -> None:
    async def unknown(host: str, port: int) -> list[str]:
        raise error

    assert says in (await failure("https://pictures.test/", names=unknown)).detail


async def test_nobody_listens() -> None:
    assert "could not be reached" in (await failure(f"http://{HERE}:{free_port()}/")).detail


# Redirects


def moved(location: str, status: int = 302, visits: Visits | None = None) -> Handler:
    """A handler that redirects, and would set a cookie."""
    lines = [f"Location: {location}"] if location else []
    return answer(*lines, "Content-Length: 0", "Set-Cookie: who=me", status=f"{status} Moved", visits=visits)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("relative", [True, False])
async def test_a_redirect_is_followed(status: int, relative: bool) -> None:
    visits = Visits()
    async with serving(picture(visits), "second.test") as target:
        way = [f"{target}/b.png?c=1", "/b.png?c=1"][relative]

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            line, _, _ = await read_request(reader)
            handler = picture(visits) if "/b.png" in line else moved(way, status)
            again = asyncio.StreamReader()
            again.feed_data(f"{line}\r\n\r\n".encode())
            await handler(again, writer)

        async with serving(handle) as base:
            found = await fetch(f"{base}/a.png", allowed=[HERE, "second.test"])
            assert found == Download(PNG, "image/png", f"{base if relative else target}/b.png?c=1")
    assert [line for line, _ in visits.requests] == ["GET /b.png?c=1 HTTP/1.1"]


async def test_a_redirect_takes_nothing_along() -> None:
    """No cookie, no referrer, nothing of the address that it came from."""
    visits = Visits()
    async with serving(picture(visits), "second.test") as target, serving(moved(f"{target}/b")) as base:
        await fetch(f"{base}/secret?token=1", allowed=[HERE, "second.test"])
    [(_, headers)] = visits.requests
    assert set(headers) == {"host", "user-agent", "accept", "accept-encoding"}
    assert headers["host"] == target.removeprefix("http://")


async def test_a_cookie_is_not_kept() -> None:
    """Neither along a redirect nor from one user's download to the next."""
    seen: list[str] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, headers, _ = await read_request(reader)
        seen.append(headers.get("cookie", ""))
        again = asyncio.StreamReader()
        again.feed_data(f"{line}\r\n\r\n".encode())
        await (moved("/b") if "/a" in line else picture())(again, writer)

    async with serving(handle) as base:
        fetcher = SafeFetcher(frozenset({HERE}), Names())
        for path in ("/a", "/b"):
            await fetcher.fetch(base + path, LIMIT)
        await fetcher.aclose()
    assert seen == [""] * 3


TURNS: Final[list[tuple[str, str]]] = [
    ("open internet", "https://127.0.0.1:{port}/"),
    ("only https", "http://127.0.0.1:{port}/"),
    ("only https", "//127.0.0.1:{port}/"),
    ("open internet", "https://[::1]:{port}/"),
    ("open internet", "https://[::ffff:127.0.0.1]:{port}/"),
    ("plain form", "https://2130706433:{port}/"),
    ("plain form", "https://127.1:{port}/"),
    ("open internet", "https://inner.test:{port}/"),
    ("only https", "http://inner.test:{port}/"),
    ("only https", "http://169.254.169.254/latest/meta-data/"),
    ("open internet", "https://169.254.169.254/latest/meta-data/"),
    ("only https", "file:///etc/passwd"),
    ("only https", "gopher://127.0.0.1:{port}/_INFO"),
    ("only https", "ftp://127.0.0.1:{port}/"),
    ("only https", "data:image/png;base64,iVBORw0KGgo="),
    ("user name", "https://pictures.test@127.0.0.1:{port}/"),
    ("no address may hold", "https:\\\\127.0.0.1:{port}\\"),
    ("no address may hold", "\\\\127.0.0.1:{port}\\"),
    ("no address may hold", "https://pictures.test\\@127.0.0.1:{port}/"),
    ("plain form", "https://127.0.0.1.:{port}/"),
    ("plain form", "https://１２７.０.０.１:{port}/"),
    ("plain form", "https:///127.0.0.1:{port}/"),
    ("not valid", "https://[127.0.0.1:{port}/"),
    ("to nowhere", ""),
]


@pytest.mark.parametrize(("says", "location"), TURNS)
async def test_a_redirect_that_turns_inward(says: str, location: str) -> None:
    visits = Visits()
    async with inside() as (port, inner), serving(moved(location.format(port=port), visits=visits)) as base:
        assert says in (await failure(f"{base}/a")).detail
    assert (visits.count, inner.count) == (1, 0)


async def test_a_redirect_that_never_ends() -> None:
    visits = Visits()
    async with serving(moved("/again", visits=visits)) as base:
        assert "too often" in (await failure(f"{base}/a")).detail
    assert visits.count == 6


async def test_five_redirects_are_followed() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, _, _ = await read_request(reader)
        step = int(line.split()[1].removeprefix("/"))
        again = asyncio.StreamReader()
        again.feed_data(f"{line}\r\n\r\n".encode())
        await (moved(f"/{step - 1}") if step else picture())(again, writer)

    async with serving(handle) as base:
        assert (await fetch(f"{base}/5")).url == f"{base}/0"
        assert "too often" in (await failure(f"{base}/6")).detail


# What the environment says does not count


async def test_no_proxy_no_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {HERE} login me password secret")
    monkeypatch.setenv("NETRC", str(netrc))
    proxy, server = Visits(), Visits()
    async with serving(picture(proxy), LOOPBACK) as proxy_url, serving(picture(server)) as base:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy_url)
            monkeypatch.setenv(name.lower(), proxy_url)
        assert (await fetch(f"{base}/a")).content == PNG
    assert (proxy.count, server.count) == (0, 1)
    assert "authorization" not in server.requests[0][1]


# TLS


def certificate(name: str, folder: Path) -> Path:
    """A self-signed certificate for `name` with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / f"{name}.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return path


@contextlib.asynccontextmanager
async def tls_server(handler: Handler, pem: Path) -> AsyncIterator[int]:
    """A server on loopback that speaks TLS; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    async with await asyncio.start_server(_closing(handler), LOOPBACK, 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


async def test_a_certificate_that_nobody_vouches_for(tmp_path: Path) -> None:
    visits = Visits()
    async with tls_server(picture(visits), certificate(HERE, tmp_path)) as port:
        error = await failure(f"https://{HERE}:{port}/a")
    assert error.detail == "The file could not be downloaded: its server's certificate could not be verified"
    assert visits.requests == []


# What aiohttp reads when it is loaded needs a process of its own: which certificates to trust, which parser.
CLIENT: Final = """
import asyncio, json, sys
from openrouter_responses_pipe.openrouter_responses_pipe import PipeError, SafeFetcher

async def resolve(host, port):
    return ["127.0.0.1"]

async def main():
    fetcher, said = SafeFetcher(frozenset(["pictures.test", "other.test", "127.0.0.1"]), resolve), []
    for url in sys.argv[1:]:
        try:
            said.append((await fetcher.fetch(url, 1000)).mime)
        except PipeError as error:
            said.append(type(error).__name__ + ": " + error.detail)
    print(json.dumps(said), flush=True)
    await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def own_process(*urls: str, **environment: str) -> AsyncIterator[list[str]]:
    """What a process of its own gets from these addresses; it lives on until this is left."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", CLIENT, *urls),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environment},
    )
    assert process.stdout
    try:
        yield json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
    finally:
        await asyncio.wait_for(process.communicate(b""), PATIENCE_S)
    assert process.returncode == 0


async def test_tls_is_for_the_name_in_the_address(tmp_path: Path) -> None:
    """The certificate is trusted: only the name, or the way on, is wrong."""
    pem, visits = certificate(HERE, tmp_path), Visits()
    down = moved(f"http://{HERE}:{free_port()}/")
    async with tls_server(picture(visits), pem) as port, tls_server(down, pem) as downward:
        urls = [f"https://{host}:{port}/a" for host in (HERE, "other.test", LOOPBACK)]
        async with own_process(*urls, f"https://{HERE}:{downward}/", SSL_CERT_FILE=str(pem)) as said:
            wrong = (
                "InputError: The file could not be downloaded: its server's certificate could not be verified"
            )
            no_way = "UnsafeURLError: The file was not downloaded: it redirects from https to http"
            assert said == ["image/png", wrong, wrong, no_way]
    assert len(visits.requests) == 1


async def test_tls_ends_without_a_farewell(tmp_path: Path) -> None:
    """A server that does not answer the good-bye of TLS holds no socket open."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pem = certificate(HERE, tmp_path)
    context.load_cert_chain(pem)

    def stay_silent(listener: socket.socket) -> None:
        with context.wrap_socket(listener.accept()[0], server_side=True) as connection:
            connection.recv(65536)
            connection.sendall(OK + b"Content-Length: 1000000\r\n\r\n")
            with socket.socket(fileno=os.dup(connection.fileno())) as below, contextlib.suppress(OSError):
                while below.recv(65536):
                    pass

    with socket.create_server((LOOPBACK, 0)) as listener:
        server = asyncio.create_task(asyncio.to_thread(stay_silent, listener))
        async with own_process(
            f"https://{HERE}:{listener.getsockname()[1]}/", SSL_CERT_FILE=str(pem)
        ) as said:
            assert "larger than" in said[0]
            await asyncio.wait_for(server, SOON_S)


# What comes back


@pytest.mark.parametrize("status", [201, 204, 206, 300, 304, 305, 400, 401, 403, 404, 410, 429, 500, 503])
async def test_only_a_plain_answer_counts(status: int) -> None:
    body = b"" if status in (204, 304) else PNG
    async with serving(answer(status=f"{status} Reason", body=body)) as base:
        error = await failure(f"{base}/a")
    assert error.user_message == (
        f"This chat could not be sent. The file could not be downloaded: its server answered {status}."
    )


BOMB: Final = bytes(10_000_000)
PACKED: Final = {
    "gzip": gzip.compress(BOMB),
    "deflate": zlib.compress(BOMB),
    "br": b"\x5b\xff\xff\x03",
    "zstd": b"\x28\xb5",
}


@pytest.mark.parametrize(
    "encoding", [*PACKED, "GZIP", "x-gzip", "compress", "identity, gzip", "gzip, gzip", "unknown"]
)
async def test_nothing_is_unpacked(encoding: str) -> None:
    body = PACKED.get(encoding.lower(), PACKED["gzip"])
    lines = [f"Content-Encoding: {encoding}", f"Content-Length: {len(body)}"]
    async with serving(answer(*lines, body=body)) as base:
        error = await failure(f"{base}/a", max_bytes=100_000_000)
    assert "compressed" in error.detail


async def test_a_packing_in_a_second_line() -> None:
    lines = ["Content-Encoding: identity", "Content-Encoding: gzip"]
    async with serving(answer(*lines, body=PACKED["gzip"])) as base:
        assert "compressed" in (await failure(f"{base}/a", max_bytes=100_000_000)).detail


async def test_what_is_packed_without_a_word_stays_packed() -> None:
    async with serving(answer(body=PACKED["gzip"])) as base:
        found = await fetch(f"{base}/a", max_bytes=20_000)
    assert (found.content, found.mime) == (PACKED["gzip"], "application/octet-stream")


async def test_a_packed_transfer_stays_packed() -> None:
    body = PACKED["gzip"]
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    async with serving(answer("Transfer-Encoding: gzip, chunked", body=chunked)) as base:
        with contextlib.suppress(InputError):
            assert (await fetch(f"{base}/a", max_bytes=20_000)).content == body


async def test_an_identity_encoding_is_none() -> None:
    async with serving(answer("Content-Encoding: Identity", body=PNG)) as base:
        assert (await fetch(f"{base}/a")).content == PNG


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(("size", "passes"), [(LIMIT, True), (LIMIT + 1, False)])
async def test_the_limit_is_exact(declared: bool, size: int, passes: bool) -> None:
    body = PNG.ljust(size, b"\x01")
    lines = [f"Content-Length: {size}"] if declared else []
    async with serving(answer(*lines, body=body)) as base:
        if passes:
            assert (await fetch(f"{base}/a")).content == body
        else:
            assert isinstance(await failure(f"{base}/a"), PayloadTooLargeError)


async def test_a_length_above_the_limit_is_refused_unread() -> None:
    """Nothing of the body ever comes: who waited for it would wait in vain."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
        await reader.read()

    async with serving(handle) as base:
        error = await failure(f"{base}/a", max_bytes=20 * 1024 * 1024)
    assert isinstance(error, PayloadTooLargeError)
    assert error.detail == "The file is larger than 20 MB, which is the limit"


@pytest.mark.parametrize("chunked", [True, False])
async def test_an_endless_file(chunked: bool) -> None:
    sent: list[int] = []
    over = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        kind = b"Transfer-Encoding: chunked\r\n" if chunked else b""
        writer.write(b"HTTP/1.1 200 OK\r\n" + kind + b"\r\n")
        piece = bytes(65536)
        try:
            while True:
                writer.write(b"10000\r\n" + piece + b"\r\n" if chunked else piece)
                await writer.drain()
                sent.append(len(piece))
        finally:
            over.set()

    async with serving(handle) as base:
        assert isinstance(await failure(f"{base}/a", max_bytes=1_000_000), PayloadTooLargeError)
        await asyncio.wait_for(over.wait(), SOON_S)
    assert sum(sent) < 50_000_000


@pytest.mark.parametrize("at", ["answer", "header", "body", "redirect"])
async def test_a_slow_drip(at: str) -> None:
    """A byte now and then, so that something always comes: the time is counted for the whole."""
    start = {
        "answer": b"",
        "header": b"HTTP/1.1 200 OK\r\nX-Slow: ",
        "body": b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n",
        "redirect": b"HTTP/1.1 302 Found\r\nX-Slow: ",
    }[at]
    gone = asyncio.Event()
    drips: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(start)
        while not gone.is_set():
            try:  # until the other side hangs up
                await asyncio.wait_for(reader.read(), 0.01)
                gone.set()
            except TimeoutError:
                drips.append(b"HTTP/1.1 200 OK\r\n"[len(drips) : len(drips) + 1] if at == "answer" else b"a")
                writer.write(drips[-1])
            except ConnectionError:
                gone.set()

    async with serving(handle) as base:
        began = time.monotonic()
        error = await failure(f"{base}/a", timeout_s=0.15)
        assert error.detail == "The file could not be downloaded: it took too long"
        assert 0.14 < time.monotonic() - began < SOON_S
        await asyncio.wait_for(gone.wait(), SOON_S)
    assert len(drips) > 2


async def test_the_time_is_for_all_requests_together() -> None:
    """Each redirect on its own is quick enough."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(), 0.1)
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n")

    async with serving(handle) as base:
        assert "took too long" in (await failure(f"{base}/a", timeout_s=0.25)).detail


async def test_a_name_service_that_never_answers() -> None:
    async def silent(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    assert "took too long" in (await failure(f"https://{HERE}/", names=silent, timeout_s=0.05)).detail


async def raw(content: bytes, **how: Any) -> str:
    """What is said of an answer of these bytes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(content)
        await writer.drain()

    async with serving(handle) as base:
        return (await failure(f"{base}/a", **how)).detail.removeprefix("The file could not be downloaded: ")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the connection was cut"),
        (OK, "the connection was cut"),
        (OK + b"Content-Length: 500\r\n\r\n" + PNG, "the connection was cut"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n30\r\n" + PNG[:20], "the connection was cut"),
        (
            OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + PNG,
            "the answer is not valid|the connection was cut",
        ),
        (OK + b"Content-Length: 20\r\n\r\n" + PNG, "the answer is not valid"),
        (OK + b"Content-Length: many\r\n\r\n" + PNG, "the answer is not valid"),
        (OK + b"Content-Length: -1\r\n\r\n" + PNG, "the answer is not valid"),
        (OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + PNG, "the answer is not valid"),
        (OK + b"X-Long: " + b"a" * 20_000_000 + b"\r\n\r\n" + PNG, "the answer is not valid"),
        (OK + b"a" * 20_000_000 + b": 1\r\n\r\n" + PNG, "the answer is not valid"),
        (b"HTTP/1.1 200 " + b"a" * 20_000_000 + b"\r\n\r\n" + PNG, "the answer is not valid"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "the answer is not valid"),
        (b"-ERR unknown command\r\n" * 100, "the answer is not valid"),
        (PNG, "the answer is not valid"),
        (
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
            "its server answered 101",
        ),
        (OK + b"Content-Length: 0\r\n\r\n", "it is empty"),
        (OK + b"\r\n", "it is empty"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "it is empty"),
    ],
    ids=lambda value: repr(value[:50]),
)
async def test_an_answer_that_is_none(content: bytes, says: str) -> None:
    assert re.fullmatch(says, await raw(content))


@pytest.mark.parametrize("rest", [b"zz\r\n", b"-1\r\n", b"3\r\nabcdefgh\r\n", b"f" * 40 + b"\r\n"])
async def test_an_answer_that_turns_bad(rest: bytes) -> None:
    """The first piece is read and in order, the next one is not: half a file is never taken for a whole."""
    async with serving(_turning_bad(rest)) as base:
        await failure(f"{base}/a", timeout_s=SOON_S)


async def test_an_answer_that_turns_bad_for_the_slow_parser() -> None:
    """Where aiohttp has no compiled parts."""
    async with serving(_turning_bad(b"zz\r\n")) as base, own_process(base, AIOHTTP_NO_EXTENSIONS="1") as said:
        assert said == ["InputError: The file could not be downloaded: the answer is not valid"]


def _turning_bad(rest: bytes) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        with contextlib.suppress(TimeoutError):  # so that it travels alone
            await asyncio.wait_for(reader.read(), 0.05)
        writer.write(rest)
        await writer.drain()

    return handle


async def test_header_lines_without_end() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK)
        while True:
            writer.write(b"X-Another: one\r\n")
            await writer.drain()

    async with serving(handle) as base:
        await failure(f"{base}/a", timeout_s=0.3)


# Stopping


@pytest.mark.parametrize("sent", [b"", OK, OK + b"Content-Length: 900\r\n\r\n" + PNG])
@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_stopping_closes_the_socket(sent: bytes, how: str) -> None:
    asked, gone = asyncio.Event(), asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(sent)
        await writer.drain()
        asked.set()
        try:
            await reader.read()
        finally:
            gone.set()

    before = asyncio.all_tasks()
    fetcher = SafeFetcher(frozenset({HERE}), Names())
    async with serving(handle) as base:
        task = asyncio.create_task(fetcher.fetch(f"{base}/a", LIMIT, PATIENCE_S))
        await asyncio.wait_for(asked.wait(), PATIENCE_S)
        if how == "cancel":
            task.cancel()
        else:
            await fetcher.aclose()
        kind = asyncio.CancelledError if how == "cancel" else AdmissionError
        with pytest.raises(kind):
            await asyncio.wait_for(task, SOON_S)
        await asyncio.wait_for(gone.wait(), SOON_S)
    await fetcher.aclose()
    await all_ended(before)


async def test_a_closed_fetcher_connects_to_nobody() -> None:
    visits = Visits()
    fetcher = SafeFetcher(frozenset({HERE}), Names())
    async with serving(picture(visits)) as base:
        await fetcher.fetch(f"{base}/a", LIMIT)
        await fetcher.aclose()
        await fetcher.aclose()
        with pytest.raises(AdmissionError):
            await fetcher.fetch(f"{base}/a", LIMIT)
    assert visits.count == 1


async def test_one_fetcher_serves_two_event_loops() -> None:
    fetcher = SafeFetcher(frozenset({HERE}), Names())
    async with serving(picture()) as base:
        assert (await fetcher.fetch(base, LIMIT)).content == PNG
        found = await asyncio.to_thread(asyncio.run, fetcher.fetch(base, LIMIT))
        assert found.content == PNG
    await fetcher.aclose()


# What a file is


def box(brand: bytes, *others: bytes) -> bytes:
    """The first box of an ISO media file."""
    body = b"ftyp" + brand + bytes(4) + b"".join(others)
    return (len(body) + 4).to_bytes(4, "big") + body + bytes(20)


MIMES: Final[list[tuple[str, bytes]]] = [
    ("image/png", PNG),
    ("image/jpeg", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(20)),
    ("image/jpeg", b"\xff\xd8\xff\xdb" + bytes(20)),
    ("image/gif", b"GIF89a" + bytes(20)),
    ("image/gif", b"GIF87a" + bytes(20)),
    ("image/webp", b"RIFF\x24\x00\x00\x00WEBPVP8 " + bytes(20)),
    ("image/webp", b"RIFF\n\n\n\nWEBPVP8 " + bytes(20)),
    ("image/bmp", b"BM\x46\x00\x00\x00\x00\x00\x00\x00\x36\x00" + bytes(20)),
    ("image/avif", box(b"avif", b"mif1", b"miaf")),
    ("image/avif", box(b"avis")),
    ("image/avif", box(b"mif1", b"miaf", b"avif")),
    ("image/heic", box(b"heic", b"mif1")),
    ("image/heic", box(b"mif1", b"heic")),
    ("application/pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"),
    ("application/pdf", b"\r\n%PDF-1.4\n"),
    ("audio/wav", b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(20)),
    ("audio/mpeg", b"ID3\x04\x00\x00\x00\x00\x00\x00" + bytes(20)),
    ("audio/mpeg", b"\xff\xfb\x90\x64" + bytes(20)),
    ("audio/mpeg", b"\xff\xf3\x44\xc4" + bytes(20)),
    ("audio/aac", b"\xff\xf1\x50\x80" + bytes(20)),
    ("audio/ogg", b"OggS\x00\x02" + bytes(22) + b"\x01\x13OpusHead"),
    ("video/ogg", b"OggS\x00\x02" + bytes(22) + b"\x80theora"),
    ("audio/flac", b"fLaC\x00\x00\x00\x22" + bytes(20)),
    ("audio/mp4", box(b"M4A ", b"mp42")),
    ("video/mp4", box(b"isom", b"avc1")),
    ("video/mp4", box(b"mp42")),
    ("video/quicktime", box(b"qt  ")),
    ("video/quicktime", b"\x00\x00\x00\x08wide\x00\x00\x10\x00mdat"),
    ("video/webm", b"\x1aE\xdf\xa3\x9fB\x86\x81\x01B\xf7\x81\x01B\xf2\x81\x04B\xf3\x81\x08B\x82\x84webm"),
    ("video/x-matroska", b"\x1aE\xdf\xa3\xa3B\x86\x81\x01B\x82\x88matroska"),
    ("video/mpeg", b"\x00\x00\x01\xba" + bytes(20)),
    ("video/mpeg", b"\x00\x00\x01\xb3" + bytes(20)),
    ("text/plain", b"Hello"),
    ("text/plain", "Grüße, 漢字".encode()),
    ("text/plain", b"BMW is a car, GIF a format, ID3 a tag, and RIFF .. WAVE too"),
    ("text/plain", b"1 < 2 and <html> is a tag"),
    ("text/plain", b"<details>no page</details>"),
    ("text/plain", b'{"a": 1}'),
    ("text/html", b"<!DOCTYPE html><title>Not found</title>"),
    ("text/html", b"\xef\xbb\xbf \n<HTML>"),
    ("text/html", b"<!-- a comment --><html lang=en>"),
    ("text/html", b'<?xml version="1.0"?><!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Strict//EN">'),
    ("text/html", b"<script>alert(1)</script>"),
    ("text/html", b"<body><svg></svg></body>"),
    ("image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg'>"),
    ("image/svg+xml", b"<?xml version='1.0'?>\n<!-- Made by hand -->\n<svg width='1'><script/></svg>"),
    ("image/svg+xml", b"<svg:svg xmlns:svg='http://www.w3.org/2000/svg'/>"),
    ("application/octet-stream", b"\x00\x01\x02"),
    ("application/octet-stream", b"text\x00with a zero"),
    ("application/octet-stream", b"\xff\xfeU\x00T\x00F\x00"),
    ("application/octet-stream", b"MZ\x90\x00\x03"),
    ("application/octet-stream", b"PK\x03\x04\x14\x00"),
    ("application/octet-stream", b"Gr\xfc\xdfe"),
]


@pytest.mark.parametrize(("mime", "content"), MIMES)
async def test_a_file_is_what_it_begins_with(mime: str, content: bytes) -> None:
    """Whatever its header says."""
    for claimed in ("image/png", "text/html"):
        async with serving(answer(f"Content-Type: {claimed}", body=content)) as base:
            assert await fetch(f"{base}/a.jpg") == Download(content, mime, f"{base}/a.jpg")


async def test_a_long_text_is_text_to_its_end() -> None:
    text = "漢".encode() * 5000
    for content, mime in ((text, "text/plain"), (text[:-1], "application/octet-stream")):
        async with serving(answer(body=content)) as base:
            assert (await fetch(f"{base}/a", max_bytes=20_000)).mime == mime


@pytest.mark.parametrize(
    "piece",
    [b"<", b" ", b"\n", b"<!--", b"<!-->", b"<a:", b"<w:w", b"RIFF", b"OggS", b"\x1aE\xdf\xa3", b"!doctype "],
)
async def test_what_never_becomes_a_signature_takes_no_time(piece: bytes) -> None:
    body = piece * (2_000_000 // len(piece))
    async with serving(answer(body=body)) as base:
        async with asyncio.timeout(SOON_S):
            await fetch(f"{base}/a", max_bytes=3_000_000)


# Base64

_B64: Final = "[A-Za-z0-9+/]"


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_the_size_of_base64(data: bytes) -> None:
    text = base64.b64encode(data).decode()
    assert _validate_base64_size(text, len(data)) == len(data)
    assert _validate_base64_size(text.rstrip("="), len(data)) == len(data)
    if data:
        with pytest.raises(PayloadTooLargeError):
            _validate_base64_size(text, len(data) - 1)


@settings(max_examples=1000, deadline=None)
@given(text=st.text(alphabet="Aa0+/=-_ \n%é", max_size=12) | st.text(max_size=12))
def test_any_text_as_base64(text: str) -> None:
    """The grammar decides, and then the decoder gives as many bytes."""
    found = None
    with contextlib.suppress(InputError):
        found = _validate_base64_size(text, 100)
    is_base64 = re.fullmatch(f"(?:{_B64}{{4}})*(?:{_B64}{{2}}(?:==)?|{_B64}{{3}}=?)?", text)
    padded = text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4)
    assert found == (len(base64.b64decode(padded, validate=True)) if is_base64 else None)


@pytest.mark.parametrize(
    "text",
    [
        "A",
        "AAAAA",
        "AB=",
        "=",
        "==",
        "====",
        "A===",
        "AB=C",
        "AA AA",
        "AAA\n",
        "AA-_",
        "ＡＡＡＡ",
        "AAA\ud800",
    ],
)
def test_what_is_no_base64(text: str) -> None:
    with pytest.raises(InputError, match="damaged"):
        _validate_base64_size(text, 100)


def test_large_base64_is_judged_quickly() -> None:
    text = "A" * (64 * 1024 * 1024)
    size = 48 * 1024 * 1024
    began = time.monotonic()
    assert _validate_base64_size(text, size) == size
    with pytest.raises(PayloadTooLargeError) as caught:
        _validate_base64_size(text, size - 1024 * 1024)
    for damaged in (text[:-1] + "!", "=" * len(text)):
        with pytest.raises(InputError, match="damaged"):
            _validate_base64_size(damaged, size)
    assert time.monotonic() - began < 2 * SOON_S
    assert caught.value.user_message == (
        "This chat could not be sent. A file in it is larger than 47 MB, which is the limit."
    )
