"""An S3 server on loopback, and what lies in it."""

import socket
from importlib.util import find_spec
from pathlib import Path

import pytest

from ensemble.data import storage

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


needs_s3 = pytest.mark.skipif(
    find_spec("s3fs") is None or find_spec("moto") is None, reason="needs s3fs and moto[server,s3]"
)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def upload(file, url):
    storage.filesystem(url).pipe_file(url, Path(file).read_bytes())
    return url


def upload_folder(folder, url):
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            upload(file, f"{url}/{file.relative_to(folder).as_posix()}")
    return url
