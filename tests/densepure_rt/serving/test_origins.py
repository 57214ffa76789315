"""Who may ask a server, by what browsers say of their pages."""

from __future__ import annotations

import re

import pytest
from starlette.datastructures import Headers

from densepure_rt.errors import UsageError
from densepure_rt.serving.origins import LOOPBACK, hosts_of, refused


@pytest.mark.parametrize(
    ("headers", "taken"),
    [
        ({"host": "127.0.0.1:8000"}, True),
        ({"host": "LocalHost"}, True),
        ({"host": "[::1]:8000"}, True),
        ({}, True),  # HTTP/1.0, from no browser
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}, True),
        ({"host": "localhost:8000", "origin": "https://localhost:8000"}, True),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8001"}, False),
        ({"host": "127.0.0.1:8000", "origin": "http://localhost:8000"}, False),
        ({"host": "127.0.0.1:8000", "origin": "https://example.org"}, False),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000.example.org"}, False),
        ({"host": "127.0.0.1:8000", "origin": "null"}, False),
        ({"host": "127.0.0.1:8000", "origin": ""}, False),
        ({"origin": "http://example.org"}, False),
        ({"host": "example.org:8000", "origin": "http://example.org:8000"}, False),  # DNS rebinding
        ({"host": "example.org"}, False),
        ({"host": "localhost.example.org"}, False),
        ({"host": "127.0.0.1.example.org"}, False),
        ({"host": "127.0.0.1:8000@example.org"}, False),
        ({"host": "127.0.0.1, example.org"}, False),
        ({"host": "[::1"}, False),
        ({"host": ":8000"}, False),
    ],
)
def test_a_server_of_this_machine_is_asked_by_programs_and_its_own_pages(headers: dict[str, str], taken: bool) -> None:
    assert (refused(Headers(headers), LOOPBACK) is None) == taken


def test_a_second_origin_hides_behind_no_first() -> None:
    raw = [(b"host", b"localhost"), (b"origin", b"http://localhost"), (b"origin", b"http://example.org")]
    found = refused(Headers(raw=raw), LOOPBACK)
    assert found is not None
    assert "'http://example.org'" in found


@pytest.mark.parametrize(
    ("address", "allowed", "names"),
    [
        ("127.0.0.1", [], LOOPBACK),
        ("::1", [], LOOPBACK),
        ("127.0.0.2", [], LOOPBACK | {"127.0.0.2"}),
        ("127.0.0.1", ["Certify.Example.org", "[fd00::1]"], LOOPBACK | {"certify.example.org", "[fd00::1]"}),
        ("0.0.0.0", [], None),
        ("192.0.2.1", [], None),
        ("192.0.2.1", ["example.org"], LOOPBACK | {"192.0.2.1", "example.org"}),
    ],
)
def test_a_server_knows_its_names_where_this_machine_alone_reaches_it_or_it_is_told(
    address: str, allowed: list[str], names: frozenset[str] | None
) -> None:
    assert hosts_of(address, allowed) == names


def test_a_server_that_is_told_no_names_goes_by_any_but_not_for_other_sites() -> None:
    assert refused(Headers({"host": "anything", "origin": "http://anything"}), None) is None
    assert refused(Headers({"host": "anything", "origin": "http://example.org"}), None) is not None


@pytest.mark.parametrize("name", ["", "http://example.org", "example.org:443", "a b", "[::1"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=re.escape(repr(name))):
        hosts_of("127.0.0.1", [name])
