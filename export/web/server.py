"""The page and HTTP API of `serve`: an ASGI application that scores images, and its uvicorn server. No torch.

    GET  /, /page.js, /style.css   the page; no other file is served
    GET  /api/info                 members, threshold, limits, version, what runs
    POST /api/score                multipart/form-data, a part `images` with a filename for each image
    POST /api/explain              one such part: heat maps of the members, where `serve --explain` makes them

An error is answered by its status and one line of text. Limits of an upload: limits.py.
"""

import asyncio
import math
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import FormData, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ensemble.core import metrics
from ensemble.core.errors import ImageError, ManyeyesError, UnavailableError, join_limited
from ensemble.data.inputs import inputs_from_open_files
from export.inference.ensemble import Ensemble
from export.inference.infer import member_logits
from export.web.limits import UPLOAD_TIMEOUT_SECONDS, UploadLimits
from export.web.request_guard import LOCAL, AllowedHosts, guard_requests

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}

UploadedFiles = Sequence[tuple[str, BinaryIO]]  # name and content
Score = Callable[[UploadedFiles], dict[str, object]]  # files -> JSON
Explain = Callable[[str, bytes], dict[str, object]]  # an image's name and bytes -> JSON


def make_app(
    ensemble: Ensemble, limits: UploadLimits, hosts: AllowedHosts = LOCAL, explain: Explain | None = None
) -> ASGIApp:
    """The ASGI application, behind the request guard.

    hosts: the host names that it answers to. explain: what /api/explain answers with; without, there is no
    /api/explain. UnavailableError for an ensemble with members whose scores are looked up by id.
    """
    if ensemble.externals:
        names = join_limited(member.name for member in ensemble.externals)
        raise UnavailableError(f"{names} cannot score new images, only ids known before; stack without --external")
    queue = _InferenceQueue(limits.waiting)
    info = {
        "version": version("manyeyes"),
        "positive": "ai",
        "threshold": ensemble.stacker.threshold,
        "members": list(ensemble.stacker.members),
        "runs": dict(ensemble.settings),
        "device": ensemble.device,
        "cascade": ensemble.cascade is not None,
        "limits": {"images": limits.images, "megabytes": limits.megabytes},
        "explain": explain is not None,
    }
    folder = Path(__file__).parent / "page"
    pages = {path: Response((folder / name).read_text("utf-8"), media_type=kind) for path, (name, kind) in PAGE.items()}
    routes = [Route(path, page, methods=["GET"]) for path, page in pages.items()]
    routes += [Route("/api/info", JSONResponse(info), methods=["GET"])]
    score = partial(queue.answer, limits=limits, score=partial(_score, ensemble))
    routes += [Route("/api/score", score, methods=["POST"])]
    if explain:
        heatmaps = partial(
            queue.answer, limits=replace(limits, images=1), score=lambda files: explain(files[0][0], files[0][1].read())
        )
        routes += [Route("/api/explain", heatmaps, methods=["POST"])]
    app = Starlette(routes=routes, exception_handlers=HANDLERS)
    return _with_headers(guard_requests(app, hosts))


class _InferenceQueue:
    """Runs the members in one thread, request by request, in the order of arrival."""

    def __init__(self, waiting: int) -> None:
        self._slots, self._turn = asyncio.Semaphore(waiting), asyncio.Lock()
        self._thread = ThreadPoolExecutor(1)

    async def answer(self, request: Request, limits: UploadLimits, score: Score) -> Response:
        """Receive the images of one request and answer with `score(files)`; 503 where too many requests wait."""
        if self._slots.locked():
            raise HTTPException(503, "too many requests are waiting; try again in a second", {"retry-after": "1"})
        async with self._slots:
            form = await _read_form(request, limits)
            try:
                parts = [part for part in form.getlist("images") if isinstance(part, UploadFile)]
                if not parts:
                    raise HTTPException(400, "no images: send each as a part named images, with a filename")
                # a client's file name may hold lone surrogates, which are replaced
                files = [((part.filename or "image").encode("utf-8", "replace").decode(), part.file) for part in parts]
                async with self._turn:
                    if await request.is_disconnected():
                        raise ClientDisconnect
                    return JSONResponse(await asyncio.get_running_loop().run_in_executor(self._thread, score, files))
            finally:
                await form.close()


def _score(ensemble: Ensemble, files: UploadedFiles) -> dict[str, object]:
    """What /api/score answers: the images in their order, scored as by `infer`; null for an image with an error."""
    stacker = ensemble.stacker
    logits, errors = member_logits(inputs_from_open_files(files), ensemble)
    targets = stacker.target_of(ensemble.apply(logits)[0])
    images = [
        {
            "name": name,
            "target": None if row in errors else target,
            "ai": None if row in errors else target >= stacker.threshold,
            "members": {m: None if math.isnan(p) else p for m, p in zip(stacker.members, members, strict=True)},
            "error": errors.get(row),
        }
        for row, ((name, _), target, members) in enumerate(
            zip(files, targets.tolist(), metrics.sigmoid(logits).tolist(), strict=True)
        )
    ]
    return {"threshold": stacker.threshold, "positive": "ai", "images": images}


async def _read_form(request: Request, limits: UploadLimits) -> FormData:
    """The parts of a request, large ones on disk. HTTPException beyond the limits, as early as possible."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise HTTPException(415, "send the images as multipart/form-data")
    too_large = HTTPException(413, f"over {limits.megabytes:g} MB in one request; send fewer or smaller images")
    if int(request.headers.get("content-length", 0)) > limits.body_bytes:
        raise too_large
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > limits.body_bytes:
            raise too_large
        return message

    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT_SECONDS):
            return await Request(request.scope, receive).form(max_files=limits.images, max_fields=0)
    except TimeoutError:
        raise HTTPException(408, f"the images did not arrive within {UPLOAD_TIMEOUT_SECONDS} seconds") from None
    except HTTPException as error:  # Starlette's parser answers 400 to everything
        if error.detail.startswith("Too many files"):
            raise HTTPException(413, f"at most {limits.images} in one request; send fewer images") from None
        raise


async def _error_response(request: Request, error: Exception) -> Response:
    return PlainTextResponse(str(error), 422 if isinstance(error, ImageError) else 500)


async def _client_gone(request: Request, error: Exception) -> Response:
    """The response for a client that has disconnected; nobody reads it."""
    return Response(status_code=499)


HANDLERS: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
    ManyeyesError: _error_response,
    ClientDisconnect: _client_gone,
}


def _with_headers(inner: ASGIApp) -> ASGIApp:
    """Add SECURITY_HEADERS to every response."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        await inner(scope, receive, send_with_headers)

    return call


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on this address; port 0 takes a free one. UnavailableError if that is not possible."""
    if not host:  # the socket would listen on every address
        raise UnavailableError(
            "--host is empty; leave it out for this machine alone, or give 0.0.0.0 for every address"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        host.encode("idna")  # create_server does so too, but leaves its socket open if that fails
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while ")[0]
        raise UnavailableError(
            f"cannot listen on {host} port {port} ({reason}); choose another --host or --port"
        ) from None


def url_of(listening: socket.socket) -> str:
    """The address for a browser, such as http://127.0.0.1:7860."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve_forever(app: ASGIApp, listening: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM; running requests are finished first."""
    config = uvicorn.Config(
        app, http="h11", ws="none", log_level="warning", access_log=False, server_header=False, lifespan="off"
    )
    with suppress(KeyboardInterrupt):  # uvicorn raises it again after its shutdown
        uvicorn.Server(config).run(sockets=[listening])
