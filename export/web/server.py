"""A page and its HTTP API that score images with one ensemble. Runs without torch.

    GET  /, /page.js, /style.css   the page; no other file is served
    GET  /api/info                 members, threshold, limits, version, what runs
    POST /api/score                multipart/form-data, a part `images` with a filename for each image
    POST /api/explain              one such part: heat maps of the members, where the server makes them

Errors are a status and one line of text.

An ASGI application on a port of this machine, by uvicorn.
"""

import asyncio
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
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
from export.inference import ensemble as ensembles
from export.inference.ensemble import Ensemble
from export.inference.infer import member_logits
from export.web.request_guard import LOCAL, AllowedHosts, guarded

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
SENDING = 120  # seconds that a client has to send its images
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}

Files = Sequence[tuple[str, BinaryIO]]  # name and content
Work = Callable[[Files], dict[str, object]]
Explain = Callable[[str, bytes], dict[str, object]]


@dataclass(frozen=True)
class Limits:
    """Of one request: images, and megabytes (10^6 bytes) of all of them together; and requests at work or waiting."""

    images: int = 50
    megabytes: float = 20
    waiting: int = 32

    @property
    def body(self) -> int:
        """Bytes that a request's body may have: its images, and 1 kB for the header of each."""
        return int(self.megabytes * 1_000_000) + 1000 * self.images


def app(ensemble: Ensemble, limits: Limits, own: AllowedHosts = LOCAL, explain: Explain | None = None) -> ASGIApp:
    """The ASGI application. Images run in one thread, request by request, in the order they came.

    own: the host names it answers to. explain: an image's name and bytes -> what /api/explain answers.
    UnavailableError for an ensemble with members whose scores are looked up by id.
    """
    if ensemble.externals:
        names = join_limited(member.name for member in ensemble.externals)
        raise UnavailableError(f"{names} cannot score new images, only ids known before; stack without --external")
    places, turn = asyncio.Semaphore(limits.waiting), asyncio.Lock()

    def post(path: str, limits: Limits, work: Work) -> Route:
        async def answer(request: Request) -> Response:
            if places.locked():
                raise HTTPException(503, "too many requests are waiting; try again in a second", {"retry-after": "1"})
            async with places:
                form = await _form(request, limits)
                try:
                    files = _files(form)
                    async with turn:
                        if await request.is_disconnected():
                            raise ClientDisconnect
                        running = asyncio.get_running_loop().run_in_executor(request.state.worker, work, files)
                        return JSONResponse(await running)
                finally:
                    await form.close()

        return Route(path, answer, methods=["POST"])

    about = _info(ensemble, limits) | {"explain": explain is not None}
    routes = [Route(path, _file(*file)) for path, file in PAGE.items()]
    routes += [Route("/api/info", _answer(lambda: JSONResponse(about)))]
    routes += [post("/api/score", limits, partial(_scored, ensemble))]
    if explain:
        routes += [post("/api/explain", replace(limits, images=1), partial(_explained, explain))]
    inner = Starlette(routes=routes, exception_handlers=HANDLERS, lifespan=_worker)
    return _with_headers(guarded(inner, own))


@asynccontextmanager
async def _worker(app: Starlette) -> AsyncIterator[dict[str, ThreadPoolExecutor]]:
    """The one thread that runs the members, as `request.state.worker`."""
    with ThreadPoolExecutor(1) as worker:
        yield {"worker": worker}


def _scored(ensemble: Ensemble, files: Files) -> dict[str, object]:
    """What /api/score answers: these images in their order, scored as `infer` does; null stands for no number."""
    stacker = ensemble.stacker
    logits, errors = member_logits(inputs_from_open_files(files), ensemble)
    targets = stacker.target_of(ensembles.apply(ensemble, logits)[0])
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


def _explained(explain: Explain, files: Files) -> dict[str, object]:
    """What /api/explain answers."""
    ((name, file),) = files
    return explain(name, file.read())


def _info(ensemble: Ensemble, limits: Limits) -> dict[str, object]:
    """What /api/info answers."""
    return {
        "version": version("manyeyes"),
        "positive": "ai",
        "threshold": ensemble.stacker.threshold,
        "members": list(ensemble.stacker.members),
        "runs": dict(ensemble.settings),
        "device": ensemble.device,
        "cascade": ensemble.cascade is not None,
        "limits": {"images": limits.images, "megabytes": limits.megabytes},
    }


async def _form(request: Request, limits: Limits) -> FormData:
    """The parts of a request, large ones on disk; HTTPException beyond the limits, as soon as it is known."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise HTTPException(415, "send the images as multipart/form-data")
    too_large = HTTPException(413, f"over {limits.megabytes:g} MB in one request; send fewer or smaller images")
    if int(request.headers.get("content-length", 0)) > limits.body:
        raise too_large
    count = 0

    async def receive() -> Message:
        nonlocal count
        message = await request.receive()
        count += len(message.get("body", b""))
        if count > limits.body:
            raise too_large
        return message

    try:
        async with asyncio.timeout(SENDING):
            return await Request(request.scope, receive).form(max_files=limits.images, max_fields=0)
    except TimeoutError:
        raise HTTPException(408, f"the images did not arrive within {SENDING} seconds") from None
    except HTTPException as error:  # of Starlette's parser, which has one status for all
        if error.detail.startswith("Too many files"):
            raise HTTPException(413, f"at most {limits.images} in one request; send fewer images") from None
        raise


def _files(form: FormData) -> Files:
    """Name and content of each image. Names are the client's, in any charset, of which some make half characters."""
    parts = [part for part in form.getlist("images") if isinstance(part, UploadFile)]
    files = [((part.filename or "image").encode("utf-8", "replace").decode(), part.file) for part in parts]
    if not files:
        raise HTTPException(400, "no images: send each as a part named images, with a filename")
    return files


def _answer(make: Callable[[], Response]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return make()

    return answer


def _file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    """Answers with a file of page/, read now."""
    text = (Path(__file__).parent / "page" / name).read_text("utf-8")
    return _answer(lambda: Response(text, media_type=kind))


async def _told(request: Request, error: Exception) -> Response:
    return PlainTextResponse(str(error), 422 if isinstance(error, ImageError) else 500)


async def _gone(request: Request, error: Exception) -> Response:
    """For a client that went away: nobody reads it."""
    return Response(status_code=499)


HANDLERS: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
    ManyeyesError: _told,
    ClientDisconnect: _gone,
}


def _with_headers(inner: ASGIApp) -> ASGIApp:
    """Every answer with HEADERS."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await inner(scope, receive, sent)

    return call


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
