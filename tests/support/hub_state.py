"""What the loopback Hub of `hub_api` holds: repositories, faults on request, and what it was asked and sent."""

import math
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatch
from hashlib import sha1, sha256
from pathlib import Path

LFS_SUFFIXES = (".onnx", ".safetensors", ".parquet", ".bin")
PART = 4 << 20  # bytes of a part, for files larger than that


@dataclass
class Fault:
    """Requests whose "METHOD path" matches are answered by `status`, or, at 0, cut off in mid-body; `times` of them."""

    pattern: str
    status: int = 0
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""


@dataclass
class Repo:
    private: bool = False
    heads: dict[str, str] = field(default_factory=dict)  # branch -> commit
    commits: dict[str, dict[str, bytes | str]] = field(default_factory=dict)  # files: content, or SHA-256 if large
    messages: list[str] = field(default_factory=list)
    gated: bool = False
    moves: list[str] = field(default_factory=list)  # commits that main moves on to, one after each look at it
    licence: str | None = None

    def commit(self, branch: str, files: dict[str, bytes | str]) -> str:
        name = sha1(repr((len(self.commits), sorted(files))).encode(), usedforsecurity=False).hexdigest()
        self.commits[name], self.heads[branch] = files, name
        return name

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.heads.get(revision)


@dataclass
class Hub:
    """received: bytes of large files by SHA-256; sent: bytes of files by path; seen: "METHOD path" of each request."""

    store: Path
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    received: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    wait: float = 0.0  # seconds before each piece of a large file is taken or given

    def add(self, name: str, files: dict[str, bytes], **more) -> Repo:
        repo = self.repos[name] = Repo(**more)
        repo.commit("main", {".gitattributes": b"", **{path: self.keep(path, data) for path, data in files.items()}})
        return repo

    def keep(self, path: str, data: bytes) -> bytes | str:
        if not path.endswith(LFS_SUFFIXES):
            return data
        digest = sha256(data).hexdigest()
        (self.store / digest).write_bytes(data)
        return digest

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        found = self.repos[name].commits[self.repos[name].heads[branch]]
        return {
            path: (self.store / kept).read_bytes() if isinstance(kept, str) else kept for path, kept in found.items()
        }

    def entry(self, path: str, kept: bytes | str) -> dict[str, object]:
        """As a repository's tree lists a file."""
        if isinstance(kept, str):
            size = (self.store / kept).stat().st_size
            lfs = {"oid": kept, "size": size, "pointerSize": 130}
            return {"type": "file", "path": path, "size": size, "oid": kept[:40], "lfs": lfs}
        return {"type": "file", "path": path, "size": len(kept), "oid": git_hash(kept)}

    def upload_mode(self, there: dict[str, bytes | str], path: str) -> dict[str, object]:
        """How a file is to be sent, and which content is there."""
        mode, kept = "lfs" if path.endswith(LFS_SUFFIXES) else "regular", there.get(path)
        oid = git_hash(kept) if isinstance(kept, bytes) else kept
        patterns = there.get(".gitignore", b"")
        assert isinstance(patterns, bytes)
        ignored = any(fnmatch(path, pattern) for pattern in patterns.decode().split())
        return {"path": path, "uploadMode": mode, "shouldIgnore": ignored, "oid": oid}

    def upload(self, oid: str, size: int) -> dict[str, object]:
        """Where a large file is to be sent; nowhere if it is here."""
        if (self.store / oid).is_file():
            return {"oid": oid, "size": size}
        upload: dict[str, object] = {"href": f"{self.url}/lfs/{oid}"}
        if size > PART:
            count = math.ceil(size / PART)
            parts = {f"{number:05}": f"{self.url}/lfs/{oid}/{number}" for number in range(1, count + 1)}
            upload = {"href": f"{self.url}/complete", "header": {"chunk_size": str(PART), **parts}}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{self.url}/verify"}}}


def git_hash(data: bytes) -> str:
    return sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
