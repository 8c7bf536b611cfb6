"""An ASGI application on a port of this machine, by uvicorn."""

import socket
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp

from ensemble.core.errors import UnavailableError


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens on this address; port 0 is a free one. UnavailableError if it cannot be had."""
    if not host:  # would be every address
        raise UnavailableError(
            "--host is empty; leave it out for this machine alone, or give 0.0.0.0 for every address"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        host.encode("idna")  # as the socket would, which is left open by its error
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:  # the second of a name that cannot be one
        why = (getattr(error, "strerror", None) or str(error)).partition(" (while ")[0]
        raise UnavailableError(
            f"cannot listen on {host} port {port} ({why}); choose another --host or --port"
        ) from None


def address(listening: socket.socket) -> str:
    """Where a browser finds it, such as http://127.0.0.1:7860."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def answer(app: ASGIApp, listening: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM; those under way are finished."""
    config = uvicorn.Config(
        app, http="h11", ws="none", log_level="warning", access_log=False, server_header=False, lifespan="on"
    )
    with suppress(KeyboardInterrupt):  # raised again by uvicorn after it ended in order
        uvicorn.Server(config).run(sockets=[listening])
