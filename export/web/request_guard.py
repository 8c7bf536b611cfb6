"""Refuse requests that a page of another site sends through a visitor's browser. Runs without torch.

DNS rebinding: the browser's Host header shows the foreign name that was pointed at this machine, so unknown
names are refused. Cross-site requests: the browser names the sending page in Origin and Sec-Fetch-Site.
Programs such as curl send neither, and are let through. (Starlette's TrustedHostMiddleware does not tell the
user how to allow a name.)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from socket import gethostname
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

SAME_SITE = ("same-origin", "none")  # values of Sec-Fetch-Site: sent by our own page, or by the user


@dataclass(frozen=True)
class AllowedHosts:
    """Host names that a server answers to, in lower case, IPv6 without brackets; and whether any IP address is one."""

    names: frozenset[str]
    any_address: bool = False


LOCAL = AllowedHosts(frozenset({"localhost", "127.0.0.1", "::1"}))


def allowed_hosts(address: str, others: Iterable[str] = ()) -> AllowedHosts:
    """The names of a server that listens on this IP address: the address, localhost, and `others`.

    A server on every address (0.0.0.0, ::) also answers to the machine's name and to any IP
    address: DNS rebinding needs a name.
    """
    every = ip_address(address).is_unspecified
    names = {address, *others, *([gethostname()] if every else [])}
    return AllowedHosts(LOCAL.names | {name.lower().strip("[]") for name in names}, every)


def guard_requests(inner: ASGIApp, hosts: AllowedHosts) -> ASGIApp:
    """Refuse requests to other host names (421), and what pages of other sites send (403)."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refusal(scope["method"], Headers(scope=scope), hosts) if scope["type"] == "http" else None
        await (refusal or inner)(scope, receive, send)

    return call


def _refusal(method: str, headers: Headers, hosts: AllowedHosts) -> PlainTextResponse | None:
    host = headers.get("host", "").lower()
    name = _host_name(host)
    if not (name in hosts.names or (hosts.any_address and _is_address(name))):
        return PlainTextResponse(f"not a name of this server: {name!a}; serve --allow-host adds one", 421)
    if method in ("GET", "HEAD"):  # links from other sites may lead here; they change nothing
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
