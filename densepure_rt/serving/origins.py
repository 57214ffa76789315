"""What keeps pages of other sites from asking a server that the reader's browser can reach and they cannot.

A browser sends a page's requests to any address, this machine's too, and says in Origin whose page it is; the answer is
kept from the page, the work is done. A name that its owner points at 127.0.0.1 after the page has come (DNS rebinding)
makes the origin the server's own: that is seen by the Host alone.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from densepure_rt.errors import UsageError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
NAME = r"\[[0-9a-f:.]+\]|[a-z0-9._-]+"  # of a Host, without its port


class SameOrigin:
    """ASGI: `app`, for programs and for the server's own pages. names: of `hosts_of`."""

    def __init__(self, app: ASGIApp, names: Collection[str] | None = None) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = refused(Headers(scope=scope), self.names) if scope["type"] == "http" else None
        answer: ASGIApp = self.app if found is None else JSONResponse({"error": found}, 403)
        await answer(scope, receive, send)


def refused(headers: Headers, names: Collection[str] | None) -> str | None:
    """Why a request is not taken; None for one that is. A request without a Host (HTTP/1.0) comes from no browser."""
    host = headers.get("host", "").lower()
    own = (f"http://{host}", f"https://{host}")  # the latter before a proxy that passes the Host on
    for origin in headers.getlist("origin"):
        if origin.lower() not in own:
            return f"a page of {origin[:80]!r} is of another site, and this server is asked by its own pages alone"
    if names is not None and host and name_of(host) not in names:
        return f"this server is not called {host[:80]!r}: ask {', '.join(sorted(names))}, or start it with --allow-host"
    return None


def name_of(host: str) -> str | None:
    found = re.fullmatch(rf"({NAME})(:[0-9]*)?", host)
    return found and found[1]


def hosts_of(address: str, allowed: Collection[str]) -> frozenset[str] | None:
    """The names that a server at this IP address goes by, None for any.

    allowed: those that it is given. Without them only a server that this machine alone can reach knows its names.
    Raises UsageError for what is no name.
    """
    for name in allowed:
        if name_of(name.lower()) != name.lower():
            raise UsageError(f"`allowed` is a name or an address without a port, such as example.org, got {name!r}")
    if not (allowed or ipaddress.ip_address(address).is_loopback):
        return None
    return LOOPBACK | {f"[{address}]" if ":" in address else address} | {name.lower() for name in allowed}
