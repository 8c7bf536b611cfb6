"""A loopback stand-in for the Hub's download API, as far as snapshot_download calls it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments, repos: dict[str, Path], faults: dict[str, int], seen: list[str], **more):
        self.repos, self.faults, self.seen = repos, faults, seen
        super().__init__(*arguments, **more)

    def log_message(self, format, *arguments):
        self.seen.append(f"{self.command} {self.path}")

    def do_GET(self):
        self._answer(body=True)

    def do_HEAD(self):
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repo, rest = "/".join(parts[:2]), parts[2:]
        if repo in self.faults:
            code = {403: "GatedRepo", 404: "RepoNotFound"}.get(self.faults[repo], "")
            return self._send(self.faults[repo], b"{}", {"X-Error-Code": code}, body)
        if repo not in self.repos:
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        folder = self.repos[repo]
        if rest[:1] == ["resolve"]:
            path = folder / "/".join(rest[2:])
            if not path.is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            data = path.read_bytes()
            etag = {"ETag": f'"{sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self._send(200, data, etag, body)
        if rest[:1] == ["tree"]:
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            tree = [
                {
                    "type": "file",
                    "path": path.relative_to(folder).as_posix(),
                    "size": path.stat().st_size,
                    "oid": sha256(path.read_bytes()).hexdigest()[:40],
                }
                for path in files
            ]
            return self._send(200, json.dumps(tree).encode(), {}, body)
        return self._send(200, json.dumps({"id": repo, "sha": COMMIT}).encode(), {}, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextmanager
def serve(repos: dict[str, Path], faults: dict[str, int]) -> Iterator[tuple[str, list[str]]]:
    """(endpoint, requests seen) of a server that holds `repos` and answers `faults` with a status."""
    seen: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, repos=repos, faults=faults, seen=seen))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
