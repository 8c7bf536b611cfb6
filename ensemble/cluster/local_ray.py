"""A Ray started on this machine for one job: no other user reaches it, and nothing of it stays. Imports it late."""

import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ensemble.core.errors import UnavailableError, error_line
from ensemble.core.parallel import available_cores

OBJECT_STORE_BYTES = 256 << 20  # bytes: what is on its way is small, and the rest goes to disk
FOLDER_PREFIX = "manyeyes-ray-"  # and some characters, in the folder for temporary files
LOCK_FILE = "held"  # in the folder, by the process whose it is
MAX_TEMPDIR_CHARACTERS = 8  # characters of the folder for temporary files, before /tmp is taken
LOCK_GRACE_SECONDS = 60.0  # seconds until a folder's lock is surely taken
LOG_HINTS = re.compile(r"\s*(Last 0 lines|Please check).*", re.DOTALL)  # and where: in a folder that is gone by then
REMEDY = "name a cluster that runs with --address HOST:PORT"


@contextmanager
def private_token() -> Iterator[None]:
    """A token for a Ray that is started meanwhile, so that no other user reaches it; Ray would keep one at home.

    Ray looks for it as it is imported.
    """
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def private_folder() -> Iterator[Path]:
    """For logs and what does not fit into memory, this user's alone; short, since a socket has 107 bytes for its path.

    Those of processes that were killed are removed.
    """
    base = tempfile.gettempdir() if len(tempfile.gettempdir()) <= MAX_TEMPDIR_CHARACTERS else "/tmp"  # noqa: S108
    for left in Path(base).glob(f"{FOLDER_PREFIX}*"):
        _remove_unlocked(left)
    found = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=base))
    try:
        with FileLock(found / LOCK_FILE):
            yield found
    finally:
        shutil.rmtree(found, ignore_errors=True)


def start(ray: Any, folder: Path) -> None:
    """Start Ray on this machine's cores, and connect; UnavailableError, saying why, where it cannot."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # as without Ray: its 15 gives way to all else that runs here
    try:
        with silence_stderr():
            ray.init(
                "local",
                num_cpus=available_cores(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(folder / "r"),  # Ray opens its own folder to all users: one that others cannot come to
            )
    except Exception as error:  # of many kinds: no memory, no ports, a path that is too long
        why = error_line(LOG_HINTS.sub("", str(error)))
        raise UnavailableError(f"Ray could not be started here: {why}; {REMEDY}") from None


@contextmanager
def silence_stderr() -> Iterator[None]:
    """Nothing on standard error meanwhile, below Python too: Ray says there that it was told to be quiet."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _remove_unlocked(left: Path) -> None:
    """Remove a folder that no process holds, in whatever container; another user's cannot be, and stays."""
    with suppress(OSError, Timeout):
        if time.time() - left.stat().st_mtime > LOCK_GRACE_SECONDS:
            with FileLock(left / LOCK_FILE, timeout=0):
                shutil.rmtree(left, ignore_errors=True)
