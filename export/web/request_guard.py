"""Who may ask a server: no page of another site through its visitor's browser. Runs without torch.

A browser sends the name it was led to as Host, so a foreign name that was pointed at this
machine (DNS rebinding) is known by it; and it says which page sends a form, in Origin and
Sec-Fetch-Site. Programs such as curl send neither, and need not.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from socket import gethostname
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

SAME_SITE = ("same-origin", "none")  # of Sec-Fetch-Site: the page itself, or the user


@dataclass(frozen=True)
class AllowedHosts:
    """Host names that a server answers to, in lower case, IPv6 without brackets; and whether to any IP address."""

    names: frozenset[str]
    addresses: bool = False


LOCAL = AllowedHosts(frozenset({"localhost", "127.0.0.1", "::1"}))


def allowed_hosts(address: str, others: Iterable[str] = ()) -> AllowedHosts:
    """Of a server that listens on this IP address: it, localhost's, and `others`.

    A server on every address (0.0.0.0, ::) also has the machine's name and any IP address:
    only a name can be pointed at another machine.
    """
    anywhere = ip_address(address).is_unspecified
    given = {address, *others, *([gethostname()] if anywhere else [])}
    return AllowedHosts(LOCAL.names | {name.lower().strip("[]") for name in given}, anywhere)


def guard_requests(inner: ASGIApp, own: AllowedHosts) -> ASGIApp:
    """Refuses requests to other names (421), and what pages of other sites send (403)."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refusal(scope["method"], Headers(scope=scope), own) if scope["type"] == "http" else None
        await (refusal or inner)(scope, receive, send)

    return call


def _refusal(method: str, headers: Headers, own: AllowedHosts) -> PlainTextResponse | None:
    host = headers.get("host", "").lower()
    name = _host_name(host)
    if not (name in own.names or (own.addresses and _is_address(name))):
        return PlainTextResponse(f"not a name of this server: {name!a}; serve --allow-host adds one", 421)
    if method in ("GET", "HEAD"):  # links from elsewhere lead here, and change nothing
        return None
    foreign = any(origin.lower().partition("://")[2] != host for origin in headers.getlist("origin"))
    if foreign or headers.get("sec-fetch-site", "none") not in SAME_SITE:
        return PlainTextResponse("sent by a page of another site; use this server's own page, or a program", 403)
    return None


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets; empty where it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
