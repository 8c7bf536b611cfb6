"""A loopback stand-in for the Hub's HTTP API as huggingface_hub calls it to push and to pull, with faults on request.

Repositories live in memory, large files on disk. The client has to be told HF_ENDPOINT and HF_HUB_DISABLE_XET=1:
Xet, which the real Hub prefers for large files, has a server of its own, so these tests see the LFS way only.
"""

import base64
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from hub_state import Hub, Repo, git_hash

TOKEN = "hf_aSecretThatNobodyMayPrint"  # noqa: S105 of this server alone
READER = "hf_aTokenWithoutTheRightToWrite"
CHUNK = 1 << 20


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format, *arguments):
        pass

    def do_GET(self):
        self._route()

    def do_HEAD(self):
        self._route()

    def do_POST(self):
        self._route()

    def do_PUT(self):
        self._route()

    def _route(self) -> None:
        path = self.path.partition("?")[0]
        call = f"{self.command} {path}"
        self.hub.seen.append(call)
        self.cut = False
        for fault in self.hub.faults:
            if fault.times and re.search(fault.pattern, call):
                fault.times -= 1
                if fault.status:
                    self._drain()
                    return self._json({"error": fault.message}, fault.status, fault.headers)
                self.cut = True
        for pattern, answer in ROUTES:
            if found := re.fullmatch(pattern, call):
                return answer(self, *map(unquote, found.groups()))
        self._drain()
        return self._json({"error": f"no answer to {call}"}, 501)

    def _drain(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, values: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(values).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str = "") -> None:
        return self._json({"error": "refused"}, status, {"X-Error-Code": code} if code else {})

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _open(self, name: str, write: bool = False) -> Repo | None:
        """The repository, or None after the refusal was sent."""
        repo, known = self.hub.repos.get(name), self._token() in (TOKEN, READER)
        if repo is None or (repo.private and not known):
            self._refuse(404 if known else 401, "RepoNotFound")
        elif repo.gated:
            self._refuse(403, "GatedRepo")
        elif write and self._token() != TOKEN:
            self._refuse(403)
        else:
            return repo
        return None

    def create(self) -> None:
        asked = json.loads(self._drain())
        name = f"{asked['organization']}/{asked['name']}"
        if self._token() not in (TOKEN, READER):
            return self._json({"error": f"Invalid token {self._token()}"}, 401)
        if self._token() == READER or asked["organization"] == "others":
            return self._refuse(403)
        status = 409 if name in self.hub.repos else 200
        if status == 200:
            self.hub.add(name, {}, private=asked.get("visibility") == "private")
        return self._json({"url": f"{self.hub.url}/{name}"}, status)

    def branch(self, name: str, branch: str) -> None:
        self._drain()
        if repo := self._open(name, write=True):
            if branch in repo.heads:
                return self._refuse(409)
            repo.heads[branch] = repo.heads["main"]
            return self._json({})
        return None

    def info(self, name: str, revision: str = "main") -> None:
        if repo := self._open(name):
            if (commit := repo.resolve(revision)) is None:
                return self._refuse(404, "RevisionNotFound")
            if repo.moves:
                repo.heads["main"] = repo.moves.pop(0)
            card = {"license": repo.licence} if repo.licence else None
            return self._json({"id": name, "sha": commit, "private": repo.private, "siblings": [], "cardData": card})
        return None

    def tree(self, name: str, revision: str) -> None:
        if repo := self._open(name):
            files = repo.commits[repo.resolve(revision) or ""]
            return self._json([self.hub.entry(path, kept) for path, kept in files.items()])
        return None

    def validate(self) -> None:
        content = json.loads(self._drain())["content"]
        if "license: forbidden" in content:
            return self._json({"errors": [{"message": '"license" must be one of these'}], "warnings": []}, 400)
        return self._json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        asked = json.loads(self._drain())["files"]
        if repo := self._open(name, write=True):
            there = repo.commits[repo.resolve(revision) or ""]
            return self._json({"files": [self.hub.upload_mode(there, file["path"]) for file in asked]})
        return None

    def batch(self, name: str) -> None:
        asked = json.loads(self._drain())["objects"]
        if self._open(name, write=True):
            return self._json({"transfer": "basic", "objects": [self.hub.upload(**item) for item in asked]})
        return None

    def put(self, oid: str, part: str = "") -> None:
        left = int(self.headers["Content-Length"])
        if self.cut:
            self.rfile.read(left // 2)
            self.hub.received[oid] += left // 2
            self.close_connection = True
            return None
        place = self.hub.store / f"{oid}.{part or '1'}.part"
        with place.open("wb") as file:
            while left:
                data = self.rfile.read(min(CHUNK, left))
                if not data:
                    self.close_connection = True
                    return None
                left -= len(data)
                self.hub.received[oid] += len(data)
                file.write(data)
                threading.Event().wait(self.hub.wait)
        if not part:
            self._assemble(oid, 1)
        return self._json({}, 200, {"ETag": f'"{oid[:8]}{part}"'})

    def complete(self) -> None:
        asked = json.loads(self._drain())
        self._assemble(asked["oid"], len(asked["parts"]))
        return self._json({})

    def _assemble(self, oid: str, count: int) -> None:
        whole, digest = self.hub.store / f"{oid}.whole", sha256()
        with whole.open("wb") as file:
            for number in range(1, count + 1):
                part = self.hub.store / f"{oid}.{number}.part"
                with part.open("rb") as source:
                    while data := source.read(CHUNK):
                        digest.update(data)
                        file.write(data)
                part.unlink()
        assert digest.hexdigest() == oid
        whole.rename(self.hub.store / oid)

    def verify(self) -> None:
        asked = json.loads(self._drain())
        found = self.hub.store / asked["oid"]
        return self._json({}, 200 if found.is_file() and found.stat().st_size == asked["size"] else 404)

    def commit(self, name: str, branch: str) -> None:
        lines = [json.loads(line) for line in self._drain().splitlines()]
        if repo := self._open(name, write=True):
            header = lines[0]["value"]
            if header.get("parentCommit") not in (None, repo.heads[branch]):
                return self._refuse(412)
            files = dict(repo.commits[repo.heads[branch]])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    assert (self.hub.store / value["oid"]).is_file()
                    files[value["path"]] = value["oid"]
                else:
                    del files[value["path"]]
            made = repo.commit(branch, files)
            repo.messages.append(header["summary"])
            return self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{made}", "commitOid": made})
        return None

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._open(name)
        if repo is None:
            return None
        commit = repo.resolve(revision)
        if commit is None or path not in repo.commits[commit]:
            return self._refuse(404, "EntryNotFound" if commit else "RevisionNotFound")
        kept = repo.commits[commit][path]
        etag = kept if isinstance(kept, str) else git_hash(kept)
        size = (self.hub.store / kept).stat().st_size if isinstance(kept, str) else len(kept)
        told = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(told[1]) if told else 0
        self.send_response(206 if told else 200)
        self.send_header("Content-Length", str(size - start))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        if told:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        if self.command == "GET":
            self._give(path, kept, start, size // 2 if self.cut else size)
        return None

    def _give(self, path: str, kept: bytes | str, start: int, end: int) -> None:
        while start < end:
            if isinstance(kept, str):
                with (self.hub.store / kept).open("rb") as file:
                    file.seek(start)
                    data = file.read(min(CHUNK, end - start))
            else:
                data = kept[start:end]
            threading.Event().wait(self.hub.wait)
            self.wfile.write(data)
            self.hub.sent[path] += len(data)
            start += len(data)
        self.close_connection |= self.cut


MODEL = "/api/models/([^/]+/[^/]+)"
ROUTES = [
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.validate),
    (f"POST {MODEL}/branch/([^/]+)", _Handler.branch),
    (f"POST {MODEL}/preupload/([^/]+)", _Handler.preupload),
    (f"POST {MODEL}/commit/([^/]+)", _Handler.commit),
    (f"GET {MODEL}/tree/([^/]+)", _Handler.tree),
    (f"GET {MODEL}/revision/([^/]+)", _Handler.info),
    (f"GET {MODEL}", _Handler.info),
    ("POST /([^/]+/[^/]+).git/info/lfs/objects/batch", _Handler.batch),
    ("PUT /lfs/([0-9a-f]+)/([0-9]+)", _Handler.put),
    ("PUT /lfs/([0-9a-f]+)", _Handler.put),
    ("POST /complete", _Handler.complete),
    ("POST /verify", _Handler.verify),
    ("(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.resolve),
]


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


@contextmanager
def serve(store: Path) -> Iterator[Hub]:
    """A Hub without repositories that keeps large files in `store`."""
    hub = Hub(store)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
