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
from export.inference import ensemble as ensembles
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
Work = Callable[[UploadedFiles], dict[str, object]]
Explain = Callable[[str, bytes], dict[str, object]]


def make_app(
    ensemble: Ensemble, limits: UploadLimits, own: AllowedHosts = LOCAL, explain: Explain | None = None
) -> ASGIApp:
    """The ASGI application. Images run in one thread, request by request, in the order they came.

    own: the host names it answers to. explain: an image's name and bytes -> what /api/explain answers.
    UnavailableError for an ensemble with members whose scores are looked up by id.
    """
    if ensemble.externals:
        names = join_limited(member.name for member in ensemble.externals)
        raise UnavailableError(f"{names} cannot score new images, only ids known before; stack without --external")
    places, turn = asyncio.Semaphore(limits.waiting), asyncio.Lock()

    def post(path: str, limits: UploadLimits, work: Work) -> Route:
        async def answer(request: Request) -> Response:
            if places.locked():
                raise HTTPException(503, "too many requests are waiting; try again in a second", {"retry-after": "1"})
            async with places:
                form = await _read_form(request, limits)
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
    routes = [Route(path, _page_route(*file)) for path, file in PAGE.items()]
    routes += [Route("/api/info", _answer(lambda: JSONResponse(about)))]
    routes += [post("/api/score", limits, partial(_score, ensemble))]
    if explain:
        routes += [post("/api/explain", replace(limits, images=1), partial(_explain, explain))]
    inner = Starlette(routes=routes, exception_handlers=HANDLERS, lifespan=_inference_thread)
    return _with_headers(guard_requests(inner, own))


@asynccontextmanager
async def _inference_thread(app: Starlette) -> AsyncIterator[dict[str, ThreadPoolExecutor]]:
    """The one thread that runs the members, as `request.state.worker`."""
    with ThreadPoolExecutor(1) as worker:
        yield {"worker": worker}


def _score(ensemble: Ensemble, files: UploadedFiles) -> dict[str, object]:
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


def _explain(explain: Explain, files: UploadedFiles) -> dict[str, object]:
    """What /api/explain answers."""
    ((name, file),) = files
    return explain(name, file.read())


def _info(ensemble: Ensemble, limits: UploadLimits) -> dict[str, object]:
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


async def _read_form(request: Request, limits: UploadLimits) -> FormData:
    """The parts of a request, large ones on disk; HTTPException beyond the limits, as soon as it is known."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise HTTPException(415, "send the images as multipart/form-data")
    too_large = HTTPException(413, f"over {limits.megabytes:g} MB in one request; send fewer or smaller images")
    if int(request.headers.get("content-length", 0)) > limits.body_bytes:
        raise too_large
    count = 0

    async def receive() -> Message:
        nonlocal count
        message = await request.receive()
        count += len(message.get("body", b""))
        if count > limits.body_bytes:
            raise too_large
        return message

    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT_SECONDS):
            return await Request(request.scope, receive).form(max_files=limits.images, max_fields=0)
    except TimeoutError:
        raise HTTPException(408, f"the images did not arrive within {UPLOAD_TIMEOUT_SECONDS} seconds") from None
    except HTTPException as error:  # of Starlette's parser, which has one status for all
        if error.detail.startswith("Too many files"):
            raise HTTPException(413, f"at most {limits.images} in one request; send fewer images") from None
        raise


def _files(form: FormData) -> UploadedFiles:
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


def _page_route(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    """Answers with a file of page/, read now."""
    text = (Path(__file__).parent / "page" / name).read_text("utf-8")
    return _answer(lambda: Response(text, media_type=kind))


async def _error_response(request: Request, error: Exception) -> Response:
    return PlainTextResponse(str(error), 422 if isinstance(error, ImageError) else 500)


async def _client_gone(request: Request, error: Exception) -> Response:
    """For a client that went away: nobody reads it."""
    return Response(status_code=499)


HANDLERS: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
    ManyeyesError: _error_response,
    ClientDisconnect: _client_gone,
}


def _with_headers(inner: ASGIApp) -> ASGIApp:
    """Every answer with HEADERS."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        await inner(scope, receive, sent)

    return call


def listen(host: str, port: int) -> socket.socket:
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


def url_of(listening: socket.socket) -> str:
    """Where a browser finds it, such as http://127.0.0.1:7860."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve_forever(app: ASGIApp, listening: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM; those under way are finished."""
    config = uvicorn.Config(
        app, http="h11", ws="none", log_level="warning", access_log=False, server_header=False, lifespan="on"
    )
    with suppress(KeyboardInterrupt):  # raised again by uvicorn after it ended in order
        uvicorn.Server(config).run(sockets=[listening])
