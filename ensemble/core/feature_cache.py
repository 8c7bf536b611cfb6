"""A cache of image features in SQLite, in the user's cache folder, so that no file is embedded twice."""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError


def default_path() -> Path:
    """The file of features in the user's cache folder."""
    return artifacts.cache_path() / "features.sqlite"


@contextmanager
def open_cache(path: Path) -> Iterator[sqlite3.Connection]:
    """The cache, made if it is not there; ArtifactError says what to do with a damaged one."""
    artifacts.ensure_folder(path.parent)
    try:
        with closing(sqlite3.connect(path, timeout=60)) as connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS features (embedder TEXT, key BLOB, value BLOB, PRIMARY KEY (embedder, key))"
            )
            yield connection
    except sqlite3.Error as error:
        raise ArtifactError(
            f"the cache {path} cannot be used ({error}); remove it, or name another folder with MANYEYES_CACHE"
        ) from None


def cached_keys(cache: sqlite3.Connection, embedder: str) -> set[bytes]:
    """SHA-256 of every file whose features of this embedder are in the cache."""
    return {key for (key,) in cache.execute("SELECT key FROM features WHERE embedder = ?", (embedder,))}


def read(cache: sqlite3.Connection, embedder: str, keys: Sequence[bytes]) -> list[bytes]:
    """The values of known keys, in their order."""
    query = "SELECT value FROM features WHERE embedder = ? AND key = ?"
    return [cache.execute(query, (embedder, key)).fetchone()[0] for key in keys]


def write(cache: sqlite3.Connection, embedder: str, values: Mapping[bytes, bytes]) -> None:
    """Store values under their files' SHA-256; all of them or none."""
    with cache:
        rows = [(embedder, key, value) for key, value in values.items()]
        cache.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?)", rows)
