"""Answers that were measured on this machine, such as the fastest setting: small JSON files in the user's cache."""

from contextlib import suppress

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError


def get(file: str, key: str) -> object:
    """The value stored under this key in a file of the cache; None where there is none."""
    return _read(file).get(key)


def put(file: str, key: str, value: object) -> None:
    """Store a JSON value under this key; a cache that cannot be written is no error."""
    with suppress(ArtifactError):
        artifacts.write_json(artifacts.cache_path() / file, {**_read(file), key: value})


def _read(file: str) -> dict[str, object]:
    with suppress(ArtifactError):  # a lost or damaged cache costs a new measurement
        return artifacts.read_json(artifacts.cache_path() / file, "")
    return {}
