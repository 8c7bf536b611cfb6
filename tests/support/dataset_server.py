"""A loopback stand-in for the Hub's data set URLs and Kaggle's download API, with faults on request."""

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "d" * 40
PIECE = 1 << 14


@dataclass
class Hub:
    """Data sets by id -> path -> bytes, Kaggle ZIPs by handle, what to do wrong, and what was asked for."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    kaggle: dict[str, bytes] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    locked: set[str] = field(default_factory=set)  # as gated ones often are: listed, but not given
    drops: dict[str, list[int]] = field(default_factory=dict)  # path -> bytes after which to hang up, once each
    served: dict[str, bytes] = field(default_factory=dict)  # path -> other bytes than the tree tells of
    ranges: bool = True
    pause: float = 0.0  # seconds before each piece
    refuse: int = 0  # status for every Kaggle call
    status: int = 0  # of every answer of the Hub, in place of what was asked for
    seen: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)  # path -> bytes

    endpoint: str = ""

    def asked(self, text: str) -> list[str]:
        return [line for line in self.seen if text in line]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments, hub: Hub, **more):
        self.hub = hub
        super().__init__(*arguments, **more)

    def log_message(self, format, *arguments):
        byte_range = self.headers.get("Range") if hasattr(self, "headers") else None
        self.hub.seen.append(f"{self.command} {unquote(self.path)} {byte_range or ''}".strip())

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "archive":
            return self._file("/".join(parts[1:]), self.hub.kaggle["/".join(parts[1:3])])
        if self.hub.status:
            return self._json({"error": "no"}, self.hub.status)
        api, parts = parts[0] == "api", parts[1:] if parts[0] == "api" else parts
        repo, rest = "/".join(parts[1:3]), parts[3:]
        if repo in self.hub.gated:
            return self._json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        if repo not in self.hub.repos:
            return self._json({}, 401, {"X-Error-Code": "RepoNotFound"})
        files = self.hub.repos[repo]
        if not api and repo in self.hub.locked:
            return self._json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        if not api:
            return self._resolve(files, "/".join(rest[2:]))
        if rest[:1] == ["tree"]:
            return self._json(self._tree(files, "/".join(rest[2:])))
        siblings = [{"rfilename": path} for path in files]
        return self._json({"id": repo, "sha": COMMIT, "cardData": {"license": "cc0-1.0"}, "siblings": siblings})

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "paths-info" in self.path:
            parts = unquote(self.path).strip("/").split("/")
            files = self.hub.repos["/".join(parts[2:4])]
            if self.headers.get("Content-Type", "").startswith("application/json"):
                asked = json.loads(body)["paths"]
            else:
                asked = parse_qs(body.decode())["paths"]
            return self._json([_entry(path, files[path]) for path in asked if path in files])
        if self.hub.refuse:
            return self._json({"code": self.hub.refuse, "message": "no"}, self.hub.refuse)
        request = json.loads(body)
        handle = f"{request['ownerSlug']}/{request['datasetSlug']}"
        if handle not in self.hub.kaggle:
            return self._json({"code": 404, "message": "not found"}, 404)
        if self.path.endswith("GetDataset"):
            return self._json({"currentVersionNumber": 7})
        return self._send(b"", 302, {"Location": f"/archive/{handle}/archive.zip?version=7"})

    def _tree(self, files: Mapping[str, bytes], folder: str) -> list[dict[str, object]]:
        recursive = parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]
        folders, entries = set(), []
        for path, data in files.items():
            if path.startswith(f"{folder}/" if folder else ""):
                rest = path[len(folder) :].strip("/")
                if recursive or "/" not in rest:
                    entries.append(_entry(path, data))
                else:
                    folders.add(path[: len(path) - len(rest)] + rest.partition("/")[0])
        return [
            *entries,
            *({"type": "directory", "path": name, "oid": "e" * 40, "size": 0} for name in sorted(folders)),
        ]

    def _resolve(self, files: Mapping[str, bytes], path: str):
        if path not in files:
            return self._json({}, 404, {"X-Error-Code": "EntryNotFound"})
        return self._file(path, self.hub.served.get(path, files[path]))

    def _file(self, path: str, data: bytes):
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        headers = {"ETag": f'"{sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if not self.hub.ranges or not match:
            return self._send(data, 200, headers | ({"Accept-Ranges": "bytes"} if self.hub.ranges else {}), path)
        start, stop = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
        headers |= {"Accept-Ranges": "bytes", "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        return self._send(data[start:stop], 206, headers, path)

    def _json(self, values, status: int = 200, headers: Mapping[str, str] | None = None):
        return self._send(json.dumps(values).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int, headers: Mapping[str, str], path: str = ""):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        drop = self.hub.drops[path].pop(0) if self.hub.drops.get(path) else None
        for start in range(0, len(data) if drop is None else drop, PIECE):
            time.sleep(self.hub.pause if path else 0)
            piece = data[start : min(start + PIECE, len(data) if drop is None else drop)]
            try:
                self.wfile.write(piece)
            except OSError:
                self.close_connection = True
                return
            if path:
                self.hub.sent[path] = self.hub.sent.get(path, 0) + len(piece)
        self.close_connection = self.close_connection or drop is not None


def _entry(path: str, data: bytes) -> dict[str, object]:
    digest = sha256(data).hexdigest()
    lfs = {"lfs": {"oid": digest, "size": len(data), "pointerSize": 130}} if not path.endswith((".md", ".txt")) else {}
    return {"type": "file", "path": path, "size": len(data), "oid": digest[:40], **lfs}


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """`hub`, with its `endpoint`, while a server answers for it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub=hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
