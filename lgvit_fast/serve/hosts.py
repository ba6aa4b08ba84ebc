"""The names by which requests may address the server: a defence against rebinding of DNS names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["AllowedHosts", "hosts_of"]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^\[\]:@/?#]+))(?::\d*)?")


def hosts_of(host: str) -> list[str] | None:
    """The names that a server on this address has; None, which allows any, unless it is loopback."""
    if host not in _LOOPBACK:
        try:
            if not ip_address(host).is_loopback:
                return None
        except ValueError:  # a name
            return None
    return [*_LOOPBACK, host]


class AllowedHosts:
    """Refuses requests to other hosts with 400.

    Args:
        app: answers the others.
        hosts: names and addresses, without a port.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app, self._hosts = app, {host.strip("[]").lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] == "http":
            given = Headers(scope=scope).getlist("host")
            if len(given) != 1 or _name(given[0]) not in self._hosts:
                error = f"the host is {', '.join(given)!r}, expected one of {sorted(self._hosts)}"
                await JSONResponse({"error": error}, 400)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _name(header: str) -> str | None:
    """A header's host, without its port and brackets."""
    found = _HOST.fullmatch(header.lower())
    return found and (found["v6"] or found["name"])
